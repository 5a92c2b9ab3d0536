"""Bags with labels 0 and 1, positive where any instance is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from bigbag.datasets.cache import DEFAULT_CACHE_BYTES
from bigbag.datasets.processed import BAG_KEYS, PathLike, ProcessedMILDataset


class BinaryClassificationDataset(ProcessedMILDataset):
    r"""Bags with ``Y in {0, 1}``, ``y_n in {0, 1}`` and ``Y = max_n y_n``.

    ``Y`` has the shape () and ``y_inst`` (N,). Without ``inst_labels_path`` the instances of negative bags are labelled
    0 and those of positive bags -1 (unknown). Instance labels that contradict the bag's label are replaced by -1, with
    a warning if ``verbose``.

    torchmil means to do the same, but asks for ``inst_labels_path`` wherever there are instance labels.

    Args:
        features_path: folder of the features, as are the other arguments; see :class:`ProcessedMILDataset`.
        labels_path: folder of the bag labels.
        inst_labels_path: folder of the instance labels, or None.
        coords_path: folder of the coordinates.
        bag_names: bags to take; None takes all.
        bag_keys: what a bag holds.
        dist_thr: largest distance of neighbours, in the unit of the coordinates that a bag holds.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        verbose: show progress and warnings.
        cache_bytes: most bytes of bags to keep in memory.
    """

    _optional_folders = frozenset({"inst_labels_path"})

    def __init__(
        self,
        features_path: PathLike,
        labels_path: PathLike,
        inst_labels_path: PathLike | None = None,
        coords_path: PathLike | None = None,
        bag_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        dist_thr: float = 1.5,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        verbose: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(
            features_path=features_path,
            labels_path=labels_path,
            inst_labels_path=inst_labels_path,
            coords_path=coords_path,
            bag_names=bag_names,
            bag_keys=bag_keys,
            dist_thr=dist_thr,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            verbose=verbose,
            cache_bytes=cache_bytes,
        )

    def _load_labels(self, name: str) -> np.ndarray:
        labels = super()._load_labels(name)
        if labels.size != 1:
            raise ValueError(
                f"bag {name!r} ({self._path('labels_path', name)}): label has shape {labels.shape}, expected one number"
            )
        return labels.reshape(())

    def _load_inst_labels(self, name: str) -> np.ndarray:
        labels = super()._load_inst_labels(name)
        if labels.ndim == 0 or labels.size != len(labels):
            raise ValueError(
                f"bag {name!r} ({self._path('inst_labels_path', name)}): instance labels have shape {labels.shape}, "
                "expected one for each instance"
            )
        return labels.reshape(len(labels))

    def _load_bag(self, name: str) -> dict[str, np.ndarray]:
        bag = super()._load_bag(name)
        if "Y" in bag and "y_inst" in self.bag_keys:
            bag["y_inst"] = self._consistent_inst_labels(bag, name)
        return bag

    def _consistent_inst_labels(self, bag: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """The instance labels where they agree with the bag's label, zeros where that is 0, else -1."""
        given, label = bag.get("y_inst"), bag["Y"]
        if given is None and label == 0:
            return np.zeros(self._num_instances(bag, name), np.int64)
        if given is not None and (len(given) == 0 or given.max() == label):
            return given
        if self.verbose:
            problem = (
                "Instance labels not found"
                if given is None
                else f"Instance labels (max(y_inst)={given.max()}) are not consistent with bag label (Y={label})"
            )
            warnings.warn(f"{problem} for bag {name}. Setting all instance labels to -1 (unknown).", stacklevel=2)
        return np.full(self._num_instances(bag, name), -1)
