"""From bags on disk to packs on their way to the device: sources, packing, stores, the plan of an epoch, the stream."""

from bigbag.data.cap import cap_instances, capped_sizes, count_capped
from bigbag.data.manifest import BagInfo, Manifest, ShardInfo
from bigbag.data.pack import pack
from bigbag.data.plan import EpochPlan, PackPlan, StepPlan, plan_epoch
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.stores import BagStore, MemoryStore, ShardStore, open_store

__all__ = [
    "BagInfo",
    "BagStore",
    "EpochPlan",
    "Manifest",
    "MemoryStore",
    "PackPlan",
    "ShardInfo",
    "ShardStore",
    "Source",
    "SourceEntry",
    "StepPlan",
    "cap_instances",
    "capped_sizes",
    "count_capped",
    "open_store",
    "pack",
    "plan_epoch",
]
