"""Attention inside each bag on the GPU.

    S[i, j] = scale q[i] . k[j] + bias[i, j],   P = softmax_j S,   out[i] = sum_j drop(P)[i, j] v[j]

A bag's rows are cut into blocks; the blocks are planned on the device from ``offsets`` alone, so nothing waits for it.
``_forward``: one program owns one block of queries and one head, and walks over the keys of its bag with a running
maximum and sum (base 2). Backward computes S again from the logsumexp (Dao 2023): ``_grad_q`` owns a block of queries,
``_grad_kv`` a block of keys; a second run of ``_grad_q`` gives the gradient of the table or slopes of the bias, one
partial result per program. No atomics. Bias and dropout come from positions and row numbers, tile by tile.

Reads: q once, k and v once per block of queries (backward: also q and its gradient once per block of keys). FLOPs per
head: 4 N^2 d forward, 14 N^2 d backward, 6 N^2 d and N^2 C additions more for the weights of a bias with C buckets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _factors(rows, cols, head, seed, drop_below, dropout):
    """0 where dropout drops, else 1 / (1 - dropout)."""
    key = _hash(_hash(seed.to(tl.uint32, bitcast=True)) + head.to(tl.uint32) * 0x9E3779B1)
    row = _hash(key + rows.to(tl.uint32) * 0x9E3779B1)
    bits = _hash(row[:, None] + cols.to(tl.uint32)[None, :] * 0x85EBCA77)
    return tl.where(bits >= drop_below.to(tl.uint32, bitcast=True), 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _place(coords, rows, inside):
    return tl.load(coords + rows * 2, mask=inside, other=0.0), tl.load(coords + rows * 2 + 1, mask=inside, other=0.0)


@triton.jit
def _buckets(up, right, square, thresholds, KIND: tl.constexpr, STEPS: tl.constexpr):
    SIDE: tl.constexpr = 2 * STEPS + 1
    first = tl.zeros(square.shape, tl.int32)
    second = tl.zeros(square.shape, tl.int32)
    for step in tl.static_range(STEPS):
        reach = tl.load(thresholds + step)
        if KIND == "product":
            first += (up >= reach).to(tl.int32) - (-up >= reach).to(tl.int32)
            second += (right >= reach).to(tl.int32) - (-right >= reach).to(tl.int32)
        else:
            first += (square >= reach).to(tl.int32)
    if KIND == "product":
        bucket = (first + STEPS) * SIDE + second + STEPS
        nowhere = SIDE * SIDE
    else:
        bucket = first + STEPS
        nowhere = SIDE
    return tl.where(square == square, bucket, nowhere)


@triton.jit
def _pairs(coords, kv_coords, thresholds, rows, row_in, cols, col_in, KIND: tl.constexpr, STEPS: tl.constexpr):
    """Distance, or bucket, of each pair of the tile; 0 and the last bucket where one has no place."""
    row_up, row_right = _place(coords, rows, row_in)
    col_up, col_right = _place(kv_coords, cols, col_in)
    up = row_up[:, None] - col_up[None, :]
    right = row_right[:, None] - col_right[None, :]
    square = up * up + right * right
    if KIND == "distance":
        out = tl.sqrt(tl.where(square == square, square, 0.0))
    else:
        out = _buckets(up, right, square, thresholds, KIND, STEPS)
    return out


@triton.jit
def _bias(pairs, weights, rows, head, H, C, inside, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    if KIND == "distance":
        out = -tl.load(weights + head) * pairs
    else:
        base = weights + head * C
        if PER_ROW:
            out = tl.load(base + rows[:, None] * H * C + pairs, mask=inside, other=0.0)
        else:
            out = tl.load(base + pairs, mask=inside, other=0.0)
    return out


@triton.jit
def _tile(base, rows, inside, head, H, D, cols, UPCAST: tl.constexpr):
    """(rows, cols) of one head of (T, H, D)."""
    out = tl.load(
        base + (rows[:, None] * H + head) * D + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0
    )
    if UPCAST:  # the interpreter has no bfloat16 arithmetic
        out = out.to(tl.float32)
    return out


@triton.jit
def _scores(
    q,
    k,
    scale,
    pairs,
    weights,
    rows,
    head,
    H,
    C,
    inside,
    KIND: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile in base 2; -inf outside."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if KIND != "":
        scores += _bias(pairs, weights, rows, head, H, C, inside, KIND, PER_ROW)
    return tl.where(inside, scores * LOG2E, -float("inf"))


@triton.jit
def _key_tile(
    mask, coords, kv_coords, thresholds, rows, row_in, first, end,
    MASKED: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of the keys in a tile, which of them take part, and distances or buckets."""
    cols = first + tl.arange(0, BLOCK_N).to(tl.int64)
    col_in = cols < end
    if MASKED:
        col_in = col_in & (tl.load(mask + cols, mask=col_in, other=0) != 0)
    if KIND != "":
        pairs = _pairs(coords, kv_coords, thresholds, rows, row_in, cols, col_in, KIND, STEPS)
    else:
        pairs = 0
    return cols, col_in, pairs


