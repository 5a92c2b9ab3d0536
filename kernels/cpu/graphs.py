"""Neighbours of points as CSR graphs, on CPU, with Numba; what is done with a graph then is in :mod:`edges`.

    cells      neighbours within a radius, from points sorted by the key of the cell they lie in
    lattice    the same on a lattice, where a cell is one of its points and no distance need be computed
    hilbert    place of an integer point along Hilbert's curve (Skilling, AIP Conf. Proc. 707, 2004)

A thread owns a range of rows (in cells: of pieces of rows) and alone writes them, so results do not depend on the
number of threads.
Columns come out sorted within a row. Rows are int64 offsets ``crow``, columns int32.
"""

from __future__ import annotations

import numba
import numpy as np

from bigbag.kernels.cpu.segments import _launch

PIECE_ROWS = 4096
FEW_COLUMNS = 16
NO_WEIGHT = np.empty(0, dtype=np.float32)

# No fast-math: a distance equal to the radius must be one on every machine.
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@_jit
def _sort_columns(col, weight, start, end):
    """Shell sort: insertion sort for the usual few columns, n**1.3 for many. It compiles in a tenth of the time."""
    gap = 1
    while gap < (end - start) // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for e in range(start + gap, end):
            value = col[e]
            mark = weight[e] if len(weight) else 0
            hole = e
            while hole >= start + gap and col[hole - gap] > value:
                col[hole] = col[hole - gap]
                if len(weight):
                    weight[hole] = weight[hole - gap]
                hole -= gap
            col[hole] = value
            if len(weight):
                weight[hole] = mark
        gap //= 3


@_jit
def _write_sorted(found, count, col, start):
    """Put each of a few different columns where its rank says; without branches, so random ones cost no more."""
    for e in range(count):
        rank = 0
        for f in range(count):
            rank += found[f] < found[e]
        col[start + rank] = found[e]


@_jit
def _lower_bound(keys, value):
    """First place whose key is at least ``value``."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _counting_sort(keys, points, starts, sorted_keys, sorted_points, order):
    for k in range(len(keys)):
        starts[keys[k] + 1] += 1
    for cell in range(1, len(starts)):
        starts[cell] += starts[cell - 1]
    for k in range(len(keys)):
        place = starts[keys[k]]
        starts[keys[k]] += 1
        order[place] = k
        sorted_keys[place] = keys[k]
        for a in range(points.shape[1]):
            sorted_points[place, a] = points[k, a]


@_jit
def _cells(begin, end, keys, points, order, shifts, limit, crow, col, no_weight, fill):
    # A shift leads to a row of three cells; their points lie end to end, keys[k] + shift - 1 .. keys[k] + shift + 1.
    # Both ends move forward with k, so no search is needed after the first point of a piece.
    for piece in range(begin, end):
        first, last = piece * PIECE_ROWS, min((piece + 1) * PIECE_ROWS, len(keys))
        low = np.empty_like(shifts)
        for s in range(len(shifts)):
            low[s] = _lower_bound(keys, keys[first] + shifts[s] - 1)
        high = low.copy()
        found = np.empty(FEW_COLUMNS, np.int32)
        for k in range(first, last):
            if k == first or keys[k] != keys[k - 1]:
                for s in range(len(shifts)):
                    while low[s] < len(keys) and keys[low[s]] < keys[k] + shifts[s] - 1:
                        low[s] += 1
                    high[s] = max(high[s], low[s])
                    while high[s] < len(keys) and keys[high[s]] <= keys[k] + shifts[s] + 1:
                        high[s] += 1
            place = crow[order[k]]
            count = 0
            for s in range(len(shifts)):
                for m in range(low[s], high[s]):
                    square = 0.0
                    for a in range(points.shape[1]):
                        square += (points[k, a] - points[m, a]) * (points[k, a] - points[m, a])
                    if square <= limit and m != k:
                        if fill:
                            if count < FEW_COLUMNS:
                                found[count] = order[m]
                            else:
                                if count == FEW_COLUMNS:
                                    col[place : place + count] = found
                                col[place + count] = order[m]
                        count += 1
            if fill:
                if count <= FEW_COLUMNS:
                    _write_sorted(found, count, col, place)
                else:
                    _sort_columns(col, no_weight, place, place + count)
            else:
                crow[order[k] + 1] = count


@_jit
def _bounds(points, low, high):
    for a in range(points.shape[1]):
        low[a] = high[a] = points[0, a]
    for i in range(len(points)):
        for a in range(points.shape[1]):
            low[a] = min(low[a], points[i, a])
            high[a] = max(high[a], points[i, a])


@_jit
def _lattice_keys(begin, end, points, low, step, factors, keys, off):
    for i in range(begin, end):
        key = keys[i]
        for a in range(points.shape[1]):
            place = (points[i, a] - low[a]) / step
            off[0] |= place != np.floor(place)
            key += np.int64(place) * factors[a]
        keys[i] = key


@_jit
def _lattice(begin, end, keys, order, shifts, reach, crow, col, no_weight, fill):
    # As in _cells; here a row of cells is keys[k] + shift - reach .. keys[k] + shift + reach, all of them neighbours.
    # Without an order the points are rows of the graph as they are, and their columns ascend as they come.
    for piece in range(begin, end):
        first, last = piece * PIECE_ROWS, min((piece + 1) * PIECE_ROWS, len(keys))
        low = np.empty_like(shifts)
        for s in range(len(shifts)):
            low[s] = _lower_bound(keys, keys[first] + shifts[s] - reach[s])
        high = low.copy()
        found = np.empty(FEW_COLUMNS, np.int32)
        for k in range(first, last):
            if k == first or keys[k] != keys[k - 1]:
                for s in range(len(shifts)):
                    begins, ends = keys[k] + shifts[s] - reach[s], keys[k] + shifts[s] + reach[s]
                    while low[s] < len(keys) and keys[low[s]] < begins:
                        low[s] += 1
                    high[s] = max(high[s], low[s])
                    while high[s] < len(keys) and keys[high[s]] <= ends:
                        high[s] += 1
            row = order[k] if len(order) else k
            place = crow[row]
            if not fill:
                count = -1  # itself
                for s in range(len(shifts)):
                    count += high[s] - low[s]
                crow[row + 1] = count
                continue
            for s in range(len(shifts)):
                for m in range(low[s], high[s]):
                    if m != k:
                        col[place] = order[m] if len(order) else m
                        place += 1
            count = place - crow[row]
            if len(order) and count <= FEW_COLUMNS:
                found[:count] = col[crow[row] : place]
                _write_sorted(found, count, col, crow[row])
            elif len(order):
                _sort_columns(col, no_weight, crow[row], place)


@_jit
def _hilbert(begin, end, cells, bits, out):
    axes = cells.shape[1]
    for i in range(begin, end):
        x = cells[i].copy()
        for level in range(bits - 1, 0, -1):
            bit = np.int64(1) << level
            below = bit - 1
            for a in range(axes):
                if x[a] & bit:
                    x[0] ^= below
                else:
                    swap = (x[0] ^ x[a]) & below
                    x[0] ^= swap
                    x[a] ^= swap
        for a in range(1, axes):
            x[a] ^= x[a - 1]
        flip = np.int64(0)
        for level in range(bits - 1, 0, -1):
            if x[axes - 1] & (np.int64(1) << level):
                flip ^= (np.int64(1) << level) - 1
        key = np.int64(0)
        for level in range(bits - 1, -1, -1):
            for a in range(axes):
                key = (key << 1) | (((x[a] ^ flip) >> level) & 1)
        out[i] = key


def counting_sort(keys: np.ndarray, points: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (N,) int64 below num_cells in ascending order, the points (N, c) beside them, and the order; stable."""
    order, starts = np.empty(len(keys), dtype=np.int32), np.zeros(num_cells + 1, dtype=np.int32)
    sorted_keys, sorted_points = np.empty_like(keys), np.empty_like(points)
    _counting_sort(keys, points, starts, sorted_keys, sorted_points, order)
    return sorted_keys, sorted_points, order


