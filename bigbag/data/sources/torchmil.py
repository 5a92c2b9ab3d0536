"""The folder layout of torchmil's processed data sets, CAMELYON16 among them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.bags import Bag, Label
from bigbag.data.sources.base import SourceEntry


class TorchmilFolder:
    r"""Bags in torchmil's layout (a :class:`bigbag.data.sources.Source`)::

        root/splits.csv                                                  columns bag_name, split
        root/patches_512/features/features_UNI/<bag>.npy                 (N, P)
        root/patches_512/labels/<bag>.npy                                the bag's label, one number or (K,) of them
        root/patches_512/patch_labels/<bag>.npy                          (N,) or (N, 1), optional
        root/patches_512/coords/<bag>.npy                                (N, 2) in pixels, optional

    Coordinates become places on a lattice of patches, ``floor(coords / patch_size)`` less their smallest per axis.
    A bag without instance labels has none; torchmil would mark all of them unknown.

    Args:
        root: folder of ``splits.csv``.
        features: name of the extractor, ``UNI`` or ``resnet50_bt`` in the published set.
        patch_size: side of a patch in the pixels that ``coords`` are in.

    Raises:
        ValueError: a file or column that is missing, a bag in two splits, a bag without a label.
    """

    patch_shape: tuple[int, int] | None = None

    def __init__(self, root: str, features: str = "UNI", patch_size: int = 512) -> None:
        self.root = Path(root)
        self.features = features
        self.patch_size = patch_size
        self.folder = self.root / f"patches_{patch_size}"
        self._features_folder = self.folder / "features" / f"features_{features}"
        if not self._features_folder.is_dir():
            raise ValueError(
                f"{self._features_folder}: no such folder, expected the features there; check root, features and "
                "patch_size of the source"
            )

    @cached_property
    def _splits(self) -> dict[str, str]:
        path = self.root / "splits.csv"
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a CSV with the columns bag_name and split")
        splits: dict[str, str] = {}
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"bag_name", "split"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: columns {reader.fieldnames}, expected bag_name and split")
            for row in reader:
                name, split = (row["bag_name"] or "").strip(), (row["split"] or "").strip()
                if not name or not split:
                    raise ValueError(f"{path}, line {reader.line_num}: bag_name or split is empty")
                if splits.setdefault(name, split) != split:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: bag {name!r} is in {splits[name]} and in {split}"
                    )
        return splits

    @cached_property
    def left_out(self) -> list[dict[str, str]]:
        """Bags of ``splits.csv`` without features, and features without a line in it."""
        present = {path.name.removesuffix(".npy") for path in self._features_folder.glob("*.npy")}
        missing = [
            {"name": name, "reason": f"in splits.csv, but {self._file('features', name)} does not exist"}
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
        y_inst = self._read("patch_labels", entry.name)
        coords = self._read("coords", entry.name)
        x = self._read("features", entry.name)
        assert x is not None
        return Bag(
            x=x,
            y=entry.label,
            key=entry.name,
            coords=None if coords is None or not len(coords) else to_lattice(coords, self.patch_size),
            y_inst=None if y_inst is None else _to_integers(y_inst, self._file("patch_labels", entry.name)),
        )

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
        return (self._features_folder if kind == "features" else self.folder / kind) / f"{name}.npy"

    def _read(self, kind: str, name: str) -> np.ndarray | None:
        path = self._file(kind, name)
        return read_npy(path) if path.exists() else None

    def _label(self, name: str) -> Label:
        path = self._file("labels", name)
        value = self._read("labels", name)
        if value is None:
            raise ValueError(f"bag {name!r}: label is missing, expected it in {path}")
        if value.size == 0 or value.size != max(value.shape, default=1) or value.dtype.kind not in "biuf":
            raise ValueError(f"bag {name!r}: {path} holds {value.shape} of {value.dtype}, expected numbers in a row")
        numbers = [int(v) if float(v).is_integer() else float(v) for v in value.reshape(-1).tolist()]
        return numbers[0] if len(numbers) == 1 else numbers


def read_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file of plain numbers.

    Raises:
        ValueError: not an ``.npy`` file, truncated, or an array of Python objects, which would have to be unpickled.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable .npy file of numbers ({error}): write it again") from None


def to_lattice(coords: np.ndarray, patch_size: float) -> np.ndarray:
    """``floor(coords / patch_size)``, less its smallest value per axis: ``(N, c)`` int32 places on a lattice."""
    places = np.floor(coords / patch_size)
    return (places - places.min(axis=0)).astype(np.int32)


def _to_integers(values: np.ndarray, path: Path) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != 1 or not np.array_equal(flat, np.rint(flat)):
        raise ValueError(f"{path}: {values.shape} of {values.dtype}, expected one integer label per instance")
    return flat[:, 0].astype(np.int64)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
