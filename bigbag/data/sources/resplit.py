"""A source with the splits of a table or a rule in place of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bigbag.bags import Bag
from bigbag.data.sources.base import Source, SourceEntry
from bigbag.data.sources.folder import FolderSource
from bigbag.data.splits import make_splits

if TYPE_CHECKING:
    from bigbag.config import SplitsConfig


class Resplit:
    """The bags of ``source``, split by ``settings`` (a :class:`bigbag.data.sources.Source`).

    Args:
        source: the bags.
        settings: how they are split; see :func:`bigbag.data.make_splits`.
    """

    def __init__(self, source: Source, settings: SplitsConfig) -> None:
        self.source, self.settings = source, settings
        self.patch_shape = source.patch_shape

    @property
    def left_out(self) -> Sequence[dict[str, str]]:
        return getattr(self.source, "left_out", ())

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def load(self, entry: SourceEntry) -> Bag:
        return self.source.load(entry)

    def description(self) -> dict[str, Any]:
        """That of the source; the splits themselves are part of the entries."""
        return self.source.description()

    @cached_property
    def _entries(self) -> tuple[SourceEntry, ...]:
        entries = self.source.entries()
        if self.settings.table is None or not isinstance(self.source, FolderSource):
            splits = make_splits(entries, self.settings)
            return tuple(replace(entry, split=split) for entry, split in zip(entries, splits))
        # A table may name the slides of a bag that is a patient.
        slides = self.source.slide_entries
        by_slide = dict(zip((slide.name for slide in slides), make_splits(slides, self.settings)))
        return tuple(replace(entry, split=self._split_of(entry.name, by_slide)) for entry in entries)

    def _split_of(self, bag: str, by_slide: Mapping[str, str | None]) -> str | None:
        assert isinstance(self.source, FolderSource)
        found = {name: by_slide[name] for name in self.source.slides_of(bag)}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} in {split}" for name, split in found.items())
            raise ValueError(f"{self.settings.table}: bag {bag!r} has slides in several splits ({listed})")
        return next(iter(found.values()))
