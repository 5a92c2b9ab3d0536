"""Readers: one per on-disk format."""

from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.sources.detect import FORMATS, detect_format
from bigbag.data.sources.folder import FolderSource
from bigbag.data.sources.memory import MemorySource
from bigbag.data.sources.resplit import Resplit
from bigbag.data.sources.tables import MilTable, Musk1, Musk2, TableSource
from bigbag.data.sources.torchmil import TorchmilFolder

__all__ = [
    "FORMATS",
    "FolderSource",
    "MemorySource",
    "MilTable",
    "Musk1",
    "Musk2",
    "Resplit",
    "Source",
    "SourceEntry",
    "TableSource",
    "TorchmilFolder",
    "detect_format",
]
