"""All pairs of points within a radius."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import isqrt

import numpy as np
import torch

from bigbag.adjacency import Adjacency

# Cells are this much wider than the radius, and at most 2**40 to an axis, so that rounding never puts two neighbours
# two cells apart: the error of a cell number is below 2 * 2**-53 * 2**40 = 2**-12 cells.
_MARGIN = 1 + 2.0**-10
_MOST_CELLS_OF_AXIS = 2.0**40
_MOST_CELLS = 2**62
# Up to so many cells for each point they are counted, which takes a third of the time of sorting.
_CELLS_OF_POINT = 4
# A radius of more steps of a lattice than this has more rows of neighbours than are worth walking along.
_MOST_STEPS = 8
# Points that say what the step of a lattice may be; all are then held against it.
_STEP_SAMPLE = 4096
# float64 holds every integer up to here.
_EXACT = 2.0**53


def radius_graph(points: np.ndarray, radius: float, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """CSR (crow, col) of the pairs of different points (N, c) float64 of one bag with distance <= radius."""
    limit = largest_square(radius)
    if len(points) == 0 or points.shape[1] > 3:
        return radius_graph_by_tree(points, radius, sizes)
    on_lattice = lattice_graph(points, limit, sizes)
    if on_lattice is not None:
        return on_lattice
    cells = cell_keys(points, radius, sizes)
    if cells is None:
        return radius_graph_by_tree(points, radius, sizes)
    from bigbag.kernels.cpu.graphs import radius_neighbours

    keys, shifts, num_cells = cells
    keys, points, order = sorted_by_cell(keys, points, num_cells)
    return radius_neighbours(keys, points, order, shifts, limit)


def sorted_by_cell(keys: np.ndarray, points: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys in ascending order, the points beside them, and where they came from (int32)."""
    from bigbag.kernels.cpu.graphs import counting_sort

    if (keys[1:] >= keys[:-1]).all():
        return keys, points, np.arange(len(keys), dtype=np.int32)
    if num_cells <= _CELLS_OF_POINT * len(keys):
        return counting_sort(keys, points, num_cells)
    order = np.argsort(keys)
    return keys[order], points[order], order.astype(np.int32)


