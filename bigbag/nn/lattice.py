"""The rows of a pack on two-dimensional lattices, one for each bag, and windows of neighbouring rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.segments import on_device


@dataclass(frozen=True)
class Window:
    """The window of a convolution or of ``torch.nn.Unfold``, each number for rows and for columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def shift(self) -> tuple[int, int]:
        """Twice the distance from a cell to the first window's centre: 0 where windows are centred on cells."""
        found = [2 * p - d * (k - 1) for k, p, d in zip(self.kernel, self.padding, self.dilation)]
        return found[0], found[1]

    @property
    def centred(self) -> bool:
        """There is one window for each cell, around it."""
        return self.shift == (0, 0) and self.stride == (1, 1)

    def size(self, size: Tensor) -> Tensor:
        """``(B, 2)`` windows along each axis of lattices of ``size`` ``(B, 2)`` cells."""
        reach = size + on_device(self.shift, size.device)
        return (torch.div(reach - 1, self._tensor(self.stride, size), rounding_mode="floor") + 1).clamp_min(0)

    def offsets(self, device: torch.device) -> Tensor:
        """``(K, 2)``: the cells of the first window."""
        axes = [torch.arange(k, device=device) * d - p for k, d, p in zip(self.kernel, self.dilation, self.padding)]
        return torch.cartesian_prod(*axes)

    @staticmethod
    def _tensor(pair: tuple[int, int], like: Tensor) -> Tensor:
        return on_device(pair, like.device)


@dataclass(frozen=True)
class Lattice:
    """Rows of a pack on lattices.

    Attributes:
        places: ``(T, 2)`` int64: row and column of the cell, from 0.
        size: ``(B, 2)`` int64: rows and columns of the lattice of each bag.
        segments: how the T rows are cut into bags.
    """

    places: Tensor
    size: Tensor
    segments: Segments

    @staticmethod
    def full(sizes: Sequence[tuple[int, int]], device: torch.device | str = "cpu") -> Lattice:
        """Every cell of lattices of ``sizes``, row by row."""
        parts = [
            torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).view(-1, 2)
            for h, w in sizes
        ]
        places = torch.cat([*parts, torch.zeros(0, 2, dtype=torch.int64, device=device)])
        size = on_device(list(sizes), device, torch.int64).view(-1, 2)
        return Lattice(places, size, Segments.from_sizes([h * w for h, w in sizes], device))

    @cached_property
    def numbers(self) -> Tensor:
        """``(T,)``: the number of each cell in its bag's lattice, row by row."""
        return self.places[:, 0] * self.size[self.segments.bag_of_instance, 1] + self.places[:, 1]

    def cells(self) -> tuple[Lattice, Tensor]:
        """The cells in which there are rows, and for each row ``(T,)`` which of them it is in. Waits for the device."""
        keys, cell = torch.unique(self._keys(self.segments.bag_of_instance, self.places), return_inverse=True)
        places = self.places.new_empty(len(keys), 2).index_copy(0, cell, self.places)
        bags = torch.empty_like(keys).index_copy(0, cell, self.segments.bag_of_instance)
        sizes = torch.bincount(bags, minlength=self.segments.num_bags).tolist()
        return Lattice(places, self.size, Segments.from_sizes(sizes, places.device)), cell

    def windows(self, window: Window, full: bool = False) -> tuple[Lattice, Tensor]:
        """The windows in whose stride there are rows: where they lie, and for each row ``(T,)`` which it is, or -1.

        Args:
            window: a row belongs to the window whose centre is at it or, with a stride, next before it.
            full: all windows instead, as ``torch.nn.Unfold`` has them. Waits for the device.
        """
        if window.centred and not full:
            return self, torch.arange(len(self.places), device=self.places.device)
        size, stride = window.size(self.size), on_device(window.stride, self.size.device)
        shifted = 2 * self.places + on_device(window.shift, self.size.device)
        places = torch.div(shifted, 2 * stride, rounding_mode="floor")
        bags = self.segments.bag_of_instance
        inside = ((places >= 0) & (places < size[bags])).all(1)
        if full:
            lattice = Lattice.full([(h, w) for h, w in size.tolist()], self.places.device)
            return lattice, torch.where(inside, lattice.find(bags, places), -1)
        sizes = torch.bincount(bags[inside], minlength=self.segments.num_bags).tolist()
        kept = Lattice(places[inside], size, Segments.from_sizes(sizes, places.device))
        lattice, cell = kept.cells()
        return lattice, torch.full_like(bags, -1).masked_scatter(inside, cell)

    def neighbours(self, lattice: Lattice, window: Window) -> Tensor:
        """``(L, K)``: the rows in each window at the places of ``lattice``; -1 where there is none."""
        corner = lattice.places * on_device(window.stride, self.places.device)
        cells = corner[:, None] + window.offsets(self.places.device)
        bags = lattice.segments.bag_of_instance[:, None].expand(cells.shape[:2])
        inside = ((cells >= 0) & (cells < self.size[bags])).all(2)
        return torch.where(inside, self.find(bags, cells), -1)

    def find(self, bags: Tensor, places: Tensor) -> Tensor:
        """The rows of cells ``places`` ``(..., 2)`` of ``bags`` ``(...)``; -1 where there is none."""
        if not len(self.places):
            return torch.full_like(bags, -1)
        keys, order = self._sorted
        wanted = self._keys(bags, places)
        at = torch.searchsorted(keys, wanted.contiguous()).clamp_max(len(keys) - 1)
        return torch.where(keys[at] == wanted, order[at], -1)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        found = self._keys(self.segments.bag_of_instance, self.places).sort()
        return found.values, found.indices

    def _keys(self, bags: Tensor, places: Tensor) -> Tensor:
        height, width = self.size.amax(0).unbind(0) if len(self.size) else (1, 1)
        return (bags * height + places[..., 0]) * width + places[..., 1]
