"""Attention values of projected instances: what follows the projection in the attention of ABMIL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.ops.attention_pool import ACTIVATIONS
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.registry import FLOATING, HALF, Operator, choose

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


def attention_scores(
    h: Tensor, bias: Tensor | None, w2: Tensor, *, act: str = "tanh", gated: bool = False, impl: str | None = None
) -> Tensor:
    """Attention values of instances that are projected already, such as those that were smoothed in between.

        scores[t, k] = sum_d w2[k, d] act(h[t, d] + bias[d]) [* sigmoid(h[t, D + d] + bias[D + d])]

    ``h`` is read as it is stored; all arithmetic is in float32 (float64 if any argument is), whatever autocast says.
    :func:`bigbag.ops.attention_pool` does the projection too, and the pooling.

    Cost, with D' = D, or 2D if gated: 2 T H D FLOP forward, 4 T H D backward, and T D' activations each way. Bytes: h
    once each way, its gradient, and scores (T, H). It keeps h alone; working memory: D' + H D floats per 2048 (triton:
    32) rows. Not twice differentiable, except ``impl="reference"``.

    Args:
        h: (T, D') projected instances, without bias; float16, bfloat16, float32 or float64.
        bias: (D',) or None.
        w2: (H, D) weight, one row per head.
        act: "tanh", "relu" or "gelu" (exact).
        gated: the right half of h is the gate.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, H) in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown ``act``, an ``impl`` that can't run.

    Ilse et al., Attention-based deep multiple instance learning, ICML 2018.
    """
    _check(h, bias, w2, act, gated)
    given = torch.float64 if torch.float64 in (t.dtype for t in (h, bias, w2) if t is not None) else h.dtype
    chosen = choose("attention_scores", _DTYPES, impl, h.device.type, given)
    acc = torch.float64 if given == torch.float64 else torch.float32
    bias = w2.new_zeros(h.shape[1], dtype=acc) if bias is None else bias.to(acc)
    return _FORWARD[chosen](h, bias, w2.to(acc), act, gated)


def _check(h: Tensor, bias: Tensor | None, w2: Tensor, act: str, gated: bool) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"attention_scores: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if h.dim() != 2 or w2.dim() != 2 or h.shape[1] != w2.shape[1] * (1 + gated):
        width = "2D" if gated else "D"
        raise ValueError(
            f"attention_scores: expected h (T, {width}) and w2 (H, D), got {tuple(h.shape)} and {tuple(w2.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (h.shape[1],):
        raise ValueError(f"attention_scores: bias has shape {tuple(bias.shape)}, expected {(h.shape[1],)}")
    for name, value in {"h": h, "bias": bias, "w2": w2}.items():
        if value is not None and (value.device != h.device or value.dtype not in FLOATING):
            found = f"{value.dtype} on {value.device}"
            raise ValueError(f"attention_scores: {name} must be floating on {h.device}, got {found}")


def _reference(h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> Tensor:
    """The definition."""
    left, *gate = (h.to(bias.dtype) + bias).chunk(1 + gated, 1)
    hidden = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[act](left)
    if gated:
        hidden = hidden * torch.sigmoid(gate[0])
    with torch.autocast(h.device.type, enabled=False):
        return hidden @ w2.t()


def _register(impl: str, module: str) -> Any:
    """Custom operators ``bigbag::attention_scores_{impl}`` and ``..._backward`` around the launchers of ``module``."""

    def define(name: str, function: str, schema: str) -> CustomOp:
        return CustomOp(f"{name}_{impl}", schema, launcher(module, function))

    given = "Tensor h, Tensor bias, Tensor w2, str act, bool gated"
    forward = define("attention_scores", "forward", f"({given}) -> Tensor")
    backward = define("attention_scores_backward", "backward", f"(Tensor ds, {given}) -> (Tensor, Tensor, Tensor)")

    @forward.register_fake
    def _(h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> Tensor:
        return w2.new_empty(h.shape[0], w2.shape[0])

    @backward.register_fake
    def _(ds: Tensor, h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> Any:
        return h.new_empty(h.shape), bias.new_empty(bias.shape), w2.new_empty(w2.shape)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    def differentiate(ctx: Any, ds: Tensor) -> Any:
        return *backward(ds, *ctx.saved_tensors, *ctx.options), None, None

    forward.register_autograd(differentiate, setup_context=setup)
    return forward


_FORWARD: dict[str, Any] = {
    "reference": _reference,
    "cpu": _register("cpu", "bigbag.kernels.cpu.attention_scores"),
    "triton": _register("triton", "bigbag.kernels.gpu.attention_scores"),
}

OPERATORS = (Operator("attention_scores", attention_scores, _DTYPES),)
