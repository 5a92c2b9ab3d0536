"""How a pack is cut into bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bigbag.parts import Parts


def on_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A few numbers of the host as a tensor on the device, without waiting for the device.

    ``torch.tensor(values, device=...)`` waits there for all that the device was asked before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True)
class Segments:
    """How a pack is cut into bags: bag ``b`` owns rows ``offsets[b] : offsets[b + 1]``.

    Attributes:
        offsets: ``(B + 1,)`` int64, on the device of the pack.
        sizes: the same as B integers on the host, so that nothing ever waits for the device.
        parts: where the bags are shared out over ranks: who holds what. The rows are this rank's.
    """

    offsets: Tensor
    sizes: tuple[int, ...]
    parts: Parts | None = None

    def __post_init__(self) -> None:
        # Of fewer bits, sums of offsets would wrap.
        if self.offsets.dtype != torch.int64:
            raise ValueError(
                f"Segments: offsets are {self.offsets.dtype}, expected torch.int64; see Segments.from_sizes"
            )

    @staticmethod
    def from_sizes(sizes: Sequence[int], device: torch.device | str = "cpu", parts: Parts | None = None) -> Segments:
        host = tuple(int(size) for size in sizes)
        return Segments(on_device([0, *accumulate(host)], device, torch.int64), host, parts)

    @property
    def totals(self) -> tuple[int, ...]:
        """The number of instances of each bag, those on other ranks included."""
        return self.sizes if self.parts is None else self.parts.totals

    # Not cached: torch.compile can't follow the lock of Python 3.11's cached_property.
    @property
    def bag_sizes(self) -> Tensor:
        """``(B,)`` int64: :attr:`totals` on the device."""
        if self.parts is None:
            return self.offsets.diff()
        return on_device(self.totals, self.offsets.device, torch.int64)

    def extended(self, front: Sequence[int], back: Sequence[int] | None = None) -> Segments:
        """The bags with ``front[b]`` more rows before those of bag b, and ``back[b]`` behind them.

        Where ranks share the bags, the first rank has the former, the last one the latter.
        """
        ends = (0,) * self.num_bags if back is None else back
        if self.parts is None:
            sizes = [f + size + b for f, size, b in zip(front, self.sizes, ends)]
            return Segments.from_sizes(sizes, self.offsets.device)
        every = [list(sizes) for sizes in self.parts.sizes]
        every[0] = [f + size for f, size in zip(front, every[0])]
        every[-1] = [size + b for size, b in zip(every[-1], ends)]
        return Segments.of_parts(self.parts.with_sizes(every), self.offsets.device)

    @staticmethod
    def of_parts(parts: Parts, device: torch.device | str = "cpu") -> Segments:
        """This rank's parts of bags."""
        return Segments.from_sizes(parts.sizes[parts.rank], device, parts)

    def bag(self, number: int) -> Segments:
        """One bag by itself."""
        if self.parts is None:
            return Segments.from_sizes(self.sizes[number : number + 1], self.offsets.device)
        return Segments.of_parts(
            self.parts.with_sizes([[own[number]] for own in self.parts.sizes]), self.offsets.device
        )

    def place(self, bag: int, row: int) -> int:
        """Where row ``row`` of a bag is, or -1 where that is on another rank, or nowhere; negative: from its end."""
        here = (row if row >= 0 else self.totals[bag] + row) - (0 if self.parts is None else self.parts.before[bag])
        return self.starts[bag] + here if 0 <= here < self.sizes[bag] else -1

    @property
    def holds_first(self) -> bool:
        """Whether rows put before those of a bag are here: true but on ranks after the first of those that share it."""
        return self.parts is None or self.parts.rank == 0

    @property
    def num_bags(self) -> int:
        return len(self.sizes)

    @cached_property
    def num_instances(self) -> int:
        return sum(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """``offsets`` on the host, B + 1 integers."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def bag_of_instance(self) -> Tensor:
        """``(T,)`` int64: the bag that each instance belongs to."""
        bags = torch.arange(self.num_bags, device=self.offsets.device)
        return torch.repeat_interleave(bags, self.offsets.diff(), output_size=self.num_instances)
