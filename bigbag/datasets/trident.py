"""Whole-slide images as TRIDENT leaves them: HDF5 files of features and of level-0 coordinates."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bigbag.data.sources.h5 import attributes_of, need_dataset, open_h5
from bigbag.data.sources.trident import level0_stride
from bigbag.data.table import read_table
from bigbag.datasets.cache import DEFAULT_CACHE_BYTES
from bigbag.datasets.processed import BAG_KEYS, PathLike
from bigbag.datasets.slides import PatchLattice


class TridentWSIDataset(PatchLattice):
    r"""Slides of a TRIDENT job, ``<job>/<mag>x_<size>px_<overlap>px_overlap``::

        base_path/features_<feature_extractor>/<slide>.h5                data set features (N, P)
        base_path/patches/<slide>_patches.h5                             data set coords (N, 2), in level-0 pixels
        labels_path/<slide>.h5, data set labels;  or labels_path, a CSV of the slides' names and labels
        patch_labels_path/<slide>.h5                                     data set patch_labels (N,)

    Coordinates become places on a lattice, ``floor(coords / stride)``, and ``dist_thr`` counts its steps. The stride is
    that of the file's attributes, ``patch_size_level0`` less the overlap, so that a slide scanned at 40x and patched at
    20x has neighbours; ``patch_size`` serves files without them. torchmil divides by ``patch_size`` always.

    The label of a slide in a CSV is found by its name, with or without an extension. A slide that the CSV lacks is an
    error; torchmil gives it an empty label.

    Args:
        base_path: folder of TRIDENT's patches and features.
        labels_path: folder of the labels, or CSV.
        feature_extractor: name of the encoder.
        patch_labels_path: folder of the labels of the patches.
        wsi_names: slides to take; None takes all that have features.
        bag_keys: what a bag holds.
        patch_size: distance of adjacent patches in level-0 pixels, where files do not say.
        dist_thr: largest distance of neighbours, in steps of the lattice; None is sqrt(2), 8 neighbours.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        wsi_name_col: column of the CSV that holds names.
        wsi_label_col: column of the CSV that holds labels, which are numbers.
        cache_bytes: most bytes of bags to keep in memory.

    Raises:
        FileNotFoundError: no features of that extractor.
        ValueError: a CSV without its columns.
    """

    def __init__(
        self,
        base_path: PathLike,
        labels_path: PathLike,
        feature_extractor: str,
        patch_labels_path: PathLike | None = None,
        wsi_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        patch_size: int = 512,
        dist_thr: float | None = None,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        wsi_name_col: str | None = None,
        wsi_label_col: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.base_path, self.feature_extractor = base_path, feature_extractor
        self.patch_size = patch_size
        self.wsi_name_col, self.wsi_label_col = wsi_name_col, wsi_label_col
        self._labels_of_csv: dict[str, np.ndarray] | None = None
        super().__init__(
            features_path=os.path.join(base_path, f"features_{feature_extractor}", ""),
            labels_path=labels_path,
            inst_labels_path=patch_labels_path,
            coords_path=os.path.join(base_path, "patches", ""),
            bag_names=wsi_names,
            bag_keys=bag_keys,
            file_ext=".h5",
            dist_thr=math.sqrt(2) if dist_thr is None else dist_thr,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )

    def _load_coords(self, name: str) -> np.ndarray:
        positions, stride = self._load_positions(name)
        return np.floor(positions / stride).astype(np.int64)

    def _load_positions(self, name: str) -> tuple[np.ndarray, float]:
        path = self._path("coords_path", f"{name}_patches")
        positions = self._read_file(path, "coords")
        with open_h5(path) as file:
            stride = level0_stride(attributes_of(need_dataset(file, ("coords",))))
        return positions, self.patch_size if stride is None else stride

    def _load_inst_labels(self, name: str) -> np.ndarray:
        return self._read_file(self._path("inst_labels_path", name), "patch_labels")

    def _load_labels(self, name: str) -> np.ndarray:
        if os.path.isdir(str(self.labels_path)):
            return super()._load_labels(name)
        if self._labels_of_csv is None:
            self._labels_of_csv = self._read_csv()
        if name not in self._labels_of_csv:
            raise ValueError(
                f"bag {name!r}: no line of {self.labels_path} has this name in the column {self.wsi_name_col!r}; add "
                "one, or leave the slide out with wsi_names"
            )
        return self._labels_of_csv[name]

    def _read_csv(self) -> dict[str, np.ndarray]:
        """Labels by name, and by name without its extension where no slide is called so."""
        if self.wsi_name_col is None or self.wsi_label_col is None:
            raise ValueError(f"labels_path is the CSV {self.labels_path}: give its wsi_name_col and wsi_label_col")
        path = Path(str(self.labels_path))
        if not path.is_file():
            raise ValueError(f"labels_path is {path}, expected a folder or a CSV: there is no such file")
        labels: dict[str, np.ndarray] = {}
        table = read_table(path)
        names, values = (table.need(name, "labels_path") for name in (self.wsi_name_col, self.wsi_label_col))
        for line, row in table:
            where = f"{path}, line {line}"
            name, label = row[names], _number(row[values], where)
            if not np.array_equal(labels.setdefault(name, label), label):
                raise ValueError(f"{where}: {name!r} has the labels {labels[name]} and {label}")
        return {os.path.splitext(name)[0]: label for name, label in labels.items()} | labels

    def _file_size(self, folder: str, name: str) -> int:
        return super()._file_size(folder, f"{name}_patches" if folder == "coords_path" else name)


def _number(text: str, where: str) -> np.ndarray:
    """A label ``(1,)`` of a CSV, an integer where it is one."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: label {text!r}, expected a number") from None
    return np.array([int(value) if value.is_integer() else value])
