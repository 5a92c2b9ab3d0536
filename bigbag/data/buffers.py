"""Buffers that packs are laid in, used again and again.

Filling fresh memory is several times slower than copying, since the kernel has to clear and map every page first. A
buffer is therefore leased to a pack and comes back by itself when the last tensor of that pack is gone.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Buffers for packs, for any number of threads.

    A pack gets the smallest free buffer that holds it and is at most twice its size, else a new one, for which the
    smallest free one goes where there are enough. So one large pack among small ones makes one buffer large, not all.

    Args:
        count: buffers that there are, while no more are leased at once.
    """

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._leased: list[int] = []
        self._free: list[np.ndarray] = []
        # A buffer may come back at any moment, also by the garbage collector while its thread is in here.
        self._returned: deque[np.ndarray] = deque()
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Of all buffers, free and leased."""
        with self._lock:
            self._settle()
            return sum(self._leased) + sum(buffer.size for buffer in self._free)

    def keep(self, count: int) -> None:
        """Change the number of buffers."""
        with self._lock:
            self._count = count
            self._settle()

    def lease(self, num_bytes: int) -> Tensor:
        """``num_bytes`` bytes, of a buffer that comes back once nothing refers to them."""
        with self._lock:
            self._settle()
            fitting = [i for i, buffer in enumerate(self._free) if num_bytes <= buffer.size <= 2 * num_bytes]
            # Of equal ones that used last, which the cache may still hold.
            best = min(reversed(fitting), key=lambda i: self._free[i].size, default=None)
            buffer = None if best is None else self._free.pop(best)
            self._leased.append(num_bytes if buffer is None else buffer.size)
            if buffer is None:
                self._let_go()
        if buffer is None:
            buffer = np.empty(num_bytes, dtype=np.uint8)  # numpy asks for huge pages, torch does not
        # A tensor keeps the very array it was made from alive, so the end of this view is the end of all its tensors.
        view = buffer[:num_bytes]
        weakref.finalize(view, self._come_back, buffer).atexit = False
        return torch.from_numpy(view)

    def _come_back(self, buffer: np.ndarray) -> None:
        self._returned.append(buffer)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
            self._leased.remove(self._free[-1].size)
        self._let_go()

    def _let_go(self) -> None:
        while self._free and len(self._free) + len(self._leased) > self._count:
            del self._free[min(range(len(self._free)), key=lambda i: self._free[i].size)]
