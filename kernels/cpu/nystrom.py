"""Attention between the rows of a pack and the landmarks of their bags, on CPU: the long factors of Nystrom attention.

    spread  out[t] = sum_i p[t, i] values[b, i],    p = softmax over i of q[t] . keys[b, i]
    gather  y[b, i] = sum_t p[t, i] v[t],           p = softmax over t of queries[b, i] . k[t]

per head, b the bag of row t. A bag of N rows has min(N, M) landmarks; what stands beyond them is not read, and gives
zeros. Rows are walked in chunks whose (H, chunk, M) score matrix has about ``CHUNK_ELEMENTS`` elements and stays in
cache: batched GEMMs over the heads into reused buffers, softmax in place, ``gather`` with a running maximum. Backward
walks again and recomputes p from the scores, their maximum and the sum of exponentials. (Those two and not their
log-sum-exp: near 1e4 it is off by more than a softmax that saturates may be.) Arithmetic is float32 (float64 for
float64) whatever the rows are stored in: the pseudo-inverse between the factors magnifies rounding.

FLOPs (d the width of q and k, dv that of v): 2 T H M (d + dv) forward, 2 T H M (3 d + 2 dv) backward, for each.
Bytes: q, out (k, v) once forward; q, grad_out, grad_q (k, v, grad_k, grad_v) once backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigbag.kernels.cpu.segments import accumulation_dtype

# Three such matrices stay in the caches; below it, operations on a chunk cost less than starting them.
CHUNK_ELEMENTS = 1 << 19


class _Rows:
    """Chunks of (T, H, d) rows as (H, rows, d), widened through a buffer where they are narrower."""

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


class _Walk:
    """The chunks of every bag, and (H, a, b) scratch matrices in one allocation each."""

    def __init__(self, offsets: Tensor, heads: int, landmarks: int, dtype: torch.dtype, scratch: int) -> None:
        self.starts, self.heads, self.landmarks = offsets.tolist(), heads, landmarks
        longest = max((e - s for s, e in zip(self.starts, self.starts[1:])), default=0)
        self.rows = max(1, min(longest, max(32, CHUNK_ELEMENTS // max(1, heads * landmarks))))
        self._scratch = [torch.empty(heads * self.rows * landmarks, dtype=dtype) for _ in range(scratch)]

    def bags(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Bag, number of its landmarks, bounds of its chunks; empty bags are left out."""
        for bag, (start, end) in enumerate(zip(self.starts, self.starts[1:])):
            if end > start:
                cuts = [*range(start, end, self.rows), end]
                yield bag, min(end - start, self.landmarks), list(zip(cuts, cuts[1:]))

    def scratch(self, which: int, first: int, second: int) -> Tensor:
        return self._scratch[which][: self.heads * first * second].view(self.heads, first, second)


def spread(q: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, d); keys (B, H, M, d), values (B, H, M, dv) in the accumulation dtype
    -> out (T, H, dv) in the dtype of q, and maxima and sums of exponentials (2, T, H) in the accumulation dtype."""
    num_rows, heads, _ = q.shape
    walk = _Walk(offsets, heads, keys.shape[2], keys.dtype, 1)
    out = torch.empty(num_rows, heads, values.shape[3], dtype=q.dtype)
    norms = torch.empty(2, num_rows, heads, dtype=keys.dtype)
    rows, result = _Rows(q, walk.rows), _Rows(out, walk.rows)
    for bag, count, chunks in walk.bags():
        key, value = keys[bag, :, :count].mT, values[bag, :, :count]
        for start, end in chunks:
            p = torch.bmm(rows.load(start, end), key, out=walk.scratch(0, end - start, count))
            top = p.amax(2, keepdim=True)
            total = p.sub_(top).exp_().sum(2, keepdim=True)
            norms[0, start:end], norms[1, start:end] = top.squeeze(2).t(), total.squeeze(2).t()
            # Dividing dv columns of the product is cheaper than M columns of p.
            torch.bmm(p, value, out=result.place(start, end)).div_(total)
            result.store(start, end)
    return out, norms


def spread_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, norms: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, H, d), keys (B, H, M, d), values (B, H, M, dv)."""
    walk = _Walk(offsets, q.shape[1], keys.shape[2], keys.dtype, 3)
    grad_q, grad_keys, grad_values = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    rows, grads, results = _Rows(q, walk.rows), _Rows(grad, walk.rows), _Rows(grad_q, walk.rows)
    for bag, count, chunks in walk.bags():
        key, value = keys[bag, :, :count], values[bag, :, :count]
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for start, end in chunks:
            query, grad_out = rows.load(start, end), grads.load(start, end)
            p, grad_p, grad_s = (walk.scratch(i, end - start, count) for i in range(3))
            torch.bmm(query, key.mT, out=p).sub_(norms[0, start:end].t().unsqueeze(2)).exp_()
            p.div_(norms[1, start:end].t().unsqueeze(2))
            torch.bmm(grad_out, value.mT, out=grad_p)
            torch.ops.aten._softmax_backward_data.out(grad_p, p, 2, p.dtype, grad_input=grad_s)
            torch.bmm(grad_s, key, out=results.place(start, end))
            results.store(start, end)
            grad_key.baddbmm_(grad_s.mT, query)
            grad_value.baddbmm_(p.mT, grad_out)
        grad_keys[bag, :, :count], grad_values[bag, :, :count] = grad_key, grad_value
    return grad_q, grad_keys, grad_values


