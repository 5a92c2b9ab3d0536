"""Bags in one file per bag and kind of data: torchmil's layout, on which its other data sets build."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.bags import Bag, Label
from bigbag.data.sources.base import SourceEntry
from bigbag.data.sources.h5 import need_dataset, open_h5, read_dataset
from bigbag.data.sources.torchmil import read_npy, to_label
from bigbag.datasets.base import MILDataset, digest_of, to_bag
from bigbag.datasets.cache import DEFAULT_CACHE_BYTES, BagCache, LoadedBags
from bigbag.graphs import build_adjacency, normalize_adjacency

logger = logging.getLogger(__name__)

BAG_KEYS = ("X", "Y", "y_inst", "adj", "coords")
PathLike = str | Path


def default_read_file(file_path: PathLike, key_type: str) -> np.ndarray:
    """The array of an ``.npy`` file, or the data set ``key_type`` of an ``.h5`` file.

    Args:
        file_path: the file.
        key_type: "features", "labels", "inst_labels" or "coords".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, or a file that can't be read.
    """
    extension = os.path.splitext(file_path)[1]
    if extension not in (".npy", ".h5"):
        raise ValueError(f"unsupported extension {extension!r}, expected .npy or .h5; or pass read_file_fn")
    if not os.path.exists(file_path):
        raise FileNotFoundError("no such file")
    if extension == ".npy":
        return read_npy(Path(file_path))
    with open_h5(file_path) as file:
        return read_dataset(need_dataset(file, (key_type,)))


class ProcessedMILDataset(MILDataset):
    r"""Bags of files ``<folder>/<bag><file_ext>``, one folder for each kind of data::

        features_path     X       (N, ...)
        labels_path       Y       any shape, such as (1,)
        inst_labels_path  y_inst  (N, ...)
        coords_path       coords  (N, c)

    The graph ``adj`` joins instances at most ``dist_thr`` apart, with weights ``a_ij = 1``, or with ``adj_with_dist``
    ``exp(-||x_i - x_j|| / P)``, and with ``norm_adj`` ``a_ij / sqrt(d_i d_j)``; it is built in O(N) by
    :func:`bigbag.graphs.build_adjacency`. A bag of one instance gets a self loop.

    Methods to override: ``_load_features``, ``_load_labels``, ``_load_inst_labels``, ``_load_coords`` (arrays of a
    bag's name), ``_load_bag`` (a dict of them), ``_build_adj`` (edges) and ``_build_bag`` (a dict of tensors). Both
    dicts may hold further entries, which a subclass may name in ``bag_keys``.

    Where torchmil differs: it keeps every bag for ever, in each worker; its binary graphs are float64, which its own
    models on float32 features refuse; a missing file, or arrays of different lengths, are named here.

    Args:
        features_path: folder of the features.
        labels_path: folder of the bag labels.
        inst_labels_path: folder of the instance labels.
        coords_path: folder of the coordinates.
        bag_names: bags to take; None takes all of ``features_path``. They are sorted.
        bag_keys: what a bag holds, of "X", "Y", "y_inst", "adj" and "coords".
        file_ext: extension of the files, ".npy" or ".h5" (with the data sets features, labels, inst_labels, coords).
        dist_thr: largest distance of neighbours, in the unit of the coordinates that a bag holds: for the classes that
            turn pixels into places on a lattice of patches, in patches.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``; otherwise when they are asked for.
        read_file_fn: function of path and kind ("features", "labels", "inst_labels", "coords") that returns an array.
        verbose: show progress and warnings.
        cache_bytes: most bytes of bags to keep in memory, over all workers of a ``DataLoader``; see
            :class:`bigbag.datasets.cache.BagCache`.

    Raises:
        ValueError: a folder that ``bag_keys`` needs is not given, or holds no bag.
        FileNotFoundError: ``features_path`` does not exist.
    """

    left_out: Sequence[dict[str, str]] = ()
    _folders: Mapping[str, str] = {
        "X": "features_path",
        "Y": "labels_path",
        "y_inst": "inst_labels_path",
        "coords": "coords_path",
        "adj": "coords_path",
    }
    _optional_folders: frozenset[str] = frozenset()

    def __init__(
        self,
        features_path: PathLike | None = None,
        labels_path: PathLike | None = None,
        inst_labels_path: PathLike | None = None,
        coords_path: PathLike | None = None,
        bag_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        file_ext: str = ".npy",
        dist_thr: float = 1.5,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = False,
        read_file_fn: Callable[[str, str], np.ndarray] = default_read_file,
        verbose: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.features_path, self.labels_path = features_path, labels_path
        self.inst_labels_path, self.coords_path = inst_labels_path, coords_path
        self.bag_keys, self.file_ext = list(bag_keys), file_ext
        self.dist_thr, self.adj_with_dist, self.norm_adj = dist_thr, adj_with_dist, norm_adj
        self.load_at_init, self.read_file_fn, self.verbose = load_at_init, read_file_fn, verbose
        self._check_keys()
        self.bag_names = sorted(self._find_names() if bag_names is None else bag_names)
        self._cache = BagCache(cache_bytes)
        if load_at_init:
            self._fill_cache()

    @property
    def loaded_bags(self) -> LoadedBags:
        """Those of the bags that are in memory, by name; ``loaded_bags.clear()`` frees them, to be read again."""
        return LoadedBags(self._cache, self.bag_names)

    @loaded_bags.setter
    def loaded_bags(self, bags: Mapping[str, dict[str, Tensor]]) -> None:
        kept = dict(bags)
        self.loaded_bags.clear()
        self.loaded_bags.update(kept)

    def get_bag_labels(self) -> list[np.ndarray]:
        """The labels of the bags as they are in the files."""
        return [self._load_labels(name) for name in self.bag_names]

    def subset(self, indices: Sequence[int]) -> ProcessedMILDataset:
        """A data set of the bags ``indices``, which shares files and memory with this one."""
        part = copy.copy(self)
        part.bag_names = [self.bag_names[index] for index in indices]
        return part

    def entries(self) -> Sequence[SourceEntry]:
        return [
            SourceEntry(name, self._split(name), self._label(name), path=self._path("features_path", name))
            for name in self.bag_names
        ]

    def load(self, entry: SourceEntry) -> Bag:
        return to_bag(self._select(self._build_bag(entry.name)), entry.label, entry.name, f" ({entry.path})")

    def description(self) -> dict[str, Any]:
        """The class, the settings that change bags, and a digest of names, splits, labels and sizes of files."""
        attributes = {self._folders[key] for key in self.bag_keys if key in self._folders}
        sizes = [
            [entry.name, entry.split, entry.label, [self._file_size(kind, entry.name) for kind in sorted(attributes)]]
            for entry in self.entries()
        ]
        settings = ("bag_keys", "dist_thr", "adj_with_dist", "norm_adj", "patch_size")
        return {
            "name": type(self).__name__,
            **{name: getattr(self, name) for name in settings if hasattr(self, name)},
            "files_sha256": digest_of(sizes),
        }

    def _bag(self, name: str) -> dict[str, Tensor]:
        bag = self._cache.bags.get(name)
        if bag is None:
            bag = self._build_bag(name)
            self._cache.add(name, bag)
        return self._select(bag)

    def _select(self, bag: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: bag[key] for key in self.bag_keys if key in bag}

    def _split(self, name: str) -> str | None:
        return None

    def _label(self, name: str) -> Label | None:
        """The label of a bag for packing."""
        if "Y" not in self.bag_keys:
            return None
        return to_label(self._load_labels(name), f"bag {name!r}: {self._path('labels_path', name)}")

    def _read_file(self, file_path: str, key_type: str) -> np.ndarray:
        try:
            return np.asarray(self.read_file_fn(file_path, key_type))
        except Exception as error:
            raise ValueError(f"{file_path}: the {key_type} of a bag can't be read: {error}") from error

    def _load_features(self, name: str) -> np.ndarray:
        return self._read_file(self._path("features_path", name), "features")

    def _load_labels(self, name: str) -> np.ndarray:
        return self._read_file(self._path("labels_path", name), "labels")

    def _load_inst_labels(self, name: str) -> np.ndarray:
        return self._read_file(self._path("inst_labels_path", name), "inst_labels")

    def _load_coords(self, name: str) -> np.ndarray:
        return self._read_file(self._path("coords_path", name), "coords")

    def _load_bag(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a bag: those of ``bag_keys``, and what the graph is built from."""
        keys, bag = self.bag_keys, {}
        if "X" in keys or ("adj" in keys and self.adj_with_dist):
            bag["X"] = self._load_features(name)
        if "Y" in keys:
            bag["Y"] = self._load_labels(name)
        if "y_inst" in keys and self.inst_labels_path is not None:
            bag["y_inst"] = self._load_inst_labels(name)
        if "coords" in keys or "adj" in keys:
            bag["coords"] = self._place_instances(bag, name)
        return bag

    def _place_instances(self, bag: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """The coordinates of a bag, of which the other data have been read."""
        return self._load_coords(name)

    def _build_bag(self, name: str) -> dict[str, Tensor]:
        """The tensors of a bag, the graph among them."""
        bag = self._load_bag(name)
        _check_lengths(bag, name)
        tensors = {
            key: values if isinstance(values, Tensor | str) else torch.from_numpy(np.asarray(values))
            for key, values in bag.items()
        }
        if "adj" in self.bag_keys:
            edge_index, edge_weight, norm_edge_weight = self._build_adj(bag)
            values = torch.from_numpy(norm_edge_weight if self.norm_adj else edge_weight)
            size = (len(bag["coords"]),) * 2
            coo = torch.sparse_coo_tensor(torch.from_numpy(edge_index), values, size, check_invariants=False)
            tensors["adj"] = coo.coalesce()
        return tensors

    def _build_adj(self, bag_dict: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges ``(2, E)`` int64, their weights ``(E,)`` float32, and the same normalised."""
        coords = bag_dict["coords"]
        features = bag_dict["X"] if self.adj_with_dist else None
        features = None if features is None else features.reshape(len(coords), math.prod(features.shape[1:]))
        adj = build_adjacency(coords, radius=self.dist_thr, features=features, self_loops=len(coords) == 1)
        edge_index = np.stack([adj.rows().numpy(), adj.col.numpy().astype(np.int64)])
        weight = np.ones(adj.num_edges, np.float32) if adj.weight is None else adj.weight.numpy()
        normalized = normalize_adjacency(adj, "symmetric").weight
        assert normalized is not None
        return edge_index, weight, normalized.numpy()

    def _path(self, folder: str, name: str) -> str:
        return os.path.join(str(getattr(self, folder)), name + self.file_ext)

    def _file_size(self, folder: str, name: str) -> int:
        path = self._path(folder, name)
        return os.path.getsize(path) if getattr(self, folder) is not None and os.path.exists(path) else -1

    def _num_instances(self, bag: Mapping[str, np.ndarray], name: str) -> int:
        """Size of a bag of which ``bag`` has been read so far."""
        known = [len(bag[key]) for key in ("X", "y_inst", "coords") if key in bag]
        return known[0] if known else len(self._load_features(name))

    def _check_keys(self) -> None:
        for key in self.bag_keys:
            if key not in self._folders:
                if not type(self).__module__.startswith("bigbag."):
                    continue  # a subclass of the user's, which may add to what a bag holds
                raise ValueError(f"bag_keys holds {key!r}, expected some of {', '.join(self._folders)}")
            folder = self._folders[key]
            if getattr(self, folder) is None and folder not in self._optional_folders:
                raise ValueError(f"{folder} must be provided if {key!r} is in bag_keys")

    def _find_names(self) -> list[str]:
        if self.features_path is None:
            raise ValueError("features_path must be provided if bag_names is None")
        split = (os.path.splitext(file) for file in os.listdir(self.features_path))
        names = [name for name, extension in split if extension == self.file_ext]
        if not names:
            raise ValueError(f"{self.features_path}: no bags found, expected files *{self.file_ext}")
        return names

    def _fill_cache(self) -> None:
        from tqdm import tqdm

        for name in tqdm(self.bag_names, desc="Loading bags", unit="bag", disable=not self.verbose):
            if not self._cache.add(name, self._build_bag(name)):
                logger.info(
                    f"{type(self).__name__}: {len(self.loaded_bags)} of {len(self)} bags fill cache_bytes = "
                    f"{self._cache.max_bytes}; the others are read when they are asked for"
                )
                return


def _check_lengths(bag: Mapping[str, np.ndarray], name: str) -> None:
    lengths = {key: len(bag[key]) for key in ("X", "y_inst", "coords") if key in bag}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ValueError(f"bag {name!r}: {listed}: expected the same number of instances in each of its files")
