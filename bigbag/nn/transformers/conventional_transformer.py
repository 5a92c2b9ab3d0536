"""Transformer layers with exact softmax attention, on packs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigbag.nn.attention.multihead_self_attention import MultiheadSelfAttention
from bigbag.nn.transformers.encoder import LayerStack
from bigbag.nn.transformers.layer import Layer


class TransformerLayer(Layer):
    r"""Transformer layer with exact softmax attention: :class:`Layer` around :class:`MultiheadSelfAttention`.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attention.
        n_heads: heads.
        use_mlp: whether there is an MLP.
        dropout: of attention weights and MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        att_module = MultiheadSelfAttention(in_dim, att_dim, att_dim, n_heads, dropout)
        super().__init__(att_module, in_dim, in_dim, out_dim, att_dim, use_mlp, dropout=dropout)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:  # type: ignore[override]
        """As :meth:`Layer.forward`, with ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, mask=mask)


class TransformerEncoder(LayerStack):
    r"""A stack of :class:`TransformerLayer`, normalised at the end.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attentions, and between the layers.
        n_heads: heads.
        n_layers: layers.
        use_mlp: whether the layers have an MLP.
        add_self: add the input to the output of every layer; all widths must agree.
        dropout: of attention weights and MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        n_layers: int = 4,
        use_mlp: bool = True,
        add_self: bool = False,
        dropout: float = 0.0,
    ) -> None:

        def layer(width_in: int, width_out: int) -> TransformerLayer:
            return TransformerLayer(width_in, width_out, att_dim, n_heads, use_mlp, dropout)

        super().__init__(layer, in_dim, out_dim, att_dim, n_layers, add_self)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:  # type: ignore[override]
        """As :meth:`Encoder.forward`, with ``mask`` ``(B, N)``."""
        return super().forward(X, return_att, mask=mask)
