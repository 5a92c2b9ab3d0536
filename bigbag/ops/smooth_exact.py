"""The exact Sm operator, (I + gamma L)^-1, by conjugate gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.ops.custom import CustomOp
from bigbag.ops.distributed import all_sum
from bigbag.ops.join import with_halo
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import Operator
from bigbag.ops.smooth import _scalar
from bigbag.ops.spmm import DTYPES, accumulation_dtype, degrees, graph_of, kernels, needs_grad, prepare, reference_spmm
from bigbag.parts import Halo

LAPLACIANS = ("normalized", "combinatorial")


class IndefiniteSystem(ValueError):
    """Conjugate gradients met a direction x with ``x^T (I + gamma L) x < 0``: the matrix is not positive definite."""


# How often the residual is looked at: each look waits for the device.
_CHECK_EVERY = 4


def smooth_exact(
    adj: Adjacency,
    f: Tensor,
    gamma: float | Tensor,
    *,
    laplacian: str = "normalized",
    tolerance: float | None = None,
    max_steps: int = 200,
    impl: str | None = None,
) -> Tensor:
    """Sm in the limit of many steps: the g that minimises |g - f|^2 + gamma trace(g^T L g).

        g = (I + gamma L)^-1 f,   L = I - A ("normalized"), or D - A ("combinatorial")

    Conjugate gradients on blocks of columns, in the accumulation dtype; M = I + gamma L is never formed. The gradient
    is implicit: with u = M^-1 grad, df = u, dgamma = -<u, L g>, dA_ij = gamma <u_i, g_j> (less gamma <u_i, g_i> where A
    also makes D). ``smooth`` with alpha = gamma / (1 + gamma) converges to the normalized form.

    Cost: 2 E D FLOP and about twenty passes over (T, D) per step, forward and backward; steps grow with
    sqrt(1 + 2 gamma). It holds g, and five blocks of D / 8 columns (of 8 to 64).

    Where bags are shared out over ranks (``adj.halo``), a step asks for the directions of the halo, H D numbers, and
    adds up 2 D inner products over the ranks. There, weights must not require grad.

    Args:
        adj: (T, T) symmetric adjacency; for "normalized", with eigenvalues up to 1 (symmetrically normalised).
        f: (T, ...) floating.
        gamma: 0 or more; a number or a tensor of one element.
        laplacian: "normalized" or "combinatorial".
        tolerance: on |residual| / |f|, column by column; default 1e-6 (1e-12 for float64).
        max_steps: steps after which it gives up.
        impl: "reference" (dense), "cpu" or "triton"; None chooses by device.

    Returns:
        (T, ...) in the dtype of f.

    Raises:
        IndefiniteSystem: eigenvalues of A so far above 1 that I + gamma L is not positive definite.
        ValueError: an adjacency not marked symmetric, shapes that do not fit, an unknown ``laplacian``, no convergence
            within ``max_steps``, an ``impl`` that can't run.

    Castro-Macias et al., Sm: enhanced localization in multiple instance learning for medical imaging classification,
    NeurIPS 2024.
    """
    chosen, rows = prepare("smooth_exact", adj, f, impl, "f", in_parts=True)
    if laplacian not in LAPLACIANS:
        raise ValueError(f"smooth_exact: laplacian must be one of {', '.join(LAPLACIANS)}, got {laplacian!r}")
    if not adj.symmetric:
        raise ValueError(
            "smooth_exact: conjugate gradients need a symmetric adjacency, and adj.symmetric is False; normalise it "
            "symmetrically, or set the flag if it is"
        )
    acc = accumulation_dtype(f.dtype)
    g = _scalar("smooth_exact", "gamma", gamma, f)
    weight = None if adj.weight is None else adj.weight.to(acc)[:, None]
    if chosen == "reference":
        return _reference(adj, weight, rows, g, laplacian).view(f.shape)
    degree = None
    if laplacian == "combinatorial":
        bare = None if weight is None else weight.detach()[:, 0]
        degree = degrees(replace(adj, weight=bare), impl=chosen).to(acc)
    graph = graph_of(adj, chosen, transposed=False)
    tolerance = (1e-12 if acc == torch.float64 else 1e-6) if tolerance is None else tolerance
    if adj.halo is not None:
        if needs_grad(adj.weight):
            raise ValueError("smooth_exact: adj.weight requires grad, which it does not get where ranks share a bag")
        system = (weight, degree, graph.crow, graph.col, adj.halo)
        return _SolveInParts.apply(rows, g, system, chosen, tolerance, max_steps).to(f.dtype).view(f.shape)
    solved = _OPS["solve", chosen](rows, g, weight, degree, graph.crow, graph.col, tolerance, max_steps)
    return solved.to(f.dtype).view(f.shape)


def _reference(adj: Adjacency, weight: Tensor | None, f: Tensor, gamma: Tensor, laplacian: str) -> Tensor:
    eye = torch.eye(adj.num_nodes, dtype=gamma.dtype, device=f.device)
    dense = reference_spmm(adj, weight, eye)
    own = torch.diag(dense.sum(1)) if laplacian == "combinatorial" else eye
    return torch.linalg.solve(eye + gamma * (own - dense), f.to(gamma.dtype)).to(f.dtype)


class _Symmetric(Protocol):
    """What conjugate gradients ask of a system: a symmetric matrix times columns, on rows that ranks may share."""

    halo: Halo | None
    can_be_indefinite: bool

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...


class _System:
    """x -> (I + gamma L) x."""

    can_be_indefinite = True

    def __init__(
        self,
        impl: str,
        gamma: Tensor,
        weight: Any,
        degree: Tensor | None,
        crow: Tensor,
        col: Tensor,
        halo: Halo | None = None,
    ) -> None:
        self.halo = halo
        self.multiply, self.graph = kernels(impl).spmm, (crow, col, weight)
        ones = gamma.new_ones(crow.shape[0] - 1)
        own = ones if degree is None else degree
        self.scale, self.diagonal = (-gamma).view(1), 1 + gamma * own
        self.laplacian = (gamma.new_full((1,), -1), own)

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.multiply(*self.graph, with_halo(x, self.halo), self.scale, self.diagonal, out=out)

    def apply_laplacian(self, x: Tensor) -> Tensor:
        return self.multiply(*self.graph, with_halo(x, self.halo), *self.laplacian)


def _columns(width: int) -> int:
    return max(8, min(64, width // 8))


def _solve(
    impl: str,
    f: Tensor,
    gamma: Tensor,
    weight: Any,
    degree: Any,
    crow: Tensor,
    col: Tensor,
    tolerance: float,
    steps: int,
) -> Tensor:
    return _solve_system(_System(impl, gamma, weight, degree, crow, col), f, tolerance, steps)


def _solve_system(system: _System, f: Tensor, tolerance: float, steps: int) -> Tensor:
    # In the precision of the sums: the gradient to gamma takes small differences of it.
    dtype = system.scale.dtype
    out = huge_pages(torch.empty(f.shape, dtype=dtype, device=f.device))
    width = _columns(f.shape[1])
    if f.shape[0] == 0 and system.halo is None:
        return out
    for start in range(0, f.shape[1], width):
        block = f[:, start : start + width].to(dtype).contiguous()
        out[:, start : start + width] = _conjugate_gradients(system, block, tolerance, steps)
    return out


def _conjugate_gradients(system: _Symmetric, f: Tensor, tolerance: float, max_steps: int) -> Tensor:
    """One system per column, all with the same matrix."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        own = torch.linalg.vecdot(a, b, dim=0)
        return own if system.halo is None else all_sum(own, system.halo.parts)

    def divided(a: Tensor, b: Tensor) -> Tensor:
        # A column that is solved exactly stays where it is.
        return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)

    x, q, goal = f.clone(), torch.empty_like(f), tolerance**2 * dot(f, f)
    r, refined = f - system.apply(x), False
    p, rr = r.clone(), dot(r, r)
    lowest = torch.zeros_like(rr)
    for step in range(max_steps + 1):
        if step % _CHECK_EVERY == 0 or step == max_steps:
            solved, indefinite = torch.stack([(rr <= goal).all(), (lowest < 0).any()]).tolist()
            if indefinite and system.can_be_indefinite:
                raise IndefiniteSystem(
                    "smooth_exact: I + gamma L is not positive definite; normalise the adjacency, so that its "
                    "eigenvalues are up to 1, give it weights of 0 or more (combinatorial), or take "
                    "smooth_exact_directed"
                )
            if solved and refined:
                return x
            if solved:
                # The recursion's residual drifts from the true one: once more from there, often in no step at all.
                torch.sub(f, system.apply(x, out=q), out=r)
                p.copy_(r)
                rr, refined = dot(r, r), True
                if bool((rr <= goal).all()):
                    return x
        system.apply(p, out=q)
        curvature = dot(p, q)
        lowest = torch.minimum(lowest, curvature)
        a = divided(rr, curvature)
        x.addcmul_(p, a)
        r.addcmul_(q, a, value=-1)
        before, rr = rr, dot(r, r)
        p.mul_(divided(rr, before)).add_(r)
    worst = float((rr / goal.clamp_min(torch.finfo(rr.dtype).tiny)).max().sqrt()) * tolerance
    raise ValueError(
        f"smooth_exact: residual {worst:.2g} of |f| after {max_steps} steps, expected {tolerance:.2g}; is the "
        "adjacency symmetric, with eigenvalues up to 1 (normalized) or weights of 0 or more (combinatorial)? "
        "If so, raise max_steps or tolerance"
    )


