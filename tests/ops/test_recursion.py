"""All steps of Sm in one pass over memory, on CPU, against its steps one by one. Gradients: also in test_proof.py."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.kernels.cpu import bands
from bigbag.kernels.cpu import recursion as waves
from bigbag.kernels.cpu.spmm import transpose
from bigbag.ops.smooth import smooth
from bigbag.samples.graphs import pattern
from bigbag.testing import poisoned_empty

SMOOTH = sys.modules["bigbag.ops.smooth"]  # the name in bigbag.ops is the function


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directed(*sizes: int) -> Adjacency:
    """Lattices, every edge with a weight of its own, rows summing to at most 1."""
    adj = pattern("lattice", sizes)
    weight = torch.rand(adj.num_edges, generator=torch.Generator().manual_seed(7)) / 8
    return replace(adj, weight=weight, symmetric=False)


def results(adj: Adjacency, x: Tensor, alpha: float, steps: int) -> list[Tensor]:
    x, a = x.clone().requires_grad_(), torch.tensor(alpha, dtype=x.dtype, requires_grad=True)
    with poisoned_empty():
        out = smooth(adj, x, a, steps, impl="cpu")
        return [out.detach(), *torch.autograd.grad(out, (x, a), randn(*x.shape, seed=3).to(x.dtype))]


@pytest.mark.parametrize("ring_rows", [3, 6, 20])
@pytest.mark.parametrize("width", [1, 16, 85, 192])
def test_waves_are_the_steps_one_by_one(width: int, ring_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that hold 3, 6 and 20 states: 11 steps take six, three and one wave through bags of 1 to 700 rows."""
    adj, x = directed(700, 1, 45, 0, 333), randn(1079, width).double()
    plan = waves.plan(adj.crow, adj.col, x, 11)
    monkeypatch.setattr(SMOOTH, "_plan", lambda *_: None)
    one_by_one = results(adj, x, 0.7, 11)
    monkeypatch.setattr(SMOOTH, "_plan", lambda *_: plan._replace(steps=ring_rows - 1))
    together = results(adj, x, 0.7, 11)
    assert torch.equal(together[0], one_by_one[0])
    for found, expected in zip(together[1:], one_by_one[1:]):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 1.0])
