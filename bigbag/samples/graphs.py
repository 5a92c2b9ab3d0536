"""Calls on which the operators on adjacencies are proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.testing import Sample

_SIZES = {
    "several": (5, 1, 130, 17),
    "empty bags": (0, 9, 0, 60, 0),
    # Not a lone bag of one: gradients along a loop are exactly 0, and so would be their budget.
    "bags of one": (1, 9, 1, 12),
    "off the block": (520, 65),
    "no bag has instances": (0, 0),
}


def pattern(kind: str, sizes: tuple[int, ...]) -> Adjacency:
    """A block-diagonal graph without weights.

    Args:
        kind: "random" (0 to 7 directed edges a row, loops and repetitions among them), "lattice" (rows of 7 instances,
            8 neighbours, symmetric), "star" (the first instance of a bag neighbours all), or "none" (no edge at all).
    """
    generator = torch.Generator().manual_seed(len(kind))
    parts = []
    for size in sizes:
        nodes = torch.arange(size)
        if kind == "random":
            row = torch.repeat_interleave(nodes, torch.randint(0, 8, (size,), generator=generator))
            col = torch.randint(0, max(size, 1), (len(row),), generator=generator)
        elif kind == "lattice":
            apart = [(nodes // 7)[:, None] - nodes // 7, (nodes % 7)[:, None] - nodes % 7]
            row, col = ((apart[0].abs() <= 1) & (apart[1].abs() <= 1) & (nodes[:, None] != nodes)).nonzero().unbind(1)
        elif kind == "star":
            row, col = torch.zeros_like(nodes), nodes
        else:
            row = col = nodes[:0]
        parts.append(Adjacency.from_edges(row, col, None, size, symmetric=kind in ("lattice", "none")))
    return Adjacency.block_diagonal(parts)


@dataclass(frozen=True)
class GraphSample(Sample):
    """A call of an operator on an adjacency; the tensor "weight", if there is one, holds its edges' weights.

    Attributes:
        graph: kind of :func:`pattern`.
        per_bag: pass ``segments``.
        constant_weights: the edges have weights, and no gradient flows to them.
    """

    graph: str = "random"
    per_bag: bool = False
    constant_weights: bool = False

    def structure(self, device: str) -> dict[str, Any]:
        found: dict[str, Any] = {"adj": self.adjacency().to(device)}
        return found | ({"segments": Segments.from_sizes(self.sizes, device)} if self.per_bag else {})

    def adjacency(self) -> Adjacency:
        """The graph, with its weights where they are constant; of one bag: that block of the pack's."""
        if self.of is None:
            adj = pattern(self.graph, self.sizes)
            weight = _edge_weights(self.graph, self.sizes, torch.Generator().manual_seed(3))
            return replace(adj, weight=weight) if self.constant_weights else adj
        pack, bag = self.of
        whole: Adjacency = pack.adjacency()
        first, last = pack.bounds("rows", bag)
        edges = slice(*pack.bounds("edges", bag))
        part = None if whole.weight is None else whole.weight[edges]
        crow, col = whole.crow[first : last + 1], whole.col[edges]
        return Adjacency(crow - crow[0], col - first, part, whole.symmetric)

    def bounds(self, kind: str, bag: int) -> tuple[int, int]:
        if kind != "edges":
            return super().bounds(kind, bag)
        first, last = self.adjacency().crow[list(super().bounds("rows", bag))].tolist()
        return first, last

    def apply(self, tensors: Mapping[str, Tensor], structure: Mapping[str, Any], impl: str | None) -> Any:
        named, options = dict(tensors), {**self.options, **structure}
        adj = options.pop("adj")
        adj = replace(adj, weight=named.pop("weight", adj.weight))
        if self.op == "smooth":
            options |= {"alpha": named.pop("alpha")} if "alpha" in named else {"alpha": 0.6}
        first = (*named.values(), adj) if self.op.startswith("neighbor") else (adj, *named.values())
        out = getattr(ops, self.op)(*first, **options, impl=impl)
        # Instances first, as everywhere else.
        return out.transpose(0, 1) if self.op == "chebyshev" else out


