"""Transformer layers with Nystrom attention, on packs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.nn.attention.nystrom_attention import NystromAttention
from bigbag.nn.transformers.encoder import Encoder, layer_widths
from bigbag.nn.transformers.layer import Layer


class NystromTransformerLayer(Layer):
    r"""Transformer layer with Nystrom attention: :class:`Layer` around :class:`NystromAttention`.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attention.
        n_heads: heads.
        learn_weights: as in :class:`NystromAttention`, as are the next two.
        n_landmarks: landmarks.
        pinv_iterations: steps of the pseudo-inverse.
        dropout: of the MLP.
        use_mlp: whether there is an MLP.
        zero_padding: as in :class:`NystromAttention`, as is the next.
        conv_residual: add a convolution of the values.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        learn_weights: bool = True,
        n_landmarks: int = 256,
        pinv_iterations: int = 6,
        dropout: float = 0.0,
        use_mlp: bool = False,
        zero_padding: bool = True,
        conv_residual: bool = False,
    ) -> None:
        widths = (in_dim, att_dim, att_dim, n_heads, learn_weights)
        att_module = NystromAttention(*widths, n_landmarks, pinv_iterations, zero_padding, conv_residual)
        super().__init__(att_module, in_dim, in_dim, out_dim, att_dim, use_mlp, dropout=dropout)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:  # type: ignore[override]
        """As :meth:`Layer.forward`, with ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, mask=mask)


class NystromTransformerEncoder(Encoder):
    r"""A stack of :class:`NystromTransformerLayer`, normalised at the end.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attentions, and between the layers.
        n_heads: heads.
        n_layers: layers.
        n_landmarks: landmarks.
        pinv_iterations: steps of the pseudo-inverse.
        dropout: of the MLP.
        use_mlp: whether the layers have an MLP.
        add_self: add the input to the output of every layer; all widths must agree.
        zero_padding: as in :class:`NystromAttention`, as is the next.
        conv_residual: add a convolution of the values.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 8,
        n_layers: int = 4,
        n_landmarks: int = 256,
        pinv_iterations: int = 6,
        dropout: float = 0.0,
        use_mlp: bool = False,
        add_self: bool = False,
        zero_padding: bool = True,
        conv_residual: bool = False,
    ) -> None:
        out_dim = in_dim if out_dim is None else out_dim
        layers = [
            NystromTransformerLayer(
                width_in,
                width_out,
                att_dim,
                n_heads,
                n_landmarks=n_landmarks,
                pinv_iterations=pinv_iterations,
                dropout=dropout,
                use_mlp=use_mlp,
                zero_padding=zero_padding,
                conv_residual=conv_residual,
            )
            for width_in, width_out in layer_widths(in_dim, att_dim, out_dim, n_layers)
        ]
        super().__init__(torch.nn.ModuleList(layers), add_self)
        self.norm = torch.nn.LayerNorm(out_dim)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:  # type: ignore[override]
        """As :meth:`Encoder.forward`, with ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, mask=mask)
