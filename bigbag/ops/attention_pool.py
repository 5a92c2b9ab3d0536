"""Attention pooling over the bags of a pack: ABMIL's pool, gated or not, with one or several heads.

The implementations are ``torch.library`` custom operators (one for forward, one for backward), so that
``torch.compile(fullgraph=True)`` sees one node. They take the weights concatenated and in their final precision;
what is plain, differentiable and small (casts, ``cat``, missing biases) is done outside of them, by autograd.
They take ``offsets`` alone, not ``sizes``, so that a compiled graph does not depend on how a pack is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.dropout import fold_seed, keep
from bigbag.ops.registry import FLOATING, HALF, Operator, choose, compute_dtype
from bigbag.ops.segments import log_sums, reference_softmax

ACTIVATIONS = ("tanh", "relu", "gelu")

# By dtype of the computation. Tensor cores have no use for float64; the reference has.
_DTYPES = {
    "triton": (*HALF, torch.float32),
    "cpu": FLOATING,
    "reference": FLOATING,
}


def attention_pool(
    x: Tensor,
    segments: Segments,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    wg: Tensor | None = None,
    bg: Tensor | None = None,
    *,
    act: str = "tanh",
    keep_preactivations: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention-weighted mean of the instances of each bag.

        h = act(x w1^T + b1) [* sigmoid(x wg^T + bg)]
        scores = h w2^T,   a = softmax of scores over each bag,   z[b, h] = sum_t drop(a[t, h]) x[t]

    The computation runs in autocast's dtype where autocast is on (float64 weights excepted), else in that of ``w1``;
    ``x`` is converted to it chunk by chunk, never as a whole. Sums are accumulated in float32 (float64 for float64).
    Gradients flow to all weights, and to ``x`` where it requires grad, through both outputs. Not twice
    differentiable, except ``impl="reference"``. A bag without instances gives z = 0.

    Cost, with D' = D, or 2D if gated, in the dtype of the computation: 2 T P D' FLOP forward; backward 4 T P D'
    (2 T P D' with ``keep_preactivations``), and 2 T P D' more for the gradient of x. Bytes: x is read once
    (triton) or twice (cpu) forward, and twice backward. Beyond inputs, outputs and gradients it holds O(T H) floats and
    a constant number of chunks (cpu: below 64 MiB at P = 1024, D' = 256), T D' elements with ``keep_preactivations``,
    and with triton H P floats per 64 instances and bag. A non-contiguous x is copied.

    Args:
        x: (T, P) instances, float16, bfloat16, float32 or float64; may be stored narrower than the weights.
        segments: how the T instances are cut into B bags.
        w1: (D, P) weight.
        b1: (D,) bias or None.
        w2: (H, D) weight, one row per head.
        wg: (D, P) weight of the gate, or None for no gate.
        bg: (D,) bias of the gate or None.
        act: "tanh", "relu" or "gelu" (exact).
        keep_preactivations: keep x W^T (T, D') for backward instead of computing it again.
        dropout: share of the attention weights set to 0, the rest being divided by 1 - dropout.
        seed: which weights are dropped: a function of (seed, head, row of x), the same for all ``impl``.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        z (B, H, P) in the dtype of the computation, and scores (T, H) in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown ``act``, an ``impl`` that can't run.

    Ilse et al., Attention-based deep multiple instance learning, ICML 2018.
    """
    _check(x, segments, w1, b1, w2, wg, bg, act, dropout)
    dtype = compute_dtype(w1)
    chosen = choose("attention_pool", _DTYPES, impl, x.device.type, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    gated = wg is not None
    # Converted first: autocast to bfloat16 can't lay float16 end to end.
    weight = w1.to(dtype) if wg is None else torch.cat([w1.to(dtype), wg.to(dtype)])
    if b1 is None and bg is None:
        bias = w2.new_zeros(weight.shape[0], dtype=acc)
    else:
        zeros = w1.new_zeros(w1.shape[0], dtype=acc)
        parts = [zeros if b is None else b.to(acc) for b in ((b1, bg) if gated else (b1,))]
        bias = torch.cat(parts) if gated else parts[0]
    factors = _drop_factors(x, w2, acc, dropout, seed) if dropout else None
    args = (x, segments.offsets, weight, bias, w2.to(acc), factors, act, gated)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            z, scores = _reference(*args)
    else:
        z, scores, _, _ = _FORWARD[chosen](*args, keep_preactivations)
    if segments.parts is not None:
        own = distributed.shares(log_sums(scores, segments), segments.parts)
        z = distributed.all_sum(z * own[..., None], segments.parts)
    return z.to(dtype), scores


def _check(
    x: Tensor,
    segments: Segments,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    wg: Tensor | None,
    bg: Tensor | None,
    act: str,
    dropout: float,
) -> None:
    if x.dim() != 2 or x.dtype not in FLOATING:
        raise ValueError(f"attention_pool: x must be a (T, P) floating tensor, got {tuple(x.shape)} {x.dtype}")
    # Not while tracing: a compiled graph must not depend on how a pack is cut.
    if not torch.compiler.is_compiling() and x.shape[0] != segments.num_instances:
        rows = segments.num_instances
        raise ValueError(f"attention_pool: x has {x.shape[0]} rows, but segments has {rows} instances")
    if act not in ACTIVATIONS:
        raise ValueError(f"attention_pool: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention_pool: dropout must be in [0, 1), got {dropout}")
    if bg is not None and wg is None:
        raise ValueError("attention_pool: bg without wg: a gate needs its weight")
    dim = w1.shape[0]
    expected = {"w1": (w1, (dim, x.shape[1])), "b1": (b1, (dim,)), "w2": (w2, (w2.shape[0], dim))}
    expected |= {"wg": (wg, (dim, x.shape[1])), "bg": (bg, (dim,))}
    for name, (value, shape) in expected.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(f"attention_pool: {name} has shape {tuple(value.shape)}, expected {shape}")
        if value.device != x.device or not value.is_floating_point():
            found = f"{value.dtype} on {value.device}"
            raise ValueError(f"attention_pool: {name} must be floating on {x.device}, got {found}")


def _drop_factors(x: Tensor, w2: Tensor, acc: torch.dtype, dropout: float, seed: int) -> Tensor:
    """(T, H): 0 for the weights that dropout drops, 1 / (1 - dropout) for the others."""
    rows = torch.arange(x.shape[0], device=x.device)
    return keep(fold_seed(seed), w2.shape[0], rows.new_zeros(1), rows, dropout)[:, 0].t().to(acc) / (1 - dropout)


def _reference(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, factors: Tensor | None, act: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """The definition: rounding to the compute dtype where its GEMMs round, the rest in the accumulation dtype."""
    x = x.to(weight.dtype)
    pre = (x @ weight.t()).to(bias.dtype) + bias
    left, right = pre.chunk(2, 1) if gated else (pre, None)
    hidden = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[act](left)
    if right is not None:
        hidden = hidden * torch.sigmoid(right)
    scores = hidden @ w2.t()
    starts = offsets.tolist()
    a = reference_softmax(scores, offsets)
    a = a if factors is None else a * factors
    bags = [a[s:e].t() @ x[s:e].to(a.dtype) for s, e in zip(starts, starts[1:])]
    z = torch.stack(bags) if bags else x.new_zeros(0, w2.shape[0], x.shape[1], dtype=a.dtype)
    return z, scores


_SCHEMA_FORWARD = (
    "(Tensor x, Tensor offsets, Tensor weight, Tensor bias, Tensor w2, Tensor? factors, str act, bool gated, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_SCHEMA_BACKWARD = (
    "(Tensor? grad_z, Tensor? grad_scores, Tensor x, Tensor offsets, Tensor weight, Tensor bias, Tensor w2, Tensor z,"
    " Tensor a, Tensor kept, Tensor? factors, str act, bool gated, bool need_x) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _register(impl: str, kernels: str) -> Any:
    """Custom operators ``bigbag::attention_pool_{impl}`` and ``..._backward`` around the launchers in ``kernels``."""

    name, module = f"attention_pool_{impl}", f"{kernels}.attention_pool"
    forward = CustomOp(name, _SCHEMA_FORWARD, launcher(module, "forward"))
    backward = CustomOp(f"{name}_backward", _SCHEMA_BACKWARD, launcher(module, "backward"))

    @forward.register_fake
    def _(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, *options: Any) -> Any:
        z = bias.new_empty(offsets.shape[0] - 1, w2.shape[0], x.shape[1])
        scores = bias.new_empty(x.shape[0], w2.shape[0])
        kept = weight.new_empty((x.shape[0], weight.shape[0]) if options[-1] else (0,))
        return z, scores, torch.empty_like(scores), kept

    @backward.register_fake
    def _(grad_z: Any, grad_scores: Any, *args: Any) -> Any:
        x, _, weight, bias, w2, *_, need_x = args
        grad_x = x.new_empty(x.shape if need_x else (0,))
        return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape), w2.new_empty(w2.shape)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        x, offsets, weight, bias, w2, factors, act, gated, _ = inputs
        z, _, a, kept = output
        ctx.mark_non_differentiable(a, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, offsets, weight, bias, w2, z, a, kept, factors)
        ctx.act, ctx.gated = act, gated

    def differentiate(ctx: Any, grad_z: Any, grad_scores: Any, *_: Any) -> Any:
        if grad_z is None and grad_scores is None:
            return (None,) * 9
        need_x = ctx.needs_input_grad[0]
        grads = backward(grad_z, grad_scores, *ctx.saved_tensors, ctx.act, ctx.gated, need_x)
        return grads[0] if need_x else None, None, *grads[1:], None, None, None, None

    forward.register_autograd(differentiate, setup_context=setup)
    return forward


_FORWARD = {
    "cpu": _register("cpu", "bigbag.kernels.cpu"),
    "triton": _register("triton", "bigbag.kernels.gpu"),
}

OPERATORS = (Operator("attention_pool", attention_pool, _DTYPES),)
