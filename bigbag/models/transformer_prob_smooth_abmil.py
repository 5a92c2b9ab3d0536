"""TransformerProbSmoothABMIL: probabilistic smooth attention on top of a transformer encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.models.base import MILModel, required_feature_dim
from bigbag.models.prob_smooth_abmil import ProbSmoothABMIL
from bigbag.nn import TransformerEncoder


class TransformerProbSmoothABMIL(ProbSmoothABMIL):
    r""":class:`ProbSmoothABMIL` on instances that a transformer has seen together (arXiv 2507.14932).

    ``X = feat_ext(X)``; ``X = TransformerEncoder(X)``; then as in the class that it extends, whose differences from
    torchmil are its own, too.

    Args:
        in_shape: shape of one instance. None, torchmil's default, does not work there either.
        pool_att_dim: half the width of the MLP of the attention.
        covar_mode: "diag" or "zero".
        n_samples_train: draws in training.
        n_samples_test: draws in evaluation, where draws are asked for.
        feat_ext: module applied to each instance; None for none.
        transf_att_dim: width of the transformer; with ``transf_add_self`` and several layers, that of the instances.
        transf_n_layers: layers.
        transf_n_heads: heads.
        transf_use_mlp: whether the layers have an MLP.
        transf_add_self: add the instances to the output of every layer.
        transf_dropout: of attention weights and MLP.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: no ``in_shape``, another ``covar_mode``.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        pool_att_dim: int = 128,
        covar_mode: str = "diag",
        n_samples_train: int = 1000,
        n_samples_test: int = 5000,
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
        MILModel.__init__(self)  # the layers in torchmil's order: an optimiser's state goes by the order of parameters
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = required_feature_dim(self, in_shape)
        self.transformer_encoder = TransformerEncoder(
            feat_dim,
            att_dim=transf_att_dim,
            n_layers=transf_n_layers,
            n_heads=transf_n_heads,
            use_mlp=transf_use_mlp,
            add_self=transf_add_self,
            dropout=transf_dropout,
        )
        self._add_pool(feat_dim, out_dim, (pool_att_dim, covar_mode, n_samples_train, n_samples_test))

    def predict(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_inst_pred: bool = True,
        return_samples: bool = False,
    ) -> Any:
        """As :meth:`forward`; the graph takes no part in predictions, and ``adj`` may be left out."""
        return self.forward(X, adj, mask, return_att=return_inst_pred, return_samples=return_samples)

    def embed(self, bags: PackedBags) -> Tensor:
        self.transformer_encoder.recompute = self.activation_checkpointing
        return self.transformer_encoder.forward_packed(self.encode(self.feat_ext, bags.x), bags.segments)
