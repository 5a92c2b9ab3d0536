"""Self loops and normalisation of graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bigbag.adjacency import Adjacency

NORMALIZATIONS = ("none", "symmetric", "row")


def add_self_loops(adj: Adjacency) -> Adjacency:
    """A + I where the diagonal is empty: a self loop of weight 1 at every node that has none; O(T + E).

    Args:
        adj: on the CPU, columns ascending within a row.

    Returns:
        A new graph, binary if ``adj`` is.
    """
    from bigbag.kernels.cpu.edges import with_diagonal

    _check_on_cpu(adj, "add_self_loops")
    crow, col, weight = with_diagonal(*_arrays(adj))
    return _adjacency(crow, col, weight, adj.symmetric)


def normalize_adjacency(adj: Adjacency, mode: str) -> Adjacency:
    """Scale the weights by the degrees d_i = sum_j a_ij; O(T + E), 4 E bytes of new weights.

        symmetric:  a_ij / sqrt(d_i d_j)        row:  a_ij / d_i        none:  a_ij

    A node without edges keeps its empty row. Of a directed graph "symmetric" takes the row sums on both sides, and
    0 for a node that has none.

    Args:
        adj: on the CPU, with weights of 0 or more.
        mode: "none", "symmetric" or "row".

    Returns:
        The same edges with new weights, in the dtype of the old ones (float32 for a binary graph). It is ``symmetric``
        if ``adj`` is and ``mode`` is not "row".

    Raises:
        ValueError: another mode, a negative weight.
    """
    from bigbag.kernels.cpu.edges import row_sums, scale

    if mode not in NORMALIZATIONS:
        raise ValueError(f"normalize_adjacency: mode is {mode!r}, expected one of {', '.join(NORMALIZATIONS)}")
    if mode == "none":
        return adj
    _check_on_cpu(adj, "normalize_adjacency")
    crow, col, weight = _arrays(adj)
    if weight is None:
        weight = np.ones(len(col), dtype=np.float32)
    if len(weight) and weight.min() < 0:
        raise ValueError(f"normalize_adjacency: the smallest weight is {weight.min()}, expected weights of 0 or more")
    degree = row_sums(crow, weight)
    factor = np.zeros_like(degree)
    np.divide(1.0, np.sqrt(degree) if mode == "symmetric" else degree, out=factor, where=degree > 0)
    scaled = scale(crow, col, weight, factor, mode == "symmetric")
    return replace(adj, weight=torch.from_numpy(scaled), symmetric=adj.symmetric and mode == "symmetric")


def _check_on_cpu(adj: Adjacency, where: str) -> None:
    if adj.col.device.type != "cpu":
        raise ValueError(f"{where}: the graph is on {adj.col.device}, expected cpu; build graphs before they move")


def _arrays(adj: Adjacency) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return adj.crow.numpy(), adj.col.numpy(), None if adj.weight is None else adj.weight.detach().numpy()


def _adjacency(crow: np.ndarray, col: np.ndarray, weight: np.ndarray | None, symmetric: bool) -> Adjacency:
    values = None if weight is None else torch.from_numpy(weight)
    return Adjacency(torch.from_numpy(crow), torch.from_numpy(col), values, symmetric)
