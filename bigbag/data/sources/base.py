"""What a source of bags is: a cheap list of entries, and a way to load each of them.

A source reads one on-disk format (or generates bags). Packing walks its entries, loads each bag once and writes it to
shards; nothing downstream knows where a bag came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bigbag.bags import Bag, Label


@dataclass(frozen=True)
class SourceEntry:
    """One bag of a source, known without reading its instances.

    Attributes:
        name: the user's name of the bag (a slide id); may hold dots.
        split: "train", "val", "test", or None where the source does not say.
        label: label of the bag, or None where it is missing.
        patient: patient or case, or None.
        path: file or folder that the bag is read from, for error messages; "" for generated bags.
        parts: other files that it is read from.
    """

    name: str
    split: str | None = None
    label: Label | None = None
    patient: str | None = None
    path: str = ""
    parts: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A readable set of bags.

    Attributes:
        patch_shape: ``(height, width)`` where an instance's features are the pixels of a grey patch in [0, 1] and can
            be drawn, else None.
    """

    patch_shape: tuple[int, int] | None

    def entries(self) -> Sequence[SourceEntry]:
        """All bags, in a fixed order."""
        ...

    def load(self, entry: SourceEntry) -> Bag:
        """Read one bag; its ``key`` and ``y`` are the entry's name and label.

        ``coords`` are in the source's own unit, and ``stride`` is the distance of adjacent patches in it, None where
        that is unknown or where they count patches already.
        """
        ...

    def description(self) -> dict[str, Any]:
        """JSON-able settings that determine the bags: an interrupted packing resumes only if they are unchanged."""
        ...
