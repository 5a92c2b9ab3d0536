"""Quadratic forms of an adjacency, without a T x T matrix or a second (T, D): x^T A x and Dirichlet's energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.ops import segments as _segments
from bigbag.ops.custom import CustomOp
from bigbag.ops.distributed import all_sum
from bigbag.ops.join import squared, with_halo
from bigbag.ops.registry import Operator
from bigbag.ops.spmm import (
    DTYPES,
    Graph,
    _permuted,
    accumulation_dtype,
    graph_of,
    kernels,
    needs_grad,
    prepare,
    reference_edge_dots,
    rows_of,
)


def quadratic_form(adj: Adjacency, x: Tensor, segments: Segments | None = None, *, impl: str | None = None) -> Tensor:
    """``sum_ij A_ij <x_i, x_j>`` = trace(x^T A x), in total or per bag: the numerator of a min-cut loss.

    Gradients flow to x and to ``adj.weight``. Cost: 2 E D FLOP forward, twice that backward. Bytes: x once forward,
    three times backward; it holds O(E) floats beyond the gradient. It is differentiable once.

    Args:
        adj: (T, T) adjacency.
        x: (T, D) floating.
        segments: how the T rows are cut into B bags; None sums over all.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        0-dimensional, or (B,) with ``segments``; float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.

    Bianchi et al., Spectral clustering with graph neural networks for graph pooling, ICML 2020.
    """
    chosen, rows = prepare("quadratic_form", adj, x, impl, in_parts=True)
    if chosen == "reference":
        dots = reference_edge_dots(adj, rows, rows, 1)
    else:
        rows, graph = _graph(adj, rows, chosen)
        dots = _OPS["own_dots", chosen](rows, *graph)
    return _sum_edges("quadratic_form", adj, dots[:, 0], segments, chosen)


def dirichlet_energy(adj: Adjacency, x: Tensor, segments: Segments | None = None, *, impl: str | None = None) -> Tensor:
    """``1/2 sum_ij A_ij |x_i - x_j|^2``: how much x varies along edges; for a symmetric A, trace(x^T (D - A) x).

    Differences are squared edge by edge, so a smooth x loses nothing to cancellation. Cost: 3 E D FLOP forward, twice
    that backward. Arguments, bytes and returns as in :func:`quadratic_form`; of 16 bits, it holds (T, D) float32 more.
    """
    chosen, rows = prepare("dirichlet_energy", adj, x, impl, in_parts=True)
    if chosen == "reference":
        acc = rows.to(accumulation_dtype(x.dtype))
        squares = (acc[rows_of(adj)] - acc[adj.col.long()]).square().sum(1)
    else:
        rows, graph = _graph(adj, rows, chosen)
        squares = _OPS["distances", chosen](rows, *graph)[:, 0]
    return _sum_edges("dirichlet_energy", adj, squares, segments, chosen) / 2


def _graph(adj: Adjacency, rows: Tensor, impl: str) -> tuple[Tensor, Graph]:
    """The rows and the graph on them; with those of the halo, whose edges count on their own ranks."""
    square = adj if adj.halo is None else squared(adj)
    return with_halo(rows, adj.halo), graph_of(square, impl, transposed=needs_grad(rows), same=False)


def _sum_edges(name: str, adj: Adjacency, values: Tensor, segments: Segments | None, impl: str) -> Tensor:
    """Of all bags, or of each; those that ranks share, on all ranks."""
    total = _sum_own_edges(name, adj, values, segments, impl)
    return total if adj.halo is None else all_sum(total, adj.halo.parts)


def _sum_own_edges(name: str, adj: Adjacency, values: Tensor, segments: Segments | None, impl: str) -> Tensor:
    if adj.weight is not None:
        values = values * adj.weight.to(values.dtype)
    if segments is None:
        return values.sum()
    if not torch.compiler.is_compiling() and segments.num_instances != adj.num_nodes:
        raise ValueError(f"{name}: segments has {segments.num_instances} instances, but adj has {adj.num_nodes} nodes")
    # No edge joins two bags, so the edges of a bag lie between the edges of its first and of its last row.
    offsets = adj.crow[segments.offsets]
    if impl == "reference":
        bounds = offsets.tolist()
        return torch.stack([values[s:e].sum() for s, e in zip(bounds, bounds[1:])]) if len(bounds) > 1 else values[:0]
    return _segments._OPS["sum", impl](values[:, None], offsets)[:, 0]


def _dots_backward(impl: str, grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *transposed: Any) -> Tensor:
    """With G the matrix of gradients: G x + G^T x, the second product added to the first where it stands."""
    multiply, (crow_t, col_t, perm) = kernels(impl).spmm, transposed
    half = multiply(crow, col, grad, x)
    return multiply(crow_t, col_t, _permuted(grad, perm), x, None, None, half, grad.new_ones(1), half)


def _distances_backward(impl: str, grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, *transposed: Any) -> Tensor:
    """With G the matrix of gradients: 2 (rows of G + columns of G) x - 2 G x - 2 G^T x."""
    multiply, minus_two, (crow_t, col_t, perm) = kernels(impl).spmm, grad.new_full((1,), -2), transposed
    grad_t = _permuted(grad, perm)
    ones = grad.new_ones(x.shape[0], 1)
    sums = multiply(crow, col, grad, ones) + multiply(crow_t, col_t, grad_t, ones)
    # The two halves may cancel: the first is kept in the accumulation dtype.
    half = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    multiply(crow, col, grad, x, minus_two, 2 * sums[:, 0], out=half)
    place = half if half.dtype == x.dtype else None
    return multiply(crow_t, col_t, grad_t, x, minus_two, None, half, grad.new_ones(1), place)


def _register(impl: str, kind: str, along_edges: Callable[..., Tensor], gradient: Callable[..., Tensor]) -> None:
    """Custom operators ``bigbag::edge_{kind}_{impl}`` and ``..._backward`` of one x at both ends of an edge."""

    def run(x: Tensor, crow: Tensor, col: Tensor, crow_t: Any, col_t: Any, perm: Any) -> Tensor:
        return along_edges(impl, crow, col, x)

    def run_backward(grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, crow_t: Any, col_t: Any, perm: Any) -> Tensor:
        return gradient(impl, grad, x, crow, col, crow_t, col_t, perm)

    graph = "Tensor crow, Tensor col, Tensor crow_t, Tensor col_t, Tensor? perm"
    name = f"edge_{kind}_{impl}"
    forward = CustomOp(name, f"(Tensor x, {graph}) -> Tensor", run)
    backward = CustomOp(f"{name}_backward", f"(Tensor grad, Tensor x, {graph}) -> Tensor", run_backward)
    forward.register_fake(lambda x, crow, col, *rest: x.new_empty(col.shape[0], 1, dtype=accumulation_dtype(x.dtype)))
    backward.register_fake(lambda grad, x, *rest: x.new_empty(x.shape))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        return backward(grad.contiguous(), *ctx.saved_tensors), *[None] * 5

    forward.register_autograd(differentiate, setup_context=setup)
    _OPS[kind, impl] = forward


_OPS: dict[tuple[str, str], Any] = {}
for _impl in ("cpu", "triton"):
    _register(_impl, "own_dots", lambda impl, crow, col, x: kernels(impl).edge_dots(crow, col, x, x, 1), _dots_backward)
    _register(
        _impl, "distances", lambda impl, crow, col, x: kernels(impl).edge_distances(crow, col, x), _distances_backward
    )

OPERATORS = (
    Operator("quadratic_form", quadratic_form, DTYPES),
    Operator("dirichlet_energy", dirichlet_energy, DTYPES),
)
