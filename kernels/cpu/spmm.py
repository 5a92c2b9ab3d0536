"""Products with a sparse matrix in CSR form, on CPU, with Numba.

    spmm         out[i] = scale[i] sum_e w[e] x[col[e]] + diagonal[i] x[i] + beta h[i]        (e: the edges of row i)
    edge_dots    d[e] = <x[i], y[col[e]]>           edge_distances  d[e] = |x[i] - x[col[e]]|^2
    spmm_backward   sum_e w[e] grad[row of e], e with col[e] = j, and <grad[row of e], x[j]>, both from one read of grad
    edge_softmax a[e] = exp(s[e]) / sum over the edges of row i          transpose   CSR of A^T, by counting

With H heads, edge values are (E, H), and head h owns columns h D/H to (h + 1) D/H of the rows.
A thread owns a range of rows, or of the edges of these rows, and alone writes them: no races, and results do not depend
on the number of threads. Sums are accumulated in float32 (float64 for float64).
Bytes: x once (neighbours' rows come from cache where the graph is local), out once, 4 (1 + H) per edge.
A block of columns of one row is summed in registers over all its neighbours and written once; the rows that the next
one needs anew are asked for meanwhile. Row after row, not block after block: rows of 2 KiB, a part of each read at a
time, fall on a part of the cache's sets. Where neighbours lie far apart, rows are computed in an order of their own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.order import LARGE_BYTES, _jit_serial, row_order
from bigbag.kernels.cpu.segments import _block, _jit, _launch, accumulation_dtype, array
from bigbag.kernels.cpu.vectors import (
    LINE_BYTES,
    NARROW,
    WIDE,
    broadcast,
    fence,
    fits,
    lane_sum,
    lanes,
    load,
    multiply_add,
    multiply_fold,
    prefetch,
    store,
    stream,
    tail,
)

# Lanes of the blocks of columns where a second vector is kept beside the sums.
PAIRED = 64
# Rows asked for ahead, at most, and their count.
AHEAD = 17


@_jit
def _room_ahead(x):
    """Room for the rows of x to ask for ahead; none where x stays in caches, where asking takes a tenth of the time."""
    return np.empty(AHEAD if x.size * x.itemsize >= LARGE_BYTES else 1, np.int32)


@_jit
def _look_ahead(row, crow, col, ahead):
    """List what a row (-1: none) reads; of consecutive columns the last: on a lattice, what the row before did not.

    The first entry counts the rest. Without room for any, none is asked for.
    """
    count = 0
    if row >= 0 and len(ahead) > 1:
        for e in range(crow[row], crow[row + 1]):
            if count + 1 < len(ahead) and (e + 1 == crow[row + 1] or col[e + 1] != col[e] + 1):
                count += 1
                ahead[count] = col[e]
    ahead[0] = count


@_block
def _spmm_row(zero, c, i, n, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches):
    """As many blocks as fit from column c on; returns where they end. So do the functions below."""
    factor, one = scale[i] if len(scale) > 1 else scale[0], scale.dtype.type(1)
    while fits(zero, c, x.shape[2]):
        for k in range(ahead[0] if lanes(zero) == WIDE else 0):
            prefetch(zero, x, ahead[k + 1], h, c)
        acc = zero
        for e in range(crow[i], crow[i + 1]):
            u = weight[e, h] if len(weight) else one
            acc = multiply_add(acc, u, load(zero, x, col[e], h, c))
        acc = multiply_add(zero, factor, acc)
        if len(diagonal):
            acc = multiply_add(acc, diagonal[i], load(zero, x, i, h, c))
        if len(extra):
            if lanes(zero) == WIDE and n >= 0:
                prefetch(zero, extra, n, h, c)
            acc = multiply_add(acc, beta[0], load(zero, extra, i, h, c))
        if past_caches:
            stream(acc, out, i, h, c)
        else:
            store(acc, out, i, h, c)
        c += lanes(zero)
    return c


@_jit
def _row_and_next(order, k, end):
    """The k-th row in turn and the one after it, which is -1 at the end; an empty order is that of the rows."""
    n = k + 1 if k + 1 < end else -1
    if len(order):
        return order[k], (order[n] if n >= 0 else -1)
    return k, n


@_jit
def _spmm(begin, end, order, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches):
    zero = scale.dtype.type(0)
    wide, narrow, rest = broadcast(zero, WIDE), broadcast(zero, NARROW), tail(zero, NARROW)
    ahead = _room_ahead(x)
    for k in range(begin, end):
        i, n = _row_and_next(order, k, end)
        _look_ahead(n, crow, col, ahead)
        for h in range(x.shape[1]):
            c = 0
            c = _spmm_row(wide, c, i, n, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches)
            c = _spmm_row(
                narrow, c, i, n, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches
            )
            c = _spmm_row(rest, c, i, n, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches)
    fence()


@_jit
def _spmm_column(begin, end, crow, col, weight, x, scale, diagonal, extra, beta, out):
    """The same of a single column, of numbers that need no widening; edge numbers and columns are unsigned."""
    for i in range(begin, end):
        acc = out.dtype.type(0)
        first, last = crow[np.uint64(i)], crow[np.uint64(i + 1)]
        if len(weight):
            for e in range(first, last):
                acc += weight[e] * x[col[e]]
        else:
            for e in range(first, last):
                acc += x[col[e]]
        acc *= scale[i] if len(scale) > 1 else scale[0]
        if len(diagonal):
            acc += diagonal[i] * x[i]
        if len(extra):
            acc += beta[0] * extra[i]
        out[i] = acc


@_jit
def _max_degree(crow):
    degree = 0
    for i in range(len(crow) - 1):
        degree = max(degree, crow[i + 1] - crow[i])
    return degree


@_block
def _add_product(u, v, sums, k):
    """Add u * v to the k-th partial sums: as many lanes for each edge of the row, added up once, at its end."""
    zero = broadcast(sums.dtype.type(0), NARROW)
    store(multiply_fold(load(zero, sums, k, 0, 0), u, v), sums, k, 0, 0)


@_block
def _dots_row(zero, c, i, n, ahead, h, crow, col, x, y, distance, sums):
    while fits(zero, c, x.shape[2]):
        for k in range(ahead[0] if lanes(zero) == WIDE else 0):
            prefetch(zero, y, ahead[k + 1], h, c)
        if lanes(zero) == WIDE and n >= 0:
            prefetch(zero, x, n, h, c)
        own = load(zero, x, i, h, c)
        for e in range(crow[i], crow[i + 1]):
            other = load(zero, y, col[e], h, c)
            if distance:
                other = multiply_add(other, np.float32(-1), own)
                _add_product(other, other, sums, e - crow[i])
            else:
                _add_product(own, other, sums, e - crow[i])
        c += lanes(zero)
    return c


@_jit
def _edge_dots(begin, end, order, crow, col, x, y, distance, out):
    zero = out.dtype.type(0)
    wide, narrow, rest = broadcast(zero, WIDE), broadcast(zero, NARROW), tail(zero, NARROW)
    ahead = _room_ahead(y)
    sums = np.empty((_max_degree(crow), 1, NARROW), out.dtype)
    for k in range(begin, end):
        i, n = _row_and_next(order, k, end)
        _look_ahead(n, crow, col, ahead)
        for h in range(x.shape[1]):
            sums[: crow[i + 1] - crow[i]] = zero
            c = 0
            c = _dots_row(wide, c, i, n, ahead, h, crow, col, x, y, distance, sums)
            c = _dots_row(narrow, c, i, n, ahead, h, crow, col, x, y, distance, sums)
            c = _dots_row(rest, c, i, n, ahead, h, crow, col, x, y, distance, sums)
            for e in range(crow[i], crow[i + 1]):
                out[e, h] = lane_sum(load(narrow, sums, e - crow[i], 0, 0))


@_block
def _backward_row(zero, c, j, n, ahead, h, crow, col, perm, weight, x, grad, grad_x, sums, past_caches):
    while fits(zero, c, x.shape[2]):
        for k in range(ahead[0] if lanes(zero) == PAIRED else 0):
            prefetch(zero, grad, ahead[k + 1], h, c)
        if lanes(zero) == PAIRED and n >= 0:
            prefetch(zero, x, n, h, c)
        own, acc = load(zero, x, j, h, c), zero
        for e in range(crow[j], crow[j + 1]):
            other = load(zero, grad, col[e], h, c)
            acc = multiply_add(acc, weight[perm[e], h], other)
            _add_product(own, other, sums, e - crow[j])
        if past_caches:
            stream(acc, grad_x, j, h, c)
        else:
            store(acc, grad_x, j, h, c)
        c += lanes(zero)
    return c


@_jit
def _spmm_backward(begin, end, order, crow, col, perm, weight, x, grad, grad_x, grad_weight, past_caches):
    zero = weight.dtype.type(0)
    wide, narrow, rest = broadcast(zero, PAIRED), broadcast(zero, NARROW), tail(zero, NARROW)
    ahead = _room_ahead(grad)
    sums = np.empty((_max_degree(crow), 1, NARROW), weight.dtype)
    for k in range(begin, end):
        j, n = _row_and_next(order, k, end)
        _look_ahead(n, crow, col, ahead)
        for h in range(x.shape[1]):
            sums[: crow[j + 1] - crow[j]] = zero
            c = 0
            c = _backward_row(wide, c, j, n, ahead, h, crow, col, perm, weight, x, grad, grad_x, sums, past_caches)
            c = _backward_row(narrow, c, j, n, ahead, h, crow, col, perm, weight, x, grad, grad_x, sums, past_caches)
            c = _backward_row(rest, c, j, n, ahead, h, crow, col, perm, weight, x, grad, grad_x, sums, past_caches)
            for e in range(crow[j], crow[j + 1]):
                grad_weight[perm[e], h] = lane_sum(load(narrow, sums, e - crow[j], 0, 0))
    fence()


@_jit
def _edge_softmax(begin, end, crow, scores, out):
    for i in range(begin, end):
        for h in range(scores.shape[1]):
            top = -out.dtype.type(np.inf)
            for e in range(crow[i], crow[i + 1]):
                top = max(top, scores[e, h])
            total = out.dtype.type(0)
            for e in range(crow[i], crow[i + 1]):
                out[e, h] = np.exp(scores[e, h] - top)
                total += out[e, h]
            for e in range(crow[i], crow[i + 1]):
                out[e, h] /= total


@_jit
def _edge_softmax_backward(begin, end, crow, a, grad, out):
    for i in range(begin, end):
        for h in range(a.shape[1]):
            # Gradients count from that of the largest weight: one that is nearly 1 would cancel with the mean.
            top, base, mean = out.dtype.type(-1), out.dtype.type(0), out.dtype.type(0)
            for e in range(crow[i], crow[i + 1]):
                if a[e, h] > top:
                    top, base = a[e, h], grad[e, h]
            for e in range(crow[i], crow[i + 1]):
                mean += a[e, h] * (grad[e, h] - base)
            for e in range(crow[i], crow[i + 1]):
                out[e, h] = a[e, h] * ((grad[e, h] - base) - mean)


@_jit_serial
def _transpose(crow, col, crow_t, col_t, perm):
    crow_t[:] = 0
    for e in range(len(col)):
        crow_t[col[e] + 1] += 1
    place = np.empty(len(crow_t), np.int64)
    place[0] = 0
    for i in range(1, len(crow_t)):
        crow_t[i] += crow_t[i - 1]
        place[i] = crow_t[i]
    for i in range(len(crow) - 1):
        for e in range(crow[i], crow[i + 1]):
            k = place[col[e]]
            place[col[e]] += 1
            col_t[k] = i
            perm[k] = e


def _split(x: Tensor, heads: int = 1) -> np.ndarray:
    """(T, D) as (T, heads, D / heads)."""
    return array(x).reshape(x.shape[0], heads, x.shape[1] // max(heads, 1))


def _past_caches(out: Tensor, heads: int = 1) -> bool:
    """Whether ``out`` is large, and its rows and heads begin at cache lines.

    What a cache would read first, only to overwrite it, then stays unread.
    """
    line = out.element_size() * out.shape[1] // max(heads, 1)
    return out.nbytes >= LARGE_BYTES and out.data_ptr() % LINE_BYTES == 0 and line % LINE_BYTES == 0


def _values(x: Tensor | None, dtype: torch.dtype, dims: int = 1) -> np.ndarray:
    """Scalars, row or edge values as an array of the accumulation dtype; an empty one stands for None."""
    if x is None:
        return torch.zeros((0,) * dims, dtype=dtype).numpy()
    return torch.atleast_1d(x.detach().to(dtype)).contiguous().numpy()


def spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    x: Tensor,
    scale: Tensor | None = None,
    diagonal: Tensor | None = None,
    h: Tensor | None = None,
    beta: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """weight (E, H) or None for ones, x (T, D), scale (1,) or (T,), diagonal (T,), h (T, D), beta (1,) -> (T, D).

    ``out`` may be ``h`` itself, not x.
    """
    dtype = accumulation_dtype(x.dtype)
    num_rows, heads = crow.shape[0] - 1, 1 if weight is None else weight.shape[1]
    out = huge_pages(torch.empty(num_rows, x.shape[1], dtype=x.dtype)) if out is None else out
    rows, one = _split(x, heads), torch.ones(1)
    extra = rows[:0] if h is None else _split(h, heads)
    values, scales = _values(weight, dtype, 2), _values(one if scale is None else scale, dtype)
    factors = (_values(diagonal, dtype), _values(one if beta is None else beta, dtype))
    work = (col.shape[0] + num_rows) * x.shape[1]
    if x.shape[1] == 1 and x.dtype == dtype:
        graph = (crow.numpy().view(np.uint64), col.numpy().view(np.uint32), values.reshape(-1))
        vectors = (rows.reshape(-1), scales, factors[0], extra.reshape(-1), factors[1], out.numpy().reshape(-1))
        _launch(_spmm_column, num_rows, work, *graph, *vectors)
        return out
    order = row_order(crow, col, x)
    args = (order, crow.numpy(), col.numpy(), values, rows, scales, factors[0], extra, factors[1])
    _launch(_spmm, num_rows, work, *args, _split(out, heads), _past_caches(out, heads))
    return out


def spmm_backward(
    crow: Tensor, col: Tensor, crow_t: Tensor, col_t: Tensor, perm: Tensor, weight: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (T, D) to x and (E, H) to the weights of :func:`spmm`, in one pass over A^T."""
    heads = weight.shape[1]
    grad_x = huge_pages(torch.empty(x.shape, dtype=x.dtype))
    grad_weight = huge_pages(torch.empty(weight.shape, dtype=weight.dtype))
    args = (crow_t.numpy(), col_t.numpy(), perm.numpy(), array(weight), _split(x, heads), _split(grad, heads))
    outs = (_split(grad_x, heads), grad_weight.numpy(), _past_caches(grad_x, heads))
    order = row_order(crow_t, col_t, grad)
    _launch(_spmm_backward, x.shape[0], 2 * col_t.shape[0] * x.shape[1], order, *args, *outs)
    return grad_x, grad_weight


