"""Deep halos: which rows they are, when ranks take them, and Sm with them beside the definition on whole bags."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bigbag import Adjacency, ops
from bigbag.graphs import build_adjacency, space_filling_order
from bigbag.ops import deep_halo as module
from bigbag.ops.deep_halo import deep_halo
from bigbag.parts import Parts
from bigbag.testing import run_ranks
from tests.ops.test_parts import cut_graph, cut_rows

STEPS, DIM = 4, 5


def lattice(height: int, width: int = 5) -> Adjacency:
    coords = np.stack(np.divmod(np.arange(height * width), width), 1)
    return build_adjacency(coords, radius=1.5, normalize="symmetric")


def nearest(count: int, ordered: bool) -> Adjacency:
    """A directed graph, of rows in the order of space or in none."""
    coords = np.random.default_rng(count).random((count, 2))
    return build_adjacency(coords[space_filling_order(coords)] if ordered else coords, knn=3, normalize="row")


def one_way(size: int) -> Adjacency:
    """Row i reads those behind it; the transpose, those before it."""
    row = torch.arange(size).repeat_interleave(3)
    col = row + torch.tensor([1, 2, 5]).repeat(size)
    weight = torch.rand(len(row), generator=torch.Generator().manual_seed(size)) / 3
    return Adjacency.from_edges(row[col < size], col[col < size], weight[col < size], size)


def packs(num_ranks: int) -> dict[str, tuple[list[Adjacency], list[list[int]] | None, bool]]:
    """Graphs of the bags, the shares of the ranks where they are not even, and whether deep halos are expected."""
    between = num_ranks - 2
    uneven = [[240, 0, 30], *[[180, 4, 0]] * between, [480 - 180 * between, 11 - 4 * between, 0]]
    return {
        "lattice": ([lattice(200)], None, True),
        "several bags": ([lattice(144), one_way(11), lattice(6)], uneven, True),
        "a bag with one rank, none with the next": ([lattice(40)], [[200]] + [[0]] * (num_ranks - 1), True),
        "one way": ([one_way(600)], None, True),
        "nearest neighbours": ([nearest(6000, ordered=True)], None, True),
        "in no order": ([nearest(300, ordered=False)], None, False),
        "bags smaller than the halo": ([lattice(2), lattice(3)], None, False),
    }


def run(adj: Adjacency, x: torch.Tensor, grad: torch.Tensor, num_steps: int, impl: str | None = None) -> tuple:
    x, alpha = x.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    out = ops.smooth(adj, x, alpha, num_steps, impl=impl)
    out.backward(grad)
    alone = ops.smooth(adj, x.detach(), alpha, num_steps, impl=impl)  # the gradient to alpha alone
    (to_alpha,) = torch.autograd.grad(alone, alpha, grad)
    return out.detach(), x.grad, alpha.grad, to_alpha


def errors_of(whole: Adjacency, shared: Adjacency, parts: Parts, dtype: torch.dtype, num_steps: int) -> list[float]:
    """Relative, of the result and the gradients to f and, twice, to alpha; against the definition in float64."""
    generator = torch.Generator().manual_seed(num_steps)
    x, grad = torch.randn(2, whole.num_nodes, DIM, generator=generator, dtype=torch.float64).to(dtype)
    expected = run(whole, x.double(), grad.double(), num_steps, "reference")
    found = run(shared, cut_rows(x, parts), cut_rows(grad, parts), num_steps)
    for gradient in found[2:]:
        dist.all_reduce(gradient)
    pairs = [*((mine, cut_rows(of, parts)) for mine, of in zip(found[:2], expected)), *zip(found[2:], expected[2:])]
    scale = [float(of.abs().max()) + 1e-30 for of in expected]
    return [float((a - b).abs().max()) / s if a.numel() else 0.0 for (a, b), s in zip(pairs, scale)]


def within(adj: Adjacency, parts: Parts, num_steps: int) -> torch.Tensor:
    """The rows that ``num_steps`` products read for those of this rank, by multiplying."""
    reached = torch.zeros(adj.num_nodes)
    reached[torch.from_numpy(parts.rows())] = 1
    for _ in range(num_steps):
        reached[adj.col[reached[adj.rows()] > 0].long()] = 1
    return reached.nonzero()[:, 0]


def all_packs() -> dict[str, tuple]:
    rank, num_ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for name, (graphs, sizes, _) in packs(num_ranks).items():
        whole, totals = Adjacency.block_diagonal(graphs), [graph.num_nodes for graph in graphs]
        whole = Adjacency(whole.crow, whole.col, whole.weight.double(), whole.symmetric)
        parts = Parts.even(totals, num_ranks, rank) if sizes is None else Parts(tuple(map(tuple, sizes)), rank)
        assert list(parts.totals) == totals
        shared = cut_graph(whole, totals, parts)
        deep = deep_halo(shared, STEPS)
        right = True
        if deep is not None:
            rows = torch.arange(whole.num_nodes, dtype=torch.float64)[:, None]
            right = torch.equal(deep.widen(cut_rows(rows, parts))[:, 0].long(), within(whole, parts, STEPS))
        with mock.patch.object(module, "exchange", wraps=module.exchange) as asked:
            errors = [errors_of(whole, shared, parts, torch.float64, num_steps) for num_steps in (1, STEPS)]
        own = torch.ones(shared.num_nodes, DIM)
        assert torch.equal(ops.smooth(shared, own, 0.7, 0), own)
        floats = [errors_of(whole, shared, parts, dtype, STEPS) for dtype in (torch.float32, torch.bfloat16)]
        found[name] = (deep is not None, right, asked.call_count, errors, floats)
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_smoothing_with_deep_halos(num_ranks):
    for found in run_ranks(all_packs, num_ranks, timeout_s=300):
        for name, (_, _, expected) in packs(num_ranks).items():
            deep, right, asked, errors, (single, half) = found[name]
            assert (deep, right) == (expected, True), name
            # Forward, both gradients; forward, that to alpha alone.
            assert asked == (4 if expected else 0), name
            assert max(map(max, errors)) <= 1e-9, f"{name}: {errors}"
            assert max(single) <= 2e-5 and max(half) <= 0.03, f"{name}: {single}, {half}"
