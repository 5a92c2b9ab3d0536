"""Products with an adjacency: spmm, dot products along edges, and degrees.

All operators on adjacencies are made of two ``torch.library`` custom operators, each the gradient of the other:
``bigbag::spmm`` (sum over neighbours, weighted) and ``bigbag::edge_dots`` (one number per edge); their memory is
O(T D + E). A product with A^T is a product with another CSR, built once per graph by counting, never a scatter.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.ops.custom import CustomOp
from bigbag.ops.join import squared, with_halo
from bigbag.ops.per_graph import once_per_graph
from bigbag.ops.registry import FLOATING, HALF, Operator, choose

DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


class Graph(NamedTuple):
    """What custom operators take of an Adjacency, or of any sparse matrix: plain tensors.

    A symmetric matrix is its own transpose.
    """

    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor | None


def spmm(adj: Adjacency, x: Tensor, *, impl: str | None = None) -> Tensor:
    """Sum over neighbours, ``out[i] = sum_j A_ij x[j]``.

    Gradients flow to x (by the same product with A^T; where ``adj.symmetric`` and the weights need none, A itself) and
    to ``adj.weight`` (``dA_ij = <grad[i], x[j]>``, on edges only). Weights are rounded to the accumulation dtype,
    float32 (float64 for float64); so are sums.

    Cost: 2 E D FLOP forward, as much for each gradient. Bytes: x and out once (neighbours' rows come from cache where
    the graph is local) and 4 to 8 per edge; both gradients on CPU come from one pass over x and grad. Beyond outputs
    and gradients it holds O(E).

    Where bags are shared out over ranks (``adj.halo``), T counts this rank's rows; x of its halo comes first, and
    gradients go back: H D numbers each way, H the rows of the halo.

    Lattices have no stencil form: over a full rectangle one is 1.2 times as fast at width 512 (2 times at 64 and
    below), but tissue is no rectangle, and a map of its cells is an index list again.

    Args:
        adj: (T, T) adjacency; ``weight`` None means ones.
        x: (T, ...) floating.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, ...) in the dtype of x.

    Raises:
        ValueError: shapes or devices that do not fit, an ``impl`` that can't run.
    """
    if adj.halo is not None:
        return spmm(squared(adj), with_halo(x, adj.halo), impl=impl)[: adj.num_nodes]
    chosen, rows = prepare("spmm", adj, x, impl)
    acc = accumulation_dtype(x.dtype)
    weight = None if adj.weight is None else adj.weight.to(acc)[:, None]
    if chosen == "reference":
        return reference_spmm(adj, weight, rows).to(x.dtype).view(x.shape)
    graph = graph_of(adj, chosen, needs_grad(x), same=adj.symmetric and not needs_grad(weight))
    return product(graph, weight, rows, chosen).view(x.shape)


def degrees(adj: Adjacency, *, impl: str | None = None) -> Tensor:
    """Row sums ``d[i] = sum_j A_ij``, (T,) float32 (float64 for float64 weights), differentiable in ``adj.weight``.

    Cost: 8 to 16 bytes per edge.
    """
    if adj.weight is None:
        return adj.crow.diff().float()
    acc = accumulation_dtype(adj.weight.dtype)
    return spmm(adj, torch.ones(adj.num_nodes, dtype=acc, device=adj.crow.device), impl=impl)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def prepare(
    name: str,
    adj: Adjacency,
    x: Tensor,
    impl: str | None,
    argument: str = "x",
    in_parts: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[str, Tensor]:
    """The implementation to run, and (T, ...) as (T, D).

    Args:
        in_parts: the caller knows of halos.
        dtype: what its products are computed in, where that is not the dtype of ``x``.
    """
    fits = x.dim() > 0 and (torch.compiler.is_compiling() or x.shape[0] == adj.num_nodes)
    if not fits or not x.is_floating_point():
        raise ValueError(
            f"{name}: {argument} must be floating (T, ...) with T = {adj.num_nodes} as in adj, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    if x.device != adj.crow.device:
        raise ValueError(f"{name}: {argument} is on {x.device}, adj on {adj.crow.device}; move one of them")
    chosen = choose(name, DTYPES, impl, x.device.type, dtype or x.dtype)
    if adj.halo is not None and (chosen == "reference" or not in_parts):
        raise ValueError(
            f"{name}: bags are shared out over {adj.halo.parts.num_ranks} ranks, but "
            + ("the reference" if in_parts else "this operator")
            + " takes whole graphs: set parallel.bag to 1"
        )
    if chosen == "cpu" and not torch.compiler.is_compiling():
        _check_edges(adj)
    return chosen, x.reshape(x.shape[0], x.shape[1:].numel())


def kernels(impl: str) -> ModuleType:
    return importlib.import_module(f"bigbag.kernels.{'gpu' if impl == 'triton' else impl}.spmm")


@once_per_graph(weighted=False)
def _transposed(adj: Adjacency, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Row offsets and columns of the transpose, and which edge each of its edges is."""
    return _OPS["transpose", impl](adj.crow.contiguous(), adj.col.contiguous())