def _grad_gamma(system: _System, u: Tensor, g: Tensor) -> Tensor:
    """-<u, L g>, by blocks of columns."""
    acc = system.scale.dtype
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    step = _columns(u.shape[1])
    for start in range(0, u.shape[1], step):
        block = g[:, start : start + step].to(acc).contiguous()
        total -= (u[:, start : start + step].to(acc) * system.apply_laplacian(block)).sum(dtype=torch.float64)
    return total.to(acc)


class _SolveInParts(torch.autograd.Function):
    """The same where ranks share the bags: custom operators can't take a halo."""

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, gamma: Tensor, graph: tuple[Any, ...], impl: str, tolerance: float, max_steps: int
    ) -> Tensor:
        ctx.system, ctx.options, ctx.dtype = _System(impl, gamma, *graph), (tolerance, max_steps), f.dtype
        g = _solve_system(ctx.system, f, *ctx.options)
        ctx.save_for_backward(g if ctx.needs_input_grad[1] else None)
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u = _solve_system(ctx.system, grad, *ctx.options)
        (g,) = ctx.saved_tensors
        grad_gamma = None if g is None else _grad_gamma(ctx.system, u, g)
        return u.to(ctx.dtype) if ctx.needs_input_grad[0] else None, grad_gamma, *[None] * 4


