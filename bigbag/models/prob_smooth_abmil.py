"""ProbSmoothABMIL and SmoothABMIL: attention-based MIL with a (Gaussian) attention regularised by the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.models.base import GraphMILModel, feature_dim
from bigbag.nn import LazyLinear, ProbSmoothAttentionPool
from bigbag.nn.encoded import Encoded, rows_of
from bigbag.nn.linear import project, readable


class ProbSmoothABMIL(GraphMILModel):
    r"""MIL with probabilistic smooth attention (Castro-Macias et al., arXiv 2507.14932).

    ``X = feat_ext(X)``; ``z^m = ProbSmoothAttentionPool(X)``; the logits are ``W z^m + b``, one per draw m of the
    attention. The loss is the criterion, averaged over the draws, plus the pool's KL term, which alone uses the graph.
    The instance scores are the means of the attention values.

    The classifier is linear, so it is applied before the pooling: draws pool ``(T, out_dim)`` logits, not features.

    In training the logits of a bag are the mean over ``n_samples_train`` draws. Differs from torchmil in evaluation:
    the mean is exact (:func:`bigbag.ops.expected_attention`), where torchmil averages over ``n_samples_test`` draws; so
    it is the same in every run and pack. Draws are made where they are asked for: ``return_samples``, ``compute_loss``
    (there by a fixed seed in evaluation, the same for each bag). The scores are exact means, too.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        att_dim: half the width of the MLP of the attention.
        covar_mode: "diag" or, for an attention without variance, "zero".
        n_samples_train: draws in training.
        n_samples_test: draws in evaluation, where draws are asked for.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: another ``covar_mode``.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        covar_mode: str = "diag",
        n_samples_train: int = 1000,
        n_samples_test: int = 5000,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = feature_dim(self.feat_ext, in_shape)
        self._add_pool(feat_dim, out_dim, (att_dim, covar_mode, n_samples_train, n_samples_test))

    def _add_pool(self, feat_dim: int | None, out_dim: int, pool: tuple[int, str, int, int]) -> None:
        self.pool = ProbSmoothAttentionPool(feat_dim, *pool)
        self.classifier = LazyLinear(feat_dim, out_dim)

    def embed(self, bags: PackedBags) -> Tensor | Encoded:
        """``(T, D)``: the instances as the pool sees them."""
        return self.features(self.feat_ext, bags.x)

    def forward_bags(  # type: ignore[no-untyped-def]
        self,
        bags: PackedBags,
        return_att: bool = False,
        return_samples: bool = False,
        return_kl_div: bool = False,
        seed: int | None = None,
    ):
        """Compute on a pack; as :meth:`forward`, with ``(T, ...)`` for ``(B, N, ...)``, and a seed of the draws."""
        self.pool.recompute = self.activation_checkpointing
        x = self.embed(bags)
        mu, log_var = self.pool.distribution(x)
        # To the left of the pooling, which commutes with it: (T, out_dim) instead of (T, D).
        classifier = readable(self.classifier.materialize(x.shape[-1]))
        values = rows_of(x, lambda rows: project(rows, classifier.weight), modules=[classifier]).to(mu.dtype)
        f = mu
        if return_samples or self.training:
            wanted = return_att and return_samples
            pooled, draws = self.pool.sample(mu, log_var, values, bags.segments, return_draws=wanted, seed=seed)
            Y_pred = pooled + classifier.bias
            if not return_samples:
                Y_pred = Y_pred.mean(1)
            elif draws is not None:
                f = draws
        else:
            Y_pred = self.pool.mean(mu, log_var, values, bags.segments) + classifier.bias
        Y_pred = Y_pred.squeeze(-1) if self.classifier.module.out_features == 1 else Y_pred
        out: list[Any] = [Y_pred] + ([f] if return_att else [])
        if return_kl_div:
            assert bags.adj is not None
            out.append(self.pool.kl_div(mu, log_var, bags.adj, bags.segments))
        return tuple(out) if len(out) > 1 else out[0]

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_att: bool = False,
        return_samples: bool = False,
        return_kl_div: bool = False,
    ) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)``, or a pack, which brings its own mask and graph.
            adj: ``(B, N, N)``, dense or sparse COO; only for ``return_kl_div``.
            mask: ``(B, N)``.
            return_att: also return attention values.
            return_samples: return the S draws themselves, of logits and attention values, not their mean.
            return_kl_div: also return the KL term.

        Returns:
            Y_pred: ``(B,)`` or ``(B, out_dim)`` logits; with ``return_samples`` ``(B, S)`` or ``(B, S, out_dim)``.
            att: ``(B, N)``, or ``(B, N, S)``; ``(T, ...)`` for a pack; only if ``return_att``.
            kl_div: scalar, only if ``return_kl_div``.
        """
        if return_kl_div:
            bags = self.pack(X, mask, adj)
        else:
            bags = X if isinstance(X, PackedBags) else PackedBags.from_padded(X, mask)
            self.check_parts(bags)
        out = self.forward_bags(bags, return_att, return_samples, return_kl_div)
        if isinstance(X, PackedBags) or not return_att:
            return out
        Y_pred, f, *rest = out
        return (Y_pred, bags.to_padded(f), *rest)

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, adj: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Mean logits, and the losses: the criterion, averaged over the draws, and "KLDiv".

        Args:
            Y: ``(B,)`` labels, or ``(B, out_dim)``.
            X: as in :meth:`forward`, as are ``adj``, here required, and ``mask``.
        """
        bags = self.pack(X, mask, adj)
        seed = None if self.training else 0
        Y_pred, kl_div = self.forward_bags(bags, return_samples=True, return_kl_div=True, seed=seed)
        if getattr(self.criterion, "spans_step", False):  # it compares bags with each other, draw by draw
            loss = self.bag_loss(Y_pred, Y)
        else:
            loss = self.bag_loss(Y_pred.flatten(0, 1), Y.repeat_interleave(Y_pred.shape[1], 0))
        return Y_pred.mean(1), {type(self.criterion).__name__: loss, "KLDiv": kl_div}

    def predict(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        return_inst_pred: bool = True,
        return_samples: bool = False,
        adj: Tensor | None = None,
    ) -> Any:
        """As :meth:`forward`; the graph takes no part in predictions, and ``adj`` may be left out."""
        return self.forward(X, adj, mask, return_att=return_inst_pred, return_samples=return_samples)


class SmoothABMIL(ProbSmoothABMIL):
    r"""MIL with smooth attention (Wu et al., MICCAI 2023, arXiv 2307.09457): :class:`ProbSmoothABMIL` without variance.

    The loss is the criterion plus "DirEnergy", ``1/N mu^T (I - A) mu``: how much attention values differ along edges.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        att_dim: half the width of the MLP of the attention.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__(in_shape, att_dim, "zero", 1, 1, feat_ext, criterion, out_dim)

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, adj: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """As in the class that it extends, with "DirEnergy" for "KLDiv"."""
        Y_pred, losses = super().compute_loss(Y, X, adj, mask)
        losses["DirEnergy"] = losses.pop("KLDiv")
        return Y_pred, losses
