"""All steps of Sm in one pass over memory, on CPU, against its steps one by one. Gradients: also in test_proof.py."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.kernels.cpu import recursion as waves
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
    plan = waves.plan(adj.crow, adj.col, x)
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
    assert waves.plan(adj.crow, adj.col, x).steps >= 4
    leaf, a = x.clone().requires_grad_(), torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    incoming = randn(333, 70, seed=3).double()
    expected = torch.autograd.grad(smooth(adj, leaf, a, 4, impl="reference"), (leaf, a), incoming)
    torch.testing.assert_close(results(adj, x, alpha, 4)[1:], list(expected), rtol=1e-11, atol=1e-12)


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


def test_edges_that_reach_far_take_step_after_step() -> None:
    near = directed(100, 100)
    assert waves.plan(near.crow, near.col, randn(10_000, 4)).steps > 20
    # One edge from the first row to the last of 40,000.
    crow = torch.ones(40_001, dtype=torch.int64)
    crow[0] = 0
    assert waves.plan(crow, torch.tensor([39_999], dtype=torch.int32), randn(40_000, 4)) is None