def _register(impl: str) -> None:
    """Custom operators ``bigbag::smooth_exact_{impl}``, ``..._gamma`` (its gradient) and ``..._edges`` (idem)."""
    name = f"smooth_exact_{impl}"
    graph = "Tensor gamma, Tensor? weight, Tensor? degree, Tensor crow, Tensor col"

    def run(f: Tensor, gamma: Tensor, weight: Any, degree: Any, crow: Tensor, *rest: Any) -> Tensor:
        return _solve(impl, f, gamma, weight, degree, crow, *rest)

    def run_gamma(u: Tensor, g: Tensor, gamma: Tensor, weight: Any, degree: Any, crow: Tensor, col: Tensor) -> Tensor:
        return _grad_gamma(_System(impl, gamma, weight, degree, crow, col), u, g)

    def run_edges(u: Tensor, g: Tensor, gamma: Tensor, degree: Any, crow: Tensor, col: Tensor) -> Tensor:
        grad = kernels(impl).edge_dots(crow, col, u, g, 1)
        if degree is not None:
            acc = grad.dtype
            own = (u.to(acc) * g.to(acc)).sum(1)
            rows = torch.repeat_interleave(own, crow.diff(), output_size=col.shape[0])
            grad -= rows[:, None]
        return gamma * grad

    def define(suffix: str, schema: str, function: Any) -> CustomOp:
        return CustomOp(name + suffix, schema, function)

    solve = define("", f"(Tensor f, {graph}, float tolerance, int max_steps) -> Tensor", run)
    to_gamma = define("_gamma", f"(Tensor u, Tensor g, {graph}) -> Tensor", run_gamma)
    to_edges = define(
        "_edges", "(Tensor u, Tensor g, Tensor gamma, Tensor? degree, Tensor crow, Tensor col) -> Tensor", run_edges
    )
    solve.register_fake(lambda f, gamma, *rest: gamma.new_empty(f.shape))
    to_gamma.register_fake(lambda u, g, gamma, *rest: gamma.new_empty(()))
    to_edges.register_fake(lambda u, g, gamma, degree, crow, col: gamma.new_empty(col.shape[0], 1))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        f, *graph, ctx.tolerance, ctx.max_steps = inputs
        ctx.dtype = f.dtype
        ctx.save_for_backward(output if any(ctx.needs_input_grad[1:3]) else None, *graph)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        g, gamma, weight, degree, crow, col = ctx.saved_tensors
        u = solve(grad, gamma, weight, degree, crow, col, ctx.tolerance, ctx.max_steps)
        grad_gamma = to_gamma(u, g, gamma, weight, degree, crow, col) if ctx.needs_input_grad[1] else None
        grad_weight = to_edges(u, g, gamma, degree, crow, col) if ctx.needs_input_grad[2] else None
        return u.to(ctx.dtype) if ctx.needs_input_grad[0] else None, grad_gamma, grad_weight, *[None] * 5

    solve.register_autograd(differentiate, setup_context=setup)
    _OPS["solve", impl] = solve


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (Operator("smooth_exact", smooth_exact, DTYPES),)
