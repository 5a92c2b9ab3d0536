"""Attention over the neighbours in a graph, in O(edges): nothing of the size T x T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.ops.custom import CustomOp
from bigbag.ops.join import squared, with_halo
from bigbag.ops.registry import Operator
from bigbag.ops.spmm import (
    DTYPES,
    Graph,
    edge_dots,
    graph_of,
    kernels,
    needs_grad,
    prepare,
    product,
    reference_edge_dots,
    reference_spmm,
)
from bigbag.parts import Halo


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    adj: Adjacency,
    *,
    softmax: bool = True,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Each instance attends to its neighbours.

        s_ij = scale <q_i, k_j>,   a_ij = exp(s_ij) / sum over neighbours of exp(s_ij'),   out_i = sum_j a_ij v_j

    With ``softmax=False``, a_ij = A_ij s_ij: linear attention weighted by edges, with gradient to ``adj.weight``. With
    softmax the weights of edges are not used. An instance without neighbours gets zeros.

    Cost: 2 E (D + D_v) FLOP forward, twice that backward. Bytes: q, k, v and out once where the graph is local, and
    some 16 H per edge; it holds O(E H) floats. Where bags are shared out over ranks (``adj.halo``), keys and values of
    the halo come first, and their gradients go back.

    Args:
        q: (T, D) or (T, H, D) floating.
        k: of the shape and dtype of q.
        v: (T, D_v) or (T, H, D_v), of the dtype of q.
        adj: (T, T) adjacency.
        softmax: normalise over neighbours.
        scale: default 1 / sqrt(D).
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, D_v) or (T, H, D_v) in the dtype of v.

    Raises:
        ValueError: shapes or dtypes that do not fit, an ``impl`` that can't run.
    """
    _check_heads("neighbor_attention", q, k, v)
    if adj.halo is not None:
        whole = (_padded(q, adj.halo), with_halo(k, adj.halo), with_halo(v, adj.halo))
        return neighbor_attention(*whole, squared(adj), softmax=softmax, scale=scale, impl=impl)[: len(q)]
    chosen, rows_q = prepare("neighbor_attention", adj, q, impl, "q")
    heads = q.shape[1] if q.dim() == 3 else 1
    graph = _graph(adj, chosen, q, k, v)
    scores = _dots(adj, graph, rows_q, k.flatten(1), heads, chosen) * _scale(q, scale)
    if not softmax:
        weights = scores if adj.weight is None else scores * adj.weight.to(scores.dtype)[:, None]
    elif graph is None:
        weights = _reference_softmax(adj, scores)
    else:
        weights = _OPS["softmax", chosen](scores, graph.crow)
    rows_v = v.flatten(1)
    if graph is None:
        return reference_spmm(adj, weights, rows_v).to(v.dtype).view(v.shape)
    return product(graph, weights, rows_v, chosen).view(v.shape)


def neighbor_scores(
    q: Tensor, k: Tensor, adj: Adjacency, *, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """How well an instance agrees with its neighbourhood, ``s_i = scale * sum_j A_ij <q_i, k_j>``.

    CAMIL's attention is the softmax of these over the bag. Cost: 2 E D FLOP forward, twice that backward; it holds
    O(E) floats. Gradients flow to q, k and ``adj.weight``.

    Args:
        q: (T, D) floating.
        k: of the shape and dtype of q.
        adj: (T, T) adjacency.
        scale: default 1 / sqrt(D).
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T,) float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not fit, an ``impl`` that can't run.

    Fourkioti et al., CAMIL: context-aware multiple instance learning for cancer detection and subtyping in whole slide
    images, ICLR 2024.
    """
    _check_heads("neighbor_scores", q, k, k)
    if q.dim() != 2:
        raise ValueError(f"neighbor_scores: q must be (T, D), got {tuple(q.shape)}")
    if adj.halo is not None:
        whole = (_padded(q, adj.halo), with_halo(k, adj.halo))
        return neighbor_scores(*whole, squared(adj), scale=scale, impl=impl)[: len(q)]
    chosen, rows = prepare("neighbor_scores", adj, q, impl, "q")
    graph = _graph(adj, chosen, q, k, adj.weight)
    values = _dots(adj, graph, rows, k, 1, chosen) * _scale(q, scale)
    if adj.weight is not None:
        values = values * adj.weight.to(values.dtype)[:, None]
    ones = values.new_ones(adj.num_nodes, 1)
    sums = reference_spmm(adj, values, ones) if graph is None else product(graph, values, ones, chosen)
    return sums[:, 0]


def _check_heads(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() in (2, 3) and k.shape == q.shape and v.dim() == q.dim() and v.shape[:-1] == q.shape[:-1]
    if not fits or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"{name}: expected q, k (T, [H,] D) and v (T, [H,] D_v) of one dtype, got {shapes}")


def _padded(q: Tensor, halo: Halo) -> Tensor:
    """Queries with rows of zeros for the halo, which asks nothing."""
    return torch.cat([q, q.new_zeros(halo.num_rows, *q.shape[1:])])


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _graph(adj: Adjacency, impl: str, *differentiated: Tensor | None) -> Graph | None:
    """None for the reference. Edge values are not symmetric, even where the adjacency is."""
    if impl == "reference":
        return None
    return graph_of(adj, impl, transposed=needs_grad(*differentiated), same=False)


def _dots(adj: Adjacency, graph: Graph | None, x: Tensor, y: Tensor, heads: int, impl: str) -> Tensor:
    return reference_edge_dots(adj, x, y, heads) if graph is None else edge_dots(graph, x, y, heads, impl)


def _reference_softmax(adj: Adjacency, scores: Tensor) -> Tensor:
    ends = adj.crow.tolist()
    rows = [scores[s:e].softmax(0) for s, e in zip(ends, ends[1:]) if e > s]
    return torch.cat(rows) if rows else scores.clone()


def _register(impl: str) -> None:
    """Custom operators ``bigbag::edge_softmax_{impl}`` and ``..._backward``."""
    forward = CustomOp(
        f"edge_softmax_{impl}",
        "(Tensor scores, Tensor crow) -> Tensor",
        lambda scores, crow: kernels(impl).edge_softmax(crow, scores.contiguous()),
    )
    backward = CustomOp(
        f"edge_softmax_{impl}_backward",
        "(Tensor a, Tensor grad, Tensor crow) -> Tensor",
        lambda a, grad, crow: kernels(impl).edge_softmax_backward(crow, a, grad),
    )
    forward.register_fake(lambda scores, crow: scores.new_empty(scores.shape))
    backward.register_fake(lambda a, grad, crow: a.new_empty(a.shape))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output, inputs[1])

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        a, crow = ctx.saved_tensors
        return backward(a, grad, crow), None

    forward.register_autograd(differentiate, setup_context=setup)
    _OPS["softmax", impl] = forward


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (
    Operator("neighbor_attention", neighbor_attention, DTYPES),
    Operator("neighbor_scores", neighbor_scores, DTYPES),
)
