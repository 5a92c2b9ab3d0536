"""Softmax, sum, mean and maximum over the bags of a pack; where ``segments.parts`` says so, over several ranks.

``cpu`` and ``triton`` are ``torch.library`` custom operators on (T, C) matrices; the gradients of sum, mean and max
are plain gathers and scatters, written in PyTorch. Sums are accumulated in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.parts import Parts

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


def segment_softmax(scores: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Softmax over the instances of each bag, column by column.

        a[t] = exp(scores[t] - max_b) / sum_{s in b} exp(scores[s] - max_b),   b the bag of t

    Bytes: 5 T C forward, 5 T C backward elements moved. FLOPs: O(T C).

    Args:
        scores: (T, ...) floating.
        segments: how the T rows are cut into bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, ...) in the dtype of ``scores``.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    chosen, rows = _prepare("segment_softmax", scores, segments, impl)
    if chosen == "reference":
        out = reference_softmax(_accumulate(rows), segments.offsets)
    else:
        out = _OPS["softmax", chosen](rows, segments.offsets)
    if segments.parts is not None:
        own = distributed.shares(log_sums(rows, segments), segments.parts)
        out = out * own[segments.bag_of_instance]
    return out.to(scores.dtype).view(scores.shape)


def log_sums(rows: Tensor, segments: Segments) -> Tensor:
    """(B, C): the log of the sum of exponentials over this rank's rows of each bag."""
    from bigbag.ops.topk import segment_logsumexp

    return segment_logsumexp(_accumulate(rows), Segments(segments.offsets, segments.sizes))


