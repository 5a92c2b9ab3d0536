"""Products with a sparse matrix in CSR form, on CPU, with Numba.

    spmm         out[i] = scale[i] sum_e w[e] x[col[e]] + diagonal[i] x[i] + beta h[i]        (e: the edges of row i)
    edge_dots    d[e] = <x[i], y[col[e]]>           edge_distances  d[e] = |x[i] - x[col[e]]|^2
    edge_softmax a[e] = exp(s[e]) / sum over the edges of row i          transpose   CSR of A^T, by counting

With H heads, edge values are (E, H), and head h owns columns h D/H to (h + 1) D/H of the rows.
A thread owns a range of rows, or of the edges of these rows, and alone writes them: no races, and results do not depend
on the number of threads. Sums are accumulated in float32 (float64 for float64).
Bytes: x once (neighbours' rows come from cache where the graph is local), out once, 4 (1 + H) per edge.
A block of columns of one row is summed in registers over all its neighbours and written once; the rows that the next
one needs anew are asked for meanwhile. Row after row, not block after block: rows of 2 KiB, a part of each read at a
time, fall on a part of the cache's sets.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _launch, accumulation_dtype, array
from bigbag.kernels.cpu.vectors import (
    LINE_BYTES,
    broadcast,
    fence,
    lane_sum,
    lanes,
    load,
    multiply_add,
    prefetch,
    store,
    stream,
)

# Lanes of the blocks of columns: as many registers of AVX-512 as it takes to hide the latency of a sum, or one.
WIDE, NARROW = 128, 16
# Rows asked for ahead, at most, and their count.
AHEAD = 17
# Outputs larger than caches are written past them: what a cache would read first, only to overwrite it, stays unread.
_LARGE_BYTES = 32 << 20

_jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
# Inlined by force: a call would put all the arrays on the stack. These functions call none with arrays in turn, for
# which Numba would count references in the inner loop.
_block = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
_jit_serial = numba.njit(cache=True, nogil=True, error_model="numpy")


@_jit
def _look_ahead(i, end, crow, col, ahead):
    """List what row i + 1 reads and row i does not: on a lattice, the last of each run of consecutive columns.

    The first entry counts the rest.
    """
    count = 0
    if i + 1 < end:
        for e in range(crow[i + 1], crow[i + 2]):
            if count + 1 < len(ahead) and (e + 1 == crow[i + 2] or col[e + 1] != col[e] + 1):
                count += 1
                ahead[count] = col[e]
    ahead[0] = count


@_block
def _spmm_row(zero, c, i, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches):
    """As many blocks as fit from column c on; returns where they end. So do the functions below."""
    factor, one = scale[i] if len(scale) > 1 else scale[0], scale.dtype.type(1)
    while c + lanes(zero) <= x.shape[2]:
        for k in range(ahead[0] if lanes(zero) == WIDE else 0):
            prefetch(zero, x, ahead[k + 1], h, c)
        acc = zero
        if len(diagonal):
            acc = multiply_add(acc, diagonal[i], load(zero, x, i, h, c))
        if len(extra):
            if lanes(zero) == WIDE and i + 1 < len(extra):
                prefetch(zero, extra, i + 1, h, c)
            acc = multiply_add(acc, beta[0], load(zero, extra, i, h, c))
        neighbours = zero
        for e in range(crow[i], crow[i + 1]):
            u = weight[e, h] if len(weight) else one
            neighbours = multiply_add(neighbours, u, load(zero, x, col[e], h, c))
        acc = multiply_add(acc, factor, neighbours)
        if past_caches:
            stream(acc, out, i, h, c)
        else:
            store(acc, out, i, h, c)
        c += lanes(zero)
    return c


@_jit
def _spmm(begin, end, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches):
    zero = scale.dtype.type(0)
    wide, narrow, single = broadcast(zero, WIDE), broadcast(zero, NARROW), broadcast(zero, 1)
    ahead = np.empty(AHEAD, np.int32)
    for i in range(begin, end):
        _look_ahead(i, end, crow, col, ahead)
        for h in range(x.shape[1]):
            c = 0
            c = _spmm_row(wide, c, i, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches)
            c = _spmm_row(narrow, c, i, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches)
            c = _spmm_row(single, c, i, ahead, h, crow, col, weight, x, scale, diagonal, extra, beta, out, past_caches)
    fence()


@_block
def _dots_row(zero, c, i, ahead, h, crow, col, x, y, distance, out):
    while c + lanes(zero) <= x.shape[2]:
        for k in range(ahead[0] if lanes(zero) == WIDE else 0):
            prefetch(zero, y, ahead[k + 1], h, c)
        own = load(zero, x, i, h, c)
        for e in range(crow[i], crow[i + 1]):
            other = load(zero, y, col[e], h, c)
            if distance:
                other = multiply_add(other, np.float32(-1), own)
                out[e, h] += lane_sum(multiply_add(zero, other, other))
            else:
                out[e, h] += lane_sum(multiply_add(zero, own, other))
        c += lanes(zero)
    return c


@_jit
def _edge_dots(begin, end, crow, col, x, y, distance, out):
    zero = out.dtype.type(0)
    wide, narrow, single = broadcast(zero, WIDE), broadcast(zero, NARROW), broadcast(zero, 1)
    ahead = np.empty(AHEAD, np.int32)
    for i in range(begin, end):
        _look_ahead(i, end, crow, col, ahead)
        for h in range(x.shape[1]):
            for e in range(crow[i], crow[i + 1]):
                out[e, h] = zero
            c = 0
            c = _dots_row(wide, c, i, ahead, h, crow, col, x, y, distance, out)
            c = _dots_row(narrow, c, i, ahead, h, crow, col, x, y, distance, out)
            c = _dots_row(single, c, i, ahead, h, crow, col, x, y, distance, out)


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
    """Whether ``out`` is large, and its rows and heads begin at cache lines."""
    line = out.element_size() * out.shape[1] // max(heads, 1)
    return out.nbytes >= _LARGE_BYTES and out.data_ptr() % LINE_BYTES == 0 and line % LINE_BYTES == 0


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
    args = (crow.numpy(), col.numpy(), _values(weight, dtype, 2), rows, _values(one if scale is None else scale, dtype))
    factors = (_values(diagonal, dtype), extra, _values(one if beta is None else beta, dtype))
    work = (col.shape[0] + num_rows) * x.shape[1]
    _launch(_spmm, num_rows, work, *args, *factors, _split(out, heads), _past_caches(out, heads))
    return out


def edge_dots(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x, y (T, D) of one dtype -> (E, heads) in the accumulation dtype."""
    return _along_edges(crow, col, x, y, heads, False)


def edge_distances(crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """x (T, D) -> (E, 1) in the accumulation dtype."""
    return _along_edges(crow, col, x, x, 1, True)


def _along_edges(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int, distance: bool) -> Tensor:
    out = huge_pages(torch.empty(col.shape[0], heads, dtype=accumulation_dtype(x.dtype)))
    args = (crow.numpy(), col.numpy(), _split(x, heads), _split(y, heads), distance, out.numpy())
    _launch(_edge_dots, crow.shape[0] - 1, col.shape[0] * x.shape[1], *args)
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
