"""SmABMIL: attention-based MIL whose attention is smooth over the graph of the bag."""

from __future__ import annotations

import torch

from bigbag.bags import PackedBags
from bigbag.models.base import GraphMILModel, required_feature_dim, squeeze_single_output
from bigbag.nn import SmAttentionPool


class SmABMIL(GraphMILModel):
    r"""Attention-based MIL with the Sm operator (Castro-Macias et al., NeurIPS 2024, arXiv 2410.03276).

    ``X = feat_ext(X)``; ``z, f = SmAttentionPool(X, A)``; the logits are ``W z + b``. The instance scores are the
    attention values ``f`` before the softmax. Cost: that of :class:`bigbag.nn.SmAttentionPool`.

    Args:
        in_shape: shape of one instance.
        att_dim: width of the attention space.
        att_act: "tanh", "relu" or "gelu".
        sm_mode: "approx" or "exact".
        sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`.
        sm_steps: steps of the approximate Sm.
        sm_where: "early", "mid", "late" or "none".
        spectral_norm: use spectral normalisation in the pool.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: no ``in_shape``; arguments that :class:`bigbag.nn.SmAttentionPool` refuses.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        att_dim: int = 128,
        att_act: str = "tanh",
        sm_mode: str = "approx",
        sm_alpha: float | str = "trainable",
        sm_steps: int = 10,
        sm_where: str = "early",
        spectral_norm: bool = False,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = required_feature_dim(self, in_shape)
        self.pool = SmAttentionPool(
            in_dim=feat_dim,
            att_dim=att_dim,
            act=att_act,
            sm_mode=sm_mode,
            sm_alpha=sm_alpha,
            sm_steps=sm_steps,
            sm_where=sm_where,
            spectral_norm=spectral_norm,
        )
        self.last_layer = torch.nn.Linear(feat_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        self.pool.recompute = self.activation_checkpointing
        z, f = self.pool.pool(self.features(self.feat_ext, bags.x), bags.segments, bags.adj)
        Y_pred = squeeze_single_output(self.last_layer(z))
        return (Y_pred, f) if return_att else Y_pred
