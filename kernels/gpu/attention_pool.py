"""Attention pooling on the GPU.

    h = act(x W1^T + b1) [* sigmoid(x Wg^T + bg)],  scores = h w2^T,
    a = softmax of scores per bag,  z = (a * factors)^T x

The scores do not know bags. ``_scores``: one program owns BLOCK_T instances; it walks over blocks of D, multiplies
[W1; Wg] by x in tiles of P with tensor cores, and reduces to H scores without writing the (T, D) activations.
``_grad_projection`` does the same in backward, recomputing the pre-activations unless they were kept; it writes the
gradient of the pre-activations for one chunk of instances, whose product with x is cuBLAS's, and partial sums for the
gradients of the biases and of w2, one row per program (no atomics). Softmax, a^T x and x dz the operator takes from
``segments``.

Reads x from memory twice forward and three times backward. FLOPs as in kernels/cpu/attention_pool. Working memory:
CHUNK_ROWS * (D' + P) elements, three (T, H) float32, and (D' + H D) floats per BLOCK_T instances of a chunk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from bigbag.kernels.gpu.attention_scores import add_scores, differentiate, load_rows

CHUNK_ROWS = 65536
LARGE_ROWS = 32768
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _project(
    x, weight, rows, T, units, D, P, GATED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x W1^T and x Wg^T for BLOCK_T rows and BLOCK_D units, float32, without biases."""
    left = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    right = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, P, BLOCK_P):
        cols = first + tl.arange(0, BLOCK_P)
        tile = tl.load(x + rows[:, None] * P + cols[None, :], mask=(rows < T)[:, None] & (cols < P)[None, :], other=0.0)
        inside = (units < D)[None, :] & (cols < P)[:, None]
        pointer = weight + units[None, :].to(tl.int64) * P + cols[:, None]
        w = tl.load(pointer, mask=inside, other=0.0)
        if UPCAST:  # the interpreter has no bfloat16 arithmetic
            tile = tile.to(tl.float32)
            w = w.to(tl.float32)
        tile = tile.to(w.dtype)
        left = tl.dot(tile, w, left, input_precision=PRECISION)
        if GATED:
            w = tl.load(pointer + D.to(tl.int64) * P, mask=inside, other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            right = tl.dot(tile, w, right, input_precision=PRECISION)
    return left, right


@triton.jit
def _scores(
    x, weight, bias, w2, scores, kept, T, P, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    heads = tl.arange(0, BLOCK_H)
    width = D * 2 if GATED else D
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first in range(0, D, BLOCK_D):
        units = first + tl.arange(0, BLOCK_D)
        left, right = _project(x, weight, rows, T, units, D, P, GATED, UPCAST, PRECISION, BLOCK_T, BLOCK_D, BLOCK_P)
        if KEEP:
            inside = (rows < T)[:, None] & (units < D)[None, :]
            place = kept + rows[:, None] * width + units[None, :]
            tl.store(place, left.to(kept.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(place + D, right.to(kept.dtype.element_ty), mask=inside)
        acc = add_scores(acc, left, right, bias, w2, units, heads, D, H, ACT, GATED)
    inside = (rows < T)[:, None] & (heads < H)[None, :]
    tl.store(scores + rows[:, None] * H + heads[None, :], acc, mask=inside)


@triton.jit
def _grad_projection(
    x, weight, bias, w2, kept, ds, grad_pre, bias_parts, w2_parts, T, P, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Blocks of units of the same rows run one after the other, so that x comes from L2 but the first time.
    block = tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    units = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if KEEP:
        left, right = load_rows(kept, rows, units, T, D, GATED)
    else:
        left, right = _project(x, weight, rows, T, units, D, P, GATED, UPCAST, PRECISION, BLOCK_T, BLOCK_D, BLOCK_P)
    differentiate(
        left, right, bias, w2, ds, grad_pre, bias_parts, w2_parts, block, rows, units, T, D, H,
        ACT, GATED, BLOCK_T, BLOCK_D,
    )  # fmt: skip


@cache
def _is_hopper() -> bool:
    """Whether four warps multiply a tile of 64 rows in one instruction, which reads from shared memory (sm_90)."""
    return bool(driver.active.get_current_target().arch == 90)


def _options(weight: Tensor, num_rows: int, dim: int, act: str, gated: bool, keep: bool, back: bool) -> dict[str, Any]:
    """Compile-time arguments. The tiles are those without register spills on sm_80 and sm_90.

    A program that projects reads the weights of its units from L2: the more rows and units its tile has, the less it
    reads for each product. Besides, of a tile of 64 x 64 each half of the warps has 32 units, for which Hopper's tensor
    cores wait for shared memory a third of the time. But all of a large GPU's multiprocessors should have rows.
    """
    exact = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tiles: dict[str, object] = {"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_P": 64, "num_warps": 8, "num_stages": 3}
    if not INTERPRETED and _is_hopper():
        if not back and num_rows >= LARGE_ROWS:
            tiles["BLOCK_T"] = 128
        if back and not keep and dim > 64:
            tiles["BLOCK_D"] = 128
    if weight.dtype == torch.float32:
        tiles |= {"BLOCK_T": 32, "BLOCK_D": 32, "BLOCK_P": 32, "num_stages": 2}
    if weight.shape[1] % 16:  # rows that are not aligned are loaded element by element, which takes registers
        if weight.dtype == torch.float32:
            tiles |= {"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_P": 16, "num_stages": 1}
        else:
            tiles |= {"BLOCK_T": 64, "BLOCK_D": 32, "BLOCK_P": 32, "num_warps": 4}
    if INTERPRETED:
        tiles |= {"BLOCK_T": 64, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_P": 128}
    precision = "ieee" if exact else "tf32"
    return {"ACT": act, "GATED": gated, "KEEP": keep, "UPCAST": INTERPRETED, "PRECISION": precision, **tiles}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """x (T, P), weight (D', P) in the compute dtype, bias (D',) and w2 (H, D) float32
    -> scores (T, H) float32, kept (T, D') or (0,)."""
    x, weight, bias, w2 = x.contiguous(), weight.contiguous(), bias.contiguous(), w2.contiguous()
    (num_rows, width), (heads, dim) = x.shape, w2.shape
    scores = x.new_empty(num_rows, heads, dtype=torch.float32)
    kept = weight.new_empty((num_rows, weight.shape[0]) if keep else (0,))
    if num_rows:
        options = _options(weight, num_rows, dim, act, gated, keep, back=False)
        grid = (triton.cdiv(num_rows, options["BLOCK_T"]),)
        block_h = triton.next_power_of_2(heads)
        _scores[grid](x, weight, bias, w2, scores, kept, num_rows, width, dim, heads, BLOCK_H=block_h, **options)
    return scores, kept


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 result: partial sums over chunks must not be rounded to 16 bits."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def backward(
    ds: Tensor,
    grad_z: Tensor | None,
    weights: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    kept: Tensor,
    act: str,
    gated: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of the scores (T, H) and of z, and the weights (T, H) of its rows: those of x (T, P) or (0,),
    weight (D', P), bias (D',), w2 (H, D)."""
    x, weight, bias, w2 = x.contiguous(), weight.contiguous(), bias.contiguous(), w2.contiguous()
    (num_rows, width), (heads, dim) = x.shape, w2.shape
    total = weight.shape[0]
    keep = kept.numel() > 0
    options = _options(weight, num_rows, dim, act, gated, keep, back=True)
    block_t, block_d = int(options["BLOCK_T"]), int(options["BLOCK_D"])
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    grad_bias, grad_w2 = torch.zeros_like(bias), torch.zeros_like(w2)
    bags = torch.repeat_interleave(offsets.diff(), output_size=num_rows) if need_x else offsets
    for start in range(0, num_rows, CHUNK_ROWS):
        end = min(start + CHUNK_ROWS, num_rows)
        chunk, rows = x[start:end], end - start
        blocks = triton.cdiv(rows, block_t)
        grad_pre = weight.new_empty(rows, total)
        bias_parts, w2_parts = bias.new_empty(blocks, total), w2.new_empty(blocks, heads, dim)
        _grad_projection[triton.cdiv(dim, block_d), blocks](
            chunk, weight, bias, w2, kept[start:end] if keep else kept, ds[start:end], grad_pre, bias_parts, w2_parts,
            rows, width, dim, heads, **options,
        )  # fmt: skip
        grad_bias += bias_parts.sum(0)
        grad_w2 += w2_parts.sum(0)
        grad_weight += _matmul(grad_pre.t(), chunk.to(weight.dtype))
        if need_x:
            grad_chunk = _matmul(grad_pre, weight)
            if grad_z is not None:
                for head in range(heads):
                    grad_chunk.addcmul_(weights[start:end, head : head + 1], grad_z[bags[start:end], head])
            grad_x[start:end] = grad_chunk
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grad_w2