def gather(queries: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """queries (B, H, M, d) in the accumulation dtype; k (T, H, d), v (T, H, dv)
    -> y (B, H, M, dv), and maxima and sums of exponentials (2, B, H, M), in the accumulation dtype."""
    heads, landmarks = queries.shape[1:3]
    walk = _Walk(offsets, heads, landmarks, queries.dtype, 1)
    y = queries.new_zeros(*queries.shape[:3], v.shape[2])
    norms = queries.new_zeros(2, *queries.shape[:3])
    keys, values = _Rows(k, walk.rows), _Rows(v, walk.rows)
    for bag, count, chunks in walk.bags():
        query = queries[bag, :, :count]
        top = query.new_full((heads, count, 1), -torch.inf)
        total, acc = torch.zeros_like(top), query.new_zeros(heads, count, v.shape[2])
        for start, end in chunks:
            p = torch.bmm(query, keys.load(start, end).mT, out=walk.scratch(0, count, end - start))
            before, top = top, torch.maximum(top, p.amax(2, keepdim=True))
            p.sub_(top).exp_()
            decay = (before - top).exp_()
            total.mul_(decay).add_(p.sum(2, keepdim=True))
            acc.mul_(decay).baddbmm_(p, values.load(start, end))
        y[bag, :, :count] = acc.div_(total)
        norms[0, bag, :, :count], norms[1, bag, :, :count] = top.squeeze(2), total.squeeze(2)
    return y, norms


def gather_backward(
    grad: Tensor, queries: Tensor, k: Tensor, v: Tensor, y: Tensor, norms: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (B, H, M, d), k (T, H, d), v (T, H, dv)."""
    walk = _Walk(offsets, k.shape[1], queries.shape[2], queries.dtype, 2)
    grad_queries, grad_k, grad_v = torch.zeros_like(queries), torch.empty_like(k), torch.empty_like(v)
    keys, values = _Rows(k, walk.rows), _Rows(v, walk.rows)
    results_k, results_v = _Rows(grad_k, walk.rows), _Rows(grad_v, walk.rows)
    delta = (grad * y).sum(3, keepdim=True)
    for bag, count, chunks in walk.bags():
        top, total = norms[:, bag, :, :count, None]
        # exp(score - top) stays undivided; what is multiplied by it is divided, being smaller.
        query, grad_y, centre = queries[bag, :, :count], grad[bag, :, :count] / total, delta[bag, :, :count] / total
        grad_query = torch.zeros_like(query)
        for start, end in chunks:
            key, value = keys.load(start, end), values.load(start, end)
            p, grad_s = (walk.scratch(i, count, end - start) for i in range(2))
            torch.bmm(query, key.mT, out=p).sub_(top).exp_()
            torch.bmm(p.mT, grad_y, out=results_v.place(start, end))
            results_v.store(start, end)
            torch.bmm(grad_y, value.mT, out=grad_s).sub_(centre).mul_(p)
            torch.bmm(grad_s.mT, query, out=results_k.place(start, end))
            results_k.store(start, end)
            grad_query.baddbmm_(grad_s, key)
        grad_queries[bag, :, :count] = grad_query
    return grad_queries, grad_k, grad_v


def weigh(queries: Tensor, k: Tensor, norms: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """sum_i weights[b, h, i] p[t, i], p of ``gather``: weights (B, H, M) -> (T, H) in the accumulation dtype."""
    walk = _Walk(offsets, k.shape[1], queries.shape[2], queries.dtype, 1)
    out = torch.empty(k.shape[:2], dtype=queries.dtype)
    keys = _Rows(k, walk.rows)
    for bag, count, chunks in walk.bags():
        top, total = norms[:, bag, :, :count, None]
        weight = (weights[bag, :, :count, None] / total).mT
        for start, end in chunks:
            p = torch.bmm(queries[bag, :, :count], keys.load(start, end).mT, out=walk.scratch(0, count, end - start))
            out[start:end] = torch.bmm(weight, p.sub_(top).exp_()).squeeze(1).t()
    return out
