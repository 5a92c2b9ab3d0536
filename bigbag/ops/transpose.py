"""The transpose of an adjacency, and whether it is the adjacency itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from bigbag.adjacency import Adjacency
from bigbag.ops.join import symmetric_in_parts, transpose_in_parts
from bigbag.ops.per_graph import once_per_graph
from bigbag.ops.registry import choose
from bigbag.ops.spmm import DTYPES, graph_of

# Weights such as a_ij / sqrt(d_i d_j), computed in either order, agree to a few roundings.
_ROUNDINGS = 16


def transpose(adj: Adjacency) -> Adjacency:
    """``A^T`` in CSR form; ``adj`` itself where it is marked symmetric.

    Gradients flow to ``adj.weight``. Cost: O(T + E) by counting, once per graph however often it is asked for.
    """
    if adj.symmetric:
        return adj
    if adj.halo is not None:
        return _in_parts(adj)
    chosen = choose("spmm", DTYPES, None, adj.col.device.type, torch.float32)
    if chosen == "reference":
        return Adjacency.from_edges(adj.col.long(), adj.rows(), adj.weight, adj.num_nodes)
    graph = graph_of(adj, chosen, transposed=True)
    return Adjacency(graph.crow_t, graph.col_t, None if adj.weight is None else adj.weight[graph.perm])


_in_parts = once_per_graph(weighted=True)(transpose_in_parts)


def marked_symmetric(adj: Adjacency) -> Adjacency:
    """``adj``, marked symmetric where ``A == A^T`` up to a few roundings of the weights.

    For graphs that come from torch tensors, which carry no mark. Cost: a transposition and a comparison, O(T + E); it
    waits for the device.
    """
    if adj.symmetric:
        return adj
    if adj.halo is not None:
        rtol = 0.0 if adj.weight is None else _ROUNDINGS * torch.finfo(adj.weight.dtype).eps
        return replace(adj, symmetric=symmetric_in_parts(adj, rtol))
    other = transpose(adj)
    same = torch.equal(adj.crow, other.crow) and torch.equal(adj.col, other.col)
    if same and adj.weight is not None and other.weight is not None:
        rtol = _ROUNDINGS * torch.finfo(adj.weight.dtype).eps
        same = torch.allclose(adj.weight, other.weight, rtol=rtol, atol=0.0)
    return replace(adj, symmetric=True) if same else adj