def radius_neighbours(
    keys: np.ndarray, points: np.ndarray, order: np.ndarray, shifts: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """CSR (crow, col) of all pairs of different points with squared distance <= limit, in adjacent cells.

    Args:
        keys: (N,) int64 cell of each point, ascending.
        points: (N, c) float64, in the order of ``keys``.
        order: (N,) int32, row of the graph that each point stands for.
        shifts: (S,) int64, from the key of a cell to that of the middle cell of each adjacent row of three.
        limit: squared radius.
    """
    crow = np.zeros(len(keys) + 1, dtype=np.int64)
    pieces, work = -(-len(keys) // PIECE_ROWS), len(keys) * len(shifts) * FEW_COLUMNS
    args = (keys, points, order, shifts, limit, crow)
    _launch(_cells, pieces, work, *args, np.empty(0, np.int32), NO_WEIGHT, False)
    np.cumsum(crow, out=crow)
    col = np.empty(crow[-1], dtype=np.int32)
    _launch(_cells, pieces, work, *args, col, NO_WEIGHT, True)
    return crow, col


def bounds(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates (c,) of points (N, c) float64, N of 1 or more."""
    low, high = np.empty(points.shape[1]), np.empty(points.shape[1])
    _bounds(points, low, high)
    return low, high


def lattice_keys(points: np.ndarray, low: np.ndarray, step: float, factors: np.ndarray, keys: np.ndarray) -> bool:
    """Add to keys (N,) int64 the number of each point's place on a lattice; False if a point lies off it."""
    off = np.zeros(1, dtype=np.bool_)
    _launch(_lattice_keys, len(points), points.size, points, low, step, factors, keys, off)
    return not off[0]


def lattice_neighbours(
    keys: np.ndarray, order: np.ndarray, shifts: np.ndarray, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """CSR (crow, col) of all pairs of different points whose keys differ by a shift and at most its reach.

    Args:
        keys: (N,) int64 place of each point, ascending.
        order: (N,) int32, row of the graph that each point stands for; empty if it is its own.
        shifts: (S,) int64, ascending.
        reach: (S,) int64.
    """
    crow = np.zeros(len(keys) + 1, dtype=np.int64)
    pieces, work = -(-len(keys) // PIECE_ROWS), len(keys) * len(shifts) * FEW_COLUMNS
    args = (keys, order, shifts, reach, crow)
    _launch(_lattice, pieces, work, *args, np.empty(0, np.int32), NO_WEIGHT, False)
    np.cumsum(crow, out=crow)
    col = np.empty(crow[-1], dtype=np.int32)
    _launch(_lattice, pieces, work, *args, col, NO_WEIGHT, True)
    return crow, col


def hilbert_keys(cells: np.ndarray, bits: int) -> np.ndarray:
    """(N,) int64 place of each cell (N, c) int64, 0 <= cell < 2**bits, c * bits <= 62, along Hilbert's curve."""
    assert cells.shape[1] * bits <= 62
    out = np.empty(len(cells), dtype=np.int64)
    _launch(_hilbert, len(cells), len(cells) * bits, cells, bits, out)
    return out