def lattice_graph(points: np.ndarray, limit: float, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """The graph of points on a lattice that lie in few steps of each other; None for others.

    Each place of the lattice has a number, bag by bag and row by row, so that the neighbours of a place in each row are
    the places between two numbers. Rows may run along the first axis or the last: the one in which the points come in
    order saves sorting them.
    """
    from bigbag.kernels.cpu.graphs import bounds, counting_sort, lattice_neighbours

    low, high = bounds(points)
    step = _lattice_step(points, low)
    if step is None:
        return None
    square = int(Fraction(limit) / int(step) ** 2)  # in steps; a float quotient may round up
    if square > _MOST_STEPS**2:
        return None
    extent = ((high - low) / step).astype(np.int64).tolist()
    for axes in (range(points.shape[1]), range(points.shape[1])[::-1]):
        numbered = _lattice_keys(points, low, step, extent, list(axes), square, sizes)
        if numbered is None:
            return None
        keys, shifts, reach, num_places = numbered
        if (keys[1:] >= keys[:-1]).all():
            return lattice_neighbours(keys, np.empty(0, np.int32), shifts, reach)
    if num_places <= _CELLS_OF_POINT * len(keys):
        keys, _, order = counting_sort(keys, points[:, :0], num_places)
    else:
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
    return lattice_neighbours(keys, order, shifts, reach)


def _lattice_step(points: np.ndarray, low: np.ndarray) -> float | None:
    """The largest step whose multiples the first points' offsets from ``low`` are; None if they are not whole."""
    offsets = points[:_STEP_SAMPLE] - low
    if offsets.max() > _EXACT or (offsets != np.floor(offsets)).any():
        return None
    return float(max(np.gcd.reduce(offsets.astype(np.int64), axis=None), 1))


def _lattice_keys(
    points: np.ndarray,
    low: np.ndarray,
    step: float,
    extent: Sequence[int],
    axes: Sequence[int],
    square: int,
    sizes: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int] | None:
    """Number of each point's place (``axes``: slowest first); what leads to the rows of neighbours, and their reach.

    ``square`` is that of the radius, in steps. Each axis has empty places at its end, as many as the radius has steps,
    so that a step over an edge of the box never meets a point. None: a point is off the lattice, or there are too many
    places to number.
    """
    from bigbag.kernels.cpu.graphs import lattice_keys

    steps = isqrt(square)
    factors, num_places = np.zeros(len(axes), dtype=np.int64), 1
    for axis in reversed(axes):
        factors[axis] = num_places
        num_places *= extent[axis] + 1 + steps
    if num_places * len(sizes) >= _MOST_CELLS:
        return None
    keys = np.repeat(np.arange(0, num_places * len(sizes), num_places, dtype=np.int64), sizes)
    if not lattice_keys(points, low, step, factors, keys):
        return None
    shifts, reach = [], []
    for offsets in product(range(-steps, steps + 1), repeat=len(axes) - 1):
        rest = square - sum(d * d for d in offsets)
        if rest >= 0:
            shifts.append(sum(d * int(factors[axis]) for d, axis in zip(offsets, axes)))
            reach.append(isqrt(rest))
    return keys, np.asarray(shifts, dtype=np.int64), np.asarray(reach, dtype=np.int64), num_places * len(sizes)


def largest_square(radius: float) -> float:
    """The largest float64 whose square root is at most ``radius``: comparing squares then equals comparing distances.

    radius**2 may lie one step below or above it: sqrt(3)**2 < 3.
    """
    square = radius * radius
    while np.sqrt(square) > radius:
        square = np.nextafter(square, 0)
    while np.sqrt(np.nextafter(square, np.inf)) <= radius:
        square = np.nextafter(square, np.inf)
    return float(square)


def cell_keys(points: np.ndarray, radius: float, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Number of the cell of each point, what leads from a cell to the rows of three cells around it, number of cells.

    Cells are numbered bag by bag, the last axis fastest, each axis with one empty cell at its end, so that a step over
    an edge of the box never meets a point. None: there are too many cells to number.
    """
    low, high = points.min(0), points.max(0)
    width = np.maximum(radius * _MARGIN, (high - low) / _MOST_CELLS_OF_AXIS)
    counts = [int(n) + 2 for n in (high - low) / width]
    num_cells = len(sizes)
    for count in counts:
        num_cells *= count
    if num_cells >= _MOST_CELLS:
        return None
    keys = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    for axis, count in enumerate(counts):
        keys *= count
        keys += ((points[:, axis] - low[axis]) / width[axis]).astype(np.int64)
    steps = [int(np.prod(counts[axis + 1 :], dtype=object)) for axis in range(len(counts) - 1)]
    shifts = [sum(s * d for s, d in zip(steps, direction)) for direction in product((-1, 0, 1), repeat=len(steps))]
    return keys, np.asarray(shifts, dtype=np.int64), num_cells


def radius_graph_by_tree(points: np.ndarray, radius: float, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same by a KD-tree per bag, for more axes than three and for boxes of more than 2**62 cells."""
    from scipy.spatial import cKDTree

    limit = largest_square(radius)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    start = 0
    for size in sizes:
        bag = points[start : start + size]
        if size > 1:
            found = cKDTree(bag).query_pairs(radius * _MARGIN, output_type="ndarray")
            square = np.zeros(len(found))
            for axis in range(points.shape[1]):
                square += (bag[found[:, 0], axis] - bag[found[:, 1], axis]) ** 2
            pairs.append(found[square <= limit] + start)
        start += size
    one_way = torch.from_numpy(np.concatenate(pairs))
    both = torch.cat([one_way, one_way.flip(1)])
    adj = Adjacency.from_edges(both[:, 0], both[:, 1], None, len(points), symmetric=True)
    return adj.crow.numpy(), adj.col.numpy()
