"""Chebyshev polynomials of a graph's Laplacian, and its largest eigenvalue by Lanczos' method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.ops import segments as _segments
from bigbag.ops.custom import CustomOp
from bigbag.ops.join import with_halo
from bigbag.ops.registry import Operator
from bigbag.ops.spmm import (
    DTYPES,
    _permuted,
    accumulation_dtype,
    degrees,
    graph_of,
    kernels,
    needs_grad,
    prepare,
    reference_spmm,
)
from bigbag.segments import on_device

# torchmil's guard against a Laplacian without edges.
_EPSILON = 1e-6


def chebyshev(
    adj: Adjacency,
    x: Tensor,
    num_terms: int,
    lambda_max: float | Tensor = 2.0,
    segments: Segments | None = None,
    *,
    degree: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The first K Chebyshev polynomials of the scaled Laplacian, applied to x.

        L~ = 2 (D - A) / lambda_max - I,   Z_0 = x,   Z_1 = L~ x,   Z_k = 2 L~ Z_{k-1} - Z_{k-2}

    A graph convolution is ``sum_k Z[k] @ W_k``: see :func:`chebyshev_conv`, which keeps no (K, T, ...). The gradient is
    the recursion backwards with A^T (Clenshaw's), so nothing is stored. No gradient flows to ``adj.weight``,
    ``lambda_max`` or ``degree``.

    Cost: 2 (K - 1) E D FLOP forward and backward. Bytes per term: the last two terms read, one written.

    Args:
        adj: (T, T) adjacency.
        x: (T, ...) floating.
        num_terms: K, 1 or more.
        lambda_max: largest eigenvalue of D - A: a number or a tensor of one element, or (B,) with ``segments``.
        segments: how the T rows are cut into B bags.
        degree: (T,) the diagonal matrix D; None: the row sums of A.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (K, T, ...) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, ``num_terms`` below 1, weights that require grad, an ``impl``
            that can't run.

    Defferrard et al., Convolutional neural networks on graphs with fast localized spectral filtering, NeurIPS 2016.
    """
    chosen, rows = prepare("chebyshev", adj, x, impl)
    if num_terms < 1:
        raise ValueError(f"chebyshev: num_terms is {num_terms}, expected 1 or more")
    if needs_grad(adj.weight):
        raise ValueError("chebyshev: adj.weight requires grad, which it does not give; compose ops.spmm instead")
    acc = accumulation_dtype(x.dtype)
    ratio = scaling(lambda_max, segments, adj, acc)
    weight = None if adj.weight is None else adj.weight.detach().to(acc)[:, None]
    degree = (degrees(_with_weight(adj, weight), impl=chosen) if degree is None else degree).to(acc)
    shape = (num_terms, *x.shape)
    if chosen == "reference":
        return _reference(adj, weight, rows, ratio, ratio * degree - 1, num_terms).view(shape)
    graph = graph_of(adj, chosen, transposed=needs_grad(x))
    args = (-ratio, ratio * degree - 1, weight, _permuted(weight, graph.perm), *graph[:4])
    return _OPS["chebyshev", chosen](rows, *args, num_terms).view(shape)


def _with_weight(adj: Adjacency, weight: Tensor | None) -> Adjacency:
    return adj if weight is None else Adjacency(adj.crow, adj.col, weight[:, 0], adj.symmetric)


def scaling(lambda_max: float | Tensor, segments: Segments | None, adj: Adjacency, acc: torch.dtype) -> Tensor:
    """2 / lambda_max, (T,) or (1,)."""
    device = adj.crow.device
    if not isinstance(lambda_max, Tensor):
        return torch.full((1,), 2 / (lambda_max + _EPSILON), dtype=acc, device=device)
    largest = lambda_max.detach().to(device=device, dtype=acc).reshape(-1)
    # Where it is 0, so is D - A, and any ratio will do: a large one would multiply the rounding of D x - A x.
    ratio = torch.where(largest == 0, 1.0, 2 / (largest + _EPSILON))
    if ratio.numel() == 1:
        return ratio
    if segments is None or ratio.shape[0] != segments.num_bags or segments.num_instances != adj.num_nodes:
        raise ValueError(
            f"chebyshev: lambda_max has shape {tuple(lambda_max.shape)}; expected one number, or one for each bag "
            "together with segments"
        )
    return torch.repeat_interleave(ratio, segments.offsets.diff(), output_size=adj.num_nodes)


