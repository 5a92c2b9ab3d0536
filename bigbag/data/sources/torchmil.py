"""The folder layout of torchmil's processed data sets, CAMELYON16 among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag, Label
from bigbag.data.lattice import settled_stride
from bigbag.data.sources.arrays import read_file
from bigbag.data.sources.base import SourceEntry
from bigbag.data.sources.h5 import need_dataset, open_h5, read_dataset
from bigbag.data.table import read_table


class TorchmilFolder:
    r"""Bags in torchmil's layout (a :class:`bigbag.data.sources.Source`)::

        root/splits.csv                                                  columns bag_name, split; optional
        root/patches_512/features/features_UNI/<bag>.npy                 (N, P)
        root/patches_512/labels/<bag>.npy                                the bag's label, one number or (K,) of them
        root/patches_512/patch_labels/<bag>.npy                          (N,) or (N, 1), optional
        root/patches_512/coords/<bag>.npy                                (N, 2) in pixels, optional

    The folders ``features``, ``labels``, ``inst_labels`` and ``coords`` may also lie in ``root`` itself, and bags may
    be ``.h5`` files with the keys 'features', 'labels' and 'coords'; instance labels are ``.npy`` then, too.

    Coordinates become places on a lattice of patches, ``floor(coords / patch_size)`` less their smallest per axis;
    where no patch size is known, the stride is measured. A bag without instance labels has none; torchmil would mark
    all of them unknown.

    Args:
        root: folder of ``splits.csv``.
        features: name of the extractor, ``UNI`` or ``resnet50_bt`` in the published set; None: the only one.
        patch_size: side of a patch in the pixels that ``coords`` are in; None: that of the only ``patches_<size>``.

    Raises:
        ValueError: a file or column that is missing, a bag in two splits, a bag without a label.
    """

    patch_shape: tuple[int, int] | None = None

    def __init__(self, root: str, features: str | None = None, patch_size: int | None = None) -> None:
        self.root = Path(root)
        self.folder, self.patch_size = _patches_folder(self.root, patch_size)
        self._features_folder = _features_folder(self.folder, features)
        self.features = self._features_folder.name.removeprefix("features_")

    @classmethod
    def detect(cls, root: Path) -> str | None:
        for folder in (*sorted(root.glob("patches_*")), root) if root.is_dir() else ():
            if (folder / "features").is_dir() and (folder / "labels").is_dir():
                place = folder.relative_to(root.parent)
                return f"{place}/features and {place}/labels are there"
        return None

    @cached_property
    def _splits(self) -> dict[str, str | None]:
        path = self.root / "splits.csv"
        if not path.is_file():
            return dict.fromkeys(sorted(self._present))
        splits: dict[str, str | None] = {}
        for line, name, split in read_split_rows(path):
            if splits.setdefault(name, split) != split:
                raise ValueError(f"{path}, line {line}: bag {name!r} is in {splits[name]} and in {split}")
        return splits

    @cached_property
    def _present(self) -> dict[str, Path]:
        """Bags with features, and their files."""
        found = [*self._features_folder.glob("*.npy"), *self._features_folder.glob("*.h5")]
        return {path.name.removesuffix(path.suffix): path for path in found}

    @cached_property
    def left_out(self) -> list[dict[str, str]]:
        """Bags of ``splits.csv`` without features, and features without a line in it."""
        present = self._present.keys()
        missing = [
            {"name": name, "reason": f"in splits.csv, but {self._features_folder / name}.npy does not exist"}
            for name in self._splits
            if name not in present
        ]
        unlisted = sorted(present - self._splits.keys())
        return missing + [{"name": name, "reason": "has features, but no line in splits.csv"} for name in unlisted]

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    @cached_property
    def _entries(self) -> tuple[SourceEntry, ...]:
        skipped = {item["name"] for item in self.left_out}
        return tuple(
            SourceEntry(name, split, self._label(name), path=str(self._file("features", name)))
            for name, split in self._splits.items()
            if name not in skipped
        )

    def load(self, entry: SourceEntry) -> Bag:
        y_inst, coords, x = (self._read(kind, entry.name) for kind in ("patch_labels", "coords", "features"))
        assert x is not None
        bag = Bag(
            x=x,
            y=entry.label,
            key=entry.name,
            y_inst=None if y_inst is None else to_inst_labels(y_inst, str(self._file("patch_labels", entry.name))),
        )
        if coords is None or not len(coords):
            return bag
        if self.patch_size is None:
            return replace(bag, coords=coords, stride=settled_stride(coords, None))
        places = to_lattice(coords, self.patch_size)
        return replace(bag, coords=places, positions=coords, stride=float(self.patch_size))

    def description(self) -> dict[str, Any]:
        """The arguments (without the place of the folder) and a digest of names, splits, labels and file sizes."""
        digest = hashlib.sha256()
        for entry in self.entries():
            sizes = [_size_of(self._file(kind, entry.name)) for kind in ("features", "patch_labels", "coords")]
            digest.update(json.dumps([entry.name, entry.split, entry.label, sizes]).encode())
        return {
            "name": "torchmil_folder",
            "features": self.features,
            "patch_size": self.patch_size,
            "files_sha256": digest.hexdigest(),
        }

    def _file(self, kind: str, name: str) -> Path:
        if kind == "features":
            return self._present[name]
        folder = self.folder / kind
        if kind == "patch_labels" and not folder.is_dir():
            folder = self.folder / "inst_labels"
        h5 = folder / f"{name}.h5"
        return h5 if h5.exists() else folder / f"{name}.npy"

    def _read(self, kind: str, name: str) -> np.ndarray | None:
        path = self._file(kind, name)
        if not path.exists():
            return None
        if path.suffix == ".npy":
            return read_npy(path)
        with open_h5(path) as file:
            return read_dataset(need_dataset(file, (kind,)))

    def _label(self, name: str) -> Label:
        path = self._file("labels", name)
        value = self._read("labels", name)
        if value is None:
            raise ValueError(f"bag {name!r}: label is missing, expected it in {path}")
        return to_label(value, f"bag {name!r}: {path}")


def _patches_folder(root: Path, patch_size: int | None) -> tuple[Path, int | None]:
    """The folder of features, labels and coordinates, and the patch size."""
    folders = {int(path.name[8:]): path for path in root.glob("patches_*") if path.is_dir() and path.name[8:].isdigit()}
    if not folders and (root / "features").is_dir():
        return root, patch_size
    if patch_size is None and len(folders) == 1:
        patch_size = next(iter(folders))
    if patch_size not in folders:
        found = ", ".join(path.name for path in folders.values()) or "neither patches_<size> nor features"
        raise ValueError(
            f"{root / f'patches_{patch_size or 512}'}: no such folder, expected the features there; {root} holds "
            f"{found}: check root and patch_size of the source"
        )
    return folders[patch_size], patch_size


def _features_folder(folder: Path, features: str | None) -> Path:
    """The folder of one extractor's features."""
    whole = folder / "features"
    found = sorted(path for path in whole.glob("features_*") if path.is_dir())
    if features is not None and (wanted := whole / f"features_{features}") in found:
        return wanted
    if features is None and len(found) == 1:
        return found[0]
    if not found and whole.is_dir() and features is None:
        return whole
    there = ", ".join(path.name.removeprefix("features_") for path in found) or "none"
    raise ValueError(
        f"{whole / f'features_{features}' if features else whole}: no such folder, expected the features there; check "
        f"root, features (there are: {there}) and patch_size of the source"
    )