# Kernels trust a graph: what is wrong in it would have them read past the ends of memory.
_check_edges = once_per_graph(weighted=False)(Adjacency.check_edges)


def graph_of(adj: Adjacency, impl: str, transposed: bool, same: bool | None = None) -> Graph:
    """The tensors of ``adj``.

    Args:
        transposed: whether a product with the transpose will be asked for; if not, A stands in for it.
        same: whether the values are symmetric, so that A is its own transpose; default: ``adj.symmetric``.
    """
    crow, col = adj.crow.contiguous(), adj.col.contiguous()
    if not transposed or (adj.symmetric if same is None else same):
        return Graph(crow, col, crow, col, None)
    return Graph(crow, col, *_transposed(adj, impl))


def product(graph: Graph, weight: Tensor | None, x: Tensor, impl: str) -> Tensor:
    """``spmm`` of (E, H) weights in the accumulation dtype, or None, and (T, D), by custom operator."""
    return _OPS["spmm", impl](x, weight, *graph)


def edge_dots(graph: Graph, x: Tensor, y: Tensor, heads: int, impl: str) -> Tensor:
    """(E, H): ``<x[i], y[j]>`` for the edge (i, j), head by head; by custom operator."""
    return _OPS["edge_dots", impl](x, y, *graph, heads)


def rows_of(adj: Adjacency) -> Tensor:
    nodes = torch.arange(adj.num_nodes, device=adj.crow.device)
    return torch.repeat_interleave(nodes, adj.crow.diff(), output_size=adj.num_edges)


