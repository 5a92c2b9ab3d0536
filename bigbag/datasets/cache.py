"""Bags that stay in memory, up to so many bytes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.utils.data import get_worker_info

DEFAULT_CACHE_BYTES = 4 * 2**30


class BagCache:
    """Keeps the first bags that fit into ``max_bytes``, and never more.

    Nothing is thrown out for a newer bag: an epoch reads every bag once, in a new order, so of ``max_bytes`` worth of
    bags that share of the reads is served, where the least recently used one would go just before it is asked for.

    Workers of a ``DataLoader`` share the bags that were loaded before they started (by ``load_at_init``), and divide
    the remaining bytes among themselves, so that all processes together stay within ``max_bytes``.

    Args:
        max_bytes: most bytes of tensors to keep; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes is {max_bytes}, expected 0 or more")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.bags: dict[str, dict[str, Tensor]] = {}
        self._inherited_bytes: int | None = None

    def add(self, name: str, bag: dict[str, Tensor]) -> bool:
        """Keep ``bag`` if there is room for it; returns whether there was."""
        size = bag_bytes(bag)
        if self.num_bytes + size > self._limit():
            return False
        self.bags[name] = bag
        self.num_bytes += size
        return True

    def _limit(self) -> int:
        """Most bytes in this process."""
        worker = get_worker_info()
        if worker is None:
            return self.max_bytes
        if self._inherited_bytes is None:
            self._inherited_bytes = self.num_bytes
        return self._inherited_bytes + (self.max_bytes - self._inherited_bytes) // worker.num_workers


def bag_bytes(bag: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a bag; of a sparse one, of its indices and values."""
    parts = [
        part
        for tensor in bag.values()
        if isinstance(tensor, Tensor)
        for part in ((tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,))
    ]
    return sum(part.numel() * part.element_size() for part in parts)
