"""The k nearest neighbours of every point."""

from __future__ import annotations

import numpy as np
import torch

from bigbag.graphs.order import space_filling_order

_CHUNK_DISTANCES = 2**22
# Below this, starting threads takes longer than the search.
_FEW_POINTS = 2**13


def nearest_graph(points: np.ndarray, k: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """CSR (crow, col) from each point (N, c) to its k nearest others in its bag, to all where there are fewer."""
    columns, degrees = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    start = 0
    for size in sizes:
        degree = min(k, max(size - 1, 0))
        degrees.append(np.full(size, degree, dtype=np.int64))
        if degree:
            nearest = _nearest(points[start : start + size], degree)
            columns.append((np.sort(nearest, axis=1) + start).astype(np.int32).reshape(-1))
        start += size
    return np.cumsum(np.concatenate(degrees)), np.concatenate(columns)


def _nearest(points: np.ndarray, k: int) -> np.ndarray:
    """(N, k) indices of the nearest others of each of N > k points; ties go to the lowest index.

    A KD-tree breaks ties as it likes, so where the last one taken and the first one left out are equally far, more
    are asked for until all that tie are seen. D points at one place cost D**2.
    """
    from scipy.spatial import cKDTree

    # Along the curve successive queries visit the same leaves: four times as fast as in random order.
    order = space_filling_order(points).numpy() if points.shape[1] <= 3 else np.arange(len(points))
    points = points[order]
    tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
    nearest = np.empty((len(points), k), dtype=np.int64)
    rows = np.arange(len(points))
    workers = torch.get_num_threads() if len(points) > _FEW_POINTS else 1
    wanted = k + 2
    while len(rows):
        wanted = min(wanted, len(points))
        step = max(1, _CHUNK_DISTANCES // wanted)
        tied = []
        for chunk in (rows[i : i + step] for i in range(0, len(rows), step)):
            distance, found = tree.query(points[chunk], k=wanted, workers=workers)
            found = order[found]
            itself = order[chunk]
            if wanted == k + 2 < len(points):
                clear = distance[:, k] < distance[:, k + 1]
                kept = found[clear, : k + 1]
                nearest[itself[clear]] = kept[kept != itself[clear, None]].reshape(-1, k)
            else:
                clear = (distance[:, k] < distance[:, -1]) | (wanted == len(points))
                nearest[itself[clear]] = _first(distance[clear], found[clear], itself[clear], k)
            tied.append(chunk[~clear])
        rows = np.concatenate(tied)
        wanted *= 2
    return nearest


def _first(distance: np.ndarray, found: np.ndarray, itself: np.ndarray, k: int) -> np.ndarray:
    """The k first of each row by distance, then index, without the row's own point."""
    distance = np.where(found == itself[:, None], -1.0, distance)
    by_both = np.lexsort((found, distance), axis=-1)[:, 1 : k + 1]
    return np.take_along_axis(found, by_both, axis=1)


def symmetrized(crow: np.ndarray, col: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """CSR of the pairs joined in either direction ("union") or in both ("mutual"), O(E log E)."""
    num_nodes = len(crow) - 1
    row = np.repeat(np.arange(num_nodes), np.diff(crow))
    there, back = row * num_nodes + col, col.astype(np.int64) * num_nodes + row
    # A pair joined in both directions comes twice. (np.union1d hashes, which takes ten times as long.)
    keys = np.sort(np.concatenate([there, back]))
    twice = keys[1:] == keys[:-1]
    keys = keys[1:][twice] if mode == "mutual" else keys[np.append(True, ~twice)[: len(keys)]]
    row, col = np.divmod(keys, max(num_nodes, 1))
    new_crow = np.zeros_like(crow)
    np.cumsum(np.bincount(row, minlength=num_nodes), out=new_crow[1:])
    return new_crow, col.astype(np.int32)
