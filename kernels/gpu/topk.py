"""Selection, log-sum-exp and weighted sums for many weights over segments, on the GPU: see kernels/cpu/topk for the
formulas.

``_threshold``: one program owns one bag and one column; it finds the k-th best key bit by bit, counting the rows at
or above each candidate, so that nothing is sorted but the k rows taken. A key is an integer that orders like the
score. ``_collect``, with the same owner, writes the rows above the threshold, and the first rows at it, in order. Of
bags longer than SPLIT_ROWS these two choose twice: k of each split, so that many programs share a bag, then of those. A
stable sort of B x C x k values ends. ``_pool``: one program owns a tile of z and one of S splits of a bag's rows; the
splits are added afterwards. ``_pool_rows``: one program owns a block of rows of one bag and a block of columns of a
gradient. No atomics.

Bytes: topk reads keys of 8 bytes once from memory and as often as a score has bits, one more time, from cache; pool
reads weights once per block of P, x once per block of S. FLOPs of pool: 2 T S P forward, 4 T S P backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigbag.kernels.gpu import segments
from bigbag.kernels.gpu.segments import _rows_of_split

INTERPRETED = triton.knobs.runtime.interpret
SPLIT_ROWS = 8192


@triton.jit
def _threshold(keys, offsets, out, T, K, BLOCK_T: tl.constexpr, BITS: tl.constexpr):
    bag, column = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    need = tl.minimum(end - start, K)
    prefix = tl.zeros([], tl.int64)
    for step in range(BITS):
        candidate = prefix + (tl.full([], 1, tl.int64) << (BITS - 1 - step))
        count = tl.zeros([BLOCK_T], tl.int32)
        for first in range(start, end, BLOCK_T):
            rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
            key = tl.load(keys + column * T + rows, mask=rows < end, other=-1)
            count += (key >= candidate).to(tl.int32)
        prefix = tl.where(tl.sum(count.to(tl.int64)) >= need, candidate, prefix)
    tl.store(out + bag.to(tl.int64) * tl.num_programs(1) + column, prefix)


@triton.jit
def _collect(keys, offsets, thresholds, index, T, K, BLOCK_T: tl.constexpr):
    bag, column = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.num_programs(1)
    start, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    need = tl.minimum(end - start, K)
    limit = tl.load(thresholds + bag.to(tl.int64) * columns + column)
    above = tl.zeros([BLOCK_T], tl.int32)
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        key = tl.load(keys + column * T + rows, mask=rows < end, other=-1)
        above += (key > limit).to(tl.int32)
    equals = need - tl.sum(above.to(tl.int64))
    taken = tl.zeros([], tl.int64)
    seen = tl.zeros([], tl.int64)
    base = index + (bag.to(tl.int64) * columns + column) * K
    for first in range(start, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        key = tl.load(keys + column * T + rows, mask=rows < end, other=-1)
        equal = (key == limit).to(tl.int64)
        take = (key > limit) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= equals))
        place = taken + tl.cumsum(take.to(tl.int64), 0) - 1
        tl.store(base + place, rows, mask=take)
        taken += tl.sum(take.to(tl.int64))
        seen += tl.sum(equal)


@triton.jit
def _pool(
    weights, x, offsets, out, S, P, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    left = (tl.program_id(0) // blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    right = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    split, bag = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = _rows_of_split(offsets, bag, split, tl.num_programs(1))
    acc = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (rows < end)[:, None]
        w = tl.load(weights + rows[:, None] * S + left[None, :], mask=inside & (left < S)[None, :], other=0.0)
        value = tl.load(x + rows[:, None] * P + right[None, :], mask=inside & (right < P)[None, :], other=0.0)
        acc = tl.dot(tl.trans(w.to(tl.float32)), value.to(tl.float32), acc, input_precision=PRECISION)
    place = ((split * tl.num_programs(2) + bag) * S + left[:, None].to(tl.int64)) * P + right[None, :]
    tl.store(out + place, acc, mask=(left < S)[:, None] & (right < P)[None, :])


@triton.jit
def _pool_rows(
    x, grad, bags, starts, offsets, out, K, N, stride_k, stride_n, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[t] = x[t] grad[b], x (T, K), grad (B, K, N) by strides."""
    bag = tl.load(bags + tl.program_id(0))
    end = tl.load(offsets + bag + 1)
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for first in range(0, K, BLOCK_S):
        inner = first + tl.arange(0, BLOCK_S)
        inside = (rows < end)[:, None] & (inner < K)[None, :]
        left = tl.load(x + rows[:, None] * K + inner[None, :], mask=inside, other=0.0).to(tl.float32)
        place = bag * K * N + inner[:, None].to(tl.int64) * stride_k + cols[None, :].to(tl.int64) * stride_n
        right = tl.load(grad + place, mask=(inner < K)[:, None] & (cols < N)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    place = rows[:, None] * N + cols[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])


def _keys(x: Tensor, largest: bool) -> Tensor:
    """(T, C) -> (C, T) integers that are not negative and order like x, or against it; NaN is above infinity."""
    wide = x.t().contiguous()
    bits, size = (torch.int16, 16) if x.element_size() == 2 else (torch.int32, 32)
    keys = (wide + 0.0).view(bits).to(torch.int64)  # -0 and 0 are equal
    keys = torch.where(keys < 0, -(keys & ((1 << (size - 1)) - 1)) - 1, keys)
    keys = torch.where(wide.isnan(), (1 << (size - 1)) - 1, keys)
    # Counted from the lowest: 0 to 2 ** size - 1.
    return (keys if largest else -keys - 1) + (1 << (size - 1))