@triton.jit(do_not_specialize=["seed", "drop_below"])
def _forward(
    q, k, v, out, lse, mask, coords, kv_coords, weights, thresholds, blocks, starts, ends, kv_offsets,
    scale, dropout, seed, drop_below, H, D, DV, C,
    MASKED: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr, PER_ROW: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    bag = tl.load(blocks + block)
    rows = tl.load(starts + block) + tl.arange(0, BLOCK_M).to(tl.int64)
    row_in = rows < tl.load(ends + block)
    kv_start, kv_end = tl.load(kv_offsets + bag), tl.load(kv_offsets + bag + 1)
    dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_tile = _tile(q, rows, row_in, head, H, D, dims, UPCAST)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(kv_start, kv_end, BLOCK_N):
        cols, col_in, pairs = _key_tile(
            mask, coords, kv_coords, thresholds, rows, row_in, first, kv_end, MASKED, KIND, STEPS, BLOCK_N
        )
        inside = row_in[:, None] & col_in[None, :]
        k_tile = _tile(k, cols, col_in, head, H, D, dims, UPCAST)
        scores = _scores(q_tile, k_tile, scale, pairs, weights, rows, head, H, C, inside, KIND, PER_ROW, PRECISION)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # As long as no key took part, any finite number will do: exp2(-inf) is 0.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            p *= _factors(rows, cols, head, seed, drop_below, dropout)
        v_tile = _tile(v, cols, col_in, head, H, DV, values, UPCAST)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    found = total > 0
    acc /= tl.where(found, total, 1.0)[:, None]
    place = out + (rows[:, None] * H + head) * DV + values[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_in[:, None] & (values < DV)[None, :])
    sums = tl.where(found, (top + tl.log2(tl.where(found, total, 1.0))) * LN2, -float("inf"))
    tl.store(lse + rows * H + head, sums, mask=row_in)


@triton.jit
def _row_sums(lse, rows, row_in, head, H):
    """Logsumexp in base 2; for rows without keys a number at which all weights are 0."""
    sums = tl.load(lse + rows * H + head, mask=row_in, other=0.0)
    return tl.where(sums == -float("inf"), 0.0, sums) * LOG2E


@triton.jit(do_not_specialize=["seed", "drop_below"])
def _grad_q(
    q, k, v, grad, lse, delta, grad_q, grad_parts, mask, coords, kv_coords, weights, thresholds,
    blocks, starts, ends, kv_offsets,
    scale, dropout, seed, drop_below, H, D, DV, C,
    FOR_WEIGHTS: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr, PER_ROW: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # FOR_WEIGHTS: the gradient of the bias weights, of which a program writes one row per query, or one in all.
    block, head = tl.program_id(0), tl.program_id(1)
    bag = tl.load(blocks + block)
    rows = tl.load(starts + block) + tl.arange(0, BLOCK_M).to(tl.int64)
    row_in = rows < tl.load(ends + block)
    kv_start, kv_end = tl.load(kv_offsets + bag), tl.load(kv_offsets + bag + 1)
    dims, values, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    q_tile = _tile(q, rows, row_in, head, H, D, dims, UPCAST)
    grad_tile = _tile(grad, rows, row_in, head, H, DV, values, UPCAST)
    sums = _row_sums(lse, rows, row_in, head, H)
    deltas = tl.load(delta + rows * H + head, mask=row_in, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_C if FOR_WEIGHTS else BLOCK_D], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for first in range(kv_start, kv_end, BLOCK_N):
        cols, col_in, pairs = _key_tile(
            mask, coords, kv_coords, thresholds, rows, row_in, first, kv_end, MASKED, KIND, STEPS, BLOCK_N
        )
        inside = row_in[:, None] & col_in[None, :]
        k_tile = _tile(k, cols, col_in, head, H, D, dims, UPCAST)
        scores = _scores(q_tile, k_tile, scale, pairs, weights, rows, head, H, C, inside, KIND, PER_ROW, PRECISION)
        v_tile = _tile(v, cols, col_in, head, H, DV, values, UPCAST)
        grads = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROP:
            grads *= _factors(rows, cols, head, seed, drop_below, dropout)
        p = tl.exp2(scores - sums[:, None])
        grads = p * (grads - deltas[:, None])
        if FOR_WEIGHTS:
            if KIND == "distance":
                acc -= tl.where(columns[None, :] == 0, tl.sum(grads * pairs, 1)[:, None], 0.0)
                rest += tl.sum(grads, 1)
                mean += tl.sum(p * pairs, 1)
            else:
                for column in range(0, C):  # noqa: PIE808 (Triton's range)
                    here = tl.sum(tl.where(pairs == column, grads, 0.0), 1)
                    acc += tl.where(columns[None, :] == column, here[:, None], 0.0)
        else:
            acc = tl.dot(grads.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    if FOR_WEIGHTS:
        if KIND == "distance":
            # grads sums to 0 over a row, but for the rounding of delta, which enters as p: take its share out again.
            acc += tl.where(columns[None, :] == 0, (rest * mean)[:, None], 0.0)
        if PER_ROW:
            place = grad_parts + (rows[:, None] * H + head) * C + columns[None, :]
            tl.store(place, acc, mask=row_in[:, None] & (columns < C)[None, :])
        else:
            place = grad_parts + (block.to(tl.int64) * H + head) * C + columns
            tl.store(place, tl.sum(acc, 0), mask=columns < C)
    else:
        place = grad_q + (rows[:, None] * H + head) * D + dims[None, :]
        tl.store(place, (acc * scale).to(grad_q.dtype.element_ty), mask=row_in[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["seed", "drop_below"])
def _grad_kv(
    q, k, v, grad, lse, delta, grad_k, grad_v, mask, coords, kv_coords, weights, thresholds,
    blocks, starts, ends, offsets,
    scale, dropout, seed, drop_below, H, D, DV, C,
    MASKED: tl.constexpr, KIND: tl.constexpr, STEPS: tl.constexpr, PER_ROW: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    bag = tl.load(blocks + block)
    cols = tl.load(starts + block) + tl.arange(0, BLOCK_N).to(tl.int64)
    stored = cols < tl.load(ends + block)
    col_in = stored
    if MASKED:
        col_in = col_in & (tl.load(mask + cols, mask=stored, other=0) != 0)
    row_start, row_end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_tile = _tile(k, cols, col_in, head, H, D, dims, UPCAST)
    v_tile = _tile(v, cols, col_in, head, H, DV, values, UPCAST)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(row_start, row_end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        row_in = rows < row_end
        inside = row_in[:, None] & col_in[None, :]
        pairs = 0
        if KIND != "":
            pairs = _pairs(coords, kv_coords, thresholds, rows, row_in, cols, col_in, KIND, STEPS)
        q_tile = _tile(q, rows, row_in, head, H, D, dims, UPCAST)
        grad_tile = _tile(grad, rows, row_in, head, H, DV, values, UPCAST)
        scores = _scores(q_tile, k_tile, scale, pairs, weights, rows, head, H, C, inside, KIND, PER_ROW, PRECISION)
        p = tl.exp2(scores - _row_sums(lse, rows, row_in, head, H)[:, None])
        grads = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        dropped = p
        if DROP:
            factors = _factors(rows, cols, head, seed, drop_below, dropout)
            grads *= factors
            dropped = p * factors
        acc_v = tl.dot(tl.trans(dropped.to(grad_tile.dtype)), grad_tile, acc_v, input_precision=PRECISION)
        grads = p * (grads - tl.load(delta + rows * H + head, mask=row_in, other=0.0)[:, None])
        acc_k = tl.dot(tl.trans(grads.to(q_tile.dtype)), q_tile, acc_k, input_precision=PRECISION)
    place = grad_k + (cols[:, None] * H + head) * D + dims[None, :]
    tl.store(place, (acc_k * scale).to(grad_k.dtype.element_ty), mask=stored[:, None] & (dims < D)[None, :])
    place = grad_v + (cols[:, None] * H + head) * DV + values[None, :]
    tl.store(place, acc_v.to(grad_v.dtype.element_ty), mask=stored[:, None] & (values < DV)[None, :])


class _Cut:
    """Bag, first and last row of blocks of at most ``size`` rows: at most T // size + B of them, the rest empty."""

    def __init__(self, offsets: Tensor, num_rows: int, size: int) -> None:
        num_bags = offsets.shape[0] - 1
        self.count = num_rows // size + num_bags
        counts = (offsets.diff() + size - 1) // size
        last = counts.cumsum(0)
        block = torch.arange(self.count, device=offsets.device)
        self.bag = torch.searchsorted(last, block, right=True).clamp_max(num_bags - 1)
        first = offsets[self.bag] + (block - (last - counts)[self.bag]) * size
        self.ends = torch.minimum(first + size, offsets[self.bag + 1])
        self.starts = torch.minimum(first, self.ends)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bag, self.starts, self.ends


class _Call:
    """The arguments of :func:`forward` as kernels take them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, kv_offsets: Tensor, mask: Tensor | None,
        coords: Tensor | None, kv_coords: Tensor | None, weights: Tensor | None, kind: str, thresholds: list[float],
        dropout: float, seed: int, scale: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.offsets, self.kv_offsets, self.kind = offsets, kv_offsets, kind
        self.weights = q if weights is None else weights.contiguous()
        self.columns = 1 if weights is None else weights.shape[2]
        bound = min(round(dropout * 2**32), 2**32 - 1)
        numbers = (scale, dropout, seed, bound - (1 << 32) if bound >= 1 << 31 else bound)
        self.numbers = (*numbers, q.shape[1], q.shape[2], v.shape[2], self.columns)
        limits = torch.tensor(thresholds or [0.0], dtype=torch.float32).to(q.device, non_blocking=True)
        places = (q if coords is None else coords, q if kv_coords is None else kv_coords)
        self.pairs = (q if mask is None else mask.view(torch.uint8), *places, self.weights, limits)
        per_row = weights is not None and kind != "distance" and weights.shape[0] > 1
        exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        self.options: dict[str, Any] = {
            "MASKED": mask is not None,
            "KIND": kind,
            "STEPS": len(thresholds),
            "PER_ROW": per_row,
        }
        self.options |= {"DROP": dropout > 0, "UPCAST": INTERPRETED, "PRECISION": "ieee" if exact else "tf32"}
        self.options |= {"BLOCK_D": max(16, triton.next_power_of_2(q.shape[2]))}
        self.options |= {"BLOCK_V": max(16, triton.next_power_of_2(v.shape[2]))}

    def tiles(self, backward: bool) -> dict[str, int]:
        """Tiles and warps without register spills on sm_80 and sm_90, where there are such."""
        if INTERPRETED:  # the interpreter's cost is per operation, not per element
            return {"BLOCK_M": 128, "BLOCK_N": 128}
        width = max(self.options["BLOCK_D"], self.options["BLOCK_V"])
        wide = width > 64
        if self.q.dtype == torch.float32:
            return {"BLOCK_M": 32, "BLOCK_N": 16 if backward else 32, "num_warps": 8, "num_stages": 1}
        extras = bool(self.kind) or self.options["DROP"]  # pairs and random bits take registers
        if (width > 128 and backward) or (extras and wide):
            return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
        if extras:
            return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
        if backward:
            return {"BLOCK_M": 64, "BLOCK_N": 32 if wide else 64, "num_warps": 8, "num_stages": 2}
        narrow = width <= 128
        return {
            "BLOCK_M": 128 if narrow else 64,
            "BLOCK_N": 64 if narrow else 32,
            "num_warps": 8 if wide else 4,
            "num_stages": 2,
        }

    def tiles_for_weights(self) -> dict[str, int]:
        """What differs where ``_grad_q`` sums per bucket; float32 without tensor cores spills 256 bytes even so."""
        return {"BLOCK_M": 16, "num_warps": 4} if self.q.dtype == torch.float32 and not INTERPRETED else {}


def _stored(t: Tensor, exact: bool = False) -> Tensor:
    """Where the kernel writes a tensor like t: the interpreter truncates where it should round to 16 bits."""
    return torch.empty(t.shape, dtype=torch.float32 if INTERPRETED or exact else t.dtype, device=t.device)


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments as in ``_Call`` -> out (Tq, H, dv), lse (Tq, H) float32; out float32 with a bias, else as q."""
    call = _Call(*arguments)
    (num_rows, heads, _), width = call.q.shape, call.v.shape[2]
    out = _stored(call.q.new_empty(num_rows, heads, width), bool(call.kind))
    lse = call.q.new_empty(num_rows, heads, dtype=torch.float32)
    if out.numel():
        tiles = call.tiles(backward=False)
        cut = _Cut(call.offsets, num_rows, tiles["BLOCK_M"])
        where = (*cut.tensors(), call.kv_offsets)
        _forward[cut.count, heads](
            call.q, call.k, call.v, out, lse, *call.pairs, *where, *call.numbers, **call.options, **tiles
        )
    return out if call.kind else out.to(call.q.dtype), lse


def backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of weights or (0,)."""
    need_weights = arguments[-1]
    call = _Call(*arguments[:-1])
    heads = call.q.shape[1]
    tiles = call.tiles(backward=True)
    delta = (grad.float() * out.float()).sum(2)
    grad, lse = grad.to(call.q.dtype).contiguous(), lse.contiguous()
    grad_q, grad_k, grad_v = _stored(call.q), _stored(call.k), _stored(call.v)
    parts = lse.new_empty(0)
    inputs = (call.q, call.k, call.v, grad, lse, delta)
    for for_weights in (False, True) if need_weights else (False,):
        settings = call.options | tiles | (call.tiles_for_weights() if for_weights else {})
        cut = _Cut(call.offsets, call.q.shape[0], settings["BLOCK_M"])
        if for_weights:
            shape = call.weights.shape if call.options["PER_ROW"] else (cut.count, heads, call.columns)
            parts = lse.new_zeros(shape)
        if call.q.numel():
            _grad_q[cut.count, heads](
                *inputs, grad_q, parts, *call.pairs, *cut.tensors(), call.kv_offsets, *call.numbers,
                FOR_WEIGHTS=for_weights, BLOCK_C=triton.next_power_of_2(call.columns), **settings,
            )  # fmt: skip
    if call.k.numel():
        kv_cut = _Cut(call.kv_offsets, call.k.shape[0], tiles["BLOCK_N"])
        where = (*kv_cut.tensors(), call.offsets)
        _grad_kv[kv_cut.count, heads](
            *inputs, grad_k, grad_v, *call.pairs, *where, *call.numbers, **call.options, **tiles
        )
    if need_weights and not call.options["PER_ROW"]:
        parts = parts.sum(0, keepdim=True)
    return grad_q.to(call.q.dtype), grad_k.to(call.k.dtype), grad_v.to(call.v.dtype), parts
