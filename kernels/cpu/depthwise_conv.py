"""Depth-wise convolution of bags laid out as grids, on CPU, with Numba.

    y[i, j] = b + sum_{u, v} w[u, v] x[i + u - r, j + v - s]            of each channel, zeros around the grid

The gradient of x is the same of that of y, with w turned by half a turn; that of w is

    dw[u, v] = sum_{i, j} dy[i, j] x[i + u - r, j + v - s]

A job owns a piece, tiles of ``_LINES x _COLUMNS`` places with about ``_PIECE_ROWS`` rows in all, and ``_CHANNELS``
channels, of which ``NARROW`` make a block. Lines are widened, once per tile, into a ring of as many as the kernel is
high, block by block, columns end to end: a vector of ``WIDE`` lanes is some neighbouring columns of a block, and the
ring stays in the second cache. Forward, such a vector of sums takes one tap after the other, the tap being repeated.
The gradient of w turns that around: a vector of sums is some neighbouring taps, and a column of dy is repeated. Sums
of a piece are kept apart and added in order, so that results do not depend on the number of threads.

A grid of one column under a kernel of one column is taken as a grid of one line, where columns fill vectors. Grids
narrower than ``WIDE / NARROW`` columns else take the time of that many.

FLOPs: 2 T C kh kw forward, as many for each gradient. Bytes: x once, and the kh - 1 lines around each tile, y once; for
the gradient of w x and dy. Working memory: per thread (kh + 1) lines of a tile, per piece the gradient of w.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _block, _jit, _launch, array
from bigbag.kernels.cpu.spmm import _past_caches
from bigbag.kernels.cpu.vectors import (
    LINE_BYTES,
    NARROW,
    WIDE,
    broadcast,
    fence,
    fits,
    load,
    multiply_add,
    multiply_fold,
    prefetch,
    repeat,
    store,
    stream,
    tail,
)

_LINES = 32
_COLUMNS = 256
_BLOCKS = 4
_CHANNELS = _BLOCKS * NARROW
_PIECE_ROWS = _LINES * _COLUMNS
_STEP = WIDE // NARROW


@_jit
def _read_line(x, tile, i, reach, c, ring, slot):
    """Line i of a tile, and ``reach`` columns on both sides, into a slot of the ring; what is beyond the grid is 0."""
    zero, row, origin = ring.dtype.type(0), tile.start + i * tile.width, tile.left - reach
    narrow, rest = broadcast(zero, NARROW), tail(zero, NARROW)
    if i < 0 or i >= tile.height:
        ring[slot] = 0
        return
    for j in range(max(0, origin), min(tile.width, tile.right + reach)):
        k, b = c, 0
        while b < ring.shape[1] and fits(narrow, k, x.shape[2]):
            store(load(narrow, x, row + j, 0, k), ring, slot, b, (j - origin) * NARROW)
            k += NARROW
            b += 1
        if b < ring.shape[1] and fits(rest, k, x.shape[2]):
            store(load(rest, x, row + j, 0, k), ring, slot, b, (j - origin) * NARROW)


@_jit
def _write_line(sums, tile, i, c, out, past_caches):
    """Line i of a tile."""
    zero, row = sums.dtype.type(0), tile.start + i * tile.width
    narrow, rest = broadcast(zero, NARROW), tail(zero, NARROW)
    for j in range(tile.left, tile.right):
        k, b = c, 0
        while b < sums.shape[1] and fits(narrow, k, out.shape[2]):
            if past_caches:
                stream(load(narrow, sums, 0, b, (j - tile.left) * NARROW), out, row + j, 0, k)
            else:
                store(load(narrow, sums, 0, b, (j - tile.left) * NARROW), out, row + j, 0, k)
            k += NARROW
            b += 1
        if b < sums.shape[1] and fits(rest, k, out.shape[2]):
            store(load(rest, sums, 0, b, (j - tile.left) * NARROW), out, row + j, 0, k)


@_block
def _convolve_line(wide, narrow, ring, slot, b, taps, bias, block, count, sums, x, ahead):
    """``count`` columns of a line, the first line that counts for it being in ``slot``; asks for x from a row on."""
    high, across = taps.shape[1], taps.shape[2] // NARROW
    for q in range(0, count, _STEP):
        for row in range(ahead + q, min(ahead + q + _STEP, x.shape[0])):
            prefetch(narrow, x, row, 0, block * NARROW)
        acc = repeat(wide, load(narrow, bias, 0, 0, block * NARROW))
        for u in range(high):
            line = slot + u - (high if slot + u >= high else 0)
            for v in range(across):
                tap = repeat(wide, load(narrow, taps, block, u, v * NARROW))
                acc = multiply_add(acc, tap, load(wide, ring, line, b, (q + v) * NARROW))
        store(acc, sums, 0, b, q * NARROW)


@_block
def _differentiate_line(wide, narrow, ring, slot, grads, b, count, first, high, total, piece):
    """Adds what ``count`` columns of a line give to the taps, which begin at ``first`` in ``total[piece]``."""
    for u in range(high):
        line = slot + u - (high if slot + u >= high else 0)
        for v in range(0, total.shape[2] // NARROW, _STEP):
            acc = wide
            for q in range(count):
                column = repeat(wide, load(narrow, grads, 0, b, q * NARROW))
                acc = multiply_add(acc, column, load(wide, ring, line, b, (q + v) * NARROW))
            acc = multiply_add(acc, total.dtype.type(1), load(wide, total, piece, first + u, v * NARROW))
            store(acc, total, piece, first + u, v * NARROW)


@_block
def _add_line(wide, narrow, ones, grads, b, count, total, piece, c):
    """Adds the sum of ``count`` columns of a line to ``total[piece]``."""
    acc = wide
    for q in range(0, count, _STEP):
        acc = multiply_add(acc, total.dtype.type(1), load(wide, grads, 0, b, q * NARROW))
    store(multiply_fold(load(narrow, total, piece, 0, c), ones, acc), total, piece, 0, c)


@_jit
def _lines(high, columns, dtype):
    """Room for lines of a tile, which begins where a line of the caches does."""
    count = high * _BLOCKS * columns * NARROW
    flat = np.empty(count + LINE_BYTES // 4, dtype)
    skip = (-flat.ctypes.data % LINE_BYTES) // flat.itemsize
    return flat[skip : skip + count].reshape((high, _BLOCKS, columns * NARROW))


@_jit
def _convolve(begin, end, x, pieces, tiles, taps, bias, columns, out, past_caches):
    zero, groups = taps.dtype.type(0), taps.shape[0] // _BLOCKS
    wide, narrow = broadcast(zero, WIDE), broadcast(zero, NARROW)
    high, reach = taps.shape[1], taps.shape[2] // NARROW // 2
    ring = _lines(high, columns, taps.dtype)
    sums = _lines(1, columns, taps.dtype)
    for job in range(begin, end):
        piece, first = job // groups, (job % groups) * _BLOCKS
        c = first * NARROW
        blocks = min(_BLOCKS, -(-(x.shape[2] - c) // NARROW))
        for k in range(pieces[piece], pieces[piece + 1]):
            tile, slot = tiles[k], 0
            ring[:] = 0
            for i in range(tile.top - high // 2, tile.bottom + high // 2):
                _read_line(x, tile, i, reach, c, ring, slot)
                slot = slot + 1 if slot + 1 < high else 0
                line = i - high // 2
                if line >= tile.top:
                    # The slot that is read into next holds the first of the lines around this one.
                    count, ahead = tile.right - tile.left, tile.start + (i + 1) * tile.width + tile.left
                    for b in range(blocks):
                        _convolve_line(wide, narrow, ring, slot, b, taps, bias, first + b, count, sums, x, ahead)
                    _write_line(sums, tile, line, c, out, past_caches)
    fence()


@_jit
def _differentiate(begin, end, x, grad, pieces, tiles, high, reach, columns, total, bias):
    zero, one = total.dtype.type(0), total.dtype.type(1)
    wide, narrow, ones = broadcast(zero, WIDE), broadcast(zero, NARROW), broadcast(one, WIDE)
    groups = total.shape[1] // (high * _BLOCKS)
    ring = _lines(high, columns, total.dtype)
    grads = _lines(1, columns, total.dtype)
    for job in range(begin, end):
        piece, first = job // groups, (job % groups) * _BLOCKS
        c = first * NARROW
        blocks = min(_BLOCKS, -(-(x.shape[2] - c) // NARROW))
        for k in range(pieces[piece], pieces[piece + 1]):
            tile, slot = tiles[k], 0
            ring[:], grads[:] = 0, 0
            for i in range(tile.top - high // 2, tile.bottom + high // 2):
                _read_line(x, tile, i, reach, c, ring, slot)
                slot = slot + 1 if slot + 1 < high else 0
                line, count = i - high // 2, tile.right - tile.left
                if line >= tile.top:
                    _read_line(grad, tile, line, 0, c, grads, 0)
                    for b in range(blocks):
                        row = (first + b) * high
                        _differentiate_line(wide, narrow, ring, slot, grads, b, count, row, high, total, piece)
                        _add_line(wide, narrow, ones, grads, b, count, bias, piece, c + b * NARROW)


_TILE = np.dtype([(name, np.int64) for name in ("start", "height", "width", "top", "bottom", "left", "right")])


def _whole_steps(columns: int) -> int:
    return -(-columns // _STEP) * _STEP


class _Plan(NamedTuple):
    """Tiles of grids, how many come before each piece, the most columns that one has, and the rows of no grid."""

    tiles: np.ndarray
    pieces: np.ndarray
    columns: int
    apart: Tensor


@lru_cache(maxsize=16)
def _plan(offsets: bytes, widths: bytes, as_lines: bool) -> _Plan:
    found, apart, rows = [], [torch.empty(0, dtype=torch.int64)], np.frombuffer(offsets, np.int64).tolist()
    for start, end, width in zip(rows, rows[1:], np.frombuffer(widths, np.int64).tolist()):
        if width == 0:
            apart.append(torch.arange(start, end))
            continue
        across = end - start if as_lines else width
        high = (end - start) // max(1, across)
        for top in range(0, high, _LINES):
            lines = (start, high, across, top, min(top + _LINES, high))
            found += [(*lines, left, min(left + _COLUMNS, across)) for left in range(0, across, _COLUMNS)]
    tiles = np.array(found, _TILE)
    size = (tiles["bottom"] - tiles["top"]) * (tiles["right"] - tiles["left"])
    number = (np.cumsum(size) - size) // _PIECE_ROWS
    pieces = np.concatenate([np.flatnonzero(np.diff(number, prepend=-1)), [len(tiles)]])
    columns = int((tiles["right"] - tiles["left"]).max(initial=1))
    return _Plan(tiles, pieces, _whole_steps(columns), torch.cat(apart))


def _plan_of(taps: Tensor, offsets: Tensor, widths: Tensor) -> tuple[bool, _Plan]:
    """Whether grids are taken as lines, and how they are cut."""
    as_lines = taps.shape[0] > taps.shape[1] == 1 and bool((widths <= 1).all())
    return as_lines, _plan(offsets.numpy().tobytes(), widths.numpy().tobytes(), as_lines)


def _blocks(channels: int) -> int:
    return -(-channels // _CHANNELS) * _BLOCKS


def forward(x: Tensor, taps: Tensor, bias: Tensor | None, offsets: Tensor, widths: Tensor) -> Tensor:
    """x (T, C) in any precision, taps (kh, kw, C) and bias (C,) in its accumulation dtype -> (T, C) like x."""
    as_lines, plan = _plan_of(taps, offsets, widths)
    taps = taps.transpose(0, 1) if as_lines else taps
    (high, across, channels), blocks = taps.shape, _blocks(x.shape[1])
    packed = taps.new_zeros(high, across, blocks * NARROW)
    packed[..., :channels] = taps
    packed = packed.view(high, across, blocks, NARROW).permute(2, 0, 1, 3).reshape(blocks, high, across * NARROW)
    added = taps.new_zeros(1, 1, blocks * NARROW)
    if bias is not None:
        added[0, 0, :channels] = bias
    out = huge_pages(torch.empty(x.shape, dtype=x.dtype))
    out[plan.apart] = x[plan.apart]
    given = (array(x)[:, None], plan.pieces, plan.tiles, packed.numpy(), added.numpy())
    jobs, columns = (len(plan.pieces) - 1) * (blocks // _BLOCKS), plan.columns + _whole_steps(across)
    written = (array(out)[:, None], _past_caches(out))
    _launch(_convolve, jobs, x.numel() * high * across, *given, columns, *written)
    return out


def backward(
    grad: Tensor, x: Tensor, taps: Tensor, offsets: Tensor, widths: Tensor, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (T, C), taps (kh, kw, C) and bias (C,), (0,) where they are not needed."""
    grad_x = forward(grad, taps.flip(0, 1), None, offsets, widths) if need_x else x.new_empty(0)
    if not need_taps:
        return grad_x, taps.new_empty(0), taps.new_empty(0)
    as_lines, plan = _plan_of(taps, offsets, widths)
    high, across = taps.shape[1::-1] if as_lines else taps.shape[:2]
    (channels, blocks), pieces = (x.shape[1], _blocks(x.shape[1])), len(plan.pieces) - 1
    room = _whole_steps(across)
    total = taps.new_zeros(pieces, blocks * high, room * NARROW)
    bias = taps.new_zeros(pieces, 1, blocks * NARROW)
    given = (array(x)[:, None], array(grad)[:, None], plan.pieces, plan.tiles, high, across // 2, plan.columns + room)
    work = x.numel() * high * across
    _launch(_differentiate, pieces * (blocks // _BLOCKS), work, *given, total.numpy(), bias.numpy())
    summed = total.sum(0).view(blocks, high, room, NARROW).permute(1, 2, 0, 3).reshape(high, room, -1)
    summed = summed[:, :across, :channels]
    return grad_x, (summed.transpose(0, 1) if as_lines else summed).contiguous(), bias.sum((0, 1))[:channels].clone()
