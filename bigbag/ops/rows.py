"""A pack against one or a few vectors per bag, and picking a few of its rows: linear layers without their width.

Scores such as ``x w`` or ``(x Wq^T) q = x (Wq^T q)`` need one pass over the stored instances and a thin result, no
(T, D) projection and no widened copy of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.registry import FLOATING, HALF, Operator, choose

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


def segment_dots(x: Tensor, y: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Inner products of the instances of each bag with a few vectors of the bag; the adjoint of ``segment_pool``.

        s[t, h] = x[t] . y[b, h],   b the bag of t

    FLOPs: 2 T S P forward, the same again for each gradient that is needed. Bytes: x once each way. Working memory:
    a constant number of chunks.

    Args:
        x: (T, P) floating; may be stored narrower than y.
        y: (B, S, P) floating.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, S) in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    rows, bags = segments.num_instances, segments.num_bags
    if x.dim() != 2 or x.shape[0] != rows or y.dim() != 3 or y.shape[0] != bags or y.shape[2] != x.shape[1]:
        raise ValueError(
            f"segment_dots: expected x (T, P) and y (B, S, P) with T = {rows} and B = {bags} as in segments, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.promote_types(x.dtype, y.dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    chosen = choose("segment_dots", _DTYPES, impl, x.device.type, dtype)
    if chosen == "reference":
        starts = segments.starts
        parts = [x[s:e].to(acc) @ y[bag].to(acc).t() for bag, (s, e) in enumerate(zip(starts, starts[1:]))]
        return torch.cat(parts) if parts else x.new_zeros(0, y.shape[1], dtype=acc)
    return _Dots.apply(x, y.to(acc), segments.offsets, chosen)


class _Dots(torch.autograd.Function):
    """The operators of ``segment_pool`` the other way round: its gradient forward, itself backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, offsets: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(x, y, offsets)
        ctx.impl = impl
        like = y.new_empty(()).expand(x.shape[0], y.shape[1])
        return _operator("segment_pool_backward", impl)(y, like, x, offsets, True, False)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, offsets = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = _operator("segment_pool_backward", ctx.impl)(y, grad, x, offsets, False, True)[1]
        if ctx.needs_input_grad[1]:
            grad_y = _operator("segment_pool", ctx.impl)(grad, x, offsets)
        return grad_x, grad_y, None, None


def _operator(name: str, impl: str) -> Any:
    return getattr(torch.ops.bigbag, f"{name}_{impl}")


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` with zeros where the index is -1, as :func:`segment_topk` marks places that a bag is too small for.

    Args:
        x: (T, P).
        index: (...) int64 rows of the pack, or -1.

    Returns:
        (..., P) in the dtype of x.
    """
    if not x.shape[0]:
        return x.new_zeros(*index.shape, x.shape[1])
    rows = x.index_select(0, index.clamp_min(0).flatten()).view(*index.shape, x.shape[1])
    return torch.where(index[..., None] < 0, 0, rows)


OPERATOR = Operator("segment_dots", segment_dots, _DTYPES)