def _edge_weights(kind: str, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Symmetric if the graph is, and small enough for a row's sum to stay below 1."""
    adj = pattern(kind, sizes)
    u = torch.rand(adj.num_nodes, generator=generator, dtype=torch.float64) / 3
    weight = u[adj.rows()] * u[adj.col.long()]
    return weight if adj.symmetric else weight + torch.rand(len(weight), generator=generator, dtype=torch.float64) / 9


def _make(
    names: str,
    graph: str,
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    scale: float,
    shift: float,
    weighted: bool,
    scalar: str,
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def rows() -> Tensor:
            return (torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) + shift) * scale

        # Integers at a large scale: products are exact in every precision, so scores saturate and do not err.
        made = {name: rows().round() if scale > 1 else rows() for name in names.split()}
        made |= {"weight": _edge_weights(graph, sizes, generator)} if weighted else {}
        return made | ({scalar: torch.tensor(0.625, dtype=torch.float64)} if scalar else {})

    return make


def _sample(
    op: str,
    name: str,
    sizes: str = "several",
    graph: str = "random",
    shape: tuple[int, ...] = (37,),
    scale: float = 1.0,
    weighted: bool = True,
    scalar: str = "",
    contiguous: bool = True,
    per_bag: bool = False,
    constant_weights: bool = False,
    factor: float | None = None,
    **options: Any,
) -> GraphSample:
    names = {"neighbor_attention": "q k v", "neighbor_scores": "q k", "smooth": "f", "smooth_exact": "f"}.get(op, "x")
    options |= {} if factor is None else {"scale": factor}
    # A sum whose terms cancel has no error relative to itself.
    shift = 1.0 if op == "quadratic_form" else 0.0
    make = _make(names, graph, _SIZES[sizes], shape, scale, shift, weighted and not constant_weights, scalar)
    cut = dict.fromkeys(names.split(), "rows") | {"weight": "edges"}
    if op not in ("quadratic_form", "dirichlet_energy"):
        cut["output 0"] = "rows"
    elif per_bag:
        cut["output 0"] = "bags"
    return GraphSample(op, name, _SIZES[sizes], make, options, contiguous, graph, per_bag, constant_weights, cut=cut)


def _everywhere(op: str, **options: Any) -> Iterator[GraphSample]:
    for name in _SIZES:
        yield _sample(op, name, name, **options)


def _samples() -> Iterator[GraphSample]:
    yield from _everywhere("spmm")
    yield from _everywhere("smooth", constant_weights=True, scalar="alpha", num_steps=3)
    for op in ("neighbor_attention", "neighbor_scores"):
        yield from _everywhere(op, weighted=op == "neighbor_scores", shape=(5,))
    for op in ("quadratic_form", "dirichlet_energy"):
        yield from _everywhere(op, per_bag=True, shape=(5,))
        yield _sample(op, "in total, binary lattice", weighted=False, graph="lattice")
        yield _sample(op, "non-contiguous", contiguous=False, shape=(6,))
    for op, shape in (("spmm", (37,)), ("neighbor_attention", (3,)), ("smooth", (4,))):
        yield _sample(op, "lattice", graph="lattice", shape=shape, weighted=op != "neighbor_attention")
        if op != "smooth":
            yield _sample(op, "star", graph="star", shape=shape, weighted=op == "spmm")
    # The CPU's kernels take columns 128, 16 and 1 at a time.
    for op in ("spmm", "dirichlet_energy"):
        yield _sample(op, "wide", shape=(150,))
    yield _sample("neighbor_attention", "wide, two heads", shape=(2, 150), weighted=False)
    yield _sample("smooth", "wide lattice", graph="lattice", shape=(150,), constant_weights=True, scalar="alpha")
    yield _sample("spmm", "binary", weighted=False)
    yield _sample("spmm", "no edges", graph="none")
    yield _sample("spmm", "one-dimensional", shape=())
    yield _sample("spmm", "one column without weights", shape=(1,), weighted=False)
    yield _sample("smooth", "one column", shape=(1,), constant_weights=True, scalar="alpha", num_steps=10)
    yield _sample("chebyshev", "one column", graph="lattice", shape=(1,), weighted=False, num_terms=4, lambda_max=14.0)
    yield _sample("spmm", "three-dimensional", shape=(2, 9))
    yield _sample("spmm", "values at 1e4", scale=1e4)
    yield _sample("spmm", "non-contiguous", contiguous=False, shape=(6,))
    for graph in ("lattice", "random"):
        yield _sample("smooth", f"binary {graph}", graph=graph, weighted=False, scale=0.25, num_steps=4)
        yield _sample("smooth", f"constant {graph}", graph=graph, constant_weights=True, shape=(9,), num_steps=10)
    yield _sample("smooth", "weights and alpha", scalar="alpha", num_steps=3)
    yield _sample("smooth", "non-contiguous", contiguous=False, weighted=False, scale=0.1, num_steps=3)
    yield _sample("chebyshev", "non-contiguous", contiguous=False, constant_weights=True, num_terms=4)
    yield _sample("smooth", "no steps", weighted=False, num_steps=0)
    yield _sample("neighbor_attention", "two heads", shape=(2, 5), weighted=False)
    yield _sample("neighbor_attention", "linear, weighted, two heads", shape=(2, 5), softmax=False, factor=0.5)
    yield _sample("neighbor_attention", "scores at 1e4", scale=3.0, shape=(4,), weighted=False, factor=256.0)
    yield from (_sample("chebyshev", f"{k} terms", weighted=False, num_terms=k, lambda_max=9.0) for k in (1, 2, 6))
    yield _sample("chebyshev", "lattice", graph="lattice", weighted=False, num_terms=4, lambda_max=14.0, shape=(5,))
    yield from _everywhere("chebyshev", constant_weights=True, num_terms=3, lambda_max=2.0)
    exact: dict[str, Any] = {"graph": "lattice", "gamma": 0.5, "shape": (3,), "tolerance": 1e-16, "max_steps": 400}
    yield from _everywhere("smooth_exact", **exact)
    yield _sample("smooth_exact", "combinatorial", laplacian="combinatorial", **exact)


SAMPLES: list[Sample] = list(_samples())
