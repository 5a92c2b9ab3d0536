"""Selection, log-sum-exp and weighted sums for many weights over segments, on CPU.

    topk       the k best rows of each bag and column, best first, the lower row first among equals
    logsumexp  out[b, c] = log sum_t exp(x[t, c])
    pool       z[b] = weights_b^T x_b,   weights (T, S), x (T, P)

``topk``: a job owns one bag and a block of columns and walks over the rows once; each column has a heap of its k best
so far, whose root, the worst of them, a row must beat. That is T C comparisons, and about k log(N / k) insertions of
O(log k) per column where rows come in no order (N in the worst order). x is read once. ``logsumexp`` reads x once
forward and once backward, chunk by chunk, by torch's own vectorised functions. ``pool`` is one GEMM per bag
(2 T S P FLOP), through one buffer where rows must be widened, and for one or two columns one pass over x. Chunks are of
about ``CHUNK_BYTES``. Sums are float32 (float64); products are written to given places, which autocast leaves alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu import segments
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _jit, _launch, accumulation_dtype, array

CHUNK_BYTES = 2 << 20  # stays in the caches between the conversion and the product
_COLUMNS = 32
# Columns of weighted sums, and of inner products, up to which x is read once and widened on the way; beyond, a GEMM is
# faster.
_FEW_SUMS, _FEW_PRODUCTS = 4, 12
_LAST = np.iinfo(np.int64).max


@_jit
def _key(value, sign):
    """An integer that orders like ``value`` (sign 1) or against it (-1); NaN is above infinity, as in torch.topk."""
    wide = np.float64(value)
    if wide == 0:  # -0 and 0 are equal
        return np.int64(0)
    if wide != wide:
        return sign * np.int64(_LAST)
    bits = wide.view(np.int64)
    return sign * (bits ^ ((bits >> np.int64(63)) & np.int64(_LAST)))


@_jit
def _sift(keys, rows, size):
    """Puts the root in its place in the first ``size`` entries; every parent is worse than its children."""
    key, row = keys[0], rows[0]
    here = 0
    while True:
        child = 2 * here + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (keys[other] < keys[child] or (keys[other] == keys[child] and rows[other] > rows[child])):
            child = other
        if keys[child] > key or (keys[child] == key and rows[child] < row):
            break
        keys[here], rows[here] = keys[child], rows[child]
        here = child
    keys[here], rows[here] = key, row


@_jit
def _rise(keys, rows, here):
    """Puts entry ``here`` in its place among those before it."""
    key, row = keys[here], rows[here]
    while here > 0:
        parent = (here - 1) // 2
        if keys[parent] < key or (keys[parent] == key and rows[parent] > row):
            break
        keys[here], rows[here] = keys[parent], rows[parent]
        here = parent
    keys[here], rows[here] = key, row


@_jit
def _topk(begin, end, x, offsets, blocks, sign, index):
    k, columns = index.shape[1], x.shape[1]
    for job in range(begin, end):
        bag, first = job // blocks, (job % blocks) * _COLUMNS
        last = min(first + _COLUMNS, columns)
        start = offsets[bag]
        count = min(k, offsets[bag + 1] - start)
        keys = np.empty((last - first, max(count, 1)), np.int64)
        rows = np.empty((last - first, max(count, 1)), np.int64)
        for t in range(start, start + count):
            for c in range(first, last):
                keys[c - first, t - start], rows[c - first, t - start] = _key(x[t, c], sign), t
                _rise(keys[c - first], rows[c - first], t - start)
        for t in range(start + count, offsets[bag + 1]):
            for c in range(first, last):
                key = _key(x[t, c], sign)
                # Later rows lose against equals.
                if count > 0 and key > keys[c - first, 0]:
                    keys[c - first, 0], rows[c - first, 0] = key, t
                    _sift(keys[c - first], rows[c - first], count)
        for c in range(first, last):
            for size in range(count, 0, -1):
                index[bag, size - 1, c] = rows[c - first, 0]
                keys[c - first, 0], rows[c - first, 0] = keys[c - first, size - 1], rows[c - first, size - 1]
                _sift(keys[c - first], rows[c - first], size - 1)


def topk(x: Tensor, offsets: Tensor, k: int, largest: bool) -> Tensor:
    """(T, C) -> rows of the k best (B, k, C), -1 beyond the size of a bag."""
    num_bags, columns = offsets.shape[0] - 1, x.shape[1]
    index = torch.full((num_bags, k, columns), -1, dtype=torch.int64)
    blocks = -(-columns // _COLUMNS)
    if x.numel() and k:
        # 16 bits are exact in 32; widened here, since scores are narrow.
        args = (
            array(x.to(accumulation_dtype(x.dtype))),
            offsets.numpy(),
            blocks,
            np.int64(1 if largest else -1),
            index.numpy(),
        )
        _launch(_topk, num_bags * blocks, x.numel(), *args)
    return index


def _chunks(offsets: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """Bag, first and last row of pieces of at most ``rows`` rows."""
    starts = offsets.tolist()
    bags = enumerate(zip(starts, starts[1:]))
    return [(bag, row, min(row + rows, end)) for bag, (start, end) in bags for row in range(start, end, rows)]


def logsumexp(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (B, C) in the accumulation dtype; -inf for an empty bag."""
    acc = accumulation_dtype(x.dtype)
    out = torch.full((len(offsets) - 1, x.shape[1]), -torch.inf, dtype=acc)
    for bag, start, end in _chunks(offsets, _buffer_rows(x.shape[1], acc)):
        torch.logaddexp(out[bag], x[start:end].to(acc).logsumexp(0), out=out[bag])
    return out


