"""The nuclei of one whole slide of ovarian cancer (HGSC), as one bag or cut into square windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry

_TARGETS = ("macrophage_cell", "macrophage_nucleus")
_SPLITS = ("train", "val", "test")


class HGSC:
    """Segmented nuclei of one slide, 592,349 of them (a :class:`bigbag.data.sources.Source`).

    An instance is a nucleus: ``x (N, 7)`` float32, area, perimeter, major and minor axis, orientation, solidity and
    circularity, in pixels and radians; ``coords (N, 2)`` int32, its centroid in level-0 pixels; ``y_inst`` 1 where it
    belongs to a macrophage. A bag is positive where it holds one: the whole slide is one positive bag, and of the 2,153
    windows of 1,024 pixels with at least 20 nuclei 1,375 are.

    One patient, labelled by a segmentation model: for tests of large bags; it says nothing of how a model generalises.
    Windows of one block of ``block`` windows squared share a split, so that neighbours seldom stand in two.

    The slide comes with the package histolytics 0.3.0 (BSD-3).

    Args:
        root: folder of ``hgsc_points.npz``: ``xy``, ``shape``, ``cls`` and ``classes``.
        window: side of the windows in level-0 pixels; None: the slide is one bag, without a split.
        min_instances: smaller windows are left out.
        origin: a corner of the lattice of windows, in level-0 pixels. The file's centroids are rounded to pixels; where
            they had not been, origin (0, 0) gave 2,154 windows and 1,374 positives, as here (-3, 0) does.
        block: side of the blocks that share a split, in windows.
        fractions: shares of train, val and test of the blocks.
        seed: seed of the split.

    Raises:
        ValueError: a file that is missing or lacks an array, a window of no pixels, or no window left.
    """

    patch_shape: tuple[int, int] | None = None

    def __init__(
        self,
        root: str | Path,
        window: int | None = None,
        min_instances: int = 20,
        origin: tuple[int, int] = (0, 0),
        block: int = 8,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        seed: int = 0,
    ) -> None:
        if window is not None and (window < 1 or block < 1):
            raise ValueError(f"window is {window} and block {block}, expected 1 or more")
        if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"fractions is {fractions}, expected shares of train, val and test that add up to 1")
        self.path = Path(root, "hgsc_points.npz")
        arrays = _read(self.path)
        self._xy, self._x = arrays["xy"], arrays["shape"].astype(np.float32)
        self._y = np.isin(arrays["cls"], np.flatnonzero(np.isin(arrays["classes"], _TARGETS))).astype(np.int8)
        self._settings = {
            "window": window,
            "min_instances": min_instances,
            "origin": list(origin),
            "block": block,
            "fractions": list(fractions),
            "seed": seed,
        }
        self._rows: dict[str, np.ndarray] = {}
        self._entries: list[SourceEntry] = []
        if window is None:
            self._add("hgsc", np.arange(len(self._xy)), None)
        else:
            self._cut(window, min_instances, origin, block, fractions, seed)
        if not self._entries:
            raise ValueError(f"no window of {window} pixels has {min_instances} nuclei; lower min_instances")

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def load(self, entry: SourceEntry) -> Bag:
        rows = self._rows[entry.name]
        return Bag(self._x[rows], y=entry.label, key=entry.name, coords=self._xy[rows], y_inst=self._y[rows])

    def description(self) -> dict[str, Any]:
        """The constructor's arguments and a digest of the file's arrays."""
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (self._xy, self._x, self._y)))
        return {"name": "hgsc", **self._settings, "sha256": digest.hexdigest()}

    def _cut(
        self,
        window: int,
        min_instances: int,
        origin: tuple[int, int],
        block: int,
        fractions: tuple[float, float, float],
        seed: int,
    ) -> None:
        """One bag for each window with enough nuclei, named by its column and row."""
        cells = np.floor_divide(self._xy.astype(np.int64) - origin, window)
        found, member, sizes = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(member.reshape(-1), kind="stable")
        blocks, block_of = np.unique(found // block, axis=0, return_inverse=True)
        shuffled = np.random.default_rng(seed).permutation(len(blocks))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(blocks))
        split_of_block = np.searchsorted(cuts, shuffled, side="right")
        for cell, rows, at in zip(found.tolist(), np.split(order, np.cumsum(sizes)[:-1]), block_of.reshape(-1)):
            if len(rows) >= min_instances:
                self._add(f"hgsc-{cell[0]}-{cell[1]}", rows, _SPLITS[split_of_block[at]])

    def _add(self, name: str, rows: np.ndarray, split: str | None) -> None:
        self._rows[name] = rows
        self._entries.append(SourceEntry(name, split, int(self._y[rows].any()), path=str(self.path)))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check root of the source")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("xy", "shape", "cls", "classes")}
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}; expected an .npz of xy, shape, cls and classes") from None