def topk(x: Tensor, offsets: Tensor, k: int, largest: bool) -> Tensor:
    """(T, C) -> rows of the k best (B, k, C), -1 beyond the size of a bag."""
    (num_rows, columns), num_bags = x.shape, offsets.shape[0] - 1
    found = offsets.new_full((num_bags, columns, k), -1)
    if x.numel() == 0:
        return found.mT.contiguous()
    keys, bits = _keys(x, largest), 8 * x.element_size()
    if num_rows > SPLIT_ROWS >= 4 * k:
        splits = segments.Splits(offsets, num_rows, SPLIT_ROWS)
        bounds = torch.cat([splits.starts, splits.ends[-1:]])
        rows = _choose(keys, bounds, offsets.new_full((splits.bound, columns, k), -1), bits)
        rows = rows.transpose(0, 1).reshape(columns, -1)  # in their order, so that of equals the first are chosen again
        places = _choose(_at(keys, rows), splits.first * k, found, bits)
        found = _at(rows, places.transpose(0, 1).reshape(columns, -1)).view(columns, num_bags, k).transpose(0, 1)
    else:
        found = _choose(keys, offsets, found, bits)
    best = _at(keys, found.transpose(0, 1).reshape(columns, -1)).view(columns, num_bags, k).transpose(0, 1)
    order = best.sort(dim=2, descending=True, stable=True).indices
    return found.gather(2, order).mT.contiguous()


def _choose(keys: Tensor, offsets: Tensor, found: Tensor, bits: int) -> Tensor:
    """keys (C, T) -> ``found`` (B, C, k): the columns of the k largest of each segment in their order, -1 before."""
    num_bags, columns, k = found.shape
    thresholds = offsets.new_empty(num_bags, columns)
    block = 2048
    _threshold[num_bags, columns](keys, offsets, thresholds, keys.shape[1], k, BLOCK_T=block, BITS=bits)
    _collect[num_bags, columns](keys, offsets, thresholds, found, keys.shape[1], k, BLOCK_T=block)
    return found


def _at(values: Tensor, places: Tensor) -> Tensor:
    """(C, T) at ``places`` (C, N) of each row, -1 where those are -1."""
    return values.gather(1, places.clamp_min(0)).masked_fill_(places < 0, -1)


def logsumexp(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (B, C) float32; -inf for an empty bag."""
    top, _ = segments.max_rows(x, offsets)
    top = torch.where(top.isinf(), 0, top)  # infinity minus infinity is nothing
    shifted = (x.float() - segments._spread(top, offsets, x.shape[0])).exp_()
    return segments.sum_rows(shifted, offsets).log_().add_(top)


def logsumexp_backward(grad: Tensor, x: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """grad (B, C) exp(x - out) -> (T, C) float32."""
    shift = torch.where(out.isinf(), 0, out)
    shifted = (x.float() - segments._spread(shift, offsets, x.shape[0])).exp_()
    return shifted.mul_(segments._spread(grad, offsets, x.shape[0]))


def _options(weights: Tensor, x: Tensor) -> dict[str, Any]:
    wide = torch.promote_types(weights.dtype, x.dtype) == torch.float32
    exact = wide and torch.get_float32_matmul_precision() == "highest"
    tiles: dict[str, Any] = {"BLOCK_T": 32, "BLOCK_S": 32, "BLOCK_P": 64, "num_warps": 4, "num_stages": 2}
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        tiles = {"BLOCK_T": 256, "BLOCK_S": 128, "BLOCK_P": 64}
    return {**tiles, "PRECISION": "ieee" if exact else "tf32"}


def pool(weights: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """weights (T, S), x (T, P) -> (B, S, P) float32."""
    weights, x = weights.contiguous(), x.contiguous()
    num_bags, (num_rows, columns), width = offsets.shape[0] - 1, weights.shape, x.shape[1]
    if num_bags * num_rows * columns * width == 0:
        return x.new_zeros(num_bags, columns, width, dtype=torch.float32)
    options = _options(weights, x)
    tiles = triton.cdiv(columns, options["BLOCK_S"]) * triton.cdiv(width, options["BLOCK_P"])
    splits = segments.num_splits(tiles * num_bags, num_rows // num_bags)
    parts = x.new_empty(splits, num_bags, columns, width, dtype=torch.float32)
    _pool[tiles, splits, num_bags](weights, x, offsets, parts, columns, width, **options)
    return parts.sum(0)


def pool_backward(
    grad: Tensor, weights: Tensor, x: Tensor, offsets: Tensor, need_weights: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weights (T, S) and x (T, P), each (0,) where it is not needed."""
    grad, weights, x = grad.contiguous(), weights.contiguous(), x.contiguous()
    (num_rows, columns), width = weights.shape, x.shape[1]
    grad_weights = weights.new_empty(weights.shape if need_weights else (0,))
    grad_x = x.new_empty(x.shape if need_x else (0,))
    if num_rows == 0:
        return grad_weights, grad_x
    options = _options(weights, x)
    bags, starts = segments.row_blocks(offsets, num_rows, options["BLOCK_T"])
    for needed, out, rows, inner, outer, strides in (
        (need_weights, grad_weights, x, width, columns, (1, width)),
        (need_x, grad_x, weights, columns, width, (width, 1)),
    ):
        if needed and inner * outer:
            grid = (len(bags), triton.cdiv(outer, options["BLOCK_P"]))
            _pool_rows[grid](rows, grad, bags, starts, offsets, out, inner, outer, *strides, **options)
    return grad_weights, grad_x
