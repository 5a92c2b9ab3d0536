"""Reductions of (T, C) rows over segments, on CPU, with Numba.

    sum     out[b, c] = sum_t x[t, c]           max   out[b, c] = max_t x[t, c], with the first row that attains it
    softmax a[t, c] = exp(x[t, c] - max_b) / sum_b
    weighted_sum  z[b, h, p] = sum_t a[t, h] x[t, p]            row_dots  d[t, h] = sum_p x[t, p] y[b(t), h, p]

Segments are cut into pieces of at most ``PIECE_ROWS`` rows. One thread owns one piece; the partial results of a bag
are added in the order of its pieces. Pieces do not depend on the number of threads, so neither do the results.
Every function reads x once (softmax: four passes over it, x being narrow) and writes its output once.
Sums are accumulated in the dtype of the output: float32, or float64 for float64.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

PIECE_ROWS = 2048

# Sums may be reordered and contracted for vectorisation; NaN and infinities keep their meaning.
_jit = numba.njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


def _widen(value):
    raise NotImplementedError("compiled code only")


@overload(_widen, inline="always")
def _widen_overload(value):
    """float32 of a 16-bit float: Numba knows neither, so bfloat16 comes as int16 and float16 as uint16."""
    if value == numba.types.int16:
        return lambda value: np.uint32(np.uint32(np.uint16(value)) << np.uint32(16)).view(np.float32)
    if value == numba.types.uint16:

        def from_half(value):
            bits = np.uint32(value)
            magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
            small = np.float32(magnitude.view(np.float32) * np.float32(2.0**112))
            special = np.uint32(magnitude | np.uint32(0x7F800000)).view(np.float32)
            wide = special if magnitude >= np.uint32(0x0F800000) else small
            return -wide if bits >> np.uint32(15) else wide

        return from_half
    return lambda value: value


@_jit
def _sum(x, starts, ends, out):
    for i in numba.prange(len(starts)):
        acc = np.zeros(x.shape[1], out.dtype)
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                acc[c] += _widen(x[t, c])
        out[i] = acc


@_jit
def _product_sum(x, y, starts, ends, out):
    for i in numba.prange(len(starts)):
        acc = np.zeros(x.shape[1], out.dtype)
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                acc[c] += x[t, c] * y[t, c]
        out[i] = acc


@_jit
def _weighted_sum(x, a, starts, ends, out):
    for i in numba.prange(len(starts)):
        for h in range(a.shape[1]):
            acc = np.zeros(x.shape[1], out.dtype)
            for t in range(starts[i], ends[i]):
                weight = a[t, h]
                for p in range(x.shape[1]):
                    acc[p] += weight * _widen(x[t, p])
            out[i, h] = acc


@_jit
def _row_dots(x, y, bags, starts, ends, out):
    for i in numba.prange(len(starts)):
        for t in range(starts[i], ends[i]):
            for h in range(y.shape[1]):
                acc = out.dtype.type(0)
                for p in range(x.shape[1]):
                    acc += _widen(x[t, p]) * y[bags[i], h, p]
                out[t, h] = acc


@_jit
def _max(x, starts, ends, out, index):
    for i in numba.prange(len(starts)):
        for c in range(x.shape[1]):
            out[i, c] = -np.inf
            index[i, c] = -1
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                value = _widen(x[t, c])
                # A NaN wins over every number and stays, as in torch.max.
                if index[i, c] < 0 or value > out[i, c] or (value != value and out[i, c] == out[i, c]):
                    out[i, c] = value
                    index[i, c] = t


@_jit
def _combine_sum(parts, first, out):
    for b in numba.prange(len(first) - 1):
        for i in range(first[b], first[b + 1]):
            for c in range(parts.shape[1]):
                out[b, c] += parts[i, c]


@_jit
def _combine_max(parts, rows, first, out, index):
    for b in numba.prange(len(first) - 1):
        for i in range(first[b], first[b + 1]):
            for c in range(parts.shape[1]):
                value = parts[i, c]
                if index[b, c] < 0 or value > out[b, c] or (value != value and out[b, c] == out[b, c]):
                    out[b, c] = value
                    index[b, c] = rows[i, c]


@_jit
def _subtract(x, shift, bags, starts, ends, out):
    for i in numba.prange(len(starts)):
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                out[t, c] = _widen(x[t, c]) - shift[bags[i], c]


@_jit
def _divide(x, total, bags, starts, ends):
    for i in numba.prange(len(starts)):
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                x[t, c] /= total[bags[i], c]


@_jit
def _softmax_backward(a, grad, delta, bags, starts, ends, out):
    for i in numba.prange(len(starts)):
        for t in range(starts[i], ends[i]):
            for c in range(a.shape[1]):
                out[t, c] = a[t, c] * (grad[t, c] - delta[bags[i], c])


class Pieces:
    """The pieces of all segments: bag, first and last row of each; ``first[b]`` is the first piece of bag b."""

    def __init__(self, offsets: Tensor) -> None:
        # Numba keeps its own number of threads; torch's is the one that users set.
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        rows = offsets.numpy()
        counts = -(-np.diff(rows) // PIECE_ROWS)
        self.first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self.bags = np.repeat(np.arange(len(counts)), counts)
        self.starts = rows[:-1][self.bags] + (np.arange(len(self.bags)) - self.first[self.bags]) * PIECE_ROWS
        self.ends = np.minimum(self.starts + PIECE_ROWS, rows[1:][self.bags])

    def __len__(self) -> int:
        return len(self.bags)

    @property
    def num_bags(self) -> int:
        return len(self.first) - 1

    def add(self, parts: Tensor) -> Tensor:
        """(pieces, C) partial sums -> (B, C)."""
        if self.num_bags == len(self) and (np.diff(self.first) == 1).all():
            return parts
        out = parts.new_zeros(self.num_bags, parts.shape[1])
        _combine_sum(parts.numpy(), self.first, out.numpy())
        return out


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def array(x: Tensor) -> np.ndarray:
    """A contiguous tensor as the array that the kernels take: bfloat16 as int16, float16 as uint16."""
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy()
    if x.dtype == torch.float16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def sum_rows(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (B, C) in the accumulation dtype."""
    pieces = Pieces(offsets)
    parts = torch.empty(len(pieces), x.shape[1], dtype=accumulation_dtype(x.dtype))
    _sum(array(x), pieces.starts, pieces.ends, parts.numpy())
    return pieces.add(parts)