def read_split_rows(path: Path) -> list[tuple[int, str, str]]:
    """The lines of a ``splits.csv``: their number, ``bag_name`` and ``split``.

    Raises:
        ValueError: no such file, a column that is missing, or an empty cell.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a CSV with the columns bag_name and split")
    table = read_table(path)
    if not {"bag_name", "split"} <= set(table.columns):
        raise ValueError(f"{path}: columns {', '.join(table.columns)}, expected bag_name and split")
    for line, row in table:
        if not row["bag_name"] or not row["split"]:
            raise ValueError(f"{path}, line {line}: bag_name or split is empty")
    return [(line, row["bag_name"], row["split"]) for line, row in table]


def read_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file of plain numbers.

    Raises:
        ValueError: not an ``.npy`` file, truncated, or an array of Python objects, which would have to be unpickled.
    """
    return np.array(read_file(path).arrays[""])


def to_lattice(coords: np.ndarray, patch_size: float) -> np.ndarray:
    """``floor(coords / patch_size)``, less its smallest value per axis: ``(N, c)`` int32 places on a lattice."""
    places = np.floor(coords / patch_size)
    return (places - places.min(axis=0)).astype(np.int32)


def to_label(values: np.ndarray, where: str) -> Label:
    """A label from a file: one number, or several in a row; whole numbers become integers.

    Raises:
        ValueError: no numbers, or a table of them.
    """
    if values.size == 0 or values.size != max(values.shape, default=1) or values.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds {values.shape} of {values.dtype}, expected numbers in a row")
    numbers = [int(v) if float(v).is_integer() else float(v) for v in values.reshape(-1).tolist()]
    return numbers[0] if len(numbers) == 1 else numbers


def to_inst_labels(values: np.ndarray, where: str) -> np.ndarray:
    """Instance labels ``(N,)`` int64 from an array ``(N,)``, ``(N, 1)`` or ``(1, N)`` of whole numbers.

    Raises:
        ValueError: anything else.
    """
    flat = values.reshape(-1) if values.dtype.kind in "biuf" else np.full(1, np.nan)
    with np.errstate(invalid="ignore"):
        whole = flat.astype(np.int64)
    if values.size not in values.shape or not np.array_equal(whole, flat):
        raise ValueError(f"{where} holds {values.shape} of {values.dtype}, expected one integer for each instance")
    return whole


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
