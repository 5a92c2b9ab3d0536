"""What torchmil users import from ``torchmil.nn.utils``."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbag.nn.linear import LazyLinear, get_feat_dim
from bigbag.nn.losses import SmoothTop1SVM
from bigbag.nn.pools import MaskedSoftmax, masked_softmax
from bigbag.nn.positions import SinusoidalPositionalEncodingND

__all__ = [
    "LazyLinear",
    "MaskedSoftmax",
    "SinusoidalPositionalEncodingND",
    "SmoothTop1SVM",
    "delta",
    "get_feat_dim",
    "log_sum_exp",
    "masked_softmax",
]


def log_sum_exp(x: Tensor) -> Tensor:
    """``log sum_c exp(x_c)`` of ``(n, C)``: ``(n,)``."""
    return torch.logsumexp(x, 1)


def delta(y: Tensor, labels: Tensor, alpha: float | None = None) -> Tensor:
    """``alpha`` (None: 1) where a class ``y (n, ...)`` is not the label ``(C,)``, else 0; ``(n, C)`` from ``(n,)``."""
    return torch.ne(y[:, None], labels.to(y.device)[None]).float() * (1.0 if alpha is None else alpha)
