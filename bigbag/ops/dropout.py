"""Which attention weights dropout sets to 0: a hash of seed, head, row and column, the same for all implementations."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_seed(seed: int) -> int:
    """A signed 32-bit integer from any integer."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded - (1 << 32) if folded >= 1 << 31 else folded


def keep(seed: int, heads: int, rows: Tensor, columns: Tensor, dropout: float) -> Tensor:
    """(H, rows, columns) bool: which attention weights dropout keeps; ``rows`` and ``columns`` count in the pack.

    Each round is the integer hash "lowbias32" (C. Wellons, Prospecting for hash functions, 2018), in 32 bits.
    """
    key = hash32(torch.full((), seed, device=rows.device))
    head = hash32(key + torch.arange(heads, device=rows.device) * 0x9E3779B1)
    row = hash32(head[:, None] + rows * 0x9E3779B1)
    return hash32(row[:, :, None] + columns * 0x85EBCA77) >= drop_below(dropout)


def hash32(x: Tensor) -> Tensor:
    """int64 -> int64 in [0, 2^32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def drop_below(dropout: float) -> int:
    """Hashes below it are dropped."""
    return min(round(dropout * 2**32), 2**32 - 1)
