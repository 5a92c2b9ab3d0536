"""Buffers that packs are laid in, used again and again.

Filling fresh memory is several times slower than copying, since the kernel has to clear and map every page first. A
buffer is therefore leased to a pack and comes back by itself when the last tensor of that pack is gone.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Buffers for packs, for any number of threads; each is as large as the largest pack so far when it was made.

    Args:
        num_idle: buffers that are kept while they are not in use.
    """

    def __init__(self, num_idle: int = 3) -> None:
        self._idle: deque[np.ndarray] = deque(maxlen=num_idle)
        self._largest = 0

    def keep(self, num_idle: int) -> None:
        """Change the number of idle buffers that are kept."""
        if num_idle != self._idle.maxlen:
            self._idle = deque(self._idle, maxlen=num_idle)

    def lease(self, num_bytes: int) -> Tensor:
        """``num_bytes`` bytes, of a buffer that comes back once nothing refers to them."""
        self._largest = max(self._largest, num_bytes)
        try:
            buffer = self._idle.pop()  # the one used last, which the cache may still hold
        except IndexError:
            buffer = None
        if buffer is None or buffer.size < num_bytes:
            buffer = np.empty(self._largest, dtype=np.uint8)  # numpy asks for huge pages, torch does not
        # A tensor keeps the very array it was made from alive, so the end of this view is the end of all its tensors.
        view = buffer[:num_bytes]
        weakref.finalize(view, self._come_back, buffer).atexit = False
        return torch.from_numpy(view)

    def _come_back(self, buffer: np.ndarray) -> None:
        self._idle.append(buffer)
