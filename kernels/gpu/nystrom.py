"""Attention between the rows of a pack and the landmarks of their bags, on the GPU, as in kernels/cpu/nystrom.

``_spread``: one program owns BLOCK_T rows of one bag and one head, and walks over the landmarks with a running maximum.
``_gather``: one program owns BLOCK_M landmarks, one head and one of S splits of the bag's rows; the splits are
combined exactly. Backward has the same two forms for both factors. With rows r1, r2 and landmarks l1, l2 of

    spread: r1 = q, r2 = grad_out, l1 = keys, l2 = values;    gather: r1 = k, r2 = v, l1 = queries, l2 = grad_y
    p = exp(r1 l1^T - top) / total,  ds = p (r2 l2^T - delta)

``_row_grads`` computes ds l1 (gather: and p l2) for its rows, ``_landmark_grads`` ds^T r1 (spread: and p^T r2) for its
landmarks, in splits that are added afterwards. top, total and delta belong to rows in spread, to landmarks in gather.
No T x M matrix, no atomics. FLOPs as on the CPU, 2 T H M (d + dv) more for spread's delta. Bytes: the rows once per
kernel and block of landmarks (from L2 but the first time); partials are S times the landmarks. 16-bit rows are
multiplied in TF32, float32 in full precision unless torch.set_float32_matmul_precision allows TF32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# Programs that fill a large GPU several times over.
_PROGRAMS = 1024


@triton.jit
def _load_rows(x, rows, head, H, D, end, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < end)[:, None] & (cols < D)[None, :]
    return tl.load(x + (rows * H + head)[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(x, value, rows, head, H, D, end, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < end)[:, None] & (cols < D)[None, :]
    tl.store(x + (rows * H + head)[:, None] * D + cols[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_landmarks(x, ids, base, D, count, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    inside = (ids < count)[:, None] & (cols < D)[None, :]
    return tl.load(x + (base + ids)[:, None] * D + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _store_landmarks(x, value, ids, base, D, M, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    inside = (ids < M)[:, None] & (cols < D)[None, :]
    tl.store(x + (base + ids)[:, None] * D + cols[None, :], value, mask=inside)


@triton.jit
def _spread(
    q, keys, values, out, tops, totals, bags, starts, offsets, counts, H, M, D, DV,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    bag = tl.load(bags + tl.program_id(0))
    end = tl.load(offsets + bag + 1)
    count = tl.load(counts + bag)
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    base = (bag * H + head) * M
    query = _load_rows(q, rows, head, H, D, end, BLOCK_D)
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, count, BLOCK_M):
        ids = first + tl.arange(0, BLOCK_M).to(tl.int64)
        key = _load_landmarks(keys, ids, base, D, count, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores = tl.where((ids < count)[None, :], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        decay = tl.exp(top - new)
        total = total * decay + tl.sum(p, 1)
        value = _load_landmarks(values, ids, base, DV, count, BLOCK_V)
        acc = tl.dot(p, value, acc * decay[:, None], input_precision=PRECISION)
        top = new
    _store_rows(out, acc / total[:, None], rows, head, H, DV, end, BLOCK_V)
    tl.store(tops + rows * H + head, top, mask=rows < end)
    tl.store(totals + rows * H + head, total, mask=rows < end)


@triton.jit
def _gather(
    queries, k, v, y, tops, totals, offsets, counts, B, H, M, D, DV,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    bag, head = (tl.program_id(2) // H).to(tl.int64), tl.program_id(2) % H
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    count = tl.load(counts + bag)
    length = tl.cdiv(stop - start, splits)
    begin = tl.minimum(start + split * length, stop)
    end = tl.minimum(begin + length, stop)
    ids = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    base = (bag * H + head) * M
    query = _load_landmarks(queries, ids, base, D, count, BLOCK_D)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        scores = tl.dot(query, tl.trans(_load_rows(k, rows, head, H, D, end, BLOCK_D)), input_precision=PRECISION)
        scores = tl.where((rows < end)[None, :], scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new[:, None])
        decay = tl.exp(top - new)
        total = total * decay + tl.sum(p, 1)
        value = _load_rows(v, rows, head, H, DV, end, BLOCK_V)
        acc = tl.dot(p, value, acc * decay[:, None], input_precision=PRECISION)
        top = new
    # Not yet divided. A split without rows gives 0 and -inf; landmarks beyond the bag's number give what the caller
    # masks.
    base += split.to(tl.int64) * B * H * M
    _store_landmarks(y, acc, ids, base, DV, M, BLOCK_V)
    tl.store(tops + base + ids, top, mask=ids < M)
    tl.store(totals + base + ids, total, mask=ids < M)


@triton.jit
def _probabilities(row1, row2, mark1, mark2, top, total, inside, PRECISION: tl.constexpr):
    """p and grad_p of (BLOCK_T, BLOCK_M), p zero outside; ``top`` and ``total`` broadcast."""
    scores = tl.dot(row1, tl.trans(mark1), input_precision=PRECISION)
    p = tl.exp(tl.where(inside, scores - top, -float("inf"))) / total
    return p, tl.dot(row2, tl.trans(mark2), input_precision=PRECISION)


@triton.jit
def _row_grads(
    r1, r2, l1, l2, tops, totals, delta, g1, g2, bags, starts, offsets, counts, H, M, D, DV, SPREAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    bag = tl.load(bags + tl.program_id(0))
    end = tl.load(offsets + bag + 1)
    count = tl.load(counts + bag)
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    base = (bag * H + head) * M
    row1, row2 = _load_rows(r1, rows, head, H, D, end, BLOCK_D), _load_rows(r2, rows, head, H, DV, end, BLOCK_V)
    centre = tl.zeros([BLOCK_T], tl.float32)
    top = tl.zeros([BLOCK_T, 1], tl.float32)
    total = top
    if SPREAD:
        top = tl.load(tops + rows * H + head, mask=rows < end, other=0.0)[:, None]
        total = tl.load(totals + rows * H + head, mask=rows < end, other=1.0)[:, None]
        # From p itself and not from the output, which may be rounded to 16 bits.
        for first in range(0, count, BLOCK_M):
            ids = first + tl.arange(0, BLOCK_M).to(tl.int64)
            mark1 = _load_landmarks(l1, ids, base, D, count, BLOCK_D)
            mark2 = _load_landmarks(l2, ids, base, DV, count, BLOCK_V)
            inside = (rows < end)[:, None] & (ids < count)[None, :]
            p, grad_p = _probabilities(row1, row2, mark1, mark2, top, total, inside, PRECISION)
            centre += tl.sum(p * grad_p, 1)
        tl.store(delta + rows * H + head, centre, mask=rows < end)
    grad1 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    grad2 = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, count, BLOCK_M):
        ids = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mark1 = _load_landmarks(l1, ids, base, D, count, BLOCK_D)
        mark2 = _load_landmarks(l2, ids, base, DV, count, BLOCK_V)
        inside = (rows < end)[:, None] & (ids < count)[None, :]
        if SPREAD:
            p, grad_p = _probabilities(row1, row2, mark1, mark2, top, total, inside, PRECISION)
            grad_s = p * (grad_p - centre[:, None])
        else:
            mark_top = tl.load(tops + base + ids, mask=ids < count, other=0.0)[None, :]
            mark_total = tl.load(totals + base + ids, mask=ids < count, other=1.0)[None, :]
            p, grad_p = _probabilities(row1, row2, mark1, mark2, mark_top, mark_total, inside, PRECISION)
            grad_s = p * (grad_p - tl.load(delta + base + ids, mask=ids < count, other=0.0)[None, :])
            grad2 = tl.dot(p, mark2, grad2, input_precision=PRECISION)
        grad1 = tl.dot(grad_s, mark1, grad1, input_precision=PRECISION)
    _store_rows(g1, grad1, rows, head, H, D, end, BLOCK_D)
    if not SPREAD:
        _store_rows(g2, grad2, rows, head, H, DV, end, BLOCK_V)


@triton.jit
def _landmark_grads(
    r1, r2, l1, l2, tops, totals, delta, g1, g2, offsets, counts, B, H, M, D, DV, SPREAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    bag, head = (tl.program_id(2) // H).to(tl.int64), tl.program_id(2) % H
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    count = tl.load(counts + bag)
    length = tl.cdiv(stop - start, splits)
    begin = tl.minimum(start + split * length, stop)
    end = tl.minimum(begin + length, stop)
    ids = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    base = (bag * H + head) * M
    mark1 = _load_landmarks(l1, ids, base, D, count, BLOCK_D)
    mark2 = _load_landmarks(l2, ids, base, DV, count, BLOCK_V)
    grad1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad2 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        row1, row2 = _load_rows(r1, rows, head, H, D, end, BLOCK_D), _load_rows(r2, rows, head, H, DV, end, BLOCK_V)
        inside = (rows < end)[None, :] & (ids < count)[:, None]
        if SPREAD:
            top = tl.load(tops + rows * H + head, mask=rows < end, other=0.0)[None, :]
            total = tl.load(totals + rows * H + head, mask=rows < end, other=1.0)[None, :]
            centre = tl.load(delta + rows * H + head, mask=rows < end, other=0.0)[None, :]
        else:
            top = tl.load(tops + base + ids, mask=ids < count, other=0.0)[:, None]
            total = tl.load(totals + base + ids, mask=ids < count, other=1.0)[:, None]
            centre = tl.load(delta + base + ids, mask=ids < count, other=0.0)[:, None]
        # The roles of rows and landmarks are exchanged: p is (BLOCK_M, BLOCK_T).
        p, grad_p = _probabilities(mark1, mark2, row1, row2, top, total, inside, PRECISION)
        grad1 = tl.dot(p * (grad_p - centre), row1, grad1, input_precision=PRECISION)
        if SPREAD:
            grad2 = tl.dot(p, row2, grad2, input_precision=PRECISION)
    base += split.to(tl.int64) * B * H * M
    _store_landmarks(g1, grad1, ids, base, D, M, BLOCK_D)
    if SPREAD:
        _store_landmarks(g2, grad2, ids, base, DV, M, BLOCK_V)


def _options(rows: Tensor, width: int, landmarks: int, owner: str, both_grads: bool = False) -> dict[str, Any]:
    """Compile-time arguments. The tiles are those without register spills on sm_80 and sm_90.

    A program owns a block of ``owner``, "rows" or "landmarks", and reads all of the others, from L2 but the first time:
    the larger its block, the less of that.
    """
    blocks = {
        "BLOCK_D": max(16, triton.next_power_of_2(rows.shape[2])),
        "BLOCK_V": max(16, triton.next_power_of_2(width)),
    }
    exact = rows.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    unaligned = (rows.shape[2] | width) % 16 != 0  # such rows are loaded element by element, which takes registers
    tiles = {"BLOCK_T": 32, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
    if not (exact or unaligned) and max(blocks.values()) <= 64:
        tiles["BLOCK_T" if owner == "rows" else "BLOCK_M"] = 64
        if both_grads:  # of keys and values stand in registers
            tiles["BLOCK_T"] = 16
    if exact:  # without tensor cores, operands stand in registers
        tiles |= {"BLOCK_T": 16, "num_stages": 1}
        if max(blocks.values()) > 64:
            tiles |= {"BLOCK_M": 16, "num_warps": 8}
        elif unaligned:
            tiles |= {"BLOCK_T": 32, "BLOCK_M": 16}
    elif unaligned:
        tiles |= {"BLOCK_M": 16, "num_stages": 1, "num_warps": 8 if max(blocks.values()) > 64 else 4}
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        tiles = {"BLOCK_T": 128, "BLOCK_M": max(16, triton.next_power_of_2(landmarks))}
    return {**blocks, **tiles, "PRECISION": "ieee" if exact else "tf32"}


def _blocks(offsets: Tensor, num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Bag and first row of each block of ``size`` rows, planned on the device: T // size + B, the last maybe empty."""
    num_bags = offsets.shape[0] - 1
    counts = (offsets.diff() + size - 1) // size
    last = counts.cumsum(0)
    block = torch.arange(num_rows // size + num_bags, device=offsets.device)
    bags = torch.searchsorted(last, block, right=True).clamp_max(num_bags - 1)
    starts = offsets[bags] + (block - (last - counts)[bags]) * size
    return bags, starts


def _splits(offsets: Tensor, num_rows: int, heads: int, landmarks: int, block: int) -> int:
    num_bags = offsets.shape[0] - 1
    programs = num_bags * heads * triton.cdiv(landmarks, block)
    return max(1, min(_PROGRAMS // programs, num_rows // (num_bags * 256)))


def spread(q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, d); keys (B, H, M, d), values (B, H, M, dv) float32
    -> out (T, H, dv) in the dtype of q, and maxima and sums of exponentials (2, T, H) float32."""
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    (num_rows, heads, dim), (landmarks, width) = q.shape, values.shape[2:]
    out, norms = q.new_empty(num_rows, heads, width), keys.new_empty(2, num_rows, heads)
    if num_rows:
        options = _options(q, width, landmarks, owner="rows")
        bags, starts = _blocks(offsets, num_rows, options["BLOCK_T"])
        _spread[len(bags), heads](
            q, keys, values, out, norms[0], norms[1], bags, starts, offsets, counts, heads, landmarks, dim, width,
            **options,
        )  # fmt: skip
    return out, norms


def gather(queries: Tensor, k: Tensor, v: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """queries (B, H, M, d) float32; k (T, H, d), v (T, H, dv) -> y (B, H, M, dv), and maxima and sums of
    exponentials (2, B, H, M), float32."""
    queries, k, v = queries.contiguous(), k.contiguous(), v.contiguous()
    (num_bags, heads, landmarks, dim), (num_rows, _, width) = queries.shape, v.shape
    if num_rows == 0:
        return queries.new_zeros(*queries.shape[:3], width), queries.new_zeros(2, *queries.shape[:3])
    options = _options(k, width, landmarks, owner="landmarks")
    block = options["BLOCK_M"]
    splits = _splits(offsets, num_rows, heads, landmarks, block)
    parts = queries.new_empty(splits, num_bags, heads, landmarks, width)
    tops, totals = queries.new_empty(parts.shape[:-1]), queries.new_empty(parts.shape[:-1])
    grid = (splits, triton.cdiv(landmarks, block), num_bags * heads)
    _gather[grid](
        queries, k, v, parts, tops, totals, offsets, counts, num_bags, heads, landmarks, dim, width, **options
    )
    # Of a bag that has rows; another has zeros.
    valid = (torch.arange(landmarks, device=k.device) < counts[:, None]) & (offsets.diff() > 0)[:, None]
    valid = valid[:, None]
    top = torch.where(valid, tops.amax(0), 0.0)
    decay = torch.where(valid, (tops - top).exp_(), 0.0)
    total = torch.where(valid, (totals * decay).sum(0), 1.0)
    return (parts * decay.unsqueeze(4)).sum(0) / total.unsqueeze(3), torch.stack([top, total])


def _backward(
    spread_pass: bool,
    r1: Tensor,
    r2: Tensor,
    l1: Tensor,
    l2: Tensor,
    norms: Tensor,
    delta: Tensor,
    offsets: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients: ds l1, p l2 (None in spread), ds^T r1, p^T r2 (None in gather)."""
    r1, r2, l1, l2 = r1.contiguous(), r2.contiguous(), l1.contiguous(), l2.contiguous()
    (num_rows, heads, dim), (num_bags, _, landmarks, width) = r1.shape, l2.shape
    g1, g2 = torch.empty_like(r1), None if spread_pass else torch.empty_like(r2)
    if num_rows == 0:
        return g1, g2, torch.zeros_like(l1), torch.zeros_like(l2) if spread_pass else None
    options = _options(r1, width, landmarks, owner="rows")
    bags, starts = _blocks(offsets, num_rows, options["BLOCK_T"])
    common = (r1, r2, l1, l2, norms[0], norms[1], delta)
    sizes = (heads, landmarks, dim, width, spread_pass)
    _row_grads[len(bags), heads](
        *common, g1, g1 if g2 is None else g2, bags, starts, offsets, counts, *sizes, **options
    )
    options = _options(r1, width, landmarks, owner="landmarks", both_grads=spread_pass)
    block = options["BLOCK_M"]
    splits = _splits(offsets, num_rows, heads, landmarks, block)
    h1 = l1.new_empty(splits, *l1.shape)
    h2 = l2.new_empty(splits, *l2.shape) if spread_pass else None
    grid = (splits, triton.cdiv(landmarks, block), num_bags * heads)
    _landmark_grads[grid](*common, h1, h1 if h2 is None else h2, offsets, counts, num_bags, *sizes, **options)
    return g1, g2, h1.sum(0), None if h2 is None else h2.sum(0)


def spread_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, norms: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, d), keys (B, H, M, d), values (B, H, M, dv)."""
    grad_q, _, grad_keys, grad_values = _backward(
        True, q, grad, keys, values, norms, torch.empty_like(norms[0]), offsets, counts
    )
    assert grad_values is not None
    return grad_q, grad_keys, grad_values


def gather_backward(
    grad: Tensor, queries: Tensor, k: Tensor, v: Tensor, y: Tensor, norms: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (B, H, M, d), k (T, H, d), v (T, H, dv)."""
    grad_k, grad_v, grad_queries, _ = _backward(False, k, v, queries, grad, norms, (grad * y).sum(3), offsets, counts)
    assert grad_v is not None
    return grad_queries, grad_k, grad_v


def weigh(queries: Tensor, k: Tensor, norms: Tensor, weights: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """sum_i weights[b, h, i] p[t, i] with the p of ``gather``: weights (B, H, M) -> (T, H) float32.

    This is the gradient of one-column values, so the kernel of ``gather``'s backward computes it."""
    k, column = k.contiguous(), weights.unsqueeze(3).contiguous()
    (num_rows, heads, dim), landmarks = k.shape, queries.shape[2]
    out = weights.new_empty(num_rows, heads, 1)
    if num_rows:
        options = _options(k, 1, landmarks, owner="rows")
        bags, starts = _blocks(offsets, num_rows, options["BLOCK_T"])
        marks = (queries.contiguous(), column, norms[0], norms[1], torch.zeros_like(norms[0]))
        _row_grads[len(bags), heads](
            k, torch.zeros_like(out), *marks, torch.empty_like(k), out, bags, starts, offsets, counts,
            heads, landmarks, dim, 1, False, **options,
        )  # fmt: skip
    return out.squeeze(2)
