"""Chebyshev graph convolution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.nn.linear import readable


class ChebConv(torch.nn.Module):
    r"""Chebyshev graph convolution (Defferrard, Bresson and Vandergheynst, NeurIPS 2016, arXiv 1606.09375).

    ``Y = sum_k T_k(L~) X W_k^T`` over the first K Chebyshev polynomials of ``L~ = 2 (D - A) / lambda_max - I``, with A
    as it is given, D its column sums and ``W_k`` the k-th block of columns of ``fc.weight``. Nothing of size K x N x P
    is formed: see :func:`bigbag.ops.chebyshev_conv`.

    Differs from torchmil, which reads its ``(K, N, P)`` polynomials as ``(N, K P)`` without a transpose, so that a row
    holds neighbouring instances instead of the polynomials of one, and which takes for ``lambda_max`` the largest
    eigenvalue of A, from a dense decomposition.

    Args:
        in_channels: input width; None learns it from the first input.
        out_channels: output width.
        K: number of polynomials.
        compute_lambda_max: where none is given, take the largest eigenvalue of D - A, of each bag, by Lanczos' method;
            else 2.
        torchmil_layout: torchmil's numbers for a bag by itself, for its checkpoints: mixed rows, and the largest
            eigenvalue of A. It forms the K polynomials.
    """

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        K: int = 3,
        compute_lambda_max: bool = True,
        torchmil_layout: bool = False,
    ) -> None:
        super().__init__()
        if K < 1:
            raise ValueError(f"ChebConv: K is {K}, expected 1 or more")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.K = K
        self.compute_lambda_max = compute_lambda_max
        self.torchmil_layout = torchmil_layout
        self.fc: torch.nn.Linear
        if in_channels is None:
            self.fc = torch.nn.LazyLinear(out_channels, bias=False)
        else:
            self.fc = torch.nn.Linear(K * in_channels, out_channels, bias=False)

    def lambda_max(self, adj: Adjacency, segments: Segments) -> float | Tensor:
        """What the Laplacian is scaled by where nothing is given: ``(B,)``, or 2."""
        if not self.compute_lambda_max:
            return 2.0
        # In float64 too, weights may have been rounded to float32 before.
        rounded = adj if adj.weight is None else replace(adj, weight=adj.weight.float())
        if not ops.marked_symmetric(rounded).symmetric:
            raise ValueError(
                "ChebConv: compute_lambda_max needs a symmetric graph; symmetrize it, or give lambda_max yourself"
            )
        return ops.lambda_max(adj, segments, laplacian=not self.torchmil_layout)

    def forward_packed(
        self, x: Tensor, adj: Adjacency, segments: Segments, lambda_max: float | Tensor | None = None
    ) -> Tensor:
        """Convolve a pack.

        Args:
            x: ``(T, in_channels)``.
            adj: the graph over the T instances.
            segments: how they are cut into bags.
            lambda_max: a number, or one for each bag; None: :meth:`lambda_max`.

        Returns:
            ``(T, out_channels)``.
        """
        if isinstance(self.fc, torch.nn.LazyLinear):
            lazy = self.fc.weight
            self.fc(torch.zeros(1, self.K * x.shape[1], device=lazy.device, dtype=lazy.dtype))
        weight = self.fc.weight
        if x.shape[1] * self.K != weight.shape[1]:
            raise ValueError(f"ChebConv: instances of width {x.shape[1]}, expected {weight.shape[1] // self.K}")
        scale = self.lambda_max(adj, segments) if lambda_max is None else lambda_max
        if not self.torchmil_layout:
            return ops.chebyshev_conv(adj, x, readable(self.fc).weight, scale, segments)
        degree = ops.degrees(ops.transpose(adj))
        terms = ops.chebyshev(adj, x.to(weight.dtype), self.K, scale, segments, degree=degree)
        return self.fc(torch.cat([part.reshape(part.shape[1], -1) for part in terms.split(segments.sizes, dim=1)]))

    def forward(self, x: Tensor, adj: Tensor, lambda_max: float | Tensor | None = None) -> Tensor:
        """Convolve a padded batch.

        Args:
            x: ``(B, N, in_channels)``.
            adj: ``(B, N, N)``, dense or sparse COO.
            lambda_max: a number, or a tensor of one for each bag; None as above.

        Returns:
            ``(B, N, out_channels)``.
        """
        bags = PackedBags.from_padded(x, adj=adj)
        assert bags.adj is not None
        return bags.to_padded(self.forward_packed(bags.x, bags.adj, bags.segments, lambda_max))
