"""Smoothing over a graph: the Sm operator, by T steps or exactly, with O(1) steps stored."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.ops.custom import CustomOp
from bigbag.ops.deep_halo import DeepHalo, deep_halo
from bigbag.ops.distributed import exchange
from bigbag.ops.join import with_halo
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import Operator
from bigbag.ops.spmm import (
    DTYPES,
    _permuted,
    accumulation_dtype,
    graph_of,
    kernels,
    needs_grad,
    prepare,
    product,
    reference_spmm,
)
from bigbag.ops.transpose import transpose


def smooth(adj: Adjacency, f: Tensor, alpha: float | Tensor, num_steps: int = 10, *, impl: str | None = None) -> Tensor:
    """Sm by steps: each pulls an instance towards its neighbours.

        g_0 = f,   g_t = (1 - alpha) f + alpha A g_{t-1},   returns g_T = sum_k p_k A^k f

    The map is linear, so its gradient is the same map with A^T: no step is stored. The gradient to ``alpha`` is
    <grad, sum_k p_k'(alpha) A^k f>, a polynomial by Horner's rule: T steps more. Where ``adj.weight`` requires grad,
    every step is a :func:`spmm`, and all T steps are stored.

    Cost: 2 T E D FLOP forward and backward, as much for the gradient to alpha. Bytes per step: the state twice and f
    once. It holds two (T, D) states in the dtype of f, one of them the result, and f if ``alpha`` requires grad. States
    are rounded to the dtype of f, sums are accumulated in float32 or float64.

    On a CPU, where edges join rows that lie close to each other, as those of a lattice row by row, all steps go through
    the rows together (:mod:`bigbag.kernels.cpu.recursion`): f is read and the result written once, states are held in
    float32 or float64, a band of rows of each, and the gradient to alpha comes from the states of that to f. So do
    those of a single column on any graph. Where rows lie in no order, as nearest neighbours, and enough numbers take
    enough steps, the graph is relabelled, once (:mod:`bigbag.kernels.cpu.bands`): 4 bytes per edge and 12 per row.

    Where bags are shared out over ranks (``adj.halo``), each step asks for the states of the halo: H D numbers, H its
    rows. On a CPU, where the rows within T steps of a rank's own are few beside those (:mod:`bigbag.ops.deep_halo`),
    they are asked for once, H_T D numbers each way, and all steps go through T + H_T rows together; it holds two such
    states (with both gradients, in bfloat16, two more and one in float32). There, weights must not require grad.

    Args:
        adj: (T, T) adjacency, as a rule normalised so that rows sum to about one.
        f: (T, ...) floating.
        alpha: weight of the neighbours, in [0, 1]; a number or a 0-dimensional tensor.
        num_steps: T, 0 or more.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, ...) in the dtype of f.

    Raises:
        ValueError: shapes that do not fit, a negative ``num_steps``, an ``impl`` that can't run.

    Castro-Macias et al., Sm: enhanced localization in multiple instance learning for medical imaging classification,
    NeurIPS 2024.
    """
    if num_steps < 0:
        raise ValueError(f"smooth: num_steps is {num_steps}, expected 0 or more")
    chosen, rows = prepare("smooth", adj, f, impl, "f", in_parts=True)
    acc = accumulation_dtype(f.dtype)
    a = _scalar("smooth", "alpha", alpha, f)
    if num_steps == 0:
        return f.clone()
    if adj.halo is not None:
        if needs_grad(adj.weight):
            raise ValueError("smooth: adj.weight requires grad, which it does not get where ranks share a bag")
        return _SmoothInParts.apply(rows, a, adj, num_steps, chosen).view(f.shape)
    if chosen == "reference" or needs_grad(adj.weight):
        return _by_steps(adj, rows, a, num_steps, chosen).view(f.shape)
    graph = graph_of(adj, chosen, transposed=needs_grad(f, a))
    weight = None if adj.weight is None else adj.weight.to(acc)[:, None]
    weight_t = _permuted(weight, graph.perm)
    return _OPS["smooth", chosen](rows, a, weight, weight_t, *graph[:4], num_steps).view(f.shape)


def _scalar(name: str, argument: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dimensional tensor of the accumulation dtype, beside ``like``."""
    acc = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        # A filled tensor needs no copy from the host.
        return torch.full((), value, dtype=acc, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: {argument} must be a number or a tensor of one element, got {tuple(value.shape)}")
    return value.reshape(()).to(device=like.device, dtype=acc)


def _by_steps(adj: Adjacency, f: Tensor, a: Tensor, num_steps: int, impl: str) -> Tensor:
    """The definition; with the reference, or through ``spmm``'s own gradients."""
    acc = a.dtype
    weight = None if adj.weight is None else adj.weight.to(acc)[:, None]
    graph = None if impl == "reference" else graph_of(adj, impl, transposed=True, same=False)
    g = f
    for _ in range(num_steps):
        mean = reference_spmm(adj, weight, g) if graph is None else product(graph, weight, g, impl)
        g = ((1 - a) * f.to(acc) + a * mean.to(acc)).to(f.dtype)
    return g


def _slopes(a: Tensor, num_steps: int) -> Tensor:
    """p_k'(a) for p_k = (1 - a) a^k, and p_T = a^T; written without a division by a."""
    k = torch.arange(num_steps + 1, device=a.device, dtype=a.dtype)
    slopes = torch.where(k > 0, k * a ** (k - 1).clamp_min(0), 0)
    return torch.cat([(1 - a) * slopes[:-1] - a ** k[:-1], slopes[-1:]])


def _recursion(
    impl: str, f: Tensor, scales: Tensor, betas: Tensor, weight: Tensor | None, crow: Tensor, col: Tensor
) -> Tensor:
    """``g <- scales[k] A g + betas[k] f`` for each k, from g = f."""
    plan = _plan(impl, f, crow, col, len(scales))
    if plan is not None:
        return _recursions().recursion(plan, crow, col, weight, f, scales, betas)
    f = f.contiguous()
    # Two buffers in turn; the first step reads f, which is not ours to write.
    g, spare = f, None
    for k in range(len(scales)):
        out = kernels(impl).spmm(crow, col, weight, g, scales[k : k + 1], None, f, betas[k : k + 1], spare)
        g, spare = out, (g if k else None)
    return g


def _recursions() -> ModuleType:
    return importlib.import_module("bigbag.kernels.cpu.recursion")


def _plan(impl: str, f: Tensor, crow: Tensor, col: Tensor, num_steps: int) -> Any:
    """How all steps go through the rows together, in caches; None: step by step."""
    return _recursions().plan(crow, col, f, num_steps) if impl == "cpu" else None


def _both_gradients(
    grad: Tensor,
    f: Tensor,
    a: Tensor,
    weight_t: Tensor | None,
    crow_t: Tensor,
    col_t: Tensor,
    num_steps: int,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Gradients to f and to alpha by one recursion, which may ``overwrite`` grad; None where it takes two.

    With the states e_1 = A^T grad - grad, e_k = alpha A^T e_{k-1} they are grad + alpha sum_k e_k and sum_k k <e_k, f>:
    nothing is divided by alpha, nor taken from what is nearly the same.
    """
    plan = _plan("cpu", grad, crow_t, col_t, num_steps)
    if plan is None:
        return None
    scales, betas = a.repeat(num_steps), a.new_zeros(num_steps)
    scales[0], betas[0] = 1, -1
    graph = (crow_t, col_t, weight_t)
    grad_f, grad_a = _recursions().recursion_total(plan, *graph, grad, scales, betas, float(a), f, overwrite)
    return grad_f, torch.full_like(a, grad_a)


def _slope_factors(a: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """What :func:`_recursion` takes for the derivative to alpha, by Horner's rule."""
    slopes = _slopes(a.double(), num_steps).to(a.dtype).flip(0)
    return torch.cat([slopes[:1], slopes.new_ones(num_steps - 1)]), slopes[1:]


def _dot(grad: Tensor, derivative: Tensor, acc: torch.dtype) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for g, d in zip(grad.split(_ROWS), derivative.split(_ROWS)):
        total += (g.to(acc) * d.to(acc)).sum(dtype=torch.float64)
    return total.to(acc)


class _SmoothInParts(torch.autograd.Function):
    """The same where ranks share the bags: custom operators can't take a halo."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, a: Tensor, adj: Adjacency, num_steps: int, impl: str) -> Tensor:
        ctx.adj, ctx.num_steps, ctx.impl = adj, num_steps, impl
        ctx.save_for_backward(f if ctx.needs_input_grad[1] else None, a)
        return _recursion_in_parts(adj, f, a.expand(num_steps), (1 - a).expand(num_steps), impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        f, a = ctx.saved_tensors
        if all(ctx.needs_input_grad[:2]):
            both = _both_gradients_in_parts(transpose(ctx.adj), grad, f, a, ctx.num_steps, ctx.impl)
            if both is not None:
                return *both, None, None, None
        grad_f = grad_a = None
        if ctx.needs_input_grad[1]:
            derivative = _recursion_in_parts(ctx.adj, f, *_slope_factors(a, ctx.num_steps), ctx.impl)
            grad_a = _dot(grad, derivative, a.dtype)
            del derivative  # before there are buffers for another
        if ctx.needs_input_grad[0]:
            factors = (a.expand(ctx.num_steps), (1 - a).expand(ctx.num_steps))
            grad_f = _recursion_in_parts(transpose(ctx.adj), grad, *factors, ctx.impl)
        return grad_f, grad_a, None, None, None


def _recursion_in_parts(adj: Adjacency, f: Tensor, scales: Tensor, betas: Tensor, impl: str) -> Tensor:
    """As :func:`_recursion`, with a deep halo, or else with the rows of the halo behind those of its two buffers."""
    assert adj.halo is not None
    deep = _deep(adj, len(scales), impl)
    if deep is not None:
        return _recursion(impl, deep.widen(f), scales, betas, *_weighted(deep.graph, scales.dtype))[deep.own]
    f, weight = f.contiguous(), None if adj.weight is None else adj.weight.to(scales.dtype)[:, None]
    graph = (adj.crow.contiguous(), adj.col.contiguous(), weight)
    g = with_halo(f, adj.halo)
    spare = torch.empty_like(g)
    for k in range(len(scales)):
        factors = (scales[k : k + 1], None, f, betas[k : k + 1])
        own = kernels(impl).spmm(*graph, g, *factors, spare[: len(f)])
        if k + 1 < len(scales):
            spare[len(f) :] = exchange(own, adj.halo)
        g, spare = spare, g
    return g[: len(f)]


def _both_gradients_in_parts(
    adj_t: Adjacency, grad: Tensor, f: Tensor, a: Tensor, num_steps: int, impl: str
) -> tuple[Tensor, Tensor] | None:
    """As :func:`_both_gradients`, this rank's part of that to alpha; None where it takes two recursions."""
    deep = _deep(adj_t, num_steps, impl)
    if deep is None:
        return None
    graph = _weighted(deep.graph, a.dtype)
    both = _both_gradients(deep.widen(grad), deep.pad(f), a, *graph, num_steps, overwrite=True)
    return None if both is None else (both[0][deep.own], both[1])


def _deep(adj: Adjacency, num_steps: int, impl: str) -> DeepHalo | None:
    """The rows with which a rank takes all steps at once; None: it asks at each step."""
    return deep_halo(adj, num_steps) if impl == "cpu" and num_steps >= _recursions().LEAST_STEPS else None


def _weighted(adj: Adjacency, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    return None if adj.weight is None else adj.weight.to(dtype)[:, None], adj.crow, adj.col


_STEPS = "Tensor? weight, Tensor? weight_t, Tensor crow, Tensor col, Tensor crow_t, Tensor col_t, int num_steps"
_ROWS = 1024


def _register(impl: str) -> None:
    """Custom operators ``bigbag::smooth_{impl}``, ``bigbag::smooth_{impl}_alpha``, its gradient to alpha, and
    ``bigbag::smooth_{impl}_backward``, both its gradients.
    """

    def run(f: Tensor, a: Tensor, weight: Any, weight_t: Any, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
        ones = a.new_ones(rest[-1])
        return _recursion(impl, f, a * ones, (1 - a) * ones, weight, crow, col)

    def run_alpha(grad: Tensor, f: Tensor, a: Tensor, weight: Any, crow: Tensor, col: Tensor, num_steps: int) -> Tensor:
        derivative = _recursion(impl, f, *_slope_factors(a, num_steps), weight, crow, col)
        return _dot(grad, derivative, a.dtype)

    def run_backward(
        grad: Tensor, f: Tensor, a: Tensor, weight: Any, weight_t: Any, crow: Any, col: Any, crow_t: Any, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        col_t, num_steps = rest
        both = _both_gradients(grad, f, a, weight_t, crow_t, col_t, num_steps) if impl == "cpu" else None
        if both is None:
            # The smaller result first: its states are gone before the other's are there.
            grad_a = run_alpha(grad, f, a, weight, crow, col, num_steps)
            both = run(grad, a, weight_t, weight, crow_t, col_t, num_steps), grad_a
        return both

    name, both = f"smooth_{impl}", f"(Tensor grad, Tensor f, Tensor a, {_STEPS}) -> (Tensor, Tensor)"
    alone = "(Tensor grad, Tensor f, Tensor a, Tensor? weight, Tensor crow, Tensor col, int num_steps) -> Tensor"
    steps = CustomOp(name, f"(Tensor f, Tensor a, {_STEPS}) -> Tensor", run)
    to_alpha = CustomOp(f"{name}_alpha", alone, run_alpha)
    backward = CustomOp(f"{name}_backward", both, run_backward)
    backward.register_fake(lambda grad, f, a, *rest: (f.new_empty(f.shape), a.new_empty(())))
    steps.register_fake(lambda f, *rest: f.new_empty(f.shape))
    to_alpha.register_fake(lambda grad, f, a, *rest: a.new_empty(()))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        f, a, weight, weight_t, *graph, ctx.num_steps = inputs
        ctx.save_for_backward(f if ctx.needs_input_grad[1] else None, a, weight, weight_t, *graph)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        f, a, weight, weight_t, crow, col, crow_t, col_t = ctx.saved_tensors
        grad_f = grad_a = None
        if f is None:
            grad_f = steps(grad, a, weight_t, weight, crow_t, col_t, crow, col, ctx.num_steps)
        elif ctx.needs_input_grad[0]:
            grad_f, grad_a = backward(grad, f, a, weight, weight_t, crow, col, crow_t, col_t, ctx.num_steps)
        else:
            grad_a = to_alpha(grad, f, a, weight, crow, col, ctx.num_steps)
        return grad_f, grad_a, *[None] * 7

    steps.register_autograd(differentiate, setup_context=setup)
    _OPS["smooth", impl] = steps


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (Operator("smooth", smooth, DTYPES),)
