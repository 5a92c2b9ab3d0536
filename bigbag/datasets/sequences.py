"""Bags whose instances follow one another: slices of CT scans, frames of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bigbag.datasets.binary import BinaryClassificationDataset
from bigbag.datasets.cache import DEFAULT_CACHE_BYTES
from bigbag.datasets.partition import PartitionedDataset
from bigbag.datasets.processed import BAG_KEYS, PathLike, ProcessedMILDataset


class SequenceDataset(ProcessedMILDataset):
    """Instance ``i`` of a bag stands at ``coords[i] = i``, and its neighbours are ``i - 1`` and ``i + 1``."""

    _optional_folders = ProcessedMILDataset._optional_folders | {"coords_path"}

    def _place_instances(self, bag: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return np.arange(self._num_instances(bag, name))[:, None]


class CTScanDataset(SequenceDataset):
    """CT scans, whose instances are slices in their order; each is joined with the one before and the one after.

    Args:
        features_path: folder of the features.
        labels_path: folder of the labels of the scans.
        slice_labels_path: folder of the labels of the slices.
        ctscan_names: scans to take; None takes all of ``features_path``.
        bag_keys: what a bag holds.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        cache_bytes: most bytes of bags to keep in memory.
    """

    def __init__(
        self,
        features_path: PathLike,
        labels_path: PathLike,
        slice_labels_path: PathLike | None = None,
        ctscan_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(
            features_path=features_path,
            labels_path=labels_path,
            inst_labels_path=slice_labels_path,
            bag_names=ctscan_names,
            bag_keys=bag_keys,
            dist_thr=1.10,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )


class VideoClassificationDataset(SequenceDataset):
    """Videos, whose instances are frames in their order; each is joined with the one before and the one after.

    Args:
        features_path: folder of the features.
        labels_path: folder of the labels of the videos.
        frame_labels_path: folder of the labels of the frames.
        video_names: videos to take; None takes all of ``features_path``.
        bag_keys: what a bag holds.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        cache_bytes: most bytes of bags to keep in memory.
    """

    def __init__(
        self,
        features_path: PathLike,
        labels_path: PathLike,
        frame_labels_path: PathLike | None = None,
        video_names: Sequence[str] | None = None,
        bag_keys: Sequence[str] = BAG_KEYS,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(
            features_path=features_path,
            labels_path=labels_path,
            inst_labels_path=frame_labels_path,
            bag_names=video_names,
            bag_keys=bag_keys,
            dist_thr=1.10,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )


class RSNAMILDataset(BinaryClassificationDataset, CTScanDataset, PartitionedDataset):
    r"""RSNA intracranial haemorrhage in torchmil's processed form: CT scans, positive where any slice is.

    Layout::

        root/splits.csv                                                  columns bag_name, split
        root/features/features_resnet50/<scan>.npy
        root/{labels,slice_labels}/<scan>.npy

    ``bigbag.datasets.download("RSNAMILDataset", root)`` gets the files.

    Flanders et al., Radiology: Artificial Intelligence 2020.

    Args:
        root: folder of ``splits.csv``.
        features: name of the extractor: "resnet18", "resnet50" or "vit_b_32" in the published set.
        partition: "train" or "test"; None takes all.
        bag_keys: what a bag holds.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        cache_bytes: most bytes of bags to keep in memory.

    Raises:
        ValueError: no ``splits.csv``, or no such partition.
    """

    _optional_folders = BinaryClassificationDataset._optional_folders | CTScanDataset._optional_folders

    def __init__(
        self,
        root: str | Path,
        features: str = "resnet50",
        partition: str | None = "train",
        bag_keys: Sequence[str] = BAG_KEYS,
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        features_path = f"{root}/features/features_{features}/"
        CTScanDataset.__init__(
            self,
            features_path=features_path,
            labels_path=f"{root}/labels/",
            slice_labels_path=f"{root}/slice_labels/",
            ctscan_names=self._choose(root, partition, features_path),
            bag_keys=bag_keys,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )


class TADMILDataset(BinaryClassificationDataset, VideoClassificationDataset, PartitionedDataset):
    r"""Traffic Anomaly Detection in torchmil's processed form: videos, positive where they show an anomaly.

    Layout::

        root/splits.csv                                                  columns bag_name, split
        root/features/features_resnet50/<video>.npy
        root/labels/<video>.npy
        root/frame_labels/<video>.npy                                    if "y_inst" is in bag_keys

    The data set is on Kaggle: nikanvasei/traffic-anomaly-dataset-tad.

    Lv et al., IEEE Transactions on Image Processing 2021, arXiv:2008.08944.

    Args:
        root: folder of ``splits.csv``.
        features: name of the extractor: "resnet18", "resnet50" or "vit_b_32" in the published set.
        partition: "train" or "test"; None takes all.
        bag_keys: what a bag holds.
        adj_with_dist: weigh edges by the similarity of features.
        norm_adj: normalise the graph.
        load_at_init: read bags now, up to ``cache_bytes``.
        cache_bytes: most bytes of bags to keep in memory.

    Raises:
        ValueError: no ``splits.csv``, or no such partition.
    """

    _optional_folders = BinaryClassificationDataset._optional_folders | VideoClassificationDataset._optional_folders

    def __init__(
        self,
        root: str | Path,
        features: str = "resnet50",
        partition: str | None = "train",
        bag_keys: Sequence[str] = ("X", "Y", "adj", "coords"),
        adj_with_dist: bool = False,
        norm_adj: bool = True,
        load_at_init: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        features_path = f"{root}/features/features_{features}/"
        VideoClassificationDataset.__init__(
            self,
            features_path=features_path,
            labels_path=f"{root}/labels/",
            frame_labels_path=f"{root}/frame_labels/",
            video_names=self._choose(root, partition, features_path),
            bag_keys=bag_keys,
            adj_with_dist=adj_with_dist,
            norm_adj=norm_adj,
            load_at_init=load_at_init,
            cache_bytes=cache_bytes,
        )
