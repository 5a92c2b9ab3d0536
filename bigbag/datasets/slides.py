"""Whole-slide images as bags of patches in torchmil's layout: any, CAMELYON16 and PANDA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry
from bigbag.datasets.binary import BinaryClassificationDataset
from bigbag.datasets.cache import DEFAULT_CACHE_BYTES
from bigbag.datasets.partition import PartitionedDataset
from bigbag.datasets.processed import BAG_KEYS, PathLike, ProcessedMILDataset
from bigbag.graphs import grid_coords


class PatchLattice(ProcessedMILDataset):
    """Coordinates in files are pixels; those of a bag are places on a lattice of patches, from 0 on each axis.

    Packing keeps the pixels beside them, as ``positions``.
    """

    patch_size: int

    def _load_positions(self, name: str) -> tuple[np.ndarray, float]:
        """The coordinates in the file, and the distance of adjacent patches in the same unit."""
        return super()._load_coords(name), self.patch_size

    def _load_coords(self, name: str) -> np.ndarray:
        return grid_coords(*self._load_positions(name))

    def load(self, entry: SourceEntry) -> Bag:
        bag = super().load(entry)
        if bag.coords is None:
            return bag
        positions, stride = self._load_positions(entry.name)
        return replace(bag, positions=positions, stride=float(stride))


class WSIDataset(PatchLattice):
    """Whole-slide images cut into patches, one folder for each kind of data, as in :class:`ProcessedMILDataset`.

    Coordinates become ``floor((coords - min) / patch_size)``, and ``dist_thr`` counts patches.

    torchmil documents this class and left it out of its last release; its documentation gives the default of
    ``dist_thr`` in pixels, its code in patches, as here.

    Args:
        features_path: folder of the features.
        labels_path: folder of the labels of the slides.
        patch_labels_path: folder of the labels of the patches.
        coords_path: folder of the coordinates, in pixels.
        wsi_names: slides to take; None takes all of ``features_path``.
        bag_keys: what a bag holds.
        patch_size: distance of adjacent patches, in the pixels that coordinates are in.
        dist_thr: largest distance of neighbours, in patches; None is sqrt(2), 8 neighbours.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        cache_bytes: most bytes of bags to keep in memory.
    """

    def __init__(
        self,
        features_path: PathLike,
        labels_path: PathLike,
        patch_labels_path: PathLike | None = None,
        coords_path: PathLike | None = None,
        wsi_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        patch_size: int = 512,
        dist_thr: float | None = None,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.patch_size = patch_size
        super().__init__(
            features_path=features_path,
            labels_path=labels_path,
            inst_labels_path=patch_labels_path,
            coords_path=coords_path,
            bag_names=wsi_names,
            bag_keys=bag_keys,
            dist_thr=math.sqrt(2) if dist_thr is None else dist_thr,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )


class CAMELYON16MILDataset(BinaryClassificationDataset, PatchLattice, PartitionedDataset):
    r"""CAMELYON16 in torchmil's processed form: slides of lymph nodes, positive where they hold a metastasis.

    A patch is positive if more than half of its pixels are annotated, a slide if any patch is. Layout::

        root/splits.csv                                                  columns bag_name, split
        root/patches_512/features/features_UNI/<slide>.npy
        root/patches_512/{labels,patch_labels,coords}/<slide>.npy

    ``bigbag.datasets.download("CAMELYON16MILDataset", root)`` gets the files. Coordinates become places on a lattice
    of patches, of which each is joined with its 8 neighbours.

    Ehteshami Bejnordi et al., JAMA 2017.

    Args:
        root: folder of ``splits.csv``.
        features: name of the extractor: "UNI", "resnet50_bt" or "resnet50" in the published set.
        partition: "train" or "test"; None takes all.
        bag_keys: what a bag holds.
        patch_size: side of a patch, in pixels.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        verbose: show progress and warnings.
        cache_bytes: most bytes of bags to keep in memory.

    Raises:
        ValueError: no ``splits.csv``, or no such partition.
    """

    def __init__(
        self,
        root: str | Path,
        features: str = "UNI",
        partition: str | None = "train",
        bag_keys: Sequence[str] = BAG_KEYS,
        patch_size: int = 512,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        verbose: bool = False,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.patch_size = patch_size
        folder = f"{root}/patches_{patch_size}"
        features_path = f"{folder}/features/features_{features}/"
        super().__init__(
            features_path=features_path,
            labels_path=f"{folder}/labels/",
            inst_labels_path=f"{folder}/patch_labels/",
            coords_path=f"{folder}/coords/",
            bag_names=self._choose(root, partition, features_path),
            bag_keys=bag_keys,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            verbose=verbose,
            cache_bytes=cache_bytes,
        )


class PANDAMILDataset(CAMELYON16MILDataset):
    """PANDA in torchmil's processed form: biopsies of the prostate, positive where any patch holds cancer.

    Layout, arguments and labels are those of :class:`CAMELYON16MILDataset`;
    ``bigbag.datasets.download("PANDAMILDataset", root)`` gets the files.

    Bulten et al., Nature Medicine 2022.
    """
