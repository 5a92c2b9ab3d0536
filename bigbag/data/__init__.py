"""From bags on disk to packs on their way to the device: sources, packing, stores, the plan of an epoch, the stream."""

from bigbag import torchmil_files
from bigbag.data.augment import Augmentation
from bigbag.data.cap import cap_instances, capped_sizes, count_capped
from bigbag.data.manifest import BagInfo, Manifest, ShardInfo
from bigbag.data.pack import pack
from bigbag.data.padding import collate_fn, pad_tensors, seq_to_spatial, spatial_to_seq
from bigbag.data.patients import PatientStore
from bigbag.data.plan import EpochPlan, PackPlan, StepPlan, plan_epoch
from bigbag.data.sampling import bag_weights, count_draws, draw_bags
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.split_tables import read_splits
from bigbag.data.splits import check_binary_labels, check_leakage, folds, make_splits, parse_splits_option, split_bags
from bigbag.data.stores import BagStore, MemoryStore, ShardStore, open_store
from bigbag.data.stream import stream

__all__ = [
    "Augmentation",
    "BagInfo",
    "BagStore",
    "EpochPlan",
    "Manifest",
    "MemoryStore",
    "PackPlan",
    "PatientStore",
    "ShardInfo",
    "ShardStore",
    "Source",
    "SourceEntry",
    "StepPlan",
    "bag_weights",
    "cap_instances",
    "capped_sizes",
    "check_binary_labels",
    "check_leakage",
    "collate_fn",
    "count_capped",
    "count_draws",
    "draw_bags",
    "folds",
    "make_splits",
    "open_store",
    "pack",
    "pad_tensors",
    "parse_splits_option",
    "plan_epoch",
    "read_splits",
    "seq_to_spatial",
    "spatial_to_seq",
    "split_bags",
    "stream",
]

torchmil_files.attach(__name__)