def reference_spmm(adj: Adjacency, weight: Tensor | None, x: Tensor) -> Tensor:
    """The definition, with (E, H) weights or None, on (T, D), in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    gathered = x.to(acc)[adj.col.long()]
    if weight is not None:
        heads = weight.shape[1]
        gathered = (gathered.view(adj.num_edges, heads, x.shape[1] // heads) * weight[:, :, None]).flatten(1)
    return x.new_zeros(adj.num_nodes, x.shape[1], dtype=acc).index_add(0, rows_of(adj), gathered)


def reference_edge_dots(adj: Adjacency, x: Tensor, y: Tensor, heads: int) -> Tensor:
    """The definition on (T, D), in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    left, right = x.to(acc)[rows_of(adj)], y.to(acc)[adj.col.long()]
    return (left * right).view(adj.num_edges, heads, x.shape[1] // max(heads, 1)).sum(2)


_GRAPH = "Tensor crow, Tensor col, Tensor crow_t, Tensor col_t, Tensor? perm"


def _permuted(values: Tensor | None, perm: Tensor | None) -> Tensor | None:
    return values if values is None or perm is None else values[perm]


def _register(impl: str) -> None:
    """Custom operators ``bigbag::{spmm,spmm_backward,edge_dots,csr_transpose}_{impl}`` around ``kernels``."""

    def run_spmm(x: Tensor, weight: Any, crow: Tensor, col: Tensor, crow_t: Any, col_t: Any, perm: Any) -> Tensor:
        return kernels(impl).spmm(crow, col, weight, x)

    def run_backward(grad: Tensor, x: Tensor, weight: Tensor, *graph: Any) -> Any:
        return kernels(impl).spmm_backward(*graph, weight, x, grad)

    def run_dots(x: Tensor, y: Tensor, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
        return kernels(impl).edge_dots(crow, col, x, y, rest[-1])

    def run_transpose(crow: Tensor, col: Tensor) -> Any:
        return kernels(impl).transpose(crow, col)

    def define(name: str, schema: str, function: Any) -> CustomOp:
        op = _OPS[name.removeprefix("csr_"), impl] = CustomOp(f"{name}_{impl}", schema, function)
        return op

    multiply = define("spmm", f"(Tensor x, Tensor? weight, {_GRAPH}) -> Tensor", run_spmm)
    schema = f"(Tensor grad, Tensor x, Tensor weight, {_GRAPH}) -> (Tensor, Tensor)"
    backward = define("spmm_backward", schema, run_backward)
    dots = define("edge_dots", f"(Tensor x, Tensor y, {_GRAPH}, int heads) -> Tensor", run_dots)
    transpose = define("csr_transpose", "(Tensor crow, Tensor col) -> (Tensor, Tensor, Tensor)", run_transpose)
    multiply.register_fake(lambda x, weight, crow, *graph: x.new_empty(crow.shape[0] - 1, x.shape[1]))
    backward.register_fake(lambda grad, x, weight, *graph: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
    transpose.register_fake(
        lambda crow, col: (torch.empty_like(crow), torch.empty_like(col), crow.new_empty(col.shape[0]))
    )

    @dots.register_fake
    def _(x: Tensor, y: Tensor, crow: Tensor, col: Tensor, crow_t: Any, col_t: Any, perm: Any, heads: int) -> Tensor:
        return x.new_empty(col.shape[0], heads, dtype=accumulation_dtype(x.dtype))

    def setup_spmm(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, *graph = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *graph)

    def differentiate_spmm(ctx: Any, grad: Tensor) -> Any:
        x, weight, crow, col, crow_t, col_t, perm = ctx.saved_tensors
        grad_x = grad_weight = None
        if all(ctx.needs_input_grad[:2]) and not torch.is_grad_enabled():
            return *backward(grad, x, weight, crow, col, crow_t, col_t, perm), *[None] * 5
        if ctx.needs_input_grad[0]:
            # Nothing asks for the transpose of the transpose, unless gradients are differentiated again.
            grad_x = multiply(grad, _permuted(weight, perm), crow_t, col_t, crow, col, _inverse(perm))
        if ctx.needs_input_grad[1]:
            grad_weight = dots(grad, x, crow, col, crow_t, col_t, perm, weight.shape[1])
        return grad_x, grad_weight, None, None, None, None, None

    def setup_dots(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, *graph, ctx.heads = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, y if ctx.needs_input_grad[0] else None, *graph)

    def differentiate_dots(ctx: Any, grad: Tensor) -> Any:
        x, y, crow, col, crow_t, col_t, perm = ctx.saved_tensors
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(y, grad, crow, col, crow_t, col_t, perm)
        if ctx.needs_input_grad[1]:
            grad_y = multiply(x, _permuted(grad, perm), crow_t, col_t, crow, col, _inverse(perm))
        return grad_x, grad_y, None, None, None, None, None, None

    multiply.register_autograd(differentiate_spmm, setup_context=setup_spmm)
    dots.register_autograd(differentiate_dots, setup_context=setup_dots)


def _inverse(perm: Tensor | None) -> Tensor | None:
    """The way back, where gradients are themselves differentiated; else nothing reads it."""
    return perm if perm is None or not torch.is_grad_enabled() else torch.argsort(perm)


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (Operator("spmm", spmm, DTYPES),)
