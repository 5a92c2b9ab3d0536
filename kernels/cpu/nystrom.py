"""Attention between the rows of a pack and the landmarks of their bags, on CPU: the long factors of Nystrom attention.

    spread  out[t] = sum_i p[t, i] values[b, i],    p = softmax over i of q[t] . keys[b, i]
    gather  y[b, i] = sum_t p[t, i] v[t],           p = softmax over t of queries[b, i] . k[t]

per head, b the bag of row t. Bag b has ``counts[b]`` landmarks; what stands beyond them is not read, and gives zeros.
(Of a bag of N rows they are min(N, M); but the rows here may be a part of it.) Bags are cut into pieces, each piece is
one thread's, and is walked in chunks whose (H, chunk, M) score matrix has about ``CHUNK_ELEMENTS`` elements and stays
in that core's cache: batched GEMMs over the heads into reused buffers, and between them one pass over the scores, in
Numba; ``gather`` has a running maximum. (Threads inside of each of these short operations, as torch has them, would
meet several times per chunk, and wait for the slowest where others use the machine, too.) What pieces contribute to
landmarks is added in their order; pieces do not depend on the number of threads. Backward walks again and recomputes p
from the scores, their maximum and the sum of exponentials. (Those two and not their log-sum-exp: near 1e4 it is off by
more than a softmax that saturates may be.) Arithmetic is float32 (float64 for float64) whatever the rows are stored in:
the pseudo-inverse between the factors magnifies rounding. But rows in bfloat16 go, where the CPU has instructions for
products of it, through :mod:`fused_nystrom`, in 0.5 to 0.65 of the time.

FLOPs (d the width of q and k, dv that of v): 2 T H M (d + dv) forward, 2 T H M (3 d + 2 dv) backward, for each.
Bytes: q, out (k, v) once forward; q, grad_out, grad_q (k, v, grad_k, grad_v) once backward. Working memory: two score
matrices per thread, and one set of landmarks per piece, of which a bag has 64 at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu import bfloat_tiles, fused_nystrom
from bigbag.kernels.cpu.activations import exp
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _block, _jit, _pool, accumulation_dtype
from bigbag.kernels.cpu.vectors import broadcast, fits, lane_maximum, lanes, larger, load

# Three such matrices stay in the cache of a core; below it, operations on a chunk cost less than starting them.
CHUNK_ELEMENTS = 1 << 18
PIECE_ROWS = 4096
_MOST_PIECES = 64
# Below this many scores, handing work to a thread costs more than the work.
_SERIAL_SCORES = 1 << 18


@_block
def _peak(like, scores, h, r, columns):
    """The largest of scores[h, r, :columns]."""
    wide, top = like, -np.inf
    c = 0
    while fits(like, c, columns):
        wide = larger(load(like, scores, h, r, c), wide)
        c += lanes(like)
    top = lane_maximum(wide)
    while c < columns:
        top = max(top, scores[h, r, c])
        c += 1
    return top


@_jit
def _weigh_rows(scores, tops, totals):
    """scores (H, n, m) = exp(scores - tops), the largest of each row (n, H), and their sums (n, H)."""
    like = broadcast(scores.dtype.type(-np.inf), 32)
    for h in range(scores.shape[0]):
        for r in range(scores.shape[1]):
            top, total = _peak(like, scores, h, r, scores.shape[2]), scores.dtype.type(0)
            for c in range(scores.shape[2]):
                weight = exp(scores[h, r, c] - top)
                scores[h, r, c] = weight
                total += weight
            tops[r, h], totals[r, h] = top, total


@_jit
def _weigh_more(scores, tops, totals, sums):
    """The same of rows (H, m) that go on: tops are raised, and totals (H, m) and sums (H, m, dv) shrink accordingly."""
    like = broadcast(scores.dtype.type(-np.inf), 32)
    for h in range(scores.shape[0]):
        for r in range(scores.shape[1]):
            top = max(tops[h, r], _peak(like, scores, h, r, scores.shape[2]))
            if top > tops[h, r]:
                shrink = exp(tops[h, r] - top) if tops[h, r] > -np.inf else scores.dtype.type(0)
                totals[h, r] *= shrink
                for c in range(sums.shape[2]):
                    sums[h, r, c] *= shrink
                tops[h, r] = top
            total = scores.dtype.type(0)
            for c in range(scores.shape[2]):
                weight = exp(scores[h, r, c] - top)
                scores[h, r, c] = weight
                total += weight
            totals[h, r] += total


@_jit
def _differentiate_rows(scores, grads, tops, totals):
    """scores (H, n, m) = P = exp(scores - tops) / totals, both (n, H); grads = P (grads - the sum of P grads)."""
    for h in range(scores.shape[0]):
        for r in range(scores.shape[1]):
            top, scale, total = tops[r, h], 1 / totals[r, h], scores.dtype.type(0)
            for c in range(scores.shape[2]):
                weight = exp(scores[h, r, c] - top) * scale
                scores[h, r, c] = weight
                total += weight * grads[h, r, c]
            for c in range(scores.shape[2]):
                grads[h, r, c] = scores[h, r, c] * (grads[h, r, c] - total)


@_jit
def _differentiate_more(scores, grads, tops, centres):
    """scores (H, m, n) = exp(scores - tops), grads = scores (grads - centres), both (H, m)."""
    for h in range(scores.shape[0]):
        for r in range(scores.shape[1]):
            top, centre = tops[h, r], centres[h, r]
            for c in range(scores.shape[2]):
                weight = exp(scores[h, r, c] - top)
                scores[h, r, c] = weight
                grads[h, r, c] = weight * (grads[h, r, c] - centre)


@dataclass(frozen=True)
class _Piece:
    """Rows ``start`` to ``end``, all of ``bag``, which has ``count`` landmarks; ``chunk`` rows at a time."""

    bag: int
    count: int
    start: int
    end: int
    chunk: int

    def chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(self.start, self.end, self.chunk):
            yield start, min(start + self.chunk, self.end)


def _is_fused(rows: Tensor) -> bool:
    return bfloat_tiles.AVAILABLE and rows.dtype == torch.bfloat16


def _pieces(offsets: Tensor, counts: Tensor, heads: int) -> list[_Piece]:
    starts, pieces = offsets.tolist(), []
    for bag, (first, last, count) in enumerate(zip(starts, starts[1:], counts.tolist())):
        size = max(PIECE_ROWS, -(-(last - first) // _MOST_PIECES))
        chunk = max(32, CHUNK_ELEMENTS // max(1, heads * count))
        for start in range(first, last, size):
            end = min(start + size, last)
            pieces.append(_Piece(bag, count, start, end, min(chunk, end - start)))
    return pieces


class _Rows:
    """Chunks of (T, H, d) rows as (H, rows, d), widened through a buffer where they are narrower than ``dtype``."""

    def __init__(self, x: Tensor, rows: int) -> None:
        self.x = x
        dtype = accumulation_dtype(x.dtype)
        self.buffer = torch.empty(rows, *x.shape[1:], dtype=dtype) if x.dtype != dtype else None

    def load(self, start: int, end: int) -> Tensor:
        chunk = self.x[start:end]
        if self.buffer is not None:
            chunk = self.buffer[: end - start].copy_(chunk)
        return chunk.transpose(0, 1)

    def place(self, start: int, end: int) -> Tensor:
        """(H, rows, d) to write a chunk into; :meth:`store` then puts it into x."""
        chunk = self.x[start:end] if self.buffer is None else self.buffer[: end - start]
        return chunk.transpose(0, 1)

    def store(self, start: int, end: int) -> None:
        if self.buffer is not None:
            self.x[start:end] = self.buffer[: end - start]


class _Buffers:
    """What a thread reuses from chunk to chunk: row buffers, and (H, a, b) matrices of scores."""

    def __init__(
        self, pieces: list[_Piece], heads: int, dtype: torch.dtype, rows: tuple[Tensor, ...], num: int
    ) -> None:
        self.heads = heads
        most = max(piece.chunk for piece in pieces)
        elements = heads * max(piece.chunk * piece.count for piece in pieces)
        self.rows = [_Rows(x, most) for x in rows]
        self._scores = [torch.empty(elements, dtype=dtype) for _ in range(num)]

    def scores(self, which: int, first: int, second: int) -> Tensor:
        return self._scores[which][: self.heads * first * second].view(self.heads, first, second)


def _launch(work: Callable[[list[_Piece], int], None], pieces: list[_Piece], heads: int) -> None:
    """``work(some pieces, number of the first)`` over all pieces, on torch's number of Python threads."""
    threads = torch.get_num_threads()
    scores = heads * sum((piece.end - piece.start) * piece.count for piece in pieces)
    if threads == 1 or len(pieces) < 2:
        if pieces:
            work(pieces, 0)
        return
    bounds = np.linspace(0, len(pieces), min(len(pieces), 4 * threads) + 1).astype(int).tolist()
    inference = torch.is_inference_mode_enabled()

    def job(begin: int, end: int) -> None:
        torch.set_num_threads(1)
        # The modes of autograd belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            work(pieces[begin:end], begin)

    pool = _pool(os.getpid(), threads)
    torch.set_num_threads(1)  # OpenMP's number belongs to a thread, MKL's to the process
    try:
        if scores < _SERIAL_SCORES:
            work(pieces, 0)
            return
        for future in [pool.submit(job, begin, end) for begin, end in zip(bounds, bounds[1:])]:
            future.result()
    finally:
        torch.set_num_threads(threads)


