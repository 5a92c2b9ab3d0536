"""Graph convolution with Chebyshev polynomials, of which one term at a time exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.ops.chebyshev import chebyshev, scaling
from bigbag.ops.join import with_halo
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import choose, compute_dtype
from bigbag.ops.spmm import DTYPES, accumulation_dtype, degrees, kernels, needs_grad
from bigbag.ops.transpose import transpose

_ROWS = 8192


def chebyshev_conv(
    adj: Adjacency,
    x: Tensor,
    weight: Tensor,
    lambda_max: float | Tensor = 2.0,
    segments: Segments | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    r"""Chebyshev polynomials of the scaled Laplacian, applied to x, times a weight matrix each.

        y = sum_{k=0}^{K-1} T_k(L~) x W_k^T,   L~ = 2 (D - A) / lambda_max - I,   T_k = 2 L~ T_{k-1} - T_{k-2}

    T_k acts on the thinner of x and y: on y by Clenshaw's recurrence, b_k = x W_k^T + 2 L~ b_{k+1} - b_{k+2}, whose
    gradient is the recursion of T_k(L~^T); on x the other way round. The gradient is exact, and keeps x only. The
    computation runs in autocast's dtype where autocast is on, else in that of ``weight``; x is converted chunk by
    chunk. No gradient flows to ``adj.weight`` or ``lambda_max``.

    Cost: 2 T K P D FLOP forward and for each gradient (of x where D > P: as much again), and with M = min(P, D)
    2 (K - 1) E M forward and backward. Bytes: K - 1 products with A of width M; beside x, y and their gradients it
    holds at most three tensors (T, M) at a time. Where bags are shared out over ranks (``adj.halo``), each of those
    products asks for the M columns of the halo.

    Args:
        adj: (T, T) adjacency; D are its column sums, as in torchmil (for a symmetric graph: its row sums).
        x: (T, P) instances; may be stored narrower than the weights.
        weight: (D, K P), the matrices W_0, W_1, ... side by side.
        lambda_max: largest eigenvalue of D - A: a number or a tensor of one element, or (B,) with ``segments``.
        segments: how the T rows are cut into B bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, D) in the dtype of the computation.

    Raises:
        ValueError: shapes that do not fit, weights of the graph that require grad, an ``impl`` that can't run.

    Defferrard et al., Convolutional neural networks on graphs with fast localized spectral filtering, NeurIPS 2016.
    """
    if x.dim() != 2 or len(x) != adj.num_nodes or weight.dim() != 2 or weight.shape[1] % max(x.shape[1], 1):
        raise ValueError(
            f"chebyshev_conv: expected x (T, P) with T = {adj.num_nodes} as in adj and weight (D, K P), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if needs_grad(adj.weight):
        raise ValueError("chebyshev_conv: adj.weight requires grad, which it does not give; detach it")
    dtype = compute_dtype(weight)
    chosen = choose("chebyshev_conv", DTYPES, impl, x.device.type, dtype)
    adj_t = transpose(adj)
    acc = accumulation_dtype(dtype)
    # Sums of the weights that products take, in their precision.
    wide = None if adj_t.weight is None else adj_t.weight.to(torch.promote_types(adj_t.weight.dtype, acc))
    degree = degrees(replace(adj_t, weight=wide))
    if chosen == "reference":  # which refuses bags that are shared out
        num_terms = weight.shape[1] // x.shape[1]
        terms = chebyshev(adj, x.to(dtype), num_terms, lambda_max, segments, degree=degree, impl="reference")
        return terms.transpose(0, 1).flatten(1) @ weight.to(dtype).t()
    ratio = scaling(lambda_max, segments, adj, acc)
    forward = _Laplacian(kernels(chosen), adj, ratio, degree)
    return _Convolution.apply(forward, _Laplacian(kernels(chosen), adj_t, ratio, degree), x, weight, dtype)


@dataclass(frozen=True)
class _Laplacian:
    """L~ of a graph or, with the transposed graph and the same degrees, its transpose."""

    kernels: Any
    adj: Adjacency
    ratio: Tensor
    degree: Tensor

    def multiply(self, z: Tensor, factor: int, added: Tensor | None, sign: int, out: Tensor) -> Tensor:
        """``factor L~ z + sign added``; ``out`` may be ``added``."""
        weight = None if self.adj.weight is None else self.adj.weight.detach()[:, None].to(self.ratio.dtype)
        diagonal = self.ratio * self.degree.to(self.ratio.dtype) - 1
        beta = None if added is None else self.ratio.new_full((1,), sign)
        graph = (self.adj.crow.contiguous(), self.adj.col.contiguous(), weight)
        z = with_halo(z, self.adj.halo)
        return self.kernels.spmm(*graph, z, -factor * self.ratio, factor * diagonal, added, beta, out)

    def terms(self, z: Tensor, count: int) -> Iterator[Tensor]:
        """``T_0(L~) z, T_1(L~) z, ...``, each to be read before the next but one is asked for."""
        # Terms are written where rows are contiguous, and are like z.
        before = last = z = z.contiguous()
        yield z
        for k in range(1, count):
            if k == 1:
                last = self.multiply(z, 1, None, 0, torch.empty_like(z))
            else:
                out = torch.empty_like(z) if k == 2 else before
                before, last = last, self.multiply(last, 2, before, -1, out)
            yield last


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, laplacian: _Laplacian, transposed: _Laplacian, x: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.laplacian, ctx.transposed, ctx.dtype = laplacian, transposed, dtype
        matrices = [matrix.t() for matrix in _matrices(weight, x.shape[1], dtype)]
        if weight.shape[0] <= x.shape[1]:
            return _clenshaw(laplacian, x, matrices)
        return _sum_of_terms(laplacian, x, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        matrices = _matrices(weight, x.shape[1], ctx.dtype)
        wants_x, wants_weight = ctx.needs_input_grad[2:4]
        grad_x = None
        of_matrices = grad.new_zeros(len(matrices), *matrices[0].shape, dtype=accumulation_dtype(ctx.dtype))
        if weight.shape[0] <= x.shape[1]:
            grad_x = torch.zeros_like(x, dtype=ctx.dtype) if wants_x else None
            for term, matrix, total in zip(ctx.transposed.terms(grad, len(matrices)), matrices, of_matrices):
                if wants_weight:
                    _add_outer(total, term, x)
                if grad_x is not None:
                    grad_x.addmm_(term, matrix)
        else:
            if wants_weight:
                terms = ctx.laplacian.terms(x.to(ctx.dtype), len(matrices))
                for term, total in zip(terms, of_matrices):
                    _add_outer(total, grad, term)
            if wants_x:
                grad_x = _clenshaw(ctx.transposed, grad, matrices)
        grad_weight = of_matrices.transpose(0, 1).flatten(1).to(weight.dtype) if wants_weight else None
        return None, None, None if grad_x is None else grad_x.to(x.dtype), grad_weight, None


def _matrices(weight: Tensor, width: int, dtype: torch.dtype) -> list[Tensor]:
    return list(weight.detach().to(dtype).split(width, dim=1))


def _clenshaw(laplacian: _Laplacian, x: Tensor, matrices: list[Tensor]) -> Tensor:
    """``sum_k T_k(L~) x M_k``, from the last k down."""
    before = last = None
    for k in range(len(matrices) - 1, -1, -1):
        product = _product(x, matrices[k], before)
        if last is not None:
            laplacian.multiply(last, 2 if k else 1, product, 1, product)
        before, last = last, product
    assert last is not None
    return last


def _product(x: Tensor, matrix: Tensor, minus: Tensor | None) -> Tensor:
    """``x M - minus``, in the memory of ``minus``; x is converted a chunk at a time."""
    out = x.new_empty(len(x), matrix.shape[1], dtype=matrix.dtype) if minus is None else minus
    for rows in _chunks(x, matrix.dtype):
        out[rows].addmm_(x[rows].to(matrix.dtype), matrix, beta=0 if minus is None else -1)
    return out


def _sum_of_terms(laplacian: _Laplacian, x: Tensor, matrices: list[Tensor]) -> Tensor:
    dtype = matrices[0].dtype
    out = x.new_zeros(len(x), matrices[0].shape[1], dtype=dtype)
    for term, matrix in zip(laplacian.terms(x.to(dtype), len(matrices)), matrices):
        out.addmm_(term, matrix)
    return out


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right``; a chunk of rows at a time where one of them is to be converted."""
    for rows in _chunks(right, left.dtype):
        total += left[rows].t() @ right[rows].to(left.dtype)


def _chunks(x: Tensor, dtype: torch.dtype) -> list[slice]:
    step = max(1, len(x) if x.dtype == dtype else _ROWS)
    return [slice(start, start + step) for start in range(0, len(x), step)]
