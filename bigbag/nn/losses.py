"""Losses of instances."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SmoothTop1SVM(torch.nn.Module):
    r"""Smooth multi-class hinge loss (Berrada, Zisserman and Kumar 2018, arXiv 1802.07595, with k = 1).

        loss_i = tau log sum_c exp((x_ic - x_iy + alpha [c != y]) / tau)      where the two largest scores are close,
        loss_i = max_c (x_ic - x_iy + alpha [c != y])                         where they are tau log(1000) apart or more

    Differs from torchmil, which adds and subtracts arrays that do not line up: it sums the exponentials over the
    samples instead of the classes, so that the margin ``alpha`` drops out of the gradient, takes targets (n, 1) alone,
    and raises as soon as three samples are far apart.

    Args:
        n_classes: number of classes; at least 2.
        alpha: margin.
        tau: temperature; towards 0 the loss becomes the hinge loss.
    """

    def __init__(self, n_classes: int, alpha: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.alpha = alpha
        self.tau = tau
        self.thresh = 1e3

    def per_sample(self, x: Tensor, y: Tensor) -> Tensor:
        """``(..., n_classes)`` scores and ``(...)`` classes to ``(...)`` losses."""
        index = y.long()[..., None]
        margins = (x - x.gather(-1, index) + self.alpha).scatter_add(-1, index, x.new_full(index.shape, -self.alpha))
        top = x.detach().topk(2, -1).values
        hard = top[..., 0] - top[..., 1] >= self.tau * math.log(self.thresh)
        return torch.where(hard, margins.amax(-1), self.tau * torch.logsumexp(margins / self.tau, -1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss.

        Args:
            x: ``(n, n_classes)`` scores.
            y: ``(n,)`` or ``(n, 1)`` classes, or ``(n, n_classes)`` with a one at the class.

        Returns:
            scalar; 0 where n = 0.
        """
        if y.dim() > 1:
            y = y.argmax(-1) if y.shape[-1] > 1 else y.squeeze(-1)
        return self.per_sample(x, y).sum() / max(1, len(x))