def logsumexp_backward(grad: Tensor, x: Tensor, out: Tensor, offsets: Tensor) -> Tensor:
    """grad (B, C) exp(x - out) -> (T, C) in the accumulation dtype."""
    out = torch.where(out.isinf(), 0, out)  # infinity minus infinity is nothing
    grad_x = huge_pages(torch.empty(x.shape, dtype=out.dtype))
    for bag, start, end in _chunks(offsets, _buffer_rows(x.shape[1], out.dtype)):
        torch.sub(x[start:end], out[bag], out=grad_x[start:end]).exp_().mul_(grad[bag])
    return grad_x


def _multiply_rows(rows: Tensor, matrices: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[t] = rows[t] @ matrices[b]^T; rows (T, K), matrices (B, M, K) in an accumulation dtype, out (T, M)."""
    acc = matrices.dtype
    if matrices.shape[1] <= _FEW_PRODUCTS:
        out.copy_(segments.row_dots(rows, matrices, offsets))
        return
    if rows.dtype == out.dtype == acc:
        for bag, start, end in _chunks(offsets, max(1, len(rows))):
            torch.mm(rows[start:end], matrices[bag].t(), out=out[start:end])
        return
    step = _buffer_rows(rows.shape[1] + matrices.shape[1], acc)
    wide = rows.new_empty(min(step, len(rows)), rows.shape[1], dtype=acc)
    product = rows.new_empty(min(step, len(rows)), matrices.shape[1], dtype=acc)
    for bag, start, end in _chunks(offsets, step):
        chunk = wide[: end - start].copy_(rows[start:end])
        out[start:end] = torch.mm(chunk, matrices[bag].t(), out=product[: end - start])


def _buffer_rows(width: int, dtype: torch.dtype) -> int:
    return max(64, CHUNK_BYTES // (dtype.itemsize * max(1, width)))


def pool(weights: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """weights (T, S), x (T, P) -> (B, S, P) in the accumulation dtype."""
    acc = accumulation_dtype(torch.promote_types(weights.dtype, x.dtype))
    weights = weights.to(acc)  # narrow beside x, mostly
    if weights.shape[1] <= _FEW_SUMS:
        return segments.weighted_sum(x, weights, offsets)
    out = torch.zeros(offsets.shape[0] - 1, weights.shape[1], x.shape[1], dtype=acc)
    if x.dtype == acc:
        for bag, start, end in _chunks(offsets, max(1, len(x))):
            torch.mm(weights[start:end].t(), x[start:end], out=out[bag])
        return out
    step = _buffer_rows(x.shape[1], acc)
    wide = torch.empty(min(step, len(x)), x.shape[1], dtype=acc)
    for bag, start, end in _chunks(offsets, step):
        out[bag].addmm_(weights[start:end].t(), wide[: end - start].copy_(x[start:end]))
    return out


def pool_backward(
    grad: Tensor, weights: Tensor, x: Tensor, offsets: Tensor, need_weights: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weights (T, S) and x (T, P), each (0,) where it is not needed."""
    grad_weights = huge_pages(torch.empty(weights.shape if need_weights else (0,), dtype=weights.dtype))
    grad_x = huge_pages(torch.empty(x.shape if need_x else (0,), dtype=x.dtype))
    if need_weights:
        _multiply_rows(x, grad, offsets, grad_weights)
    if need_x:
        _multiply_rows(weights, grad.transpose(1, 2), offsets, grad_x)
    return grad_weights, grad_x
