"""A pack against one or a few vectors per bag, and picking a few of its rows: linear layers without their width.

Scores such as ``x w`` or ``(x Wq^T) q = x (Wq^T q)`` need one pass over the stored instances and a thin result, no
(T, D) projection and no widened copy of x.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp
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
    check_vectors("segment_dots", x, y, segments)
    dtype = torch.promote_types(x.dtype, y.dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    chosen = choose("segment_dots", _DTYPES, impl, x.device.type, dtype)
    if chosen == "reference":
        starts = segments.starts
        with torch.autocast(x.device.type, enabled=False):
            parts = [x[s:e].to(acc) @ y[bag].to(acc).t() for bag, (s, e) in enumerate(zip(starts, starts[1:]))]
        return torch.cat(parts) if parts else x.new_zeros(0, y.shape[1], dtype=acc)
    return _DOTS[chosen](x, y.to(acc), segments.offsets)


def check_vectors(op: str, x: Tensor, y: Tensor, segments: Segments) -> None:
    """Refuse shapes other than x (T, P), y (B, S, P) with T and B as in ``segments``, in the name of ``op``."""
    # The number of rows is not checked while tracing: a compiled graph must not depend on how a pack is cut.
    rows = x.shape[0] if torch.compiler.is_compiling() else segments.num_instances
    bags = segments.offsets.shape[0] - 1
    if x.dim() != 2 or x.shape[0] != rows or y.dim() != 3 or y.shape[0] != bags or y.shape[2] != x.shape[1]:
        raise ValueError(
            f"{op}: expected x (T, P) and y (B, S, P) with T = {rows} and B = {bags} as in segments, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def _register(impl: str, module: str) -> Any:
    """Custom operators ``bigbag::segment_dots_{impl}`` and ``..._backward``: ``segment_pool`` the other way round."""

    def run_dots(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
        like = y.new_empty(()).expand(x.shape[0], y.shape[1])
        return importlib.import_module(module).pool_backward(y, like, x, offsets, True, False)[0]

    def run_backward(
        grad: Tensor, x: Tensor, y: Tensor, offsets: Tensor, need_x: bool, need_y: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = importlib.import_module(module)
        grad_x = kernels.pool_backward(y, grad, x, offsets, False, True)[1] if need_x else x.new_empty(0)
        return grad_x, kernels.pool(grad, x, offsets) if need_y else y.new_empty(0)

    def define(name: str, function: Any, schema: str) -> CustomOp:
        return CustomOp(f"{name}_{impl}", schema, function)

    dots = define("segment_dots", run_dots, "(Tensor x, Tensor y, Tensor offsets) -> Tensor")
    schema = "(Tensor grad, Tensor x, Tensor y, Tensor offsets, bool need_x, bool need_y) -> (Tensor, Tensor)"
    dots_backward = define("segment_dots_backward", run_backward, schema)
    dots.register_fake(lambda x, y, offsets: y.new_empty(x.shape[0], y.shape[1]))

    @dots_backward.register_fake
    def _(grad: Tensor, x: Tensor, y: Tensor, offsets: Tensor, need_x: bool, need_y: bool) -> Any:
        return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        need_x, need_y = ctx.needs_input_grad[:2]
        grad_x, grad_y = dots_backward(grad, *ctx.saved_tensors, need_x, need_y)
        return grad_x if need_x else None, grad_y if need_y else None, None

    dots.register_autograd(differentiate, setup_context=setup)
    return dots


_DOTS = {
    "cpu": _register("cpu", "bigbag.kernels.cpu.topk"),
    "triton": _register("triton", "bigbag.kernels.gpu.topk"),
}


def take_rows(x: Tensor, index: Tensor, segments: Segments | None = None) -> Tensor:
    """``x[index]`` with zeros where the index is -1, as :func:`segment_topk` marks places that a bag is too small for.

    Args:
        x: (T, P).
        index: (...) int64 rows of the pack, or -1.
        segments: how the T rows are cut; where bags are shared out over ranks, the rows come from the rank that holds
            them, and are the same on all.

    Returns:
        (..., P) in the dtype of x.
    """
    if not x.shape[0]:
        rows = x.new_zeros(*index.shape, x.shape[1])
    else:
        rows = x.index_select(0, index.clamp_min(0).flatten()).view(*index.shape, x.shape[1])
        rows = torch.where(index[..., None] < 0, 0, rows)
    return combine_rows(rows, segments)


def combine_rows(rows: Tensor, segments: Segments | None) -> Tensor:
    """Rows that one rank holds, zeros on the others, on all ranks; as they are where bags are not shared out."""
    if segments is None or segments.parts is None:
        return rows
    return distributed.all_sum(rows, segments.parts).to(rows.dtype)


OPERATORS = (Operator("segment_dots", segment_dots, _DTYPES),)