def segment_sum(x: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Sum over the instances of each bag, ``out[b] = sum_{t in b} x[t]``; zeros for an empty bag.

    Bytes: x once forward, x once backward. FLOPs: T C.

    Args:
        x: (T, ...) floating.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (B, ...) in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    return _sum("segment_sum", x, segments, impl).to(x.dtype)


def segment_mean(x: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Mean over the instances of each bag; zeros for an empty bag. Arguments and cost as in :func:`segment_sum`."""
    total = _sum("segment_mean", x, segments, impl)
    sizes = segments.bag_sizes.clamp_min(1).to(total.dtype)
    return (total / sizes.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def segment_max(x: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Maximum over the instances of each bag; zeros for an empty bag.

    The gradient goes to the first row that attains the maximum. Bytes, FLOPs and arguments as in :func:`segment_sum`.
    """
    chosen, rows = _prepare("segment_max", x, segments, impl)
    if chosen == "reference":
        out = _per_bag(rows, segments.offsets, lambda bag: bag.gather(0, _first_maximal_row(bag)[None])[0])
    else:
        out, _ = _OPS["max", chosen](rows, segments.offsets)
    if segments.parts is not None:
        out = largest_of_ranks(out, segments, segments.parts)
    return out.to(x.dtype).view(out.shape[0], *x.shape[1:])


def largest_of_ranks(own: Tensor, segments: Segments, parts: Parts) -> Tensor:
    """The largest value of all ranks that hold rows; its gradient goes to the first rank that attains it."""
    own = _accumulate(own)
    filled = (segments.offsets.diff() > 0)[:, None]
    top = distributed.all_max(torch.where(filled, own, -torch.inf), parts)
    # The lowest rank, as the largest of numbers that fall with the rank; 0 where no rank attains it.
    bids = torch.where(filled & (own == top), parts.num_ranks - parts.rank, 0)
    wins = (bids > 0) & (distributed.all_max(bids, parts) == bids)
    return distributed.all_sum(torch.where(wins, own, 0), parts)


def reference_softmax(rows: Tensor, offsets: Tensor) -> Tensor:
    """The definition of :func:`segment_softmax` on (T, C)."""
    starts = offsets.tolist()
    bags = [rows[s:e].softmax(0) for s, e in zip(starts, starts[1:])]
    return torch.cat(bags) if bags else rows.clone()


def _per_bag(rows: Tensor, offsets: Tensor, reduce: Any) -> Tensor:
    starts = offsets.tolist()
    # The sum over no row is zeros, and keeps its place in the graph.
    bags = [reduce(rows[s:e]) if e > s else rows[s:e].sum(0) for s, e in zip(starts, starts[1:])]
    return torch.stack(bags) if bags else rows.new_zeros(0, rows.shape[1])


def _first_maximal_row(bag: Tensor) -> Tensor:
    """(C,) index of the first row that attains the maximum of its column (torch.max promises none in particular)."""
    top = bag.detach().amax(0)
    hit = (bag == top) | (bag.isnan() & top.isnan())
    return hit.to(torch.uint8).argmax(0)


def _sum(name: str, x: Tensor, segments: Segments, impl: str | None) -> Tensor:
    chosen, rows = _prepare(name, x, segments, impl)
    if chosen == "reference":
        out = _per_bag(_accumulate(rows), segments.offsets, lambda bag: bag.sum(0))
    else:
        out = _OPS["sum", chosen](rows, segments.offsets)
    if segments.parts is not None:
        out = distributed.all_sum(out, segments.parts)
    return out.view(out.shape[0], *x.shape[1:])


def _prepare(name: str, x: Tensor, segments: Segments, impl: str | None) -> tuple[str, Tensor]:
    # The number of rows is not checked while tracing: a compiled graph must not depend on how a pack is cut.
    fits = x.dim() > 0 and (torch.compiler.is_compiling() or x.shape[0] == segments.num_instances)
    if not fits or not x.is_floating_point():
        raise ValueError(
            f"{name}: expected floating (T, ...) with T = {segments.num_instances} as in segments, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    return choose(name, _DTYPES, impl, x.device.type, x.dtype), x.reshape(x.shape[0], x.shape[1:].numel())


def _accumulate(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_of_bags(values: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """(B, C) -> (T, C): each row gets the values of its bag."""
    bags = torch.repeat_interleave(offsets.diff(), output_size=num_rows)
    if values.requires_grad:
        return values.index_select(0, bags)
    return torch.index_select(values, 0, bags, out=huge_pages(values.new_empty(num_rows, values.shape[1])))


def _register(impl: str, module: str) -> None:
    """Custom operators ``bigbag::segment_{sum_rows,max_rows,softmax,softmax_backward}_{impl}`` around ``module``."""

    def define(function: str, schema: str) -> CustomOp:
        return CustomOp(f"segment_{function}_{impl}", schema, launcher(module, function))

    total = define("sum_rows", "(Tensor x, Tensor offsets) -> Tensor")
    largest = define("max_rows", "(Tensor x, Tensor offsets) -> (Tensor, Tensor)")
    softmax = define("softmax", "(Tensor x, Tensor offsets) -> Tensor")
    softmax_backward = define("softmax_backward", "(Tensor a, Tensor grad, Tensor offsets) -> Tensor")
    _OPS["sum", impl], _OPS["max", impl], _OPS["softmax", impl] = total, largest, softmax

    def per_bag(x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        return x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=dtype)

    total.register_fake(lambda x, offsets: per_bag(x, offsets, _acc(x)))
    largest.register_fake(lambda x, offsets: (per_bag(x, offsets, _acc(x)), per_bag(x, offsets, torch.int64)))
    softmax.register_fake(lambda x, offsets: x.new_empty(x.shape, dtype=_acc(x)))
    softmax_backward.register_fake(lambda a, grad, offsets: a.new_empty(a.shape))

    def setup_sum(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows, ctx.dtype = inputs[0].shape[0], inputs[0].dtype

    def differentiate_sum(ctx: Any, grad: Tensor) -> Any:
        return _rows_of_bags(grad.to(ctx.dtype), ctx.saved_tensors[0], ctx.rows), None

    def setup_max(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], output[1])
        ctx.rows, ctx.dtype = inputs[0].shape[0], inputs[0].dtype

    def differentiate_max(ctx: Any, grad: Tensor, _: Any) -> Any:
        offsets, index = ctx.saved_tensors
        # One row more takes the gradient of empty bags, whose index is -1.
        out = grad.new_zeros(ctx.rows + 1, grad.shape[1])
        out.scatter_(0, torch.where(index < 0, ctx.rows, index), grad)
        return out[: ctx.rows].to(ctx.dtype), None

    def setup_softmax(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.dtype = inputs[0].dtype

    def differentiate_softmax(ctx: Any, grad: Tensor) -> Any:
        a, offsets = ctx.saved_tensors
        return softmax_backward(a, grad, offsets).to(ctx.dtype), None

    total.register_autograd(differentiate_sum, setup_context=setup_sum)
    largest.register_autograd(differentiate_max, setup_context=setup_max)
    softmax.register_autograd(differentiate_softmax, setup_context=setup_softmax)


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu", "bigbag.kernels.cpu.segments")
_register("triton", "bigbag.kernels.gpu.segments")

OPERATORS = (
    Operator("segment_softmax", segment_softmax, _DTYPES),
    Operator("segment_sum", segment_sum, _DTYPES),
    Operator("segment_mean", segment_mean, _DTYPES),
    Operator("segment_max", segment_max, _DTYPES),
)
