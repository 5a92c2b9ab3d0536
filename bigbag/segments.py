"""How a pack is cut into bags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from bigbag.parts import Parts


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

    @staticmethod
    def from_sizes(sizes: Sequence[int], device: torch.device | str = "cpu", parts: Parts | None = None) -> Segments:
        host = tuple(int(size) for size in sizes)
        return Segments(torch.tensor([0, *accumulate(host)], dtype=torch.int64, device=device), host, parts)

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
        return torch.tensor(self.totals, dtype=torch.int64, device=self.offsets.device)

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
