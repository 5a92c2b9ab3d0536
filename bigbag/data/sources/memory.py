"""Bags that are already in memory, as a source for packing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry


class MemorySource:
    """Bags that Python code has made (a :class:`bigbag.data.sources.Source`).

    Args:
        bags: the bags, any iterable; their ``key`` is their name and ``y`` their label.
        splits: split of each bag, or None.
        patients: patient of each bag, or None.
        patch_shape: ``(height, width)`` where the features are the pixels of a patch.

    Raises:
        ValueError: lists of another length than ``bags``.
    """

    def __init__(
        self,
        bags: Iterable[Bag],
        splits: Sequence[str | None] | None = None,
        patients: Sequence[str | None] | None = None,
        patch_shape: tuple[int, int] | None = None,
    ) -> None:
        bags = tuple(bags)
        for name, values in (("splits", splits), ("patients", patients)):
            if values is not None and len(values) != len(bags):
                raise ValueError(f"MemorySource: {len(values)} {name} for {len(bags)} bags")
        self.patch_shape = patch_shape
        self._bags = bags
        self._entries = tuple(
            SourceEntry(
                name=bag.key,
                split=None if splits is None else splits[i],
                label=bag.y,
                patient=None if patients is None else patients[i],
            )
            for i, bag in enumerate(bags)
        )
        self._index = {bag.key: i for i, bag in enumerate(bags)}

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def load(self, entry: SourceEntry) -> Bag:
        return self._bags[self._index[entry.name]]

    def description(self) -> dict[str, Any]:
        """Holds a digest of all features, since nothing else says whether a list is still the same."""
        return self._description

    @cached_property
    def _description(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for bag in self._bags:
            digest.update(str(bag.stride).encode())
            for values in (bag.x, bag.coords, bag.y_inst):
                if values is not None:
                    digest.update(f"{values.shape}{values.dtype}".encode())
                    digest.update(values.tobytes())
        return {"name": "memory", "num_bags": len(self._bags), "sha256": digest.hexdigest()}
