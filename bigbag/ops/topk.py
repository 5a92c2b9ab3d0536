"""The k best rows, the log-sum-exp, and sums with many columns of weights, over the bags of a pack.

Custom operators on (T, C) matrices that take ``offsets`` alone, as in :mod:`bigbag.ops.segments`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.registry import FLOATING, HALF, Operator, choose

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


def segment_topk(
    scores: Tensor, segments: Segments, k: int, *, largest: bool = True, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest (or smallest) scores of each bag, column by column, and where they are.

        index[b, :, c] = rows of bag b by scores[:, c], best first, the lower row first among equals;  values =
        scores[index]

    NaN counts as the largest value. The gradient of ``values`` goes to the rows taken. Bytes: the scores once (cpu),
    twice per bit of a score from cache (triton), B k C forward and backward. Comparisons: T C, and B C k log T more
    for the order.

    Args:
        scores: (T,) or (T, C) floating.
        segments: how the T rows are cut into B bags.
        k: how many rows; at least 1.
        largest: False takes the smallest, smallest first.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        values (B, k[, C]) in the dtype of ``scores``, 0 where the bag has fewer than k rows; index (B, k[, C]) int64,
        row in the pack, -1 there; count (B,) int64, min(k, size of the bag). Where bags are shared out over ranks, the
        index is also -1 where another rank holds the row.

    Raises:
        ValueError: shapes that do not fit, k < 1, an ``impl`` that can't run.
    """
    _check("segment_topk", scores, segments, (1, 2))
    if k < 1:
        raise ValueError(f"segment_topk: k must be at least 1, got {k}")
    chosen = choose("segment_topk", _DTYPES, impl, scores.device.type, scores.dtype)
    rows = scores.reshape(scores.shape[0], scores.shape[1:].numel())
    detached = rows.detach()
    if chosen == "reference":
        index = _reference_topk(detached, segments, k, largest)
    else:
        index = _OPS["topk", chosen](detached, segments.offsets, k, largest)
    values = _gathered(rows, index)
    if segments.parts is not None:
        index = _best_of_ranks(values.detach().view(index.shape), index, segments, largest)
        values = distributed.all_sum(_gathered(rows, index), segments.parts).to(scores.dtype)
    shape = (segments.offsets.shape[0] - 1, k, *scores.shape[1:])
    return values.view(shape), index.view(shape), segments.bag_sizes.clamp_max(k)


def _gathered(rows: Tensor, index: Tensor) -> Tensor:
    """The values (B k, C) at an index (B, k, C), 0 where it is -1."""
    flat = index.flatten(0, 1)
    if not rows.shape[0]:
        return rows.new_zeros(flat.shape) + rows.sum()
    return torch.where(flat < 0, 0, rows.gather(0, flat.clamp_min(0)))


@torch.no_grad()
def _best_of_ranks(values: Tensor, index: Tensor, segments: Segments, largest: bool) -> Tensor:
    """``index`` (B, k, C) of this rank's best rows, in the places that they have among those of all ranks."""
    assert segments.parts is not None
    k, parts = index.shape[1], segments.parts
    missing = distributed.all_stack((index < 0).to(torch.int8), parts).bool()
    every = distributed.all_stack(values, parts)
    # Equals stay in order of rank, and so of row; what is missing comes last.
    ranked = every.transpose(0, 1).flatten(1, 2).sort(dim=1, descending=largest, stable=True).indices
    absent = missing.transpose(0, 1).flatten(1, 2).gather(1, ranked)
    order = ranked.gather(1, absent.to(torch.int8).sort(dim=1, stable=True).indices)[:, :k]
    mine = order // k == parts.rank
    return torch.where(mine, index.gather(1, order % k), -1)


