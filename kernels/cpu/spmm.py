"""Products with a sparse matrix in CSR form, on CPU, with Numba.

    spmm         out[i] = scale[i] sum_e w[e] x[col[e]] + diagonal[i] x[i] + beta h[i]        (e: the edges of row i)
    edge_dots    d[e] = <x[i], y[col[e]]>           edge_distances  d[e] = |x[i] - x[col[e]]|^2
    power_step   v = A w;  total += c v;  dots[i] = <w[i], f[i]>, <v[i], f[i]>
    edge_softmax a[e] = exp(s[e]) / sum over the edges of row i          transpose   CSR of A^T, by counting

With H heads, edge values are (E, H), and head h owns columns h D/H to (h + 1) D/H of the rows.
A thread owns a range of rows, or of the edges of these rows, and alone writes them: no races, and results do not depend
on the number of threads. Sums are accumulated in float32 (float64 for float64).
Bytes: x once (neighbours' rows come from cache where the graph is local), out once, 4 (1 + H) per edge.
Whole rows, not blocks of columns: on rows of 2 and 4 KiB, blocks of a quarter measured 2 to 4 times slower.
Columns are indexed from 0, rows are not sliced: a lower bound that may be negative keeps LLVM from vectorising, and a
slice costs two atomic reference counts per edge.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _launch, _widen, accumulation_dtype, array

_jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
_jit_serial = numba.njit(cache=True, nogil=True, error_model="numpy")


def _narrow(value, like):
    raise NotImplementedError("compiled code only")


@overload(_narrow)
def _narrow_overload(value, like):
    """``value`` rounded to nearest even in the format of ``like``: int16 stands for bfloat16, uint16 for float16."""
    if like == numba.types.int16:

        def to_bfloat(value, like):
            bits = np.float32(value).view(np.uint32)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            isnan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.int16((np.uint32(0x7FC00000) if isnan else rounded) >> np.uint32(16))

        return to_bfloat
    if like == numba.types.uint16:

        def to_half(value, like):
            bits = np.float32(value).view(np.uint32)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            normal = np.uint32(magnitude - np.uint32(0x38000000))
            normal = np.uint32(normal + np.uint32(0xFFF) + ((normal >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
            # Adding 0.5 aligns the last bit of a number below 2^-14 with the last bit of a float16 subnormal.
            small = np.uint32(
                np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
            )
            half = small if magnitude < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
            half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
            return np.uint16(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))

        return to_half
    return lambda value, like: value


@_jit
def _wide(value):
    # A call, since Numba's own inlining of the same expression twice in a function confuses its scopes.
    return _widen(value)


def _accumulator(out):
    raise NotImplementedError("compiled code only")


@overload(_accumulator)
def _accumulator_overload(out):
    """Where rows of ``out`` are summed: in place, or in one row of float32 if ``out`` is narrower."""
    if out.dtype in (numba.types.int16, numba.types.uint16):
        return lambda out: np.empty((1, out.shape[1], out.shape[2]), np.float32)
    return lambda out: out


def _store(out, i, acc, a):
    raise NotImplementedError("compiled code only")


@overload(_store)
def _store_overload(out, i, acc, a):
    """Round row ``a`` of ``acc`` into row i of ``out``, if it is not there already."""
    if out.dtype == acc.dtype:
        return lambda out, i, acc, a: None

    def store(out, i, acc, a):
        for h in range(out.shape[1]):
            for c in range(out.shape[2]):
                out[i, h, c] = _narrow(acc[a, h, c], out[i, h, c])

    return store


@_jit
def _add(acc, a, h, x, j, u):
    for c in range(x.shape[2]):
        acc[a, h, c] += u * _wide(x[j, h, c])


@_jit
def _add_two(acc, a, h, x, j, k, u, v):
    for c in range(x.shape[2]):
        acc[a, h, c] += u * _wide(x[j, h, c]) + v * _wide(x[k, h, c])


@_jit
def _add_four(acc, a, h, x, rows, e, u, v, w, z):
    i, j, k, m = rows[e], rows[e + 1], rows[e + 2], rows[e + 3]
    for c in range(x.shape[2]):
        first = u * _wide(x[i, h, c]) + v * _wide(x[j, h, c])
        acc[a, h, c] += first + (w * _wide(x[k, h, c]) + z * _wide(x[m, h, c]))


@_jit
def _set_two(acc, a, h, x, j, y, k, u, v):
    for c in range(x.shape[2]):
        acc[a, h, c] = u * _wide(x[j, h, c]) + v * _wide(y[k, h, c])


@_jit
def _set(acc, a, h, x, j, u):
    for c in range(x.shape[2]):
        acc[a, h, c] = u * _wide(x[j, h, c])


@_jit
def _gather(acc, a, h, first, last, col, weight, x, factor):
    """acc[a, h] += factor * weighted neighbours' rows; four at a time quarter the traffic of acc."""
    weighted = weight.shape[0] > 0
    e = first
    while e + 3 < last:
        u = factor * weight[e, h] if weighted else factor
        v = factor * weight[e + 1, h] if weighted else factor
        w = factor * weight[e + 2, h] if weighted else factor
        z = factor * weight[e + 3, h] if weighted else factor
        _add_four(acc, a, h, x, col, e, u, v, w, z)
        e += 4
    if e + 1 < last:
        u = factor * weight[e, h] if weighted else factor
        v = factor * weight[e + 1, h] if weighted else factor
        _add_two(acc, a, h, x, col[e], col[e + 1], u, v)
        e += 2
    if e < last:
        _add(acc, a, h, x, col[e], factor * weight[e, h] if weighted else factor)


