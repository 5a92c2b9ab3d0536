"""TransformerABMIL: attention pooling over instances that have attended to each other."""

from __future__ import annotations

import torch

from bigbag.bags import PackedBags
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, TransformerEncoder


class TransformerABMIL(MILModel):
    r"""ABMIL behind a transformer encoder (Castro-Macias et al. 2024, arXiv 2410.03276).

    ``X = TransformerEncoder(feat_ext(X))``; ``z, f = AttentionPool(X)``; the logits are ``W z + b``. The instance
    scores are the attention values ``f`` before the softmax.

    Attention is exact: quadratic in the size of a bag in time, linear in memory.

    Args:
        in_shape: shape of one instance.
        pool_att_dim: width of the attention space of the pooling.
        pool_act: "tanh", "relu" or "gelu".
        pool_gated: use gated attention in the pooling.
        feat_ext: module applied to each instance; None for none.
        transf_att_dim: width of the transformer's attention.
        transf_n_layers: its layers.
        transf_n_heads: its heads.
        transf_use_mlp: whether its layers have an MLP.
        transf_add_self: add its input to the output of every layer; widths must agree.
        transf_dropout: its dropout.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        pool_att_dim: int = 128,
        pool_act: str = "tanh",
        pool_gated: bool = False,
        feat_ext: torch.nn.Module | None = None,
        transf_att_dim: int = 512,
        transf_n_layers: int = 1,
        transf_n_heads: int = 8,
        transf_use_mlp: bool = True,
        transf_add_self: bool = True,
        transf_dropout: float = 0.0,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = feature_dim(self.feat_ext, in_shape)
        assert feat_dim is not None
        self.transformer_encoder = TransformerEncoder(
            feat_dim,
            att_dim=transf_att_dim,
            n_heads=transf_n_heads,
            n_layers=transf_n_layers,
            use_mlp=transf_use_mlp,
            add_self=transf_add_self,
            dropout=transf_dropout,
        )
        self.pool = AttentionPool(in_dim=feat_dim, att_dim=pool_att_dim, act=pool_act, gated=pool_gated)
        self.last_layer = torch.nn.Linear(feat_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        self.transformer_encoder.recompute = self.pool.recompute = self.activation_checkpointing
        x = self.transformer_encoder.forward_encoded(self.encode(self.feat_ext, bags.x), bags.segments)
        z, f = self.pool.pool(x, bags.segments)
        Y_pred = squeeze_single_output(self.last_layer(z))
        return (Y_pred, f) if return_att else Y_pred
