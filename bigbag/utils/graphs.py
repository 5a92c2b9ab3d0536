"""Graphs as lists of edges in numpy, as torchmil has them: ``edge_index (2, E)`` and ``edge_weight (E,)``."""

from __future__ import annotations

import numpy as np

from bigbag.graphs import build_adjacency


def degree(index: np.ndarray, edge_weight: np.ndarray | None = None, n_nodes: int | None = None) -> np.ndarray:
    """Sum of the weights of the edges that leave each node.

    Args:
        index: ``(2, E)`` edges.
        edge_weight: ``(E,)``; None counts edges.
        n_nodes: number of nodes; None takes the largest index plus one.

    Returns:
        ``(n_nodes,)`` float64.
    """
    return np.bincount(_nodes(index[0]), edge_weight, minlength=_count(index, n_nodes)).astype(np.float64)


def add_self_loops(
    edge_index: np.ndarray, edge_weight: np.ndarray | None = None, n_nodes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Append an edge of weight 1 from every node to itself; arguments as in :func:`degree`.

    Returns:
        ``(2, E + n_nodes)`` edges and their weights.
    """
    num_nodes = _count(edge_index, n_nodes)
    weight = np.ones(edge_index.shape[1]) if edge_weight is None else edge_weight
    loops = np.tile(np.arange(num_nodes), (2, 1))
    return np.hstack([_nodes(edge_index), loops]), np.concatenate([weight, np.ones(num_nodes)])


def normalize_adj(
    edge_index: np.ndarray, edge_weight: np.ndarray | None = None, n_nodes: int | None = None
) -> np.ndarray:
    """``a_ij / sqrt(d_i d_j)`` with the degrees ``d``, 0 for a node without degree; arguments as in :func:`degree`.

    Returns:
        ``(E,)`` the new weights, in the dtype of floating weights, float64 otherwise.
    """
    weight = np.ones(edge_index.shape[1]) if edge_weight is None else edge_weight
    degrees = degree(edge_index, edge_weight, n_nodes)
    factor = np.zeros_like(degrees)
    np.divide(1.0, np.sqrt(degrees), out=factor, where=degrees > 0)
    row, col = _nodes(edge_index)
    normalized = factor[row] * weight * factor[col]
    return normalized.astype(weight.dtype, copy=False) if np.issubdtype(weight.dtype, np.floating) else normalized


def build_adj(
    coords: np.ndarray, feat: np.ndarray | None = None, dist_thr: float = 1.0, add_self_loops: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Join nodes at most ``dist_thr`` apart, by :func:`bigbag.graphs.build_adjacency`, which see for the weights.

    Edges are sorted by row, then column; torchmil's order within a row is arbitrary. At a distance of exactly
    ``dist_thr`` torchmil misses pairs for some thresholds by rounding.

    Args:
        coords: ``(N, c)``.
        feat: ``(N, P)``; edges weigh ``exp(-||x_i - x_j|| / P)``. None: 1.
        dist_thr: largest distance of neighbours.
        add_self_loops: also join every node to itself, with weight 1.

    Returns:
        ``(2, E)`` int64 edges and their ``(E,)`` weights.
    """
    adj = build_adjacency(coords, radius=dist_thr, features=feat, self_loops=add_self_loops)
    edge_index = np.stack([adj.rows().numpy(), adj.col.numpy().astype(np.int64)])
    return edge_index, np.ones(adj.num_edges) if adj.weight is None else adj.weight.numpy()


def _nodes(index: np.ndarray) -> np.ndarray:
    """An index array, also where an empty one has become floating."""
    return np.asarray(index).astype(np.int64, copy=False)


def _count(index: np.ndarray, n_nodes: int | None) -> int:
    return (int(index.max()) + 1 if index.size else 0) if n_nodes is None else n_nodes
