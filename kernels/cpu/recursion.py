"""Recursions ``g <- scale[k] A g + beta[k] f`` with a sparse matrix, all steps in one pass over memory, with Numba.

One step after another reads and writes all of g each time: T steps move 3 T (N, D) matrices through memory. But where
an edge joins rows that lie at most ``band`` apart, as on a lattice row by row, a block of rows can take step k + 1 as
soon as the band of rows around it has taken step k. So the steps follow one another through the rows as a wavefront:

    rows   [.. step 3 ..][.. step 2 ..][.. step 1 ..][.. not yet read ..]      every step a band behind the one before

Of each state only the rows between its step and the next are held, in a ring that stays in cache; memory sees f read
and the last state written, once. A thread owns blocks of columns: no step waits for another thread, and results do not
depend on the number of threads.
Bytes: f and the result once, 4 to 8 per edge and block of columns; held: (T + 1) (2 band + ROWS) numbers per
column of a block and thread. States are held in the accumulation dtype (float32, or float64 for float64).

M. Wolfe, More iteration space tiling, Supercomputing 1989, calls the schedule a wavefront of skewed loops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.order import _jit_serial
from bigbag.kernels.cpu.segments import _block, _jit, _launch, accumulation_dtype, array
from bigbag.kernels.cpu.spmm import _split, _spmm_column
from bigbag.kernels.cpu.vectors import (
    LINE_BYTES,
    NARROW,
    broadcast,
    fits,
    lane_sum,
    lanes,
    load,
    multiply_add,
    multiply_fold,
    prefetch,
    store,
    tail,
)

# Columns of a block; fewer where there are more threads than blocks.
COLUMNS = 64
# Rows that take a step before the next step's turn, and how many rows ahead f is asked for: of a block of its columns
# no prefetcher sees a run.
ROWS, AHEAD = 128, 8
# What the rings of a thread may hold, its share of the caches; with fewer steps, a wave through the rows gains nothing.
_RING_BYTES, _LEAST_STEPS = 4 << 20, 3


@_jit_serial
def _bandwidth(crow, col):
    """The furthest that an edge reaches, in rows."""
    furthest = 0
    for i in range(len(crow) - 1):
        for e in range(crow[i], crow[i + 1]):
            furthest = max(furthest, abs(col[e] - i))
    return furthest


@_jit
def _rings(num_states, size, columns, like):
    """``num_states`` rings of ``size`` rows, one behind the other: (num_states * size, 1, columns), at a cache line."""
    count, spare = num_states * size * columns, LINE_BYTES // like.itemsize
    memory = np.empty(count + spare, like.dtype)
    first = (-memory.ctypes.data) % LINE_BYTES // like.itemsize
    return memory[first : first + count].reshape(num_states * size, 1, columns)


@_block
def _copy_row(zero, at, width, x, i, c, out, k, d):
    """As many of columns ``at`` to ``width`` as fit, from ``x[i, c ...]`` to ``out[k, d ...]``; returns their end."""
    while fits(zero, at, width):
        store(load(zero, x, i, 0, c + at), out, k, 0, d + at)
        at += lanes(zero)
    return at


@_block
def _step_row(zero, at, width, i, place, crow, col, weight, f, y, total, c, ring, factors, dots):
    """Columns of one row take a step, from the ring that begins at ``before`` into the one behind it."""
    (shift, size, before), (scale, beta, share, number) = place, factors
    # Unsigned: a number that might be negative would be looked at for counting from the end, at every edge.
    first, last = crow[np.uint64(i)], crow[np.uint64(i + 1)]
    while fits(zero, at, width):
        acc = zero
        for e in range(first, last):
            j = np.int64(col[e]) - shift
            j += before - (size if j >= size else 0)
            u = weight[e] if len(weight) else ring.dtype.type(1)
            acc = multiply_add(acc, u, load(zero, ring, j, 0, at))
        acc = multiply_add(zero, scale, acc)
        ahead = i + AHEAD if lanes(zero) == COLUMNS and i + AHEAD < len(f) else i
        if beta != 0:
            prefetch(zero, f, ahead, 0, c + at)
            acc = multiply_add(acc, beta, load(zero, f, i, 0, c + at))
        if len(y):
            prefetch(zero, y, ahead, 0, c + at)
            prefetch(zero, total, ahead, 0, c + at)
            store(multiply_add(load(zero, total, i, 0, c + at), share, acc), total, i, 0, c + at)
            folded = multiply_fold(broadcast(ring.dtype.type(0), NARROW), acc, load(zero, y, i, 0, c + at))
            dots[i] += number * np.float64(lane_sum(folded))
        own = i - shift
        store(acc, ring, own + before + (0 if own >= size else size), 0, at)
        at += lanes(zero)
    return at


@_jit
def _recursion(begin, end, columns, crow, col, weight, g, f, y, total, scales, betas, share, first, out, dots, band):
    num_rows, num_steps, size = len(crow) - 1, len(scales), ROWS + 2 * band
    ring = _rings(num_steps + 1, size, columns, scales)
    zero = scales.dtype.type(0)
    wide, narrow, rest = broadcast(zero, COLUMNS), broadcast(zero, NARROW), tail(zero, NARROW)
    for block in range(begin, end):
        c, by = block * columns, dots[block]
        width = min(columns, f.shape[2] - c)
        # The first row of the block that enters; one that takes step k, or leaves, entered as many bands ago.
        for entering in range(0, num_rows + num_steps * band + ROWS, ROWS):
            for i in range(entering, min(entering + ROWS, num_rows)):
                at = _copy_row(wide, 0, width, g, i, c, ring, i % size, 0)
                at = _copy_row(narrow, at, width, g, i, c, ring, i % size, 0)
                at = _copy_row(rest, at, width, g, i, c, ring, i % size, 0)
            for k in range(num_steps):
                start = entering - (k + 1) * band
                # A row r lies at r - shift in its ring, less size if that is past its end.
                shift = (start - band) // size * size
                place, factors = (shift, size, k * size), (scales[k], betas[k], share, first + k + 1)
                for i in range(max(start, 0), min(start + ROWS, num_rows)):
                    at = _step_row(wide, 0, width, i, place, crow, col, weight, f, y, total, c, ring, factors, by)
                    at = _step_row(narrow, at, width, i, place, crow, col, weight, f, y, total, c, ring, factors, by)
                    at = _step_row(rest, at, width, i, place, crow, col, weight, f, y, total, c, ring, factors, by)
            leaving = entering - num_steps * band
            for i in range(max(leaving, 0), min(leaving + ROWS, num_rows) if len(out) else 0):
                k = num_steps * size + i % size
                at = _copy_row(wide, 0, width, ring, k, 0, out, i, c)
                at = _copy_row(narrow, at, width, ring, k, 0, out, i, c)
                at = _copy_row(rest, at, width, ring, k, 0, out, i, c)


@_jit
def _recursion_of_column(begin, end, crow, col, weight, f, y, total, scales, betas, share, out, dots):
    """The same of one column, step after step: all of it stays in caches."""
    none, states = f[:0], np.empty((2, len(f)), f.dtype)
    for k in range(len(scales)):
        g, state = f if k == 0 else states[(k - 1) % 2], states[k % 2]
        _spmm_column(0, len(f), crow, col, weight, g, scales[k : k + 1], none, f, betas[k : k + 1], state)
        for i in range(len(y)):
            total[i] += share * state[i]
            dots[0, i] += (k + 1) * np.float64(state[i]) * y[i]
    out[:] = states[(len(scales) - 1) % 2, : len(out)]


class Plan(NamedTuple):
    """How the steps go through the rows: none a ``band`` at a time, so many ``steps`` together."""

    band: int
    steps: int


def plan(crow: Tensor, col: Tensor, f: Tensor) -> Plan | None:
    """For this graph; None where edges reach too far for going together to gain anything."""
    if _is_column(f):
        return Plan(0, 0)
    band = _bandwidth(crow.numpy(), col.numpy())
    steps = _RING_BYTES // ((ROWS + 2 * band) * COLUMNS * 4) - 1
    return Plan(band, steps) if steps >= _LEAST_STEPS else None


def recursion(
    plan: Plan, crow: Tensor, col: Tensor, weight: Tensor | None, f: Tensor, scales: Tensor, betas: Tensor
) -> Tensor:
    """The last state of ``g_k = scales[k] A g_{k-1} + betas[k] f``, from ``g_0 = f``.

    Args:
        plan: of this graph, from :func:`plan`.
        weight: (E, 1) in the accumulation dtype; None for ones.
        f: (N, D).
        scales, betas: (T,) in the accumulation dtype, T > 0.

    Returns:
        (N, D) in the dtype of f.
    """
    f, nothing = f.contiguous(), scales.new_empty(0, f.shape[1])
    sums = _Sums(f[:0], nothing, np.zeros((_blocks(f), 0)), 0.0)
    return _run(plan, _arrays(crow, col, weight, scales), f, scales, betas, sums)


def recursion_total(
    plan: Plan,
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    f: Tensor,
    scales: Tensor,
    betas: Tensor,
    share: float,
    y: Tensor,
) -> tuple[Tensor, float]:
    """Of the same states, ``f + share (g_1 + ... + g_T)``, (N, D), and ``sum_k k <g_k, y>``; y like f."""
    total = huge_pages(torch.empty(f.shape, dtype=scales.dtype)).copy_(f)
    # Terms of both signs, that cancel: one sum after another would round too much away.
    sums = _Sums(y.contiguous(), total, np.zeros((_blocks(f), len(f))), share)
    _run(plan, _arrays(crow, col, weight, scales), f.contiguous(), scales, betas, sums)
    return total.to(f.dtype), float(sums.dots.sum())


class _Sums(NamedTuple):
    """What :func:`recursion_total` adds up; of no rows where the last state is wanted."""

    y: Tensor
    total: Tensor
    dots: np.ndarray
    share: float


def _is_column(f: Tensor) -> bool:
    return f.shape[1] == 1 and f.dtype == accumulation_dtype(f.dtype)


def _columns(f: Tensor) -> int:
    """Columns of a block: fewer where threads would be idle."""
    return COLUMNS if f.shape[1] >= torch.get_num_threads() * COLUMNS else NARROW


def _blocks(f: Tensor) -> int:
    return -(-f.shape[1] // _columns(f))


def _arrays(crow: Tensor, col: Tensor, weight: Tensor | None, like: Tensor) -> tuple[np.ndarray, ...]:
    values = array(like[:0] if weight is None else weight).reshape(-1)
    return crow.numpy().view(np.uint64), col.numpy().view(np.uint32), values


def _run(plan: Plan, graph: tuple[np.ndarray, ...], f: Tensor, scales: Tensor, betas: Tensor, sums: _Sums) -> Tensor:
    """The last state, or no rows of it where sums are wanted."""
    share, y, total = scales.numpy().dtype.type(sums.share), _split(sums.y), _split(sums.total)
    work, wanted = (len(graph[1]) + len(f)) * f.shape[1], f[: len(f) - len(y)]
    if _is_column(f):
        out = torch.empty_like(wanted)
        vectors = (a.reshape(-1) for a in (f.numpy(), y, total))
        column = (scales.numpy(), betas.numpy(), share, out.numpy().reshape(-1), sums.dots)
        _launch(_recursion_of_column, 1, work, *graph, *vectors, *column)
        return out
    g, spare = f, None
    for first in range(0, len(scales), plan.steps):
        part = slice(first, first + plan.steps)
        factors = (scales[part].contiguous().numpy(), betas[part].contiguous().numpy(), share, first)
        last = first + plan.steps >= len(scales)
        out = huge_pages(torch.empty_like(wanted if last else f)) if spare is None or (last and len(y)) else spare
        args = (*graph, _split(g), _split(f), y, total, *factors, _split(out), sums.dots, plan.band)
        _launch(_recursion, _blocks(f), work * len(factors[0]), _columns(f), *args)
        g, spare = out, (g if first else None)
    return g
