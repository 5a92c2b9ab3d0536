"""Baselines without attention: mean pooling and max pooling."""

from __future__ import annotations

import torch

from bigbag.bags import PackedBags
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import LazyLinear, MaxPool, MeanPool
from bigbag.nn.encoded import rows_of


class _PoolingMIL(MILModel):
    """``z = pool(feat_ext(X))``; the logits are ``W z + b``.

    The score of an instance is the logit of a bag that holds it alone, the largest one where there are several.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        dropout: probability of zeroing an entry of the bag vector ``z`` in training.
    """

    pool_class: type[MeanPool] | type[MaxPool]

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        self.pool = self.pool_class()
        self.dropout = torch.nn.Dropout(dropout)
        self.classifier = LazyLinear(feature_dim(self.feat_ext, in_shape), out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        x = self.features(self.feat_ext, bags.x)
        classifier = self.classifier.materialize(x.shape[-1])
        z = self.pool.pool(x, bags.segments).to(classifier.weight.dtype)
        Y_pred = squeeze_single_output(classifier(self.dropout(z)))
        if not return_att:
            return Y_pred
        logits = rows_of(x, lambda rows: classifier(rows.to(classifier.weight.dtype)), modules=[classifier])
        return Y_pred, logits.amax(-1)


class MeanMIL(_PoolingMIL):
    """Mean pooling: the bag is its average instance. Arguments as in the class that it extends."""

    pool_class = MeanPool


class MaxMIL(_PoolingMIL):
    """Max pooling: the bag is the largest value of each feature. Arguments as in the class that it extends."""

    pool_class = MaxPool
