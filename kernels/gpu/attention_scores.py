"""Attention scores of projected rows on the GPU.

    hidden = act(h + bias) [* sigmoid of h's right half + bias],  scores = hidden w2^T

``_score_rows``: one program owns BLOCK_T rows; it walks over blocks of D and reduces them to H scores.
``_differentiate_rows``: one program owns BLOCK_T rows and BLOCK_D units; it writes their gradient, and partial sums for
bias and w2, one row per BLOCK_T rows (no atomics), which torch adds up. The functions without a leading underscore are
parts of ``attention_pool``'s kernels too, which make the projected rows themselves.

Bytes: h once each way, its gradient once. FLOPs as in kernels/cpu/attention_scores. Working memory: D' + H D floats per
BLOCK_T rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _tanh(v):
    # From exp, since Triton's core has no tanh; the form for |v| does not overflow.
    e = tl.exp(-2.0 * tl.abs(v))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(v < 0, -t, t)


@triton.jit
def _activate(v, ACT: tl.constexpr):
    if ACT == "tanh":
        out = _tanh(v)
    elif ACT == "relu":
        out = tl.where(v < 0, 0.0, v)
    else:
        out = 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    return out


@triton.jit
def _derivative(v, value, ACT: tl.constexpr):
    if ACT == "tanh":
        out = 1.0 - value * value
    elif ACT == "relu":
        out = tl.where(value > 0, 1.0, 0.0)
    else:
        cdf = 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))
        out = cdf + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    return out


@triton.jit
def load_rows(h, rows, units, T, D, GATED: tl.constexpr):
    """The left and the right half of h, float32, for some rows and units; the left one twice where there is no gate."""
    width = D * 2 if GATED else D
    inside = (rows < T)[:, None] & (units < D)[None, :]
    place = h + rows[:, None] * width + units[None, :]
    left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    right = left
    if GATED:
        right = tl.load(place + D, mask=inside, other=0.0).to(tl.float32)
    return left, right


@triton.jit
def _add_biases(left, right, bias, units, D, GATED: tl.constexpr):
    left += tl.load(bias + units, mask=units < D, other=0.0)[None, :]
    if GATED:
        right += tl.load(bias + D + units, mask=units < D, other=0.0)[None, :]
    return left, right


@triton.jit
def add_scores(acc, left, right, w2, units, heads, D, H, ACT: tl.constexpr, GATED: tl.constexpr):
    """acc, rows by heads, and the share of some units, biases included, in their scores."""
    hidden = _activate(left, ACT)
    if GATED:
        hidden *= tl.sigmoid(right)
    for head in range(H):
        row = tl.load(w2 + head * D + units, mask=units < D, other=0.0)
        score = tl.sum(hidden * row[None, :], 1)
        acc += tl.where(heads[None, :] == head, score[:, None], 0.0)
    return acc


@triton.jit
def differentiate(
    left, right, w2, ds, grad_h, bias_parts, w2_parts, block, rows, units, heads, T, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of both halves, and the block's sums for bias and w2. ds is rows by heads."""
    width = D * 2 if GATED else D
    inside = (rows < T)[:, None] & (units < D)[None, :]
    place = grad_h + rows[:, None] * width + units[None, :]
    value = _activate(left, ACT)
    hidden = value
    gate = value
    if GATED:
        gate = tl.sigmoid(right)
        hidden = value * gate
    grad = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for head in range(H):
        grad_score = tl.sum(tl.where(heads[None, :] == head, ds, 0.0), 1)
        grad += grad_score[:, None] * tl.load(w2 + head * D + units, mask=units < D, other=0.0)[None, :]
        # Rows beyond T have ds = 0, so they add nothing here, nor to grad.
        tl.store(w2_parts + (block * H + head) * D + units, tl.sum(grad_score[:, None] * hidden, 0), mask=units < D)
    if GATED:
        grad_gate = grad * hidden * (1.0 - gate)
        tl.store(place + D, grad_gate.to(grad_h.dtype.element_ty), mask=inside)
        tl.store(bias_parts + block * width + D + units, tl.sum(grad_gate, 0), mask=units < D)
        grad *= gate
    grad *= _derivative(left, value, ACT)
    tl.store(place, grad.to(grad_h.dtype.element_ty), mask=inside)
    tl.store(bias_parts + block * width + units, tl.sum(grad, 0), mask=units < D)


