"""How bags are shared out over ranks, so that a bag may be larger than what one of them can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """Of each bag of a pack, every rank of a group holds a run of rows, in order of rank. Known to all of them.

    Attributes:
        sizes: ``sizes[r][b]``, the rows of bag b that rank r holds.
        rank: this rank's number in the group.
        group: the process group; None: that of all ranks.
    """

    sizes: tuple[tuple[int, ...], ...]
    rank: int
    group: Any = None

    @staticmethod
    def even(totals: Sequence[int], num_ranks: int, rank: int, group: Any = None) -> Parts:
        """Equal shares: of a bag of N rows, rank r holds those from :func:`part_bounds`."""
        bounds = [[part_bounds(total, r, num_ranks) for total in totals] for r in range(num_ranks)]
        return Parts(tuple(tuple(end - start for start, end in own) for own in bounds), rank, group)

    @property
    def num_ranks(self) -> int:
        return len(self.sizes)

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Rows of each whole bag."""
        return tuple(sum(of_bag) for of_bag in zip(*self.sizes))

    @cached_property
    def bounds(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """``bounds[r][b]``: between which rows of bag b those of rank r are."""
        ends = [list(accumulate(of_bag)) for of_bag in zip(*self.sizes)]
        every = range(self.num_ranks)
        return tuple(tuple((end[r] - own, end[r]) for own, end in zip(self.sizes[r], ends)) for r in every)

    @property
    def before(self) -> tuple[int, ...]:
        """Of each bag, the rows before this rank's."""
        return tuple(first for first, _ in self.bounds[self.rank])

    def with_sizes(self, sizes: Sequence[Sequence[int]]) -> Parts:
        """The same ranks holding other rows."""
        return replace(self, sizes=tuple(tuple(own) for own in sizes))

    def rows(self) -> np.ndarray:
        """(T,) int64: where in the whole pack (bags laid end to end) the rows of this rank are."""
        firsts = np.cumsum([0, *self.totals[:-1]]) + np.asarray(self.before, dtype=np.int64)
        own = [np.arange(first, first + size) for first, size in zip(firsts.tolist(), self.sizes[self.rank])]
        return np.concatenate([np.zeros(0, np.int64), *own])

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rank, and row among that rank's, of rows of the whole pack (bags laid end to end)."""
        sizes = np.asarray(self.sizes, dtype=np.int64).reshape(self.num_ranks, -1)
        # The whole pack is these pieces end to end: bag by bag, and in it rank by rank.
        ends = sizes.T.reshape(-1).cumsum()
        piece = np.searchsorted(ends, rows, side="right")
        bag, rank = np.divmod(piece, self.num_ranks)
        starts = sizes.cumsum(1) - sizes
        return rank, starts[rank, bag] + rows - (ends[piece] - sizes[rank, bag])


def part_bounds(total: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Where the rows of ``rank`` begin and end, of ``total``."""
    return rank * total // num_ranks, (rank + 1) * total // num_ranks


@dataclass(frozen=True)
class Halo:
    """Rows of other ranks that this one computes with, and its own rows that others do.

    Attributes:
        send: ``(S,)`` int64 own rows to send, those for rank 0 first.
        send_counts: how many go to each rank.
        counts: how many come from each rank.
        order: ``(H,)`` int64: place among what comes, ordered by rank, of each row that was asked for.
        parts: the ranks.
    """

    send: Tensor
    send_counts: tuple[int, ...]
    counts: tuple[int, ...]
    order: Tensor
    parts: Parts

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @staticmethod
    def of(parts: Parts, wanted: Sequence[np.ndarray], device: torch.device) -> Halo:
        """Plan an exchange.

        Args:
            parts: who holds what.
            wanted: for each rank, the rows of the whole pack that it asks for.
            device: where the rows are.
        """
        located = [parts.locate(np.asarray(rows, dtype=np.int64)) for rows in wanted]
        send = [local[rank == parts.rank] for rank, local in located]
        owners = located[parts.rank][0]
        order = np.empty(len(owners), dtype=np.int64)
        order[np.argsort(owners, kind="stable")] = np.arange(len(owners))
        counts = np.bincount(owners, minlength=parts.num_ranks)
        return Halo(
            torch.from_numpy(np.concatenate(send)).to(device),
            tuple(map(len, send)),
            tuple(map(int, counts)),
            torch.from_numpy(order).to(device),
            parts,
        )