@_jit
def _spmm(begin, end, crow, col, weight, x, scale, diagonal, extra, beta, out):
    acc = _accumulator(out)
    zero = beta.dtype.type(0)
    for i in range(begin, end):
        a = i if len(acc) == len(out) else 0
        factor = scale[i] if len(scale) > 1 else scale[0]
        for h in range(x.shape[1]):
            # What is not a neighbour's comes first, so that ``extra`` may be ``out``.
            if len(extra) and len(diagonal):
                _set_two(acc, a, h, x, i, extra, i, diagonal[i], beta[0])
            elif len(extra):
                _set(acc, a, h, extra, i, beta[0])
            elif len(diagonal):
                _set(acc, a, h, x, i, diagonal[i])
            else:
                for c in range(x.shape[2]):
                    acc[a, h, c] = zero
            _gather(acc, a, h, crow[i], crow[i + 1], col, weight, x, factor)
        _store(out, i, acc, a)


@_jit
def _dot(x, i, y, j, h, zero):
    total = zero
    for c in range(x.shape[2]):
        total += _wide(x[i, h, c]) * _wide(y[j, h, c])
    return total


@_jit
def _square_distance(x, i, j, zero):
    total = zero
    for c in range(x.shape[2]):
        difference = _wide(x[i, 0, c]) - _wide(x[j, 0, c])
        total += difference * difference
    return total


@_jit
def _edge_dots(begin, end, crow, col, x, y, out):
    for i in range(begin, end):
        for e in range(crow[i], crow[i + 1]):
            for h in range(out.shape[1]):
                out[e, h] = _dot(x, i, y, col[e], h, out.dtype.type(0))


@_jit
def _edge_distances(begin, end, crow, col, x, out):
    for i in range(begin, end):
        for e in range(crow[i], crow[i + 1]):
            out[e, 0] = _square_distance(x, i, col[e], out.dtype.type(0))


@_jit
def _power_step(begin, end, crow, col, weight, w, f, coefficients, step, v, total, dots):
    acc = _accumulator(v)
    sums = np.empty((1, 1, w.shape[2]), dots.dtype)
    zero, one = dots.dtype.type(0), dots.dtype.type(1)
    for i in range(begin, end):
        a = i if len(acc) == len(v) else 0
        if step == 1:
            dots[i, 0] = _dot(w, i, f, i, 0, zero)
            _set(sums, 0, 0, w, i, coefficients[0])
        else:
            _set(sums, 0, 0, total, i, one)
        for c in range(w.shape[2]):
            acc[a, 0, c] = zero
        _gather(acc, a, 0, crow[i], crow[i + 1], col, weight, w, one)
        dots[i, 1] = _dot(acc, a, f, i, 0, zero)
        _store(v, i, acc, a)
        for c in range(w.shape[2]):
            value = sums[0, 0, c] + coefficients[step] * acc[a, 0, c]
            total[i, 0, c] = _narrow(value, total[i, 0, c])


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
    _launch(_spmm, num_rows, (col.shape[0] + num_rows) * x.shape[1], *args, *factors, _split(out, heads))
    return out


def edge_dots(crow: Tensor, col: Tensor, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x, y (T, D) of one dtype -> (E, heads) in the accumulation dtype."""
    out = huge_pages(torch.empty(col.shape[0], heads, dtype=accumulation_dtype(x.dtype)))
    args = (crow.numpy(), col.numpy(), _split(x, heads), _split(y, heads), out.numpy())
    _launch(_edge_dots, crow.shape[0] - 1, col.shape[0] * x.shape[1], *args)
    return out


def edge_distances(crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """x (T, D) -> (E, 1) in the accumulation dtype."""
    out = torch.empty(col.shape[0], 1, dtype=accumulation_dtype(x.dtype))
    _launch(
        _edge_distances, crow.shape[0] - 1, col.shape[0] * x.shape[1], crow.numpy(), col.numpy(), _split(x), out.numpy()
    )
    return out


def power_step(
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    w: Tensor,
    f: Tensor,
    coefficients: Tensor,
    step: int,
    v: Tensor,
    total: Tensor,
) -> Tensor:
    """v = A w and total += coefficients[step] v (at step 1, total = coefficients[0] w first) -> <w, f>, <v, f>.

    The first of the two dots is computed at step 1 only.
    """
    dtype = accumulation_dtype(w.dtype)
    dots = torch.zeros(w.shape[0], 2, dtype=dtype)
    args = (crow.numpy(), col.numpy(), _values(weight, dtype, 2), _split(w), _split(f), _values(coefficients, dtype))
    work = (col.shape[0] + w.shape[0]) * w.shape[1]
    _launch(_power_step, w.shape[0], work, *args, step, _split(v), _split(total), dots.numpy())
    return dots.sum(0, dtype=torch.float64)


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
