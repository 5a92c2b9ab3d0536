"""SmTransformerABMIL: a transformer encoder and attention pooling, both smoothed over the graph of the bag."""

from __future__ import annotations

import torch

from bigbag import ops
from bigbag.bags import PackedBags
from bigbag.models.base import GraphMILModel, required_feature_dim, squeeze_single_output
from bigbag.nn import SmAttentionPool, SmTransformerEncoder


class SmTransformerABMIL(GraphMILModel):
    r"""Transformer and attention pooling with the Sm operator (Castro-Macias et al., NeurIPS 2024, arXiv 2410.03276).

    ``X = feat_ext(X)``; ``X = SmTransformerEncoder(X, A)``; ``z, f = SmAttentionPool(X, A)``; the logits are
    ``W z + b``. The instance scores are the attention values ``f`` before the softmax. Attention is exact: O(N^2) time
    in O(N) memory.

    Args:
        in_shape: shape of one instance.
        pool_att_dim: width of the attention space of the pool.
        pool_act: "tanh", "relu" or "gelu".
        pool_sm_mode: "approx" or "exact".
        pool_sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`.
        pool_sm_steps: steps of the approximate Sm.
        pool_sm_where: "early", "mid", "late" or "none".
        pool_spectral_norm: use spectral normalisation in the pool.
        feat_ext: module applied to each instance; None for none.
        transf_att_dim: width of the transformer; with ``transf_add_self`` and several layers, that of the instances.
        transf_n_layers: layers.
        transf_n_heads: heads.
        transf_use_mlp: whether the layers have an MLP.
        transf_add_self: add the instances to the output of every layer.
        transf_dropout: of attention weights and MLP.
        transf_sm_alpha: coefficient of Sm in the layers.
        transf_sm_mode: "approx" or "exact".
        transf_sm_steps: steps of the approximate Sm.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: no ``in_shape``; arguments that the layers refuse.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        pool_att_dim: int = 128,
        pool_act: str = "tanh",
        pool_sm_mode: str = "approx",
        pool_sm_alpha: float | str = "trainable",
        pool_sm_steps: int = 10,
        pool_sm_where: str = "early",
        pool_spectral_norm: bool = False,
        feat_ext: torch.nn.Module | None = None,
        transf_att_dim: int = 512,
        transf_n_layers: int = 1,
        transf_n_heads: int = 4,
        transf_use_mlp: bool = True,
        transf_add_self: bool = True,
        transf_dropout: float = 0.0,
        transf_sm_alpha: float | str = "trainable",
        transf_sm_mode: str = "approx",
        transf_sm_steps: int = 10,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = required_feature_dim(self, in_shape)
        self.transformer_encoder = SmTransformerEncoder(
            in_dim=feat_dim,
            att_dim=transf_att_dim,
            n_layers=transf_n_layers,
            n_heads=transf_n_heads,
            use_mlp=transf_use_mlp,
            add_self=transf_add_self,
            dropout=transf_dropout,
            sm_alpha=transf_sm_alpha,
            sm_mode=transf_sm_mode,
            sm_steps=transf_sm_steps,
        )
        self.pool = SmAttentionPool(
            in_dim=feat_dim,
            att_dim=pool_att_dim,
            act=pool_act,
            sm_mode=pool_sm_mode,
            sm_alpha=pool_sm_alpha,
            sm_steps=pool_sm_steps,
            sm_where=pool_sm_where,
            spectral_norm=pool_spectral_norm,
        )
        self.exact = "exact" in (transf_sm_mode, pool_sm_mode)
        self.last_layer = torch.nn.Linear(feat_dim, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        self.transformer_encoder.recompute = self.pool.recompute = self.activation_checkpointing
        assert bags.adj is not None
        # Looked at once, not in every layer.
        adj = ops.marked_symmetric(bags.adj) if self.exact else bags.adj
        x = self.transformer_encoder.forward_packed(self.encode(self.feat_ext, bags.x), bags.segments, adj=adj)
        z, f = self.pool.pool(x, bags.segments, adj)
        Y_pred = squeeze_single_output(self.last_layer(z))
        return (Y_pred, f) if return_att else Y_pred
