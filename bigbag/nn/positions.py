"""Encodings of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SinusoidalPositionalEncodingND(torch.nn.Module):
    r"""Sines and cosines of the place on a grid of ``n_dim`` dimensions (Vaswani et al. 2017, arXiv 1706.03762).

    Each dimension has c channels, ``channels / n_dim`` rounded up to an even number; those of place p are
    ``sin(p w_0), cos(p w_0), sin(p w_1), ...`` with ``w_k = 10000^(-2k / c)``. The dimensions stand one after the
    other, cut to the channels of the input.

    Args:
        n_dim: dimensions of the grid.
        channels: channels of the encoding.
        dtype_override: dtype of the encoding; None: that of the input.
    """

    inv_freq: Tensor

    def __init__(self, n_dim: int, channels: int, dtype_override: torch.dtype | None = None) -> None:
        super().__init__()
        self.n_dim = n_dim
        self.org_channels = channels
        self.channels = 2 * math.ceil(channels / (2 * n_dim))
        self.dtype_override = dtype_override
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, self.channels, 2).float() / self.channels))

    def encode(self, places: Tensor) -> Tensor:
        """``(...)`` places along one dimension to ``(..., c)``."""
        angles = places[..., None].to(self.inv_freq.dtype) * self.inv_freq
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)

    def forward(self, tensor: Tensor) -> Tensor:
        """Encoding of the places of ``(B, l_1, ..., l_n, C)``, in that shape; the same memory for all B.

        Where C is more than the encoding's ``n_dim`` times c channels, there are as many as those.

        Raises:
            RuntimeError: not ``n_dim`` dimensions between the first and the last.
        """
        if tensor.dim() != self.n_dim + 2:
            raise RuntimeError(f"The input tensor has to be {self.n_dim + 2}d, got {tensor.dim()}d")
        grid = tensor.shape[1:-1]
        parts = []
        for i, length in enumerate(grid):
            waves = self.encode(torch.arange(length, device=tensor.device))
            parts.append(waves.view(*[1] * i, length, *[1] * (self.n_dim - i - 1), -1).expand(*grid, -1))
        dtype = tensor.dtype if self.dtype_override is None else self.dtype_override
        return torch.cat(parts, -1)[..., : tensor.shape[-1]].to(dtype).expand(*tensor.shape[:-1], -1)