def test_both_gradients_at_the_ends_of_alpha(alpha: float) -> None:
    """At 0 only one step remains, dL/dalpha = <grad, A f - f>."""
    adj, x = directed(333), randn(333, 70).double()
    assert waves.plan(adj.crow, adj.col, x, 4).steps >= 4
    leaf, a = x.clone().requires_grad_(), torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    incoming = randn(333, 70, seed=3).double()
    expected = torch.autograd.grad(smooth(adj, leaf, a, 4, impl="reference"), (leaf, a), incoming)
    torch.testing.assert_close(results(adj, x, alpha, 4)[1:], list(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("together", [3, 10])
@pytest.mark.parametrize("width", [1, 70])
def test_a_total_in_the_memory_of_its_start(width: int, together: int) -> None:
    adj, f, steps = directed(333), randn(333, width), 10
    start, y = randn(333, width, seed=1), randn(333, width, seed=2)
    graph = (waves.plan(adj.crow, adj.col, f, steps)._replace(steps=together), adj.crow, adj.col, adj.weight[:, None])
    factors = (torch.full((steps,), 0.6), randn(steps, seed=3), 0.6, y)
    total, dot = waves.recursion_total(*graph, start, *factors)
    written, again = waves.recursion_total(*graph, start, *factors, overwrite=True)
    assert written.data_ptr() == start.data_ptr() != total.data_ptr()
    assert torch.equal(written, total) and again == dot


def test_results_do_not_depend_on_the_number_of_threads_nor_bfloat16_on_the_steps() -> None:
    adj, x = directed(900), randn(900, 150)
    found = []
    for threads in (1, 2, 9):
        torch.set_num_threads(threads)
        found.append(results(adj, x, 0.6, 10))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert torch.equal(found[0][0], others[0]) and torch.equal(found[0][1], others[1])
        torch.testing.assert_close(found[0][2], others[2], rtol=1e-6, atol=0.0)
    # States are not rounded to bfloat16, only the last one is.
    low = x.bfloat16()
    assert torch.equal(results(adj, low, 0.5, 40)[0], results(adj, low.float(), 0.5, 40)[0].bfloat16())


def in_no_order(*sizes: int, seed: int = 5) -> Adjacency:
    """Bags of points, an edge from each to its 4 nearest, itself among them, but for every tenth, which has none."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for size in sizes:
        points = torch.rand(size, 2, generator=generator)
        near = torch.cdist(points, points).topk(min(4, size), largest=False).indices
        row, nearest = torch.arange(size).repeat_interleave(near.shape[1]), near.reshape(-1)
        kept = row % 10 != 9
        weight = torch.rand(int(kept.sum()), generator=generator) / 4
        parts.append(Adjacency.from_edges(row[kept], nearest[kept], weight, size))
    return Adjacency.block_diagonal(parts)


def by_dense(adj: Adjacency, x: Tensor, alpha: float, steps: int) -> list[Tensor]:
    dense = torch.zeros(len(x), len(x), dtype=torch.float64)
    dense.index_put_((adj.rows(), adj.col.long()), adj.weight.double(), accumulate=True)
    leaf = x.double().requires_grad_()
    a, g = torch.tensor(alpha, dtype=torch.float64, requires_grad=True), leaf
    for _ in range(steps):
        g = (1 - a) * leaf + a * (dense @ g)
    return [g.detach(), *torch.autograd.grad(g, (leaf, a), randn(*x.shape, seed=3).double())]


@pytest.mark.parametrize(("kibibytes", "steps"), [(768, 4), (1024, 6), (8192, 11)])
@pytest.mark.parametrize("width", [16, 85])
def test_rows_in_no_order_take_the_same_steps(
    width: int, kibibytes: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directed, weighted, with loops, bags of one and rows without edges, relabelled and in several waves."""
    adj, x = in_no_order(900, 0, 1, 300), randn(1201, width).double()
    monkeypatch.setattr(waves, "_RING_BYTES", kibibytes << (10 if width > 64 else 8))
    monkeypatch.setattr(waves, "_RELABEL_NUMBERS", 0)
    plan = waves.plan(adj.crow, adj.col, x, 11)
    assert plan.graph is not None and plan.steps == steps and plan.band < 100
    together = results(adj, x, 0.7, 11)
    with monkeypatch.context() as patch:
        patch.setattr(SMOOTH, "_plan", lambda *_: None)
        one_by_one = results(adj, x, 0.7, 11)
    assert torch.equal(together[0], one_by_one[0])
    torch.testing.assert_close(together, by_dense(adj, x, 0.7, 11), rtol=1e-11, atol=1e-12)
    # The weights of a call are those of that call, whatever is known of the graph.
    other = replace(adj, weight=adj.weight.flip(0))
    torch.testing.assert_close(results(other, x, 0.7, 11), by_dense(other, x, 0.7, 11), rtol=1e-11, atol=1e-12)
    ones = replace(adj, weight=None)
    expected = by_dense(replace(adj, weight=torch.ones(adj.num_edges)), x, 0.2, 5)
    torch.testing.assert_close(results(ones, x, 0.2, 5), expected, rtol=1e-11, atol=1e-12)


def test_a_graph_is_relabelled_where_it_pays_and_helps() -> None:
    near = directed(100, 100)
    assert waves.plan(near.crow, near.col, randn(10_000, 4), 30) == waves.Plan(8, 30)
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(1))
    chain = Adjacency.from_edges(order[:-1], order[1:], None, 40_000)
    assert waves.plan(chain.crow, chain.col, randn(40_000, 16), 10)[:2] == (1, 10)
    # Fewer than 64 numbers a row and edge, and too few steps.
    assert waves.plan(chain.crow, chain.col, randn(40_000, 12), 10) is None
    assert waves.plan(chain.crow, chain.col, randn(40_000, 512), 2) is None
    ends = torch.randint(0, 40_000, (2, 120_000), generator=torch.Generator().manual_seed(2))
    random = Adjacency.from_edges(*ends, None, 40_000)
    assert waves.plan(random.crow, random.col, randn(40_000, 256), 10) is None


def test_relabelled_rows_are_the_same_graph() -> None:
    adj = in_no_order(400, 1, 0, 150)
    order, crow, col, band = bands.banded(adj.crow, adj.col)
    assert sorted(order.tolist()) == list(range(551))
    found = torch.from_numpy(bands.values_in_order(adj.crow, order, adj.weight.numpy()))
    for k, i in enumerate(order.tolist()):
        old, new = slice(*adj.crow[i : i + 2].tolist()), slice(*crow[k : k + 2].tolist())
        # Edges in their order, of which the bits of sums depend.
        assert order[col[new]].tolist() == adj.col[old].tolist() and torch.equal(found[new], adj.weight[old])
    rows = np.repeat(np.arange(551), np.diff(crow))
    assert band == np.abs(col - rows).max() < 100 < bands.band(adj.crow, adj.col)
    # No bag lies within another, and the transposed graph is no wider.
    bag = np.searchsorted([400, 401], order, side="right")
    assert (np.diff(bag) != 0).sum() == 2
    assert bands.banded(*transpose(adj.crow, adj.col)[:2]).band < 100


def test_a_graph_is_relabelled_once_until_it_changes_and_forgotten_with_it() -> None:
    adj = in_no_order(400)
    crow, col = adj.crow.clone(), adj.col.clone()
    known = bands.banded(crow, col)
    assert bands.banded(crow, col) is known and bands.band(crow, col) > 300
    assert bands.banded(crow.clone(), col) is not known
    col.zero_()
    assert bands.banded(crow, col) is None and bands.band(crow, col) == 398
    with torch.inference_mode():
        inside = adj.col.clone()
        assert bands.banded(adj.crow, inside).band == known.band
        inside.zero_()
        assert bands.banded(adj.crow, inside) is None
    held, size = weakref.ref(col), len(bands._known)
    del col
    assert held() is None and len(bands._known) == size - 1