def lambda_max(
    adj: Adjacency,
    segments: Segments | None = None,
    *,
    laplacian: bool = True,
    num_steps: int = 50,
    impl: str | None = None,
) -> Tensor:
    """The largest eigenvalue of D - A of each bag, by Lanczos' method; a lower bound that rises with ``num_steps``.

        w = M v_j - b_j v_{j-1},   a_j = <w, v_j>,   b_{j+1} v_{j+1} = w - a_j v_j,   M = D - A, or A + cI

    with c the largest row sum of the bag; the result is the largest eigenvalue of the tridiagonal (a, b), by squaring
    it again and again. Bags of up to ``num_steps`` instances get it exactly, large lattices to about 1e-3.

    Use it where A is symmetric and not negative. Cost: ``num_steps`` products of width 1, about 12 bytes per edge each,
    in float64, in which alone the order of sums does not show (float32 for "triton"). No dense matrix, no gradient,
    nothing waits for the device.

    Args:
        adj: (T, T) adjacency.
        segments: how the T rows are cut into B bags; None: one bag.
        laplacian: False gives the largest eigenvalue of A instead.
        num_steps: products with A.
        impl: as in :func:`chebyshev`.

    Returns:
        (B,), zeros for bags without instances or edges.

    Lanczos, An iteration method for the solution of the eigenvalue problem, J. Res. Nat. Bur. Standards 45 (1950).
    """
    with torch.no_grad():
        degree = degrees(adj, impl=impl)
        if segments is None and adj.halo is not None:
            raise ValueError("lambda_max: where ranks share the bags, it needs segments, with parts")
        cut = Segments.from_sizes((adj.num_nodes,), degree.device) if segments is None else segments
        chosen, _ = prepare("lambda_max", adj, degree, impl, in_parts=True)
        dtype = degree.dtype
        if chosen != "triton":  # which has no float64
            degree = degree.double()
        weight = None if adj.weight is None else adj.weight.to(degree.dtype)[:, None]
        before = 0 if cut.parts is None else on_device(cut.parts.before, degree.device)
        bag = cut.bag_of_instance
        local = torch.arange(adj.num_nodes, device=degree.device) + (before - cut.offsets[:-1])[bag]
        # An irregular start, the same for a bag alone and in a pack. A's leading vector has one sign, D - A's has both.
        w = torch.frac((local + 1).double() * 0.6180339887498949).to(degree.dtype) - (0.5 if laplacian else 0.0)
        shift = torch.zeros_like(degree) if laplacian else _largest_degree(degree, cut, chosen)
        sign, diagonal = (-1.0, degree) if laplacian else (1.0, shift)
        v = torch.zeros_like(w)
        tridiagonal = degree.new_zeros(cut.num_bags, num_steps, num_steps, dtype=torch.float64)
        for j in range(num_steps):
            norm = _per_bag(w.square(), cut, chosen).sqrt()
            previous, v = v, w / norm.clamp_min(1e-30)[bag]
            w = sign * _multiply(adj, weight, v, chosen) + diagonal * v
            if j > 0:
                tridiagonal[:, j, j - 1] = tridiagonal[:, j - 1, j] = norm.double()
                w -= norm[bag] * previous
            dot = _per_bag(w * v, cut, chosen)
            tridiagonal[:, j, j] = dot.double()
            w -= dot[bag] * v
        shifts = _segments.segment_max(shift, cut, impl=chosen)
        return (_largest_eigenvalue(tridiagonal).to(degree.dtype) - shifts).clamp_min(0).to(dtype)


def _largest_eigenvalue(matrices: Tensor) -> Tensor:
    """(B,) of (B, k, k) symmetric matrices without negative eigenvalues: powers tend to the leading projection."""
    power = matrices
    for _ in range(30):
        power = power / power.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
        power = power @ power
    trace = power.diagonal(dim1=1, dim2=2).sum(1)
    return (power * matrices).sum((1, 2)) / trace.clamp_min(1e-300)


def _largest_degree(degree: Tensor, segments: Segments, impl: str) -> Tensor:
    """(T,) the largest of the bag: added to A, it makes the largest eigenvalue the one of largest magnitude."""
    return _segments.segment_max(degree, segments, impl=impl)[segments.bag_of_instance]


def _per_bag(values: Tensor, segments: Segments, impl: str) -> Tensor:
    return _segments.segment_sum(values, segments, impl=impl)


def _multiply(adj: Adjacency, weight: Tensor | None, v: Tensor, impl: str) -> Tensor:
    if impl == "reference":
        return reference_spmm(adj, weight, v[:, None])[:, 0]
    return kernels(impl).spmm(adj.crow, adj.col, weight, with_halo(v, adj.halo)[:, None])[:, 0]