def _add(pieces: list[_Piece], parts: Tensor, out: Tensor) -> Tensor:
    """Adds the pieces' (H, M, d) to those of their bags, in order; landmarks beyond a bag's number stay."""
    for piece, part in zip(pieces, parts):
        out[piece.bag, :, : piece.count] += part[:, : piece.count]
    return out


def spread(q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, d); keys (B, H, M, d), values (B, H, M, dv) in the accumulation dtype
    -> out (T, H, dv) in the dtype of q, and maxima and sums of exponentials (2, T, H) in the accumulation dtype."""
    num_rows, heads, _ = q.shape
    out = huge_pages(torch.empty(num_rows, heads, values.shape[3], dtype=q.dtype))
    norms = torch.empty(2, num_rows, heads, dtype=keys.dtype)
    pieces = _pieces(offsets, counts, heads)

    def work(pieces: list[_Piece], _: int) -> None:
        buffers = _Buffers(pieces, heads, keys.dtype, (q, out), 1)
        rows, result = buffers.rows
        for piece in pieces:
            key, value = keys[piece.bag, :, : piece.count].mT, values[piece.bag, :, : piece.count]
            for start, end in piece.chunks():
                p = torch.bmm(rows.load(start, end), key, out=buffers.scores(0, end - start, piece.count))
                _weigh_rows(p.numpy(), *norms[:, start:end].numpy())
                # Dividing dv columns of the product is cheaper than M columns of p.
                torch.bmm(p, value, out=result.place(start, end)).div_(norms[1, start:end].t().unsqueeze(2))
                result.store(start, end)

    given = (q, keys, values, counts, out, norms)
    _launch(fused_nystrom.spread(*given) if _is_fused(q) else work, pieces, heads)
    return out, norms


def spread_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, norms: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, d), keys (B, H, M, d), values (B, H, M, dv)."""
    heads = q.shape[1]
    pieces = _pieces(offsets, counts, heads)
    grad_q = huge_pages(q.new_empty(q.shape))
    key_parts = keys.new_zeros(len(pieces), *keys.shape[1:])
    value_parts = values.new_zeros(len(pieces), *values.shape[1:])

    def work(pieces: list[_Piece], first: int) -> None:
        buffers = _Buffers(pieces, heads, keys.dtype, (q, grad, grad_q), 2)
        rows, grads, results = buffers.rows
        for number, piece in enumerate(pieces, first):
            key, value = keys[piece.bag, :, : piece.count], values[piece.bag, :, : piece.count]
            grad_key, grad_value = key_parts[number, :, : piece.count], value_parts[number, :, : piece.count]
            for start, end in piece.chunks():
                query, grad_out = rows.load(start, end), grads.load(start, end)
                p, grad_s = (buffers.scores(i, end - start, piece.count) for i in range(2))
                torch.bmm(query, key.mT, out=p)
                torch.bmm(grad_out, value.mT, out=grad_s)
                _differentiate_rows(p.numpy(), grad_s.numpy(), *norms[:, start:end].numpy())
                torch.bmm(grad_s, key, out=results.place(start, end))
                results.store(start, end)
                grad_key.baddbmm_(grad_s.mT, query)
                grad_value.baddbmm_(p.mT, grad_out)

    given = (grad, q, keys, values, norms, counts, grad_q, key_parts, value_parts)
    _launch(fused_nystrom.spread_backward(*given) if _is_fused(q) else work, pieces, heads)
    sums = [_add(pieces, parts, x.new_zeros(x.shape)) for parts, x in ((key_parts, keys), (value_parts, values))]
    return grad_q, sums[0], sums[1]


