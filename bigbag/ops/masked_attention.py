"""Attention of the instances of each bag among themselves, or of queries of a bag to its instances.

``cpu`` and ``triton`` are ``torch.library`` custom operators (one for forward, one for backward) which take ``offsets``
alone, so that a compiled graph does not depend on how a pack is cut. ``varlen`` and ``xformers`` call the fused
CUDA kernels of those libraries. What is plain, differentiable and small (casts, q times a table) is left to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import attention_bias, fused_attention
from bigbag.ops.attention_bias import AttentionBias, KernelBias
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.dropout import fold_seed, keep
from bigbag.ops.fused_attention import kept_keys
from bigbag.ops.registry import FLOATING, HALF, Operator, _overrides, choose, compute_dtype

_DTYPES = {
    "varlen": HALF,
    "xformers": (*HALF, torch.float32),
    "triton": (*HALF, torch.float32),
    "cpu": FLOATING,
    "reference": FLOATING,
}
_MAX_TRITON_DIM = 256


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    kv_segments: Segments | None = None,
    *,
    mask: Tensor | None = None,
    bias: AttentionBias | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Softmax attention inside each bag, never across bags, and never as a matrix in memory.

        S[i, j] = scale q[i] . k[j] + bias[i, j]      j over the keys of i's bag that take part
        out[i]  = sum_j drop(softmax_j S[i, j]) v[j]

    The computation runs in autocast's dtype where autocast is on (float64 excepted), else in that of ``q``; sums and
    softmax in float32 (float64 for float64). Gradients flow to q, k, v and to the slopes or table of ``bias``; not
    twice differentiable, except ``impl="reference"``. A query without any key, because its bag is empty or wholly
    masked, gives zeros and no gradient. Backward takes the weights from exp(S - logsumexp), whose relative error is
    about |S| times the rounding of float32: scores in the tens of thousands cost the gradients three digits.

    Cost for a bag of N instances: 4 H N^2 d FLOP forward, 10 H N^2 d backward (S is recomputed from its logsumexp).
    Memory beyond inputs and outputs: O(T H d), with a bias O(T H (d + buckets)) in mode "contextual"; cpu: blocks of
    constant size besides. With a mask the implementations but triton copy the keys that take part. For bags that ranks
    share see :mod:`bigbag.ops.ring_attention`; there, dropout drops other weights than on one rank.

    Args:
        q: (Tq, H, d) queries.
        k: (Tk, H, d) keys.
        v: (Tk, H, dv) values.
        segments: how the Tq queries are cut into B bags.
        kv_segments: how the Tk keys are cut into the same B bags; None: as the queries (self-attention).
        mask: (Tk,) bool, True: the key takes part. Rows of ``out`` of masked instances are computed all the same.
        bias: added to the scores, computed block by block. See :mod:`bigbag.ops.attention_bias`.
        dropout: share of the attention weights set to 0, the rest being divided by 1 - dropout.
        seed: which weights are dropped: a function of (seed, head, row of q, row of k), the same for all ``impl``.
        scale: None: 1 / sqrt(d).
        impl: "varlen" (torch.nn.attention.varlen), "xformers", "triton", "cpu" or "reference"; None chooses by device.
            "varlen" and "xformers" take neither bias nor dropout.

    Returns:
        (Tq, H, dv) in the dtype of the computation.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an ``impl`` that can't run.

    Dao, FlashAttention-2: faster attention with better parallelism and work partitioning, ICLR 2024.
    """
    kv_segments = segments if kv_segments is None else kv_segments
    _check(q, k, v, segments, kv_segments, mask, bias, dropout)
    q, k, v = (t.to(compute_dtype(q)) for t in (q, k, v))
    scale = 1 / math.sqrt(max(q.shape[2], 1)) if scale is None else float(scale)
    if segments.parts is not None:
        return _in_parts(q, k, v, segments, kv_segments, mask, bias, dropout, seed, scale, impl)
    chosen = _choose(impl, q, v, bias, dropout)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, k, v, segments, kv_segments, mask, bias, dropout, seed, scale)
    if chosen in fused_attention.IMPLS:
        return fused_attention.run(chosen, q, k, v, segments, kv_segments, mask, scale)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    ready = attention_bias.for_kernels(bias, q, scale, acc)
    return _FORWARD[chosen](
        q, k, v, segments.offsets, kv_segments.offsets, mask, *_flat(ready), float(dropout), fold_seed(seed), scale
    )[0].to(q.dtype)


