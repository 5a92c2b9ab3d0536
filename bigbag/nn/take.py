"""Some rows of a pack beside all of them, with one gradient for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.rows import combine_rows
from bigbag.segments import on_device


def take(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` to go on with, and ``x[rows]``: their gradients are added when both are known.

    (Indexing alone would make a gradient of the size of ``x``, of zeros but for those rows, and keep it until then.)
    """
    return _Take.apply(x, rows)


def take_of_bags(x: Tensor, segments: Segments, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """``x`` to go on with, and row ``numbers[b]`` of each bag b, None: its first, ``(B, P)``; as :func:`take`.

    Where ranks share the bags, it comes from the rank that holds it, and is the same on all. Every bag must have it.
    """
    if segments.parts is None:
        first = segments.offsets[:-1]
        return take(x, first if numbers is None else first + on_device(numbers, x.device))
    wanted = numbers or (0,) * segments.num_bags
    held = {bag: place for bag, row in enumerate(wanted) if (place := segments.place(bag, row)) >= 0}
    bags, places = (on_device(list(of), x.device, torch.int64) for of in (held, held.values()))
    x, rows = take(x, places)
    found = rows.new_zeros(segments.num_bags, *rows.shape[1:]).index_copy(0, bags, rows)
    return x, combine_rows(found, segments)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), x[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> tuple[Tensor, None]:
        return grad.index_add(0, ctx.saved_tensors[0], grad_rows), None