def gather(queries: Tensor, k: Tensor, v: Tensor, offsets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """queries (B, H, M, d) in the accumulation dtype; k (T, H, d), v (T, H, dv)
    -> y (B, H, M, dv), and maxima and sums of exponentials (2, B, H, M), in the accumulation dtype."""
    heads, landmarks = queries.shape[1:3]
    pieces = _pieces(offsets, counts, heads)
    parts = queries.new_zeros(len(pieces), heads, landmarks, v.shape[2])
    tops = queries.new_full((len(pieces), heads, landmarks, 1), -torch.inf)
    totals = queries.new_zeros(tops.shape)

    def work(pieces: list[_Piece], first: int) -> None:
        buffers = _Buffers(pieces, heads, queries.dtype, (k, v), 1)
        keys, values = buffers.rows
        for number, piece in enumerate(pieces, first):
            query = queries[piece.bag, :, : piece.count]
            top, total = (x[number, :, : piece.count, 0] for x in (tops, totals))
            acc = parts[number, :, : piece.count]
            for start, end in piece.chunks():
                p = torch.bmm(query, keys.load(start, end).mT, out=buffers.scores(0, piece.count, end - start))
                _weigh_more(p.numpy(), top.numpy(), total.numpy(), acc.numpy())
                acc.baddbmm_(p, values.load(start, end))

    given = (queries, k, v, parts, tops, totals)
    _launch(fused_nystrom.gather(*given) if _is_fused(k) else work, pieces, heads)
    return _combine(pieces, parts, tops, totals, queries.shape[0])


def _combine(pieces: list[_Piece], parts: Tensor, tops: Tensor, totals: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """The pieces' sums, each relative to its own maximum, as softmaxes over whole bags, with maxima and totals."""
    heads, landmarks, width = parts.shape[1:]
    y, norms = parts.new_zeros(num_bags, heads, landmarks, width), parts.new_zeros(2, num_bags, heads, landmarks)
    of_bag: dict[int, list[int]] = {}
    for number, piece in enumerate(pieces):
        of_bag.setdefault(piece.bag, []).append(number)
    for bag, numbers in of_bag.items():
        count, own = pieces[numbers[0]].count, slice(numbers[0], numbers[-1] + 1)
        top = tops[own, :, :count].amax(0)
        decay = (tops[own, :, :count] - top).exp_()
        total = (totals[own, :, :count] * decay).sum(0)
        y[bag, :, :count] = (parts[own, :, :count] * decay).sum(0) / total
        norms[0, bag, :, :count], norms[1, bag, :, :count] = top.squeeze(2), total.squeeze(2)
    return y, norms


def gather_backward(
    grad: Tensor, queries: Tensor, k: Tensor, v: Tensor, y: Tensor, norms: Tensor, offsets: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (B, H, M, d), k (T, H, d), v (T, H, dv)."""
    heads = k.shape[1]
    pieces = _pieces(offsets, counts, heads)
    grad_k, grad_v = (huge_pages(x.new_empty(x.shape)) for x in (k, v))
    parts = queries.new_zeros(len(pieces), *queries.shape[1:])
    delta = (grad * y).sum(3)

    def work(pieces: list[_Piece], first: int) -> None:
        buffers = _Buffers(pieces, heads, queries.dtype, (k, v, grad_k, grad_v), 2)
        keys, values, results_k, results_v = buffers.rows
        for number, piece in enumerate(pieces, first):
            query, part = queries[piece.bag, :, : piece.count], parts[number, :, : piece.count]
            top, total = norms[:, piece.bag, :, : piece.count]
            # exp(score - top) stays undivided; what is multiplied by it is divided, being smaller.
            grad_y, centre = (
                grad[piece.bag, :, : piece.count] / total[..., None],
                delta[piece.bag, :, : piece.count] / total,
            )
            for start, end in piece.chunks():
                key, value = keys.load(start, end), values.load(start, end)
                p, grad_s = (buffers.scores(i, piece.count, end - start) for i in range(2))
                torch.bmm(query, key.mT, out=p)
                torch.bmm(grad_y, value.mT, out=grad_s)
                _differentiate_more(p.numpy(), grad_s.numpy(), top.numpy(), centre.numpy())
                torch.bmm(p.mT, grad_y, out=results_v.place(start, end))
                results_v.store(start, end)
                torch.bmm(grad_s.mT, query, out=results_k.place(start, end))
                results_k.store(start, end)
                part.baddbmm_(grad_s, key)

    given = (grad, queries, k, v, y, norms, offsets, grad_k, grad_v, parts)
    _launch(fused_nystrom.gather_backward(*given) if _is_fused(k) else work, pieces, heads)
    return _add(pieces, parts, queries.new_zeros(queries.shape)), grad_k, grad_v


def weigh(queries: Tensor, k: Tensor, norms: Tensor, weights: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """sum_i weights[b, h, i] p[t, i], p of ``gather``: weights (B, H, M) -> (T, H) in the accumulation dtype."""
    heads = k.shape[1]
    out = torch.empty(k.shape[:2], dtype=queries.dtype)

    def work(pieces: list[_Piece], _: int) -> None:
        buffers = _Buffers(pieces, heads, queries.dtype, (k,), 1)
        keys = buffers.rows[0]
        for piece in pieces:
            query = queries[piece.bag, :, : piece.count]
            top, total = norms[:, piece.bag, :, : piece.count, None]
            weight = (weights[piece.bag, :, : piece.count, None] / total).mT
            for start, end in piece.chunks():
                p = torch.bmm(query, keys.load(start, end).mT, out=buffers.scores(0, piece.count, end - start))
                out[start:end] = torch.bmm(weight, p.sub_(top).exp_()).squeeze(1).t()

    _launch(work, _pieces(offsets, counts, heads), heads)
    return out