def _reference(
    adj: Adjacency, weight: Tensor | None, x: Tensor, ratio: Tensor, diagonal: Tensor, num_terms: int
) -> Tensor:
    def scaled(z: Tensor) -> Tensor:
        return diagonal[:, None] * z.to(ratio.dtype) - ratio[:, None] * reference_spmm(adj, weight, z)

    terms = [x]
    for k in range(1, num_terms):
        new = scaled(x) if k == 1 else 2 * scaled(terms[-1]) - terms[-2].to(ratio.dtype)
        terms.append(new.to(x.dtype))
    return torch.stack(terms)


def _forward(
    impl: str, x: Tensor, scale: Tensor, diagonal: Tensor, weight: Any, crow: Tensor, col: Tensor, num_terms: int
) -> Tensor:
    out = huge_pages(x.new_empty(num_terms, *x.shape))
    out[0] = x
    multiply, minus_one = kernels(impl).spmm, scale.new_full((1,), -1)
    for k in range(1, num_terms):
        if k == 1:
            multiply(crow, col, weight, out[0], scale, diagonal, out=out[1])
        else:
            multiply(crow, col, weight, out[k - 1], 2 * scale, 2 * diagonal, out[k - 2], minus_one, out[k])
    return out


def _adjoint(
    impl: str, grad: Tensor, scale: Tensor, diagonal: Tensor, weight_t: Tensor | None, crow_t: Tensor, col_t: Tensor
) -> Tensor:
    """b_k = grad_k + 2 L~^T b_{k+1} - b_{k+2}, down to k = 1;  grad_0 + L~^T b_1 - b_2."""
    grad = grad.contiguous()
    if len(grad) == 1:
        return grad[0].clone()
    multiply, one = kernels(impl).spmm, scale.new_ones(1)
    last, before = grad[-1], None
    for k in range(len(grad) - 2, -1, -1):
        # Into the buffer of b_{k+2}, unless that is a part of grad.
        if before is None:
            added, out = grad[k], huge_pages(torch.empty_like(grad[k]))
        elif before.data_ptr() == grad[-1].data_ptr():
            added = out = grad[k] - before
        else:
            added = out = torch.sub(grad[k], before, out=before)
        twice = 2 if k > 0 else 1
        multiply(crow_t, col_t, weight_t, last, twice * scale, twice * diagonal, added, one, out)
        before, last = last, out
    return last


def _register(impl: str) -> None:
    """Custom operators ``bigbag::chebyshev_{impl}`` and ``..._adjoint``."""

    def run(x: Tensor, s: Tensor, d: Tensor, w: Any, w_t: Any, crow: Tensor, col: Tensor, *rest: Any) -> Tensor:
        return _forward(impl, x, s, d, w, crow, col, rest[-1])

    def run_adjoint(grad: Tensor, s: Tensor, d: Tensor, w_t: Any, crow_t: Tensor, col_t: Tensor) -> Tensor:
        return _adjoint(impl, grad, s, d, w_t, crow_t, col_t)

    name = f"chebyshev_{impl}"
    tensors = "Tensor crow, Tensor col, Tensor crow_t, Tensor col_t"
    forward = CustomOp(
        name,
        f"(Tensor x, Tensor scale, Tensor diagonal, Tensor? weight, Tensor? weight_t, {tensors}, int num_terms)"
        " -> Tensor",
        run,
    )
    adjoint = CustomOp(
        f"{name}_adjoint",
        "(Tensor grad, Tensor scale, Tensor diagonal, Tensor? weight_t, Tensor crow_t, Tensor col_t) -> Tensor",
        run_adjoint,
    )
    forward.register_fake(lambda x, *rest: x.new_empty(rest[-1], *x.shape))
    adjoint.register_fake(lambda grad, *rest: grad.new_empty(grad.shape[1:]))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        _, scale, diagonal, _, weight_t, _, _, crow_t, col_t, _ = inputs
        ctx.save_for_backward(scale, diagonal, weight_t, crow_t, col_t)

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        return adjoint(grad, *ctx.saved_tensors), *[None] * 9

    forward.register_autograd(differentiate, setup_context=setup)
    _OPS["chebyshev", impl] = forward


_OPS: dict[tuple[str, str], Any] = {}
_register("cpu")
_register("triton")

OPERATORS = (Operator("chebyshev", chebyshev, DTYPES),)
