"""Operators on adjacencies: memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.memory import peak_bytes
from bigbag.ops.chebyshev import chebyshev
from bigbag.ops.quadratic import dirichlet_energy, quadratic_form
from bigbag.ops.smooth import smooth
from bigbag.ops.smooth_exact import smooth_exact
from bigbag.ops.spmm import spmm
from bigbag.samples.graphs import pattern

ROOT = Path(__file__).parents[2]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised_lattice(*sizes: int) -> Adjacency:
    """D^-1/2 A D^-1/2 in float32."""
    adj = pattern("lattice", sizes)
    scale = adj.crow.diff().clamp_min(1).float().rsqrt()
    return replace(adj, weight=scale[adj.rows()] * scale[adj.col.long()])


LINEAR: dict[str, Callable[[Adjacency, Tensor, Tensor], Tensor]] = {
    "spmm": lambda adj, x, scalar: spmm(adj, x),
    "smooth": lambda adj, x, scalar: smooth(adj, x, 0.5, 10),
    "smooth, alpha": lambda adj, x, scalar: smooth(adj, x, scalar, 10),
    "smooth_exact": lambda adj, x, scalar: smooth_exact(adj, x, 1.5),
    "chebyshev": lambda adj, x, scalar: chebyshev(adj, x, 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operators_stay_within_three_times_inputs_and_outputs(name: str) -> None:
    """Forward and backward, the input and the gradient that enters counted."""
    adj, x = normalised_lattice(3000), randn(3000, 256).requires_grad_()
    scalar = torch.tensor(0.5, requires_grad=True)
    grads: list[Tensor] = []

    def step() -> None:
        out = LINEAR[name](adj, x, scalar)
        grads[:] = torch.autograd.grad(out, [x, scalar] if "alpha" in name else [x], torch.ones_like(out))

    own = sum(t.nbytes for t in (x, adj.crow, adj.col, adj.weight))
    outputs = x.nbytes * (3 if name == "chebyshev" else 1)
    assert peak_bytes(step) + own <= 3 * (own + outputs)


@pytest.mark.parametrize("energy", [quadratic_form, dirichlet_energy])
def test_energies_hold_their_gradient_and_numbers_per_edge(energy: Callable[..., Tensor]) -> None:
    adj, x = normalised_lattice(3000), randn(3000, 256).requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(energy(adj, x), x))
    assert peak <= x.nbytes + 48 * adj.num_edges


@pytest.mark.parametrize("name", ["alpha", "no alpha"])
def test_smooth_holds_as_much_for_many_steps_as_for_few(name: str) -> None:
    adj, x = normalised_lattice(3000), randn(3000, 64).requires_grad_()
    alpha = torch.tensor(0.5, requires_grad=name == "alpha")
    peaks = [peak_bytes(lambda n=n: smooth(adj, x, alpha, n).sum().backward()) for n in (3, 30)]
    assert peaks[1] <= peaks[0] + 2048
    # Through the gradient of every step, as with trainable edges, memory grows: the measure sees it.
    edges = replace(adj, weight=adj.weight.clone().requires_grad_())
    assert peak_bytes(lambda: smooth(edges, x, alpha, 30).sum().backward()) > peaks[1] + 20 * x.nbytes