def max_rows(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(T, C) -> maxima (B, C) in the accumulation dtype and their first rows (B, C), 0 and -1 for an empty bag."""
    pieces = Pieces(offsets)
    parts = torch.empty(len(pieces), x.shape[1], dtype=accumulation_dtype(x.dtype))
    rows = torch.empty(parts.shape, dtype=torch.int64)
    _max(array(x), pieces.starts, pieces.ends, parts.numpy(), rows.numpy())
    out = parts.new_zeros(pieces.num_bags, x.shape[1])
    index = rows.new_full(out.shape, -1)
    _combine_max(parts.numpy(), rows.numpy(), pieces.first, out.numpy(), index.numpy())
    return out, index


def softmax(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (T, C) in the accumulation dtype."""
    pieces = Pieces(offsets)
    out = torch.empty(x.shape, dtype=accumulation_dtype(x.dtype))
    where = (pieces.bags, pieces.starts, pieces.ends)
    _subtract(array(x), max_rows(x, offsets)[0].numpy(), *where, out.numpy())
    # torch's exp is vectorised; Numba's is not without Intel's SVML.
    out.exp_()
    _divide(out.numpy(), sum_rows(out, offsets).numpy(), *where)
    return out


def softmax_backward(a: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """a * (grad - sum over the bag of a * grad), all (T, C) in one accumulation dtype."""
    pieces = Pieces(offsets)
    parts = torch.empty(len(pieces), a.shape[1], dtype=a.dtype)
    a_array, grad_array = array(a), array(grad)
    _product_sum(a_array, grad_array, pieces.starts, pieces.ends, parts.numpy())
    delta = pieces.add(parts).numpy()
    out = torch.empty(a.shape, dtype=a.dtype)
    _softmax_backward(a_array, grad_array, delta, pieces.bags, pieces.starts, pieces.ends, out.numpy())
    return out


def weighted_sum(x: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """x (T, P) in any precision, a (T, H) in an accumulation dtype -> z (B, H, P) in that of a."""
    pieces = Pieces(offsets)
    parts = torch.empty(len(pieces), a.shape[1], x.shape[1], dtype=a.dtype)
    _weighted_sum(array(x), array(a), pieces.starts, pieces.ends, parts.numpy())
    return pieces.add(parts.flatten(1)).view(-1, a.shape[1], x.shape[1])


def row_dots(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x (T, P) in any precision, y (B, H, P) in an accumulation dtype -> (T, H) in that of y."""
    pieces = Pieces(offsets)
    out = torch.empty(x.shape[0], y.shape[1], dtype=y.dtype)
    _row_dots(array(x), array(y), pieces.bags, pieces.starts, pieces.ends, out.numpy())
    return out
