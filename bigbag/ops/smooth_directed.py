"""The exact Sm operator on a graph that is not symmetric: by steps of Sm itself, or by conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.ops.distributed import all_sum
from bigbag.ops.once import once_differentiable
from bigbag.ops.smooth import _scalar
from bigbag.ops.smooth_exact import _columns, _conjugate_gradients
from bigbag.ops.spmm import needs_grad, prepare, spmm
from bigbag.ops.transpose import transpose

_TOLERANCE = {torch.float64: 1e-12}
# How often the steps of Sm look at the residual: each look waits for the device.
_CHECK_EVERY = 8


def smooth_exact_directed(
    adj: Adjacency, f: Tensor, gamma: float | Tensor, *, max_steps: int = 1000, impl: str | None = None
) -> Tensor:
    """``g = M^-1 f`` with ``M = I + gamma (I - A)``, for any A that leaves M invertible.

    Where the eigenvalues of A are up to 1, as those of weights whose rows sum to 1, the steps of Sm lead there: each of
    ``g <- (f + gamma A g) / (1 + gamma)`` takes off a factor of ``gamma / (1 + gamma)``. Where they do not, or not
    within ``max_steps``, it solves ``M M^T y = f`` by conjugate gradients and returns ``M^T y``. That squares the
    condition number, hence float64 throughout; either ends at a residual of 1e-6 of |f| (1e-12 for float64), column by
    column. The gradient is implicit: with ``u = M^-T grad``, df = u and dgamma = -<u, (I - A) g>.

    Cost: 2 E D FLOP per step of Sm, 4 E D per step of conjugate gradients; it holds g and six blocks of D / 8 columns
    (of 8 to 64) in float64.

    Args:
        adj: (T, T); its weights must not require grad.
        f: (T, ...) floating.
        gamma: a number or a tensor of one element.
        max_steps: steps after which it gives up.
        impl: "reference" or "cpu"; None chooses by device. Triton's products take no float64.

    Returns:
        (T, ...) in the dtype of f.

    Raises:
        ValueError: weights that require grad, shapes that do not fit, no convergence within ``max_steps``.
    """
    chosen, rows = prepare("smooth_exact_directed", adj, f, impl, "f", in_parts=True, dtype=torch.float64)
    if needs_grad(adj.weight):
        raise ValueError("smooth_exact_directed: adj.weight requires grad, which it does not get here; detach it")
    g = _Solve.apply(rows, _scalar("smooth_exact_directed", "gamma", gamma, f), adj, max_steps, chosen)
    return g.view(f.shape)


class _NormalEquations:
    """x -> M M^T x."""

    can_be_indefinite = False

    def __init__(self, adj: Adjacency, gamma: Tensor, impl: str) -> None:
        wide = adj if adj.weight is None else replace(adj, weight=adj.weight.double())
        self.adj, self.adj_t, self.gamma, self.impl, self.halo = wide, transpose(wide), gamma, impl, adj.halo

    def multiply(self, x: Tensor, transposed: bool = False) -> Tensor:
        """M x, or M^T x."""
        neighbours = spmm(self.adj_t if transposed else self.adj, x, impl=self.impl)
        return x * (1 + self.gamma) - neighbours * self.gamma

    def dot(self, x: Tensor) -> Tensor:
        """<x, x>, column by column."""
        own = torch.linalg.vecdot(x, x, dim=0)
        return own if self.halo is None else all_sum(own, self.halo.parts)

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        product = self.multiply(self.multiply(x, transposed=True))
        return product if out is None else out.copy_(product)


def _by_steps(system: _NormalEquations, f: Tensor, tolerance: float, max_steps: int) -> Tensor | None:
    """The limit of the steps of Sm; None where they would not come near it within ``max_steps``."""
    share, neighbours = f / (1 + system.gamma), system.gamma / (1 + system.gamma)
    goal, g, before = tolerance**2 * system.dot(f), f, math.nan
    for step in range(max_steps):
        new = spmm(system.adj, g, impl=system.impl).mul_(neighbours).add_(share)
        if step % _CHECK_EVERY == 0:
            # A step goes along the residual.
            square = system.dot((new - g).mul_(1 + system.gamma))
            worst = float(torch.where(goal > 0, square / goal, square).amax())
            if worst <= 1:
                return g
            if step and not math.log(worst) + (max_steps - step) / _CHECK_EVERY * math.log(worst / before) <= 0:
                return None
            before = worst
        g = new
    return None


def _solve(system: _NormalEquations, f: Tensor, tolerance: float, max_steps: int) -> Tensor:
    out, width = torch.empty_like(f, dtype=torch.float64), _columns(f.shape[1])
    if f.shape[0] == 0 and system.halo is None:
        return out
    for start in range(0, f.shape[1], width):
        block = f[:, start : start + width].double().contiguous()
        g = _by_steps(system, block, tolerance, max_steps)
        if g is None:
            y = _conjugate_gradients(system, block, tolerance, max_steps)
            g = system.multiply(y, transposed=True)
        out[:, start : start + width] = g
    return out


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, gamma: Tensor, adj: Adjacency, max_steps: int, impl: str) -> Tensor:
        ctx.tolerance, ctx.max_steps = _TOLERANCE.get(f.dtype, 1e-6), max_steps
        ctx.adj, ctx.impl = adj, impl
        g = _solve(_NormalEquations(adj, gamma.double(), impl), f, ctx.tolerance, max_steps)
        ctx.save_for_backward(gamma, g if ctx.needs_input_grad[1] else None)
        return g.to(f.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gamma, g = ctx.saved_tensors
        system = _NormalEquations(transpose(ctx.adj), gamma.double(), ctx.impl)
        u = _solve(system, grad, ctx.tolerance, ctx.max_steps)
        grad_gamma = None
        if g is not None:
            grad_gamma = -(u * (g - spmm(system.adj_t, g, impl=ctx.impl))).sum().to(gamma.dtype)
        return u.to(grad.dtype) if ctx.needs_input_grad[0] else None, grad_gamma, None, None, None
