"""Attention pooling on the GPU.

    h = act(x W1^T + b1) [* sigmoid(x Wg^T + bg)],  scores = h w2^T,
    a = softmax of scores per bag,  z = (a * factors)^T x

A program owns a block of at most BLOCK_T rows of one bag. Forward, ``_attend`` multiplies them by [W1; Wg] in tiles of
P with tensor cores, block of D by block of D, and reduces the products to H scores without writing the activations;
then, while its rows are in L2, it adds them up under the exponentials of their scores less the block's maximum.
``_combine`` joins the maxima, the sums and the sums of rows of the blocks of a bag in their order, ``_weigh`` makes a.

Backward, ``_grad_projection`` recomputes the pre-activations of its rows unless they were kept. The gradient of a score
is a (factors x - z) dz: softmax's sum over the bag is z dz. It writes the gradient of the pre-activations for one chunk
of instances, whose product with x is cuBLAS's, and partial sums for the gradients of the biases and of w2, one row per
block. ``_grad_rows`` makes the gradient of x. No atomics anywhere.

Reads of x from memory: one forward (two while the sums were a pass of their own), two backward (three while x dz was
one); grad_x is written, and nothing read back. Each further pass of a program over its rows, D / BLOCK_D and one more,
is to find them in L2. FLOPs as in kernels/cpu/attention_pool. Working memory: (T, H) floats; forward (P + 2) H floats
per block; backward CHUNK_BYTES, and (D' + H D) floats per block of a chunk.
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
from bigbag.kernels.gpu.segments import Splits

CHUNK_BYTES = 128 << 20
LARGE_ROWS = 32768
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _own(bags, starts, ends):
    """Bag, first row and number of rows of a program's block."""
    block = tl.program_id(0)
    start = tl.load(starts + block)
    return tl.load(bags + block), start, (tl.load(ends + block) - start).to(tl.int32)


