"""Buffers that packs are laid in, used again and again.

Filling fresh memory is several times slower than copying, since the kernel has to clear and map every page first. A
buffer is therefore leased to a pack and comes back by itself when the last tensor of that pack is gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.bags import Adjacency, PackedBags


class LocalBuffers:
    """Buffers of this process; each grows to the largest pack it has held. At most ``num_idle`` are kept idle."""

    def __init__(self, num_idle: int = 3) -> None:
        self._idle: deque[np.ndarray] = deque(maxlen=num_idle)
        self._largest = 0

    def lease(self, num_bytes: int) -> Tensor:
        """``num_bytes`` bytes, of a buffer that comes back once nothing refers to them."""
        self._largest = max(self._largest, num_bytes)
        try:
            buffer = self._idle.popleft()
        except IndexError:
            buffer = None
        if buffer is None or buffer.size < num_bytes:
            buffer = np.empty(self._largest, dtype=np.uint8)  # numpy asks for huge pages, torch does not
        return _lease(buffer, num_bytes, self._idle, buffer)


class SharedBuffers:
    """``num_slots`` buffers in shared memory, filled by worker processes and read by this one.

    Attributes:
        slots: the buffers, to be passed to the workers.
    """

    def __init__(self, num_slots: int, num_bytes: int) -> None:
        def new() -> Tensor:
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))

        self.slots = [new() for _ in range(num_slots)]
        self._arrays = [slot.numpy() for slot in self.slots]
        self._free: deque[int] = deque(range(num_slots))

    def acquire(self) -> int | None:
        """A free slot for a worker to fill, or None if packs that are still in use hold all of them."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def lease(self, slot: int, num_bytes: int) -> Tensor:
        """The bytes of a filled slot, which is free again once nothing refers to them."""
        return _lease(self._arrays[slot], num_bytes, self._free, slot)

    def release(self, slot: int) -> None:
        """Free a slot that was not filled."""
        self._free.append(slot)


def _lease(buffer: np.ndarray, num_bytes: int, free: deque[Any], item: Any) -> Tensor:
    # A tensor keeps the very array it was made from alive, so the end of this view is the end of all its tensors.
    view = buffer[:num_bytes]
    weakref.finalize(view, free.append, item).atexit = False
    return torch.from_numpy(view)


@dataclass(frozen=True)
class Layout:
    """Where in a buffer the tensors of a pack are: all of a pack but its bytes."""

    tensors: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    sizes: tuple[int, ...]
    keys: tuple[str, ...]
    symmetric: bool
    num_bytes: int

    @staticmethod
    def of(pack: PackedBags) -> Layout:
        """Layout of a pack whose tensors share one buffer."""
        named: dict[str, Any] = {f.name: getattr(pack, f.name) for f in fields(pack)}
        if pack.adj is not None:
            named |= {f"adj.{name}": getattr(pack.adj, name) for name in ("crow", "col", "weight")}
        tensors = {
            name: (int(tensor.storage_offset()) * tensor.element_size(), tensor.dtype, tuple(tensor.shape))
            for name, tensor in named.items()
            if isinstance(tensor, Tensor)
        }
        end = max(start + dtype.itemsize * _count(shape) for start, dtype, shape in tensors.values())
        return Layout(tensors, pack.sizes, pack.keys, pack.adj is not None and pack.adj.symmetric, end)

    def pack(self, buffer: Tensor) -> PackedBags:
        """The pack whose bytes are in ``buffer``."""
        views: dict[str, Any] = {
            name: buffer[start : start + dtype.itemsize * _count(shape)].view(dtype).view(shape)
            for name, (start, dtype, shape) in self.tensors.items()
        }
        adj = None
        if "adj.crow" in views:
            adj = Adjacency(views.pop("adj.crow"), views.pop("adj.col"), views.pop("adj.weight", None), self.symmetric)
        return PackedBags(sizes=self.sizes, keys=self.keys, adj=adj, **views)


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
