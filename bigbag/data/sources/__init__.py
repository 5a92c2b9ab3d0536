"""Readers: one per on-disk format."""

from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.sources.memory import MemorySource
from bigbag.data.sources.tables import Musk1, Musk2, TableSource
from bigbag.data.sources.torchmil import TorchmilFolder

__all__ = ["MemorySource", "Musk1", "Musk2", "Source", "SourceEntry", "TableSource", "TorchmilFolder"]
