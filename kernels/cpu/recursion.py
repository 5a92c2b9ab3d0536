"""Recursions ``g <- scale[k] A g + beta[k] f`` with a sparse matrix, all steps in one pass over memory, with Numba.

One step after another reads and writes all of g each time: T steps move 3 T (N, D) matrices through memory. But where
an edge joins rows that lie at most ``band`` apart, as on a lattice row by row, a block of rows can take step k + 1 as
soon as the band of rows around it has taken step k. So the steps follow one another through the rows as a wavefront:

    rows   [.. step 3 ..][.. step 2 ..][.. step 1 ..][.. not yet read ..]      every step a band behind the one before

Of each state only the rows between its step and the next are held, in a ring that stays in cache, and of f, which each
step adds, those between the first step and the last; memory sees f read and the last state written, once. A thread
owns blocks of columns: no step waits for another thread, and results do not depend on the number of threads.
Bytes: f and the result once, 4 to 8 per edge and block of columns; held: (T + 1) (2 band + R) + T band + R numbers per
column of a block and thread, R rows in turn; T band + R more for both gradients. FLOPs: 2 E D per step. States are held
in the accumulation dtype (float32, or float64 for float64).

Where rows lie in no order, as nearest neighbours of nuclei, the graph is relabelled (:mod:`bigbag.kernels.cpu.bands`),
and rows enter and leave the rings in that order: no (N, D) matrix is permuted.

M. Wolfe, More iteration space tiling, Supercomputing 1989, calls the schedule a wavefront of skewed loops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.bands import Banded, band, banded, values_in_order
from bigbag.kernels.cpu.memory import huge_pages
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
# Rows that take a step before the next step's turn, or half a band if that is more: each turn reads a band on either
# side again, from a cache further away. And how many rows ahead rows are asked for: no prefetcher sees a run.
ROWS, AHEAD = 128, 8
# What the rings of a thread may hold, to stay in caches; with fewer steps, a wave through the rows gains nothing.
_RING_BYTES, LEAST_STEPS = 16 << 20, 3
# Numbers that take a step, 8 bytes of memory each, in the time in which a row or an edge is relabelled: about eight
# reads at random, a cache line each.
_RELABEL_NUMBERS = 64


@_jit
def _rings(num_rows, columns, like):
    """Rows at a cache line, (num_rows, 1, columns)."""
    count, spare = num_rows * columns, LINE_BYTES // like.itemsize
    memory = np.empty(count + spare, like.dtype)
    first = (-memory.ctypes.data) % LINE_BYTES // like.itemsize
    return memory[first : first + count].reshape(num_rows, 1, columns)


@_block
def _copy_row(zero, at, width, x, i, c, out, k, d):
    """As many of columns ``at`` to ``width`` as fit, from ``x[i, c ...]`` to ``out[k, d ...]``; returns their end."""
    while fits(zero, at, width):
        store(load(zero, x, i, 0, c + at), out, k, 0, d + at)
        at += lanes(zero)
    return at


@_jit
def _enter(start, end, width, order, x, c, ring, before, size):
    """Rows ``start`` to ``end`` in order, columns from c on, into the ring behind ``before`` rows."""
    zero = ring.dtype.type(0)
    wide, narrow, rest = broadcast(zero, COLUMNS), broadcast(zero, NARROW), tail(zero, NARROW)
    for k in range(start, end):
        i, place, ahead = order[k] if len(order) else k, before + k % size, k + AHEAD
        if width == COLUMNS and ahead < end:
            prefetch(wide, x, order[ahead] if len(order) else ahead, 0, c)
        at = _copy_row(wide, 0, width, x, i, c, ring, place, 0)
        at = _copy_row(narrow, at, width, x, i, c, ring, place, 0)
        _copy_row(rest, at, width, x, i, c, ring, place, 0)


@_jit
def _leave(start, end, width, order, ring, before, size, out, c):
    """The way back."""
    zero = ring.dtype.type(0)
    wide, narrow, rest = broadcast(zero, COLUMNS), broadcast(zero, NARROW), tail(zero, NARROW)
    for k in range(start, end):
        i, place = order[k] if len(order) else k, before + k % size
        at = _copy_row(wide, 0, width, ring, place, 0, out, i, c)
        at = _copy_row(narrow, at, width, ring, place, 0, out, i, c)
        _copy_row(rest, at, width, ring, place, 0, out, i, c)


@_block
def _step_row(zero, at, width, i, places, crow, col, weight, ring, held, factors, dots):
    """Columns of one row take a step, from the ring that begins at ``before`` into the one behind it."""
    (shift, size, before, held_shift, held_size), (scale, beta, share, number) = places, factors
    # Unsigned: a number that might be negative would be looked at for counting from the end, at every edge.
    first, last = crow[np.uint64(i)], crow[np.uint64(i + 1)]
    own, k = i - shift, i - held_shift
    own += before - (size if own >= size else 0)
    k -= held_size if k >= held_size else 0
    while fits(zero, at, width):
        acc = zero
        for e in range(first, last):
            j = np.int64(col[e]) - shift
            j += before - (size if j >= size else 0)
            u = weight[e] if len(weight) else ring.dtype.type(1)
            acc = multiply_add(acc, u, load(zero, ring, j, 0, at))
        acc = multiply_add(zero, scale, acc)
        if len(dots):
            if beta != 0:
                acc = multiply_add(acc, beta, load(zero, ring, own, 0, at))
            total = held_size + k
            store(multiply_add(load(zero, held, total, 0, at), share, acc), held, total, 0, at)
            folded = multiply_fold(broadcast(ring.dtype.type(0), NARROW), acc, load(zero, held, k, 0, at))
            dots[i] += number * np.float64(lane_sum(folded))
        elif beta != 0:
            acc = multiply_add(acc, beta, load(zero, held, k, 0, at))
        store(acc, ring, own + size, 0, at)
        at += lanes(zero)
    return at


@_jit
def _step(start, end, width, places, crow, col, weight, ring, held, factors, dots):
    zero = ring.dtype.type(0)
    wide, narrow, rest = broadcast(zero, COLUMNS), broadcast(zero, NARROW), tail(zero, NARROW)
    for i in range(start, end):
        at = _step_row(wide, 0, width, i, places, crow, col, weight, ring, held, factors, dots)
        at = _step_row(narrow, at, width, i, places, crow, col, weight, ring, held, factors, dots)
        _step_row(rest, at, width, i, places, crow, col, weight, ring, held, factors, dots)


@_jit
def _recursion(
    begin, end, columns, order, crow, col, weight, band, rows, g, f, total, scales, betas, share, first, out, dots
):
    num_rows, num_steps, size = len(crow) - 1, len(scales), rows + 2 * band
    # f, and behind it the total, of the rows between those that enter and those that leave.
    held_size = rows + num_steps * band
    ring = _rings((num_steps + 1) * size, columns, scales)
    held = _rings((2 if len(total) else 1) * held_size, columns, scales)
    for block in range(begin, end):
        c, by = block * columns, dots[block]
        width = min(columns, f.shape[2] - c)
        # The first row of those that enter; ones that take step k, or leave, entered as many bands ago.
        for entering in range(0, num_rows + num_steps * band + rows, rows):
            stop = min(entering + rows, num_rows)
            _enter(entering, stop, width, order, g, c, ring, 0, size)
            _enter(entering, stop, width, order, f, c, held, 0, held_size)
            if len(total):
                _enter(entering, stop, width, order, total, c, held, held_size, held_size)
            for k in range(num_steps):
                start = entering - (k + 1) * band
                # A row r lies at r - shift in its ring, less size if that is past its end.
                shift, held_shift = (start - band) // size * size, start // held_size * held_size
                places = (shift, size, k * size, held_shift, held_size)
                factors, stop = (scales[k], betas[k], share, first + k + 1), min(start + rows, num_rows)
                _step(max(start, 0), stop, width, places, crow, col, weight, ring, held, factors, by)
            leaving, stop = max(entering - num_steps * band, 0), min(entering - num_steps * band + rows, num_rows)
            if len(out):
                _leave(leaving, stop, width, order, ring, num_steps * size, size, out, c)
            if len(total):
                _leave(leaving, stop, width, order, held, held_size, held_size, total, c)


@_jit
def _recursion_of_column(begin, end, crow, col, weight, start, y, total, scales, betas, share, out, dots):
    """The same of one column, step after step: all of it stays in caches."""
    none, states = start[:0], np.empty((2, len(start)), start.dtype)
    for k in range(len(scales)):
        g, state = start if k == 0 else states[(k - 1) % 2], states[k % 2]
        own = g if len(y) else start
        _spmm_column(0, len(start), crow, col, weight, g, scales[k : k + 1], none, own, betas[k : k + 1], state)
        for i in range(len(y)):
            total[i] += share * state[i]
            dots[0, i] += (k + 1) * np.float64(state[i]) * y[i]
    out[:] = states[(len(scales) - 1) % 2, : len(out)]


class Plan(NamedTuple):
    """How the steps go through the rows: so many ``steps`` together, a ``band`` apart, in the order of ``graph``."""

    band: int
    steps: int
    graph: Banded | None = None


def plan(crow: Tensor, col: Tensor, f: Tensor, num_steps: int) -> Plan | None:
    """For this graph, relabelled if need be; None where going together gains nothing."""
    if _is_column(f):
        return Plan(0, num_steps)
    lying = band(crow, col)
    steps, graph = _steps_that_fit(lying, f), None
    # Relabelled it must pay even if the graph is used once.
    if steps < num_steps >= LEAST_STEPS and num_steps * f.numel() >= _RELABEL_NUMBERS * (len(f) + len(col)):
        graph = banded(crow, col)
        steps = steps if graph is None else _steps_that_fit(graph.band, f)
    if steps < LEAST_STEPS:
        return None
    waves = -(-num_steps // steps)
    return Plan(lying if graph is None else graph.band, -(-num_steps // waves), graph)


def _steps_that_fit(reach: int, f: Tensor) -> int:
    columns = max(NARROW, min(COLUMNS, -(-f.shape[1] // NARROW) * NARROW))
    rows = _RING_BYTES // (columns * accumulation_dtype(f.dtype).itemsize)
    # One ring more than steps, and two as long as all of them.
    return (rows - 3 * _rows_of_a_turn(reach) - 2 * reach) // (_rows_of_a_turn(reach) + 4 * reach)


def _rows_of_a_turn(reach: int) -> int:
    return max(ROWS, reach // 2)


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
    sums = _Sums(nothing, np.zeros((_blocks(f), 0)), 0.0)
    return _run(plan, _arrays(plan, crow, col, weight, scales), f, f, scales, betas, sums)


def recursion_total(
    plan: Plan,
    crow: Tensor,
    col: Tensor,
    weight: Tensor | None,
    g: Tensor,
    scales: Tensor,
    betas: Tensor,
    share: float,
    y: Tensor,
    overwrite: bool = False,
) -> tuple[Tensor, float]:
    """Of ``g_k = scales[k] A g_{k-1} + betas[k] g_{k-1}``, ``g + share (g_1 + ... + g_T)`` and ``sum_k k <g_k, y>``.

    The first is (N, D) as g; y is like g. With ``overwrite`` it may lie in the memory of g.
    """
    # A row is read before anything is added to it, and steps after the first ones together start from other states.
    total = g if overwrite and g.dtype == scales.dtype and g.is_contiguous() else None
    total = huge_pages(torch.empty(g.shape, dtype=scales.dtype)).copy_(g) if total is None else total
    # Terms of both signs, that cancel: one sum after another would round too much away.
    sums = _Sums(total, np.zeros((_blocks(g), len(g))), share)
    _run(plan, _arrays(plan, crow, col, weight, scales), g.contiguous(), y.contiguous(), scales, betas, sums)
    return total.to(g.dtype), float(sums.dots.sum())


class _Sums(NamedTuple):
    """What :func:`recursion_total` adds up; of no rows where the last state is wanted."""

    total: Tensor
    dots: np.ndarray
    share: float


def _is_column(f: Tensor) -> bool:
    return f.shape[1] == 1 and f.dtype == accumulation_dtype(f.dtype)


def _columns(f: Tensor) -> int:
    """Columns of a block: fewer where threads would be idle."""
    for columns in (COLUMNS, COLUMNS // 2):
        if f.shape[1] >= torch.get_num_threads() * columns:
            return columns
    return NARROW


def _blocks(f: Tensor) -> int:
    return -(-f.shape[1] // _columns(f))


def _arrays(plan: Plan, crow: Tensor, col: Tensor, weight: Tensor | None, like: Tensor) -> tuple[np.ndarray, ...]:
    """The order of the rows, then the graph in that order."""
    order, rows, columns = np.empty(0, np.int32), crow.numpy(), col.numpy()
    values = array(like[:0] if weight is None else weight).reshape(-1)
    if plan.graph is not None:
        order, rows, columns, _ = plan.graph
        values = values_in_order(crow, order, values) if len(values) else values
    return order, rows.view(np.uint64), columns.view(np.uint32), values


def _run(
    plan: Plan, graph: tuple[np.ndarray, ...], g: Tensor, f: Tensor, scales: Tensor, betas: Tensor, sums: _Sums
) -> Tensor:
    """The last state, or no rows of it where sums are wanted."""
    order, crow, col, weight = graph
    share, total = scales.numpy().dtype.type(sums.share), _split(sums.total)
    work, wanted = (len(col) + len(f)) * f.shape[1], f[: len(f) - len(total)]
    if _is_column(f):
        out = torch.empty_like(wanted)
        vectors = (a.reshape(-1) for a in (g.numpy(), f.numpy()[: len(total)], total))
        column = (scales.numpy(), betas.numpy(), share, out.numpy().reshape(-1), sums.dots)
        _launch(_recursion_of_column, 1, work, crow, col, weight, *vectors, *column)
        return out
    spare = None
    for first in range(0, len(scales), plan.steps):
        part = slice(first, first + plan.steps)
        factors = (scales[part].contiguous().numpy(), betas[part].contiguous().numpy(), share, first)
        last = first + plan.steps >= len(scales)
        out = huge_pages(torch.empty_like(wanted if last else f)) if spare is None or (last and len(total)) else spare
        args = (*graph, plan.band, _rows_of_a_turn(plan.band), _split(g), _split(f), total, *factors)
        _launch(_recursion, _blocks(f), work * len(factors[0]), _columns(f), *args, _split(out), sums.dots)
        g, spare = out, (g if first else None)
    return g