@triton.jit
def _score_rows(
    h, bias, w2, scores, T, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first in range(0, D, BLOCK_D):
        units = first + tl.arange(0, BLOCK_D)
        left, right = load_rows(h, rows, units, T, D, GATED)
        left, right = _add_biases(left, right, bias, units, D, GATED)
        acc = add_scores(acc, left, right, w2, units, heads, D, H, ACT, GATED)
    inside = (rows < T)[:, None] & (heads < H)[None, :]
    tl.store(scores + rows[:, None] * H + heads[None, :], acc, mask=inside)


@triton.jit
def _differentiate_rows(
    h, bias, w2, ds, grad_h, bias_parts, w2_parts, T, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    units = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    heads = tl.arange(0, BLOCK_H)
    inside = (rows < T)[:, None] & (heads < H)[None, :]
    grad_scores = tl.load(ds + rows[:, None] * H + heads[None, :], mask=inside, other=0.0)
    left, right = load_rows(h, rows, units, T, D, GATED)
    left, right = _add_biases(left, right, bias, units, D, GATED)
    differentiate(
        left, right, w2, grad_scores, grad_h, bias_parts, w2_parts, block, rows, units, heads, T, D, H,
        ACT, GATED, BLOCK_T, BLOCK_D,
    )  # fmt: skip


def _options(dim: int, act: str, gated: bool) -> dict[str, Any]:
    """Compile-time arguments. The tiles are those without register spills on sm_80 and sm_90."""
    tiles = {"BLOCK_T": 32, "BLOCK_D": 64}
    if INTERPRETED:
        tiles = {"BLOCK_T": 64, "BLOCK_D": max(16, triton.next_power_of_2(dim))}
    return {"ACT": act, "GATED": gated, "num_warps": 8, **tiles}


def forward(h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> Tensor:
    """h (T, D') in any precision up to float32, bias (D',) and w2 (H, D) float32 -> (T, H) float32."""
    h, bias, w2 = h.contiguous(), bias.contiguous(), w2.contiguous()
    num_rows, (heads, dim) = h.shape[0], w2.shape
    scores = w2.new_empty(num_rows, heads)
    if num_rows:
        options = _options(dim, act, gated)
        grid = (triton.cdiv(num_rows, options["BLOCK_T"]),)
        block_h = triton.next_power_of_2(heads)
        _score_rows[grid](h, bias, w2, scores, num_rows, dim, heads, BLOCK_H=block_h, **options)
    return scores


def backward(ds: Tensor, h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h (T, D') in its dtype, bias (D',) and w2 (H, D), from that of the scores (T, H)."""
    ds, h, bias, w2 = ds.contiguous(), h.contiguous(), bias.contiguous(), w2.contiguous()
    num_rows, (heads, dim) = h.shape[0], w2.shape
    grad_h = torch.empty_like(h)
    options = _options(dim, act, gated)
    blocks = triton.cdiv(num_rows, options["BLOCK_T"])
    bias_parts, w2_parts = bias.new_empty(blocks, *bias.shape), w2.new_empty(blocks, heads, dim)
    if num_rows:
        _differentiate_rows[blocks, triton.cdiv(dim, options["BLOCK_D"])](
            h, bias, w2, ds, grad_h, bias_parts, w2_parts, num_rows, dim, heads,
            BLOCK_H=triton.next_power_of_2(heads), **options,
        )  # fmt: skip
    return grad_h, bias_parts.sum(0), w2_parts.sum(0)
