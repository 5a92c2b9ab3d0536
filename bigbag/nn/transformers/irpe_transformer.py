"""Transformer layers with image relative position encoding, on packs."""

from __future__ import annotations

from bigbag.nn.attention.irpe_multihead_self_attention import iRPEMultiheadSelfAttention
from bigbag.nn.transformers.encoder import LayerStack
from bigbag.nn.transformers.layer import Layer


class iRPETransformerLayer(Layer):
    r"""Transformer layer with relative positions: :class:`Layer` around :class:`iRPEMultiheadSelfAttention`.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attention.
        n_heads: heads.
        use_mlp: whether there is an MLP.
        dropout: of attention weights and MLP.
        rpe_ratio, rpe_method, rpe_mode, rpe_shared_head, rpe_skip, rpe_on, torchmil_layout: as in the attention.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
        rpe_ratio: float = 1.9,
        rpe_method: str = "product",
        rpe_mode: str | None = "contextual",
        rpe_shared_head: bool = True,
        rpe_skip: int = 1,
        rpe_on: str = "k",
        torchmil_layout: bool = False,
    ) -> None:
        position = (rpe_ratio, rpe_method, rpe_mode, rpe_shared_head, rpe_skip, rpe_on, torchmil_layout)
        att_module = iRPEMultiheadSelfAttention(in_dim, att_dim, att_dim, n_heads, dropout, True, *position)
        super().__init__(att_module, in_dim, in_dim, out_dim, att_dim, use_mlp, dropout=dropout)


class iRPETransformerEncoder(LayerStack):
    r"""A stack of :class:`iRPETransformerLayer`, normalised at the end.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of the attentions, and between the layers.
        n_heads: heads.
        n_layers: layers.
        use_mlp: whether the layers have an MLP.
        add_self: add the input to the output of every layer; all widths must agree.
        dropout: of attention weights and MLP.
        rpe_ratio, rpe_method, rpe_mode, rpe_shared_head, rpe_skip, rpe_on, torchmil_layout: as in the attention.
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
        rpe_ratio: float = 1.9,
        rpe_method: str = "product",
        rpe_mode: str | None = "contextual",
        rpe_shared_head: bool = True,
        rpe_skip: int = 1,
        rpe_on: str = "k",
        torchmil_layout: bool = False,
    ) -> None:

        def layer(width_in: int, width_out: int) -> iRPETransformerLayer:
            position = (rpe_ratio, rpe_method, rpe_mode, rpe_shared_head, rpe_skip, rpe_on, torchmil_layout)
            return iRPETransformerLayer(width_in, width_out, att_dim, n_heads, use_mlp, dropout, *position)

        super().__init__(layer, in_dim, out_dim, att_dim, n_layers, add_self)
        self.rpe_skip = rpe_skip