def _in_parts(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, mask: Tensor | None,
    bias: AttentionBias | None, dropout: float, seed: int, scale: float, impl: str | None,
) -> Tensor:  # fmt: skip
    from bigbag.ops.ring_attention import ring_attention

    if mask is not None or bias is not None or kv_segments is not segments:
        raise ValueError(
            "masked_attention: bags that ranks share take neither mask nor bias nor other keys than the queries': set "
            "parallel.bag to 1"
        )
    chosen = impl or _overrides.get("masked_attention") or ("triton" if q.is_cuda else "cpu")
    if chosen not in _FORWARD:
        able = ", ".join(_FORWARD)
        raise ValueError(
            f"masked_attention: implementation {chosen!r} takes whole bags, but ranks share these: {able} can"
        )
    assert segments.parts is not None
    seeds = [fold_seed(seed + number) for number in range(q.shape[1] * segments.parts.num_ranks)]
    return ring_attention(
        q, k, v, segments, dropout, seeds, scale, choose("masked_attention", _DTYPES, chosen, q.device.type, q.dtype)
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, mask: Tensor | None,
    bias: AttentionBias | None, dropout: float, seed: int, scale: float,
) -> Tensor:  # fmt: skip
    """The definition, with its (H, N, N) matrix: rounding to the compute dtype where the weights meet the values."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = []
    starts, kv_starts = segments.offsets.tolist(), kv_segments.offsets.tolist()
    keys = torch.arange(k.shape[0], device=k.device) if mask is None else kept_keys(mask)
    for s, e, ks, ke in zip(starts, starts[1:], kv_starts, kv_starts[1:]):
        rows, columns = slice(s, e), keys[(keys >= ks) & (keys < ke)]
        if not len(columns):
            out.append(v.new_zeros(e - s, *v.shape[1:]))
            continue
        scores = torch.einsum("ihd,jhd->hij", q[rows].to(acc), k[columns].to(acc)) * scale
        if bias is not None:
            scores = scores + attention_bias.matrix(bias, q.to(acc), scale, rows, columns)
        weights = scores.softmax(-1)
        if dropout:
            kept = keep(fold_seed(seed), q.shape[1], torch.arange(s, e, device=q.device), columns, dropout)
            weights = weights * kept / (1 - dropout)
        weights = weights.to(q.dtype).to(acc)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[columns].to(acc)).to(q.dtype))
    # The sums of no rows keep every input in the graph where no bag has keys.
    nothing = q[:0].sum() + k[:0].sum()
    if bias is not None:
        nothing = nothing + attention_bias.matrix(bias, q.to(acc), scale, slice(0), slice(0)).sum().to(q.dtype)
    return torch.cat([*out, v[:0]]) + nothing


def _check(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, mask: Tensor | None,
    bias: AttentionBias | None, dropout: float,
) -> None:  # fmt: skip
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[1:] != q.shape[1:] or v.shape[:2] != k.shape[:2]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"masked_attention: expected q (Tq, H, d), k (Tk, H, d), v (Tk, H, dv), got {shapes}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype != q.dtype or value.dtype not in FLOATING or value.device != q.device:
            raise ValueError(
                f"masked_attention: q, k and v must share a floating dtype and a device, got q {q.dtype} on {q.device} "
                f"and {name} {value.dtype} on {value.device}"
            )
    # Not while tracing: a compiled graph must not depend on how a pack is cut.
    if not torch.compiler.is_compiling():
        cuts = (("q", q, segments), ("k", k, kv_segments))
        for name, value, cut in cuts:
            if value.shape[0] != cut.num_instances:
                what = f"{name} has {value.shape[0]} rows, but its segments have {cut.num_instances} instances"
                raise ValueError(f"masked_attention: {what}")
        if segments.num_bags != kv_segments.num_bags:
            raise ValueError(
                f"masked_attention: segments has {segments.num_bags} bags, kv_segments {kv_segments.num_bags}"
            )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (k.shape[0],)):
        raise ValueError(
            f"masked_attention: mask must be bool of shape {(k.shape[0],)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"masked_attention: dropout must be in [0, 1), got {dropout}")
    if bias is not None:
        attention_bias.check(bias, q.shape[0], k.shape[0], q.shape[1], q.shape[2])


def _choose(impl: str | None, q: Tensor, v: Tensor, bias: AttentionBias | None, dropout: float) -> str:
    """The implementation for this call: ``registry.choose`` among those that take these arguments."""
    device = q.device.type
    reasons = {name: _why_not(name, q, v, bias, dropout) for name in _DTYPES}
    requested = impl if impl is not None else _overrides.get("masked_attention")
    if requested is not None and reasons.get(requested) is not None:
        raise ValueError(f"ops.masked_attention: implementation {requested!r} can't run: {reasons[requested]}")
    suited = {name: dtypes for name, dtypes in _DTYPES.items() if reasons[name] is None}
    return choose("masked_attention", _DTYPES if requested is not None else suited, impl, device, q.dtype)


def _why_not(impl: str, q: Tensor, v: Tensor, bias: AttentionBias | None, dropout: float) -> str | None:
    """Why these arguments can't go to ``impl``, or None if they can (device and dtype are the registry's to check)."""
    if impl in fused_attention.IMPLS:
        return fused_attention.why_not(impl, q, v, bias is not None, dropout)
    widest = max(q.shape[2], v.shape[2])
    if impl == "triton" and widest > _MAX_TRITON_DIM:
        return f"it takes head dimensions up to {_MAX_TRITON_DIM}, got {widest}"
    return None


def _flat(bias: KernelBias) -> tuple[Any, ...]:
    return (*bias[:-1], list(bias.thresholds))


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor kv_offsets, Tensor? mask, Tensor? coords, Tensor? kv_coords,"
    " Tensor? weights, str kind, float[] thresholds, float dropout, int seed, float scale"
)
_SCHEMA_FORWARD = f"({_ARGUMENTS}) -> (Tensor, Tensor)"
_SCHEMA_BACKWARD = (
    f"(Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _register(impl: str, module: str) -> Callable[..., Any]:
    """Custom operators ``bigbag::masked_attention_{impl}`` and ``..._backward`` around the launchers of ``module``."""

    name = f"masked_attention_{impl}"
    forward = CustomOp(name, _SCHEMA_FORWARD, launcher(module, "forward"))
    backward = CustomOp(f"{name}_backward", _SCHEMA_BACKWARD, launcher(module, "backward"))

    def accumulation(q: Tensor) -> torch.dtype:
        return torch.float64 if q.dtype == torch.float64 else torch.float32

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        # rest[6] is the kind of the bias: with one, out comes unrounded.
        out = q.new_empty(*q.shape[:2], v.shape[2], dtype=accumulation(q) if rest[6] else q.dtype)
        return out, q.new_empty(q.shape[:2], dtype=accumulation(q))

    @backward.register_fake
    def _(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        weights, need_weights = rest[5], rest[-1]
        grad_weights = lse.new_empty(weights.shape if need_weights else (0,))
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_weights

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *inputs[:9])
        ctx.rest = inputs[9:]

    def differentiate(ctx: Any, grad: Any, _: Any) -> Any:
        if grad is None:
            return (None,) * 14
        need_weights = ctx.needs_input_grad[8]
        *main, weights = backward(grad, *ctx.saved_tensors, *ctx.rest, need_weights)
        return *main, None, None, None, None, None, weights if need_weights else None, *[None] * 5

    forward.register_autograd(differentiate, setup_context=setup)
    return forward


_FORWARD = {
    "cpu": _register("cpu", "bigbag.kernels.cpu.masked_attention"),
    "triton": _register("triton", "bigbag.kernels.gpu.masked_attention"),
}

OPERATORS = (
    Operator(
        "masked_attention",
        masked_attention,
        _DTYPES,
        excludes={
            "varlen": "a bias, dropout, or head dimensions over 256",
            "xformers": "a bias or dropout",
            "triton": "head dimensions over 256",
        },
    ),
)
