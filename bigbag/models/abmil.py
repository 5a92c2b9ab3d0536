"""ABMIL: attention-based multiple-instance learning."""

from __future__ import annotations

import torch

from bigbag.bags import PackedBags
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, LazyLinear


class ABMIL(MILModel):
    r"""Attention-based MIL (Ilse, Tomczak and Welling 2018, arXiv 1802.04712).

    ``X = feat_ext(X)``; ``z, f = AttentionPool(X)``; the logits are ``W z + b``. The instance scores are the attention
    values ``f`` before the softmax.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        att_dim: width of the attention space.
        att_act: "tanh", "relu" or "gelu".
        gated: use gated attention.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        dropout: probability of zeroing an entry of the bag vector ``z`` in training.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        att_act: str = "tanh",
        gated: bool = False,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = feature_dim(self.feat_ext, in_shape)
        self.pool = AttentionPool(in_dim=feat_dim, att_dim=att_dim, act=att_act, gated=gated)
        self.dropout = torch.nn.Dropout(dropout)
        self.classifier = LazyLinear(feat_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        self.pool.recompute = self.activation_checkpointing
        z, f = self.pool.pool(self.features(self.feat_ext, bags.x), bags.segments)
        Y_pred = squeeze_single_output(self.classifier(self.dropout(z)))
        return (Y_pred, f) if return_att else Y_pred
