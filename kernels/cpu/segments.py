"""Reductions of (T, C) rows over segments, on CPU, with Numba.

    sum     out[b, c] = sum_t x[t, c]           max   out[b, c] = max_t x[t, c], with the first row that attains it
    softmax a[t, c] = exp(x[t, c] - max_b) / sum_b
    weighted_sum  z[b, h, p] = sum_t a[t, h] x[t, p]            row_dots  d[t, h] = sum_p x[t, p] y[b(t), h, p]

Segments are cut into pieces of at most ``PIECE_ROWS`` rows. A kernel computes pieces ``begin`` to ``end``, without the
GIL, and ``_launch`` deals ranges of pieces to torch's number of Python threads; the partial results of a bag are added
in the order of its pieces. Pieces do not depend on the number of threads, so neither do the results. (Numba's own
threads are a second OpenMP pool beside torch's: the two spin against each other, and a fork after use is fatal.)
Every function reads x once (softmax: four passes over it, x being narrow) and writes its output once.
Sums are accumulated in the dtype of the output: float32, or float64 for float64.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.half import _widen
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.vectors import (
    NARROW,
    broadcast,
    fits,
    in_order,
    lane_sum,
    lanes,
    load,
    multiply_add,
    store,
    tail,
)

PIECE_ROWS = 2048
# Below this many elements, handing work to a thread costs more than the work.
_SERIAL_ELEMENTS = 1 << 18

# Sums may be reordered and contracted for vectorisation; NaN and infinities keep their meaning.
# Rows are summed in blocks, then the blocks: the rounding of long sums grows with their number of blocks.
_BLOCK_ROWS = 32

_jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
# Inlined by force: a call would put all the arrays on the stack. Such a function calls none with arrays in turn, for
# which Numba would count references in the inner loop.
_block = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


@_block
def _add_row(zero, c, x, t, weight, part, h):
    """part[0, h] += weight x[t], in as many blocks of columns as fit from c on; returns where they end."""
    while fits(zero, c, x.shape[2]):
        store(multiply_add(load(zero, part, 0, h, c), weight, load(zero, x, t, 0, c)), part, 0, h, c)
        c += lanes(zero)
    return c


@_jit
def _sum(begin, end, x, starts, ends, out):
    zero = out.dtype.type(0)
    one = out.dtype.type(1)
    wide, narrow, rest = in_order(zero), broadcast(zero, NARROW), tail(zero, NARROW)
    part = np.empty((1, 1, x.shape[2]), out.dtype)
    for i in range(begin, end):
        out[i] = 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            part[:] = 0
            for t in range(block, min(block + _BLOCK_ROWS, ends[i])):
                c = _add_row(wide, 0, x, t, one, part, 0)
                c = _add_row(narrow, c, x, t, one, part, 0)
                _add_row(rest, c, x, t, one, part, 0)
            out[i] += part[0]


@_jit
def _product_sum(begin, end, x, y, starts, ends, out):
    for i in range(begin, end):
        part = np.empty(x.shape[1], out.dtype)
        out[i] = 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            part[:] = 0
            for t in range(block, min(block + _BLOCK_ROWS, ends[i])):
                for c in range(x.shape[1]):
                    part[c] += x[t, c] * y[t, c]
            out[i] += part


@_block
def _add_dots(zero, c, x, start, stop, y, b, h, out):
    """out[t, h] += x[t] . y[b, h] for rows start to stop, over as many blocks of columns as fit from c on; returns
    where they end."""
    if not fits(zero, c, x.shape[2]):
        return c
    first = c
    for t in range(start, stop):
        c, total = first, zero
        while fits(zero, c, x.shape[2]):
            total = multiply_add(total, load(zero, y, b, h, c), load(zero, x, t, 0, c))
            c += lanes(zero)
        out[t, h] += lane_sum(total)
    return c


@_jit
def _weighted_sum(begin, end, x, a, starts, ends, out):
    zero = out.dtype.type(0)
    wide, narrow, rest = in_order(zero), broadcast(zero, NARROW), tail(zero, NARROW)
    part = np.empty((1, *out.shape[1:]), out.dtype)
    for i in range(begin, end):
        out[i] = 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            part[:] = 0
            for t in range(block, min(block + _BLOCK_ROWS, ends[i])):
                for h in range(a.shape[1]):
                    c = _add_row(wide, 0, x, t, a[t, h], part, h)
                    c = _add_row(narrow, c, x, t, a[t, h], part, h)
                    _add_row(rest, c, x, t, a[t, h], part, h)
            out[i] += part[0]


@_jit
def _row_dots(begin, end, x, y, bags, starts, ends, out):
    zero = out.dtype.type(0)
    wide, narrow, rest = in_order(zero), broadcast(zero, NARROW), tail(zero, NARROW)
    for i in range(begin, end):
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            stop = min(block + _BLOCK_ROWS, ends[i])
            for h in range(y.shape[1]):
                c = _add_dots(wide, 0, x, block, stop, y, bags[i], h, out)
                c = _add_dots(narrow, c, x, block, stop, y, bags[i], h, out)
                _add_dots(rest, c, x, block, stop, y, bags[i], h, out)


@_jit
def _max(begin, end, x, starts, ends, out, index):
    for i in range(begin, end):
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
def _combine_sum(begin, end, parts, first, out):
    for b in range(begin, end):
        for i in range(first[b], first[b + 1]):
            for c in range(parts.shape[1]):
                out[b, c] += parts[i, c]


@_jit
def _combine_max(begin, end, parts, rows, first, out, index):
    for b in range(begin, end):
        for i in range(first[b], first[b + 1]):
            for c in range(parts.shape[1]):
                value = parts[i, c]
                if index[b, c] < 0 or value > out[b, c] or (value != value and out[b, c] == out[b, c]):
                    out[b, c] = value
                    index[b, c] = rows[i, c]


@_jit
def _subtract(begin, end, x, shift, bags, starts, ends, out):
    for i in range(begin, end):
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                out[t, c] = _widen(x[t, c]) - shift[bags[i], c]


@_jit
def _divide(begin, end, x, total, bags, starts, ends):
    for i in range(begin, end):
        for t in range(starts[i], ends[i]):
            for c in range(x.shape[1]):
                x[t, c] /= total[bags[i], c]


@_jit
def _softmax_backward(begin, end, a, grad, delta, bags, starts, ends, out):
    for i in range(begin, end):
        for t in range(starts[i], ends[i]):
            for c in range(a.shape[1]):
                out[t, c] = a[t, c] * (grad[t, c] - delta[bags[i], c])


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bigbag-segments")


def _launch(kernel, count: int, elements: int, *args) -> None:
    """``kernel(begin, end, *args)`` over ranges that cover ``count`` pieces or bags, ``elements`` numbers in all."""
    threads = torch.get_num_threads()
    if threads == 1 or count == 1 or elements < _SERIAL_ELEMENTS:
        kernel(0, count, *args)
        return
    bounds = np.linspace(0, count, min(count, 4 * threads) + 1).astype(int).tolist()
    # The pool belongs to a process: its threads do not survive a fork.
    pool = _pool(os.getpid(), threads)
    for job in [pool.submit(kernel, begin, end, *args) for begin, end in zip(bounds, bounds[1:])]:
        job.result()


class Pieces:
    """The pieces of all segments: bag, first and last row of each; ``first[b]`` is the first piece of bag b.

    :meth:`of` is how to come by them: the operators of a step cut the same pack again and again.
    """

    def __init__(self, rows: np.ndarray) -> None:
        counts = -(-np.diff(rows) // PIECE_ROWS)
        self.first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self.bags = np.repeat(np.arange(len(counts)), counts)
        self.starts = rows[:-1][self.bags] + (np.arange(len(self.bags)) - self.first[self.bags]) * PIECE_ROWS
        self.ends = np.minimum(self.starts + PIECE_ROWS, rows[1:][self.bags])

    @staticmethod
    def of(offsets: Tensor) -> Pieces:
        """The pieces of segments with these offsets (B + 1,), int64."""
        return _pieces(offsets.numpy().tobytes())

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
        _launch(_combine_sum, self.num_bags, parts.numel(), parts.numpy(), self.first, out.numpy())
        return out


@lru_cache(maxsize=16)
def _pieces(rows: bytes) -> Pieces:
    return Pieces(np.frombuffer(rows, np.int64))


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


def sum_rows(x: Tensor, offsets: Tensor, pieces: Pieces | None = None) -> Tensor:
    """(T, C) -> (B, C) in the accumulation dtype."""
    pieces = Pieces.of(offsets) if pieces is None else pieces
    parts = torch.empty(len(pieces), x.shape[1], dtype=accumulation_dtype(x.dtype))
    rows = (array(x)[:, None], pieces.starts, pieces.ends, parts.numpy()[:, None])
    _launch(_sum, len(pieces), x.numel(), *rows)
    return pieces.add(parts)


def max_rows(x: Tensor, offsets: Tensor, pieces: Pieces | None = None) -> tuple[Tensor, Tensor]:
    """(T, C) -> maxima (B, C) in the accumulation dtype and their first rows (B, C), 0 and -1 for an empty bag."""
    pieces = Pieces.of(offsets) if pieces is None else pieces
    parts = torch.empty(len(pieces), x.shape[1], dtype=accumulation_dtype(x.dtype))
    rows = torch.empty(parts.shape, dtype=torch.int64)
    _launch(_max, len(pieces), x.numel(), array(x), pieces.starts, pieces.ends, parts.numpy(), rows.numpy())
    out = parts.new_zeros(pieces.num_bags, x.shape[1])
    index = rows.new_full(out.shape, -1)
    partial = (parts.numpy(), rows.numpy(), pieces.first)
    _launch(_combine_max, pieces.num_bags, parts.numel(), *partial, out.numpy(), index.numpy())
    return out, index


def softmax(x: Tensor, offsets: Tensor) -> Tensor:
    """(T, C) -> (T, C) in the accumulation dtype."""
    pieces = Pieces.of(offsets)
    out = huge_pages(torch.empty(x.shape, dtype=accumulation_dtype(x.dtype)))
    where = (pieces.bags, pieces.starts, pieces.ends)
    top, _ = max_rows(x, offsets, pieces)
    _launch(_subtract, len(pieces), x.numel(), array(x), top.numpy(), *where, out.numpy())
    # torch's exp is vectorised; Numba's is not without Intel's SVML.
    out.exp_()
    _launch(_divide, len(pieces), x.numel(), out.numpy(), sum_rows(out, offsets, pieces).numpy(), *where)
    return out


def softmax_backward(a: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """a * (grad - sum over the bag of a * grad), all (T, C) in one accumulation dtype."""
    pieces = Pieces.of(offsets)
    parts = torch.empty(len(pieces), a.shape[1], dtype=a.dtype)
    a_array, grad_array = array(a), array(grad)
    _launch(_product_sum, len(pieces), a.numel(), a_array, grad_array, pieces.starts, pieces.ends, parts.numpy())
    delta = pieces.add(parts).numpy()
    out = huge_pages(torch.empty(a.shape, dtype=a.dtype))
    where = (pieces.bags, pieces.starts, pieces.ends)
    _launch(_softmax_backward, len(pieces), a.numel(), a_array, grad_array, delta, *where, out.numpy())
    return out


def weighted_sum(x: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """x (T, P) in any precision, a (T, H) in an accumulation dtype -> z (B, H, P) in that of a."""
    pieces = Pieces.of(offsets)
    parts = torch.empty(len(pieces), a.shape[1], x.shape[1], dtype=a.dtype)
    work = x.numel() * a.shape[1]
    _launch(_weighted_sum, len(pieces), work, array(x)[:, None], array(a), pieces.starts, pieces.ends, parts.numpy())
    return pieces.add(parts.flatten(1)).view(pieces.num_bags, a.shape[1], x.shape[1])


def row_dots(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x (T, P) in any precision, y (B, H, P) in an accumulation dtype -> (T, H) in that of y."""
    pieces = Pieces.of(offsets)
    out = torch.zeros(x.shape[0], y.shape[1], dtype=y.dtype)
    where = (pieces.bags, pieces.starts, pieces.ends)
    _launch(_row_dots, len(pieces), x.numel() * y.shape[1], array(x)[:, None], array(y), *where, out.numpy())
    return out
