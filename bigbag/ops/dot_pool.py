"""Attention pooling whose scores are inner products with a few vectors of the bag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.ops.rows import check_vectors, segment_dots
from bigbag.ops.segments import log_sums, segment_softmax
from bigbag.ops.topk import segment_pool

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}
# Beyond, matrix products are faster than one pass.
_FEW = 2


def dot_attention_pool(x: Tensor, y: Tensor, segments: Segments, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Attention-weighted means of the instances of each bag, for one or a few queries of the bag.

        scores[t, h] = x[t] . y[b, h],   a = softmax of scores over each bag,   z[b, h] = sum_t a[t, h] x[t]

    FLOPs: 4 T S P forward, as many for each gradient. Bytes: ``cpu`` reads x once forward and once backward for S up
    to 2, else, as ``triton``, twice. Working memory: O(T S) and a constant number of chunks.

    Args:
        x: (T, P) floating; may be stored narrower than y.
        y: (B, S, P) floating.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        z (B, S, P), zeros for an empty bag, and scores (T, S), in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    check_vectors("dot_attention_pool", x, y, segments)
    dtype = torch.promote_types(x.dtype, y.dtype)
    chosen = choose("dot_attention_pool", _DTYPES, impl, x.device.type, dtype)
    own = Segments(segments.offsets, segments.sizes)
    if chosen == "cpu" and 0 < y.shape[1] <= _FEW:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        z, scores, _ = _CPU(x, y.to(acc), segments.offsets)
    else:
        scores = segment_dots(x, y, own, impl=chosen)
        z = segment_pool(segment_softmax(scores, own, impl=chosen), x, own, impl=chosen)
    if segments.parts is not None:
        z = distributed.all_sum(
            z * distributed.shares(log_sums(scores, own), segments.parts)[..., None], segments.parts
        )
    return z, scores


def _register(module: str) -> Any:
    """Custom operators ``bigbag::dot_attention_pool_cpu`` and ``..._backward`` around the launchers of ``module``."""

    def define(name: str, function: str, schema: str) -> CustomOp:
        return CustomOp(name, schema, launcher(module, function))

    name = "dot_attention_pool_cpu"
    forward = define(name, "forward", "(Tensor x, Tensor y, Tensor offsets) -> (Tensor, Tensor, Tensor)")
    backward = define(
        f"{name}_backward",
        "backward",
        "(Tensor? grad_z, Tensor? grad_scores, Tensor x, Tensor y, Tensor offsets, Tensor z, Tensor a, bool need_x)"
        " -> (Tensor, Tensor)",
    )

    @forward.register_fake
    def _(x: Tensor, y: Tensor, offsets: Tensor) -> Any:
        scores = y.new_empty(x.shape[0], y.shape[1])
        return torch.empty_like(y), scores, torch.empty_like(scores)

    @backward.register_fake
    def _(grad_z: Any, grad_scores: Any, x: Tensor, y: Tensor, offsets: Any, z: Any, a: Any, need_x: bool) -> Any:
        return x.new_empty(x.shape if need_x else (0,)), torch.empty_like(y)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        z, _, a = output
        ctx.mark_non_differentiable(a)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, z, a)

    def differentiate(ctx: Any, grad_z: Any, grad_scores: Any, _: Any) -> Any:
        if grad_z is None and grad_scores is None:
            return None, None, None
        grad_x, grad_y = backward(grad_z, grad_scores, *ctx.saved_tensors, ctx.needs_input_grad[0])
        return grad_x if ctx.needs_input_grad[0] else None, grad_y, None

    forward.register_autograd(differentiate, setup_context=setup)
    return forward


_CPU = _register("bigbag.kernels.cpu.dot_pool")

OPERATORS = (Operator("dot_attention_pool", dot_attention_pool, _DTYPES),)
