"""Smoothing over a graph: the Sm operator, by T steps or exactly, with O(1) steps stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.kernels.cpu.memory import huge_pages
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


def smooth(adj: Adjacency, f: Tensor, alpha: float | Tensor, num_steps: int = 10, *, impl: str | None = None) -> Tensor:
    """Sm by steps: each pulls an instance towards its neighbours.

        g_0 = f,   g_t = (1 - alpha) f + alpha A g_{t-1},   returns g_T = sum_k p_k A^k f

    The map is linear, so its gradient is the same map with A^T: no step is stored. With gradient to ``alpha``, backward
    walks through w_k = (A^T)^k grad instead, sums p_k w_k, and takes dalpha = sum_k p_k'(alpha) <w_k, f>. Where
    ``adj.weight`` requires grad, every step is a :func:`spmm`, and all T steps are stored.

    Cost: 2 T E D FLOP forward and backward. Bytes per step: the state twice and f once; with gradient to alpha, the
    state and the sum twice and f once. It holds two (T, D) states in the dtype of f, one of them the result, and f if
    ``alpha`` requires grad. States are rounded to the dtype of f, sums are accumulated in float32 or float64.

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
    chosen, rows = prepare("smooth", adj, f, impl, "f")
    acc = accumulation_dtype(f.dtype)
    a = _scalar("smooth", "alpha", alpha, f)
    if num_steps == 0:
        return f.clone()
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
    graph = None if impl == "reference" else graph_of(adj, impl, transposed=True)
    g = f
    for _ in range(num_steps):
        mean = reference_spmm(adj, weight, g) if graph is None else product(graph, weight, g, impl)
        g = ((1 - a) * f.to(acc) + a * mean.to(acc)).to(f.dtype)
    return g


def _coefficients(a: Tensor, num_steps: int) -> Tensor:
    """p_0 .. p_T: (1 - a) a^k, and a^T for the last."""
    powers = a ** torch.arange(num_steps + 1, device=a.device, dtype=a.dtype)
    return torch.cat([(1 - a) * powers[:-1], powers[-1:]])


def _coefficient_slopes(a: Tensor, num_steps: int) -> Tensor:
    """dp_k / da, written without a division by a."""
    k = torch.arange(num_steps + 1, device=a.device, dtype=a.dtype)
    slopes = torch.where(k > 0, k * a ** (k - 1).clamp_min(0), 0)
    return torch.cat([(1 - a) * slopes[:-1] - a ** k[:-1], slopes[-1:]])


def _steps(impl: str, f: Tensor, a: Tensor, weight: Tensor | None, crow: Tensor, col: Tensor, num_steps: int) -> Tensor:
    f = f.contiguous()
    # Two buffers in turn; the first step reads f, which is not ours to write.
    g, spare = f, None
    for step in range(num_steps):
        out = kernels(impl).spmm(crow, col, weight, g, a.view(1), None, f, (1 - a).view(1), spare)
        g, spare = out, (g if step > 0 else None)
    return g


def _moments(
    impl: str, grad: Tensor, f: Tensor, a: Tensor, weight_t: Any, crow_t: Tensor, col_t: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """sum_k p_k w_k (T, D), and <w_k, f> for k = 0 .. T, where w_k = (A^T)^k grad."""
    grad, f = grad.contiguous(), f.contiguous()
    coefficients = _coefficients(a, num_steps)
    total, w, spare = huge_pages(torch.empty_like(grad)), grad, huge_pages(torch.empty_like(grad))
    moments = []
    for step in range(1, num_steps + 1):
        dots = kernels(impl).power_step(crow_t, col_t, weight_t, w, f, coefficients, step, spare, total)
        moments += [dots[0], dots[1]] if step == 1 else [dots[1]]
        w, spare = spare, (huge_pages(torch.empty_like(grad)) if w is grad and step < num_steps else w)
    return total, torch.stack(moments)


_STEPS = "Tensor? weight, Tensor? weight_t, Tensor crow, Tensor col, Tensor crow_t, Tensor col_t, int num_steps"


def _register(impl: str) -> None:
    """Custom operators ``bigbag::smooth_{impl}`` and ``bigbag::smooth_moments_{impl}``."""

    def run(f: Tensor, a: Tensor, w: Any, w_t: Any, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
        return _steps(impl, f, a, w, crow, col, rest[-1])

    def run_moments(grad: Tensor, f: Tensor, a: Tensor, w_t: Any, crow_t: Tensor, col_t: Tensor, n: int) -> Any:
        return _moments(impl, grad, f, a, w_t, crow_t, col_t, n)

    name = f"bigbag::smooth_{impl}"
    steps = torch.library.custom_op(name, run, mutates_args=(), schema=f"(Tensor f, Tensor a, {_STEPS}) -> Tensor")
    moments = torch.library.custom_op(
        f"bigbag::smooth_moments_{impl}",
        run_moments,
        mutates_args=(),
        schema="(Tensor grad, Tensor f, Tensor a, Tensor? weight_t, Tensor crow_t, Tensor col_t, int num_steps)"
        " -> (Tensor, Tensor)",
    )
    steps.register_fake(lambda f, *rest: f.new_empty(f.shape))
    moments.register_fake(
        lambda grad, f, a, w, crow, col, n: (grad.new_empty(grad.shape), a.new_empty(n + 1, dtype=torch.float64))
    )

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        f, a, weight, weight_t, *graph, ctx.num_steps = inputs
        ctx.save_for_backward(f if ctx.needs_input_grad[1] else None, a, weight, weight_t, *graph)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        f, a, weight, weight_t, crow, col, crow_t, col_t = ctx.saved_tensors
        if f is None:
            grad_f = steps(grad, a, weight_t, weight, crow_t, col_t, crow, col, ctx.num_steps)
            return grad_f, *[None] * 8
        grad_f, found = moments(grad, f, a, weight_t, crow_t, col_t, ctx.num_steps)
        grad_a = (_coefficient_slopes(a.double(), ctx.num_steps) * found).sum().to(a.dtype)
        return grad_f if ctx.needs_input_grad[0] else None, grad_a, *[None] * 7

    steps.register_autograd(differentiate, setup_context=setup)
    _OPS["smooth", impl] = steps


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (Operator("smooth", smooth, DTYPES),)
