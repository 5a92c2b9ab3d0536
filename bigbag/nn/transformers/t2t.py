"""Tokens-to-token layer: tokens of neighbouring tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.bags import Segments
from bigbag.nn.linear import readable
from bigbag.nn.transformers.conventional_transformer import TransformerLayer


class T2TLayer(torch.nn.Module):
    r"""Tokens-to-token layer (Yuan et al. 2021, arXiv 2101.11986): attention, then windows of tokens become tokens.

    ``Y = Unfold(TransformerLayer(X)) W + b`` over the tokens laid out as a square, row by row. With ``out_dim`` the
    windows are never formed: the linear layer is a convolution.

    Args:
        in_dim: token width.
        out_dim: output width; None: windows as they are, ``kernel_size[0] * kernel_size[1] * att_dim`` wide.
        att_dim: width of the attention.
        kernel_size, stride, padding, dilation: of the windows.
        n_heads: heads.
        use_mlp: whether the transformer layer has an MLP.
        dropout: of attention weights and MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        kernel_size: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (2, 2),
        dilation: tuple[int, int] = (1, 1),
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.unfold = torch.nn.Unfold(kernel_size, dilation, padding, stride)
        self.transf_layer = TransformerLayer(in_dim, att_dim, att_dim, n_heads, use_mlp, dropout)
        windows = att_dim * kernel_size[0] * kernel_size[1]
        self.out_proj = torch.nn.Identity() if out_dim is None else torch.nn.Linear(windows, out_dim)

    def forward_packed(self, x: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        """``(T, in_dim)`` tokens of a pack, in each bag a square number, to ``(T', out_dim)`` and how they are cut."""
        tokens = self.transf_layer.forward_packed(x, segments)
        found = [self._unfold(bag[None])[0] for bag in tokens.split(segments.sizes)]
        sizes = [len(bag) for bag in found]
        return torch.cat([*found, tokens.new_zeros(0, found[0].shape[-1])]), Segments.from_sizes(sizes, x.device)

    def forward(self, X: Tensor) -> Tensor:
        """``(B, N, in_dim)``, N a square number, to ``(B, N', out_dim)``."""
        return self._unfold(self.transf_layer(X))

    def _unfold(self, X: Tensor) -> Tensor:
        side = math.isqrt(X.shape[1])
        if side * side != X.shape[1]:
            raise ValueError(f"T2TLayer: expected a square number of tokens, got {X.shape[1]}")
        grid, window = X.mT.reshape(X.shape[0], -1, side, side), self.unfold
        if not isinstance(self.out_proj, torch.nn.Identity):
            weight = readable(self.out_proj).weight.view(-1, grid.shape[1], *self.kernel_size)
            found = F.conv2d(grid, weight, self.out_proj.bias, window.stride, window.padding, window.dilation).flatten(
                2
            )
        else:
            found = window(grid)
        return found.mT