def segment_logsumexp(x: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Log of the sum of exponentials over each bag, ``out[b] = log sum_{t in b} exp(x[t])``; -inf for an empty bag.

    Bytes: x once forward, once backward; working memory: a constant number of chunks. FLOPs: O(T C).

    Args:
        x: (T, ...) floating.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (B, ...) in the dtype of ``x``.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    _check("segment_logsumexp", x, segments, None)
    chosen = choose("segment_logsumexp", _DTYPES, impl, x.device.type, x.dtype)
    rows = x.reshape(x.shape[0], x.shape[1:].numel())
    if chosen == "reference":
        wide = rows.to(_acc(x.dtype))
        bags = [wide[s:e].logsumexp(0) for s, e in zip(segments.starts, segments.starts[1:])]
        out = torch.stack(bags) if bags else wide.new_zeros(0, wide.shape[1])
    else:
        out = _OPS["logsumexp", chosen](rows, segments.offsets)
    if segments.parts is not None:
        top = distributed.all_max(out, segments.parts)
        top = torch.where(top == -torch.inf, 0, top)
        out = top + distributed.all_sum((out - top).exp(), segments.parts).log()
    return out.to(x.dtype).view(out.shape[0], *x.shape[1:])


def segment_pool(weights: Tensor, x: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """Weighted sums of the instances of each bag, for many columns of weights at once (ProbSmooth draws 1,000).

        z[b, s] = sum_{t in b} weights[t, s] x[t]

    FLOPs: 2 T S P forward, 4 T S P backward. Bytes: weights and x once each way. Working memory: a constant number of
    chunks.

    Args:
        weights: (T, S) floating.
        x: (T, P) floating; may be stored narrower than the weights, or wider.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (B, S, P) in the wider of the two dtypes; zeros for an empty bag.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    _check("segment_pool", weights, segments, (2,))
    _check("segment_pool", x, segments, (2,))
    dtype = torch.promote_types(weights.dtype, x.dtype)
    chosen = choose("segment_pool", _DTYPES, impl, x.device.type, dtype)
    if chosen == "reference":
        left, right = weights.to(_acc(dtype)), x.to(_acc(dtype))
        with torch.autocast(x.device.type, enabled=False):
            bags = [left[s:e].t() @ right[s:e] for s, e in zip(segments.starts, segments.starts[1:])]
        out = torch.stack(bags) if bags else left.new_zeros(0, left.shape[1], right.shape[1])
    else:
        out = _OPS["pool", chosen](weights, x, segments.offsets)
    if segments.parts is not None:
        out = distributed.all_sum(out, segments.parts)
    return out.to(dtype)


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(name: str, x: Tensor, segments: Segments, ranks: tuple[int, ...] | None) -> None:
    rank_fits = x.dim() > 0 if ranks is None else x.dim() in ranks
    fits = rank_fits and (torch.compiler.is_compiling() or x.shape[0] == segments.num_instances)
    if not fits or not x.is_floating_point():
        shape = "(T, ...)" if ranks is None else " or ".join({1: "(T,)", 2: "(T, C)"}[rank] for rank in ranks)
        raise ValueError(
            f"{name}: expected floating {shape} with T = {segments.num_instances} as in segments, "
            f"got {tuple(x.shape)} {x.dtype}"
        )


def _reference_topk(rows: Tensor, segments: Segments, k: int, largest: bool) -> Tensor:
    index = torch.full((segments.num_bags, k, rows.shape[1]), -1, dtype=torch.int64, device=rows.device)
    for bag, (start, end) in enumerate(zip(segments.starts, segments.starts[1:])):
        best = rows[start:end].sort(dim=0, descending=largest, stable=True).indices[:k] + start
        index[bag, : len(best)] = best
    return index


_OPS: dict[tuple[str, str], Any] = {}


def _register(impl: str, module: str) -> None:
    """Custom operators ``bigbag::segment_{topk,logsumexp,pool}_{impl}`` around the launchers of ``module``."""

    def define(function: str, schema: str) -> CustomOp:
        return CustomOp(f"segment_{function}_{impl}", schema, launcher(module, function))

    topk = define("topk", "(Tensor x, Tensor offsets, int k, bool largest) -> Tensor")
    logsumexp = define("logsumexp", "(Tensor x, Tensor offsets) -> Tensor")
    logsumexp_backward = define("logsumexp_backward", "(Tensor grad, Tensor x, Tensor out, Tensor offsets) -> Tensor")
    pool = define("pool", "(Tensor weights, Tensor x, Tensor offsets) -> Tensor")
    pool_backward = define(
        "pool_backward",
        "(Tensor grad, Tensor weights, Tensor x, Tensor offsets, bool need_weights, bool need_x) -> (Tensor, Tensor)",
    )
    _OPS["topk", impl], _OPS["logsumexp", impl], _OPS["pool", impl] = topk, logsumexp, pool

    topk.register_fake(lambda x, offsets, k, largest: offsets.new_empty(offsets.shape[0] - 1, k, x.shape[1]))
    logsumexp.register_fake(lambda x, offsets: x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=_acc(x.dtype)))
    logsumexp_backward.register_fake(lambda grad, x, out, offsets: grad.new_empty(x.shape))

    @pool.register_fake
    def _(weights: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        dtype = _acc(torch.promote_types(weights.dtype, x.dtype))
        return x.new_empty(offsets.shape[0] - 1, weights.shape[1], x.shape[1], dtype=dtype)

    @pool_backward.register_fake
    def _(grad: Tensor, weights: Tensor, x: Tensor, offsets: Tensor, need_weights: bool, need_x: bool) -> Any:
        return weights.new_empty(weights.shape if need_weights else (0,)), x.new_empty(x.shape if need_x else (0,))

    def setup_logsumexp(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output, inputs[1])

    def differentiate_logsumexp(ctx: Any, grad: Tensor) -> Any:
        x, out, offsets = ctx.saved_tensors
        return logsumexp_backward(grad, x, out, offsets).to(x.dtype), None

    def setup_pool(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate_pool(ctx: Any, grad: Tensor) -> Any:
        need_weights, need_x = ctx.needs_input_grad[:2]
        grad_weights, grad_x = pool_backward(grad, *ctx.saved_tensors, need_weights, need_x)
        return grad_weights if need_weights else None, grad_x if need_x else None, None

    logsumexp.register_autograd(differentiate_logsumexp, setup_context=setup_logsumexp)
    pool.register_autograd(differentiate_pool, setup_context=setup_pool)


_register("cpu", "bigbag.kernels.cpu.topk")
_register("triton", "bigbag.kernels.gpu.topk")

OPERATORS = (
    Operator("segment_topk", segment_topk, _DTYPES),
    Operator("segment_logsumexp", segment_logsumexp, _DTYPES),
    Operator("segment_pool", segment_pool, _DTYPES),
)
