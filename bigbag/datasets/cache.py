"""Bags that stay in memory, up to so many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence

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

    def remove(self, name: str) -> None:
        """Let go of a bag, if it is kept."""
        if name in self.bags:
            self.num_bytes -= bag_bytes(self.bags.pop(name))

    def _limit(self) -> int:
        """Most bytes in this process."""
        worker = get_worker_info()
        if worker is None:
            return self.max_bytes
        if self._inherited_bytes is None:
            self._inherited_bytes = self.num_bytes
        return self._inherited_bytes + (self.max_bytes - self._inherited_bytes) // worker.num_workers


class LoadedBags(MutableMapping[str, dict[str, Tensor]]):
    """The kept bags of a data set by name, as a dict: to take one out, or all of them by ``clear``, frees its memory.

    Args:
        cache: where they are, perhaps with others.
        names: of the data set's bags.
    """

    def __init__(self, cache: BagCache, names: Sequence[str]) -> None:
        self._cache, self._names = cache, names

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        return self._cache.bags[name]

    def __setitem__(self, name: str, bag: dict[str, Tensor]) -> None:
        self._cache.remove(name)
        if not self._cache.add(name, bag):
            raise ValueError(f"bag {name!r} of {bag_bytes(bag)} bytes does not fit into cache_bytes beside the others")

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._cache.remove(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names if name in self._cache.bags])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)})"


def bag_bytes(bag: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a bag; of a sparse one, of its indices and values."""
    parts = [
        part
        for tensor in bag.values()
        if isinstance(tensor, Tensor)
        for part in ((tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,))
    ]
    return sum(part.numel() * part.element_size() for part in parts)
