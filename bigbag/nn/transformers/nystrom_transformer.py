"""Transformer layers with Nystrom attention, on packs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigbag.nn.attention.nystrom_attention import NystromAttention
from bigbag.nn.transformers.encoder import LayerStack
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


class NystromTransformerEncoder(LayerStack):
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

        def layer(width_in: int, width_out: int) -> NystromTransformerLayer:
            nystrom = (True, n_landmarks, pinv_iterations, dropout, use_mlp, zero_padding, conv_residual)
            return NystromTransformerLayer(width_in, width_out, att_dim, n_heads, *nystrom)

        super().__init__(layer, in_dim, out_dim, att_dim, n_layers, add_self)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:  # type: ignore[override]
        """As :meth:`Encoder.forward`, with ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, mask=mask)