@triton.jit
def _project(
    x, weight, bias, T, first_unit, D, P, GATED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x W1^T + b1 and x Wg^T + bg for the rows from x on, T of them, and BLOCK_D units, float32."""
    rows, units = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    weight += tl.cast(first_unit, tl.int64) * P
    gate = weight + tl.cast(D, tl.int64) * P
    bias += first_unit
    left = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + tl.load(bias + units, mask=units < D - first_unit, other=0.0)
    right = left
    if GATED:
        right = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        right += tl.load(bias + D + units, mask=units < D - first_unit, other=0.0)
    for first in range(0, P, BLOCK_P):
        cols = first + tl.arange(0, BLOCK_P)
        inside = (rows < T)[:, None] & (cols < P)[None, :]
        tile = tl.load(x + rows[:, None] * P + cols[None, :], mask=inside, other=0.0)
        inside = (units < D - first_unit)[None, :] & (cols < P)[:, None]
        place = units[None, :] * P + cols[:, None]
        w = tl.load(weight + place, mask=inside, other=0.0)
        if UPCAST:  # the interpreter has no bfloat16 arithmetic
            tile = tile.to(tl.float32)
            w = w.to(tl.float32)
        tile = tile.to(w.dtype)
        left = tl.dot(tile, w, left, input_precision=PRECISION)
        if GATED:
            w = tl.load(gate + place, mask=inside, other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            right = tl.dot(tile, w, right, input_precision=PRECISION)
    return left, right


@triton.jit
def _of_head(values, heads, head):
    """One column of ``values``, rows by heads."""
    return tl.sum(tl.where(heads[None, :] == head, values, 0.0), 1)


@triton.jit(do_not_specialize=["H"])
def _attend(
    x, weight, bias, w2, factors, bags, starts, ends, scores, kept, tops, sums, parts, P, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, start, count = _own(bags, starts, ends)
    if count <= 0:
        return
    rows, heads = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    width = D * 2 if GATED else D
    x += start * P
    kept += start * width
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first in range(0, D, BLOCK_D):
        units = first + tl.arange(0, BLOCK_D)
        left, right = _project(x, weight, bias, count, first, D, P, GATED, UPCAST, PRECISION, BLOCK_T, BLOCK_D, BLOCK_P)
        if KEEP:
            mask = (rows < count)[:, None] & (units < D)[None, :]
            own = kept + rows[:, None] * width + units[None, :]
            tl.store(own, left.to(kept.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(own + D, right.to(kept.dtype.element_ty), mask=mask)
        acc = add_scores(acc, left, right, w2, units, heads, D, H, ACT, GATED)
    place = start * H + rows[:, None] * H + heads[None, :]
    inside = (rows < count)[:, None] & (heads < H)[None, :]
    tl.store(scores + place, acc, mask=inside)

    acc = tl.where((rows < count)[:, None], acc, -float("inf"))
    top = tl.max(acc, 0)
    a = tl.exp(acc - tl.where(top == -float("inf"), 0.0, top)[None, :])
    block = tl.program_id(0).to(tl.int64)
    tl.store(tops + block * H + heads, top, mask=heads < H)
    tl.store(sums + block * H + heads, tl.sum(a, 0), mask=heads < H)
    if factors is not None:
        a *= tl.load(factors + place, mask=inside, other=0.0)
    last = (tl.cdiv(P, BLOCK_C) - 1) * BLOCK_C
    for back in range(0, P, BLOCK_C):  # what was read last is in cache with the best chance
        cols = last - back + tl.arange(0, BLOCK_C)
        mask = (rows < count)[:, None] & (cols < P)[None, :]
        tile = tl.load(x + rows[:, None] * P + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        for head in range(H):
            total = tl.sum(tile * _of_head(a, heads, head)[:, None], 0)
            tl.store(parts + (block * H + head) * P + cols, total, mask=cols < P)


@triton.jit
def _combine(tops, sums, parts, first, z, peaks, totals, P, H, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    bag, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(first + bag), tl.load(first + bag + 1)
    peak = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for block in range(start, end, BLOCK_S):
        blocks = block + tl.arange(0, BLOCK_S).to(tl.int64)
        place = blocks * H + head
        top = tl.load(tops + place, mask=blocks < end, other=-float("inf"))
        higher = tl.maximum(peak, tl.max(top, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        scale, share = tl.exp(peak - base), tl.exp(top - base)
        peak = higher
        total = total * scale + tl.sum(share * tl.load(sums + place, mask=blocks < end, other=0.0), 0)
        inside = (blocks < end)[:, None] & (cols < P)[None, :]
        tile = tl.load(parts + place[:, None] * P + cols[None, :], mask=inside, other=0.0)
        acc = acc * scale + tl.sum(tile * share[:, None], 0)
    of_bag = bag * H + head
    tl.store(z + of_bag * P + cols, acc / tl.where(start == end, 1.0, total), mask=cols < P)
    if tl.program_id(1) == 0:
        tl.store(peaks + of_bag, peak)
        tl.store(totals + of_bag, total)


@triton.jit
def _weigh(scores, peaks, totals, bags, starts, ends, a, H, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    bag, start, count = _own(bags, starts, ends)
    if count <= 0:
        return
    rows, heads = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    place = start * H + rows[:, None] * H + heads[None, :]
    inside = (rows < count)[:, None] & (heads < H)[None, :]
    peak = tl.load(peaks + bag * H + heads, mask=heads < H, other=0.0)
    total = tl.load(totals + bag * H + heads, mask=heads < H, other=1.0)
    score = tl.load(scores + place, mask=inside, other=-float("inf"))
    tl.store(a + place, tl.exp(score - peak[None, :]) / total[None, :], mask=inside)


@triton.jit
def _grad_scores(
    x, a, factors, z, grad_z, grad_scores, bag, start, count, P, H,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows by heads: from the gradient of z, where there is one, and from that of the scores."""
    rows, heads = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    place = start * H + rows[:, None] * H + heads[None, :]
    inside = (rows < count)[:, None] & (heads < H)[None, :]
    grad = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    if grad_z is not None:
        for first in range(0, P, BLOCK_C):
            cols = first + tl.arange(0, BLOCK_C)
            mask = (rows < count)[:, None] & (cols < P)[None, :]
            tile = tl.load(x + rows[:, None] * P + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            for head in range(H):
                of_bag = (bag * H + head) * P + cols
                mean = tl.load(z + of_bag, mask=cols < P, other=0.0)
                slope = tl.load(grad_z + of_bag, mask=cols < P, other=0.0)
                value = tile
                if factors is not None:
                    value = tile * tl.load(factors + start * H + rows * H + head, mask=rows < count, other=0.0)[:, None]
                # The difference comes first: where one instance has all the weight, it is exactly 0.
                dots = tl.sum((value - mean[None, :]) * slope[None, :], 1)
                grad += tl.where(heads[None, :] == head, dots[:, None], 0.0)
        grad = tl.where(inside, grad * tl.load(a + place, mask=inside, other=0.0), 0.0)
    if grad_scores is not None:
        grad += tl.load(grad_scores + place, mask=inside, other=0.0)
    return grad


@triton.jit
def _grad_projection(
    x, weight, bias, w2, kept, a, factors, z, grad_z, grad_scores, bags, starts, ends, grad_pre, bias_parts, w2_parts,
    P, D, H,
    ACT: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    bag, start, count = _own(bags, starts, ends)
    if count <= 0:
        return
    rows, heads = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    width = D * 2 if GATED else D
    x += start * P
    kept += start * width
    grad_pre += start * width
    ds = _grad_scores(x, a, factors, z, grad_z, grad_scores, bag, start, count, P, H, BLOCK_H, BLOCK_T, BLOCK_C)
    for first in range(0, D, BLOCK_D):
        units = first + tl.arange(0, BLOCK_D)
        if KEEP:
            left, right = load_rows(kept, rows, units, count, D, GATED)
        else:
            left, right = _project(
                x, weight, bias, count, first, D, P, GATED, UPCAST, PRECISION, BLOCK_T, BLOCK_D, BLOCK_P
            )
        differentiate(
            left, right, w2, ds, grad_pre, bias_parts, w2_parts, tl.program_id(0).to(tl.int64),
            rows, units, heads, count, D, H, ACT, GATED, BLOCK_T, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _grad_rows(
    grad_pre, weight, weights, grad_z, bags, starts, ends, grad_x, P, K, H, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_x[t] = grad_pre[t] weight + sum_h weights[t, h] grad_z[b, h], for BLOCK_P columns."""
    bag, start, count = _own(bags, starts, ends)
    if count <= 0:
        return
    rows, cols = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    grad_pre += start * K
    grad_x += start * P
    acc = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for first in range(0, K, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        inside = (rows < count)[:, None] & (inner < K)[None, :]
        left = tl.load(grad_pre + rows[:, None] * K + inner[None, :], mask=inside, other=0.0)
        inside = (inner < K)[:, None] & (cols < P)[None, :]
        right = tl.load(weight + inner[:, None].to(tl.int64) * P + cols[None, :], mask=inside, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if grad_z is not None:
        for head in range(H):
            slope = tl.load(grad_z + (bag * H + head) * P + cols, mask=cols < P, other=0.0)
            acc += (
                tl.load(weights + start * H + rows * H + head, mask=rows < count, other=0.0)[:, None] * slope[None, :]
            )
    mask = (rows < count)[:, None] & (cols < P)[None, :]
    tl.store(grad_x + rows[:, None] * P + cols[None, :], acc.to(grad_x.dtype.element_ty), mask=mask)


@cache
def _is_hopper() -> bool:
    """Whether four warps multiply a tile of 64 rows in one instruction, which reads from shared memory (sm_90)."""
    return bool(driver.active.get_current_target().arch == 90)


def _options(
    weight: Tensor, num_rows: int, num_bags: int, w2: Tensor, act: str, gated: bool, keep: bool, back: bool
) -> dict[str, Any]:
    """Compile-time arguments. The tiles are those without register spills on sm_80 and sm_90.

    A program that projects reads the weights of its units from L2, its rows once for each block of units, and both from
    shared memory once per product of 64 rows and a block: with 64 x 64 Hopper's tensor cores wait a third of the time
    for shared memory, with 128 x 128 a tenth. But all of a large GPU's multiprocessors should have rows.
    """
    heads, dim = w2.shape
    exact = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tiles: dict[str, object] = {"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_P": 64, "BLOCK_C": 256, "num_warps": 8}
    tiles["num_stages"] = 3
    if not INTERPRETED and _is_hopper():
        if not back and num_rows >= max(LARGE_ROWS, 1024 * num_bags):
            tiles["BLOCK_T"] = 128
            if dim % 128 == 0:
                tiles |= {"BLOCK_D": 128, "BLOCK_P": 32, "num_stages": 5}
        if back and dim % 128 == 0 and not keep and not (gated and act == "gelu"):
            tiles["BLOCK_D"] = 128
    else:
        tiles |= {"BLOCK_P": 32, "num_stages": 4}
    if weight.dtype == torch.float32:
        tiles |= {"BLOCK_T": 32, "BLOCK_D": 32, "BLOCK_P": 32, "num_stages": 2}
    if weight.shape[1] % 16 or dim % 16:  # rows that are not aligned come element by element, which takes registers
        if weight.dtype == torch.float32:
            tiles |= {"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_P": 16, "BLOCK_C": 64, "num_stages": 1}
        else:
            tiles |= {"BLOCK_T": 64, "BLOCK_D": 32, "BLOCK_P": 32, "BLOCK_C": 64, "num_stages": 3}
    if INTERPRETED:
        tiles |= {"BLOCK_T": 64, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_P": 128, "BLOCK_C": 1024}
    tiles["BLOCK_H"] = triton.next_power_of_2(heads)
    precision = "ieee" if exact else "tf32"
    return {"ACT": act, "GATED": gated, "KEEP": keep, "UPCAST": INTERPRETED, "PRECISION": precision, **tiles}


def _grad_tiles(options: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """Compile-time arguments of ``_grad_rows``, whose blocks of rows are those of ``_grad_projection``."""
    inner, columns = (16, 32) if weight.dtype == torch.float32 else (32, 128)
    names = ("UPCAST", "PRECISION", "BLOCK_T", "num_warps", "num_stages")
    tiles = {name: options[name] for name in names if name in options}
    return tiles | {"BLOCK_K": 128 if INTERPRETED else inner, "BLOCK_P": 256 if INTERPRETED else columns}


def forward(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    factors: Tensor | None,
    act: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, P), weight (D', P) in the compute dtype, bias (D',) and w2 (H, D) float32, factors (T, H) of dropout
    -> z (B, H, P), scores (T, H), a (T, H), all float32, and kept (T, D') or (0,)."""
    x, weight, bias, w2 = x.contiguous(), weight.contiguous(), bias.contiguous(), w2.contiguous()
    (num_rows, width), (heads, dim), num_bags = x.shape, w2.shape, offsets.shape[0] - 1
    kept = weight.new_empty((num_rows, weight.shape[0]) if keep else (0,))
    scores, a = bias.new_empty(num_rows, heads), bias.new_empty(num_rows, heads)
    if num_rows == 0:
        return bias.new_zeros(num_bags, heads, width), scores, a, kept
    options = _options(weight, num_rows, num_bags, w2, act, gated, keep, back=False)
    blocks = Splits(offsets, num_rows, options["BLOCK_T"])
    tops, sums = bias.new_empty(2, blocks.bound, heads)
    parts = bias.new_empty(blocks.bound, heads, width)
    where = (blocks.bags, blocks.starts, blocks.ends)
    _attend[(blocks.bound,)](
        x, weight, bias, w2, None if factors is None else factors.contiguous(), *where, scores, kept, tops, sums, parts,
        width, dim, heads, **options,
    )  # fmt: skip
    z = bias.new_empty(num_bags, heads, width)
    peaks, totals = bias.new_empty(2, num_bags, heads)
    # One long bag has thousands of blocks: few columns, so that many programs share them, and many blocks at once.
    columns = triton.next_power_of_2(width) if INTERPRETED else min(16, triton.next_power_of_2(width))
    _combine[num_bags, triton.cdiv(width, columns), heads](
        tops, sums, parts, blocks.first, z, peaks, totals, width, heads,
        BLOCK_S=16 if INTERPRETED else 512, BLOCK_C=columns,
    )  # fmt: skip
    _weigh[(blocks.bound,)](
        scores, peaks, totals, *where, a, heads, BLOCK_T=options["BLOCK_T"], BLOCK_H=options["BLOCK_H"]
    )
    return z, scores, a, kept


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 result: partial sums over chunks must not be rounded to 16 bits."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _chunk_rows(x: Tensor, weight: Tensor) -> int:
    """Rows whose pre-activations' gradients, and the rows themselves where they are converted, take CHUNK_BYTES."""
    converted = 0 if x.dtype == weight.dtype else x.shape[1]
    return 64 * max(1, CHUNK_BYTES // (64 * weight.element_size() * (weight.shape[0] + converted)))


def backward(
    grad_z: Tensor | None,
    grad_scores: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    w2: Tensor,
    z: Tensor,
    a: Tensor,
    kept: Tensor,
    factors: Tensor | None,
    act: str,
    gated: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of z and of the scores, and what ``forward`` took and gave: those of x (T, P) or (0,),
    weight (D', P), bias (D',), w2 (H, D)."""
    x, weight, bias, w2 = x.contiguous(), weight.contiguous(), bias.contiguous(), w2.contiguous()
    grad_z, grad_scores, factors = (None if t is None else t.contiguous() for t in (grad_z, grad_scores, factors))
    (num_rows, width), (heads, dim), total = x.shape, w2.shape, weight.shape[0]
    keep = kept.numel() > 0
    options = _options(weight, num_rows, offsets.shape[0] - 1, w2, act, gated, keep, back=True)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    grad_bias, grad_w2 = torch.zeros_like(bias), torch.zeros_like(w2)
    chunk_rows = _chunk_rows(x, weight)
    for start in range(0, num_rows, chunk_rows):
        end = min(start + chunk_rows, num_rows)
        chunk = x[start:end]
        blocks = Splits(offsets.clamp(start, end) - start, end - start, options["BLOCK_T"])
        where = (blocks.bags, blocks.starts, blocks.ends)
        own_a, own_factors, own_grad = a[start:end], *(t if t is None else t[start:end] for t in (factors, grad_scores))
        grad_pre = weight.new_empty(end - start, total)
        # Zeros, since there may be fewer blocks than their bound.
        bias_parts, w2_parts = bias.new_zeros(blocks.bound, total), w2.new_zeros(blocks.bound, heads, dim)
        _grad_projection[(blocks.bound,)](
            chunk, weight, bias, w2, kept[start:end] if keep else kept, own_a, own_factors, z, grad_z, own_grad, *where,
            grad_pre, bias_parts, w2_parts, width, dim, heads, **options,
        )  # fmt: skip
        grad_bias += bias_parts.sum(0)
        grad_w2 += w2_parts.sum(0)
        grad_weight += _matmul(grad_pre.t(), chunk.to(weight.dtype))
        if need_x:
            weights = own_a if own_factors is None else own_a * own_factors
            tiles = _grad_tiles(options, weight)
            _grad_rows[blocks.bound, triton.cdiv(width, tiles["BLOCK_P"])](
                grad_pre, weight, weights, grad_z, *where, grad_x[start:end], width, total, heads, **tiles
            )
    return grad_x, grad_weight.to(weight.dtype), grad_bias, grad_w2