def edge_dots(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x, y (T, D) of one dtype -> (E, heads) in the accumulation dtype."""
    return _along_edges(crow, col, x, y, heads, False)


def edge_distances(crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """x (T, D) -> (E, 1) in the accumulation dtype."""
    return _along_edges(crow, col, x, x, 1, True)


def _along_edges(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int, distance: bool) -> Tensor:
    out = huge_pages(torch.empty(col.shape[0], heads, dtype=accumulation_dtype(x.dtype)))
    order = row_order(crow, col, y)
    args = (crow.numpy(), col.numpy(), _split(x, heads), _split(y, heads), distance, out.numpy())
    _launch(_edge_dots, crow.shape[0] - 1, col.shape[0] * x.shape[1], order, *args)
    return out


def edge_softmax(crow: Tensor, scores: Tensor) -> Tensor:
    """(E, H) of an accumulation dtype -> softmax over the edges of each row."""
    out = huge_pages(torch.empty(scores.shape, dtype=scores.dtype))
    _launch(_edge_softmax, crow.shape[0] - 1, 8 * scores.numel(), crow.numpy(), array(scores), out.numpy())
    return out


def edge_softmax_backward(crow: Tensor, a: Tensor, grad: Tensor) -> Tensor:
    """a * (grad - sum over the edges of the row of a * grad), all (E, H)."""
    out = huge_pages(torch.empty(a.shape, dtype=a.dtype))
    _launch(_edge_softmax_backward, crow.shape[0] - 1, 4 * a.numel(), crow.numpy(), array(a), array(grad), out.numpy())
    return out


def transpose(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of A^T: crow (T + 1,), col (E,) and, for each of its edges, the edge of A it comes from (E,)."""
    crow_t, col_t, perm = torch.empty_like(crow), torch.empty_like(col), torch.empty(col.shape[0], dtype=torch.int64)
    _transpose(crow.numpy(), col.numpy(), crow_t.numpy(), col_t.numpy(), perm.numpy())
    return crow_t, col_t, perm
