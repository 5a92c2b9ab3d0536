"""All pairs of points within a radius."""

from __future__ import annotations

from itertools import product

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


def radius_graph(points: np.ndarray, radius: float, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """CSR (crow, col) of the pairs of different points (N, c) float64 of one bag with distance <= radius."""
    limit = largest_square(radius)
    cells = cell_keys(points, radius, sizes) if len(points) and points.shape[1] <= 3 else None
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
