"""VAEABMIL: attention pooling of the latent variables of a variational autoencoder, trained together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, LazyLinear, VariationalAutoEncoder, VariationalAutoEncoderMIL
from bigbag.nn.encoded import seed_generators
from bigbag.nn.variational_autoencoder import reduce_bags


class VAEABMIL(MILModel):
    r"""ABMIL on the latent variables of a variational autoencoder.

    "Using variational autoencoders for out of distribution detection in histological multiple instance learning",
    IEEE Xplore 11098836.

    ``z_n ~ q(z | x_n)``, averaged over the samples; ABMIL pools ``z``; the loss is the criterion plus the terms
    ``VaeELL`` and ``VaeKL`` of :class:`~bigbag.nn.VariationalAutoEncoder`. Instances are encoded once for all of it.

    In eval ``z_n`` is the posterior's mean, unless samples are asked for, and the losses draw by a fixed seed; torchmil
    draws anew every time. And other than in torchmil, padding does not enter the losses, which are means over the bags.

    Args:
        feat_ext: the autoencoder; None: a :class:`~bigbag.nn.VariationalAutoEncoderMIL` of its default widths.
        in_shape: shape of one instance; None learns the width of z from the first input.
        att_dim: width of the attention space.
        att_act: "tanh", "relu" or "gelu".
        gated: use gated attention.
        criterion: loss of the logits; None for binary cross-entropy.
        vae_loss_reduction: of the autoencoder's terms over the instances of a bag: "mean", "sum", or "none", which
            leaves a term per instance.
        out_dim: logits per bag.

    Raises:
        ValueError: neither ``feat_ext`` nor ``in_shape``, or a ``feat_ext`` that is no such autoencoder.
    """

    feat_ext: VariationalAutoEncoder

    in_parts = True

    def __init__(
        self,
        feat_ext: VariationalAutoEncoder | None = None,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        att_act: str = "tanh",
        gated: bool = False,
        criterion: torch.nn.Module | None = None,
        vae_loss_reduction: str = "mean",
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        if feat_ext is None and in_shape is None:
            raise ValueError("VAEABMIL needs feat_ext, a VariationalAutoEncoder, or in_shape to make one")
        if feat_ext is not None and not isinstance(feat_ext, VariationalAutoEncoder):
            raise ValueError(
                f"VAEABMIL: feat_ext is a {type(feat_ext).__name__}, expected a bigbag.nn.VariationalAutoEncoder or "
                "VariationalAutoEncoderMIL"
            )
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.vae_loss_reduction = vae_loss_reduction
        self.feat_ext = VariationalAutoEncoderMIL(tuple(in_shape or ())) if feat_ext is None else feat_ext
        feat_dim = feature_dim(self.feat_ext, in_shape)
        self.pool = AttentionPool(in_dim=feat_dim, att_dim=att_dim, act=att_act, gated=gated)
        self.classifier = LazyLinear(feat_dim, out_dim)

    def _posterior(self, bags: PackedBags) -> tuple[Tensor, Tensor]:
        """Mean (T, latent) and log standard deviation of the posteriors."""
        self.feat_ext.recompute = self.activation_checkpointing
        return self.feat_ext.get_raw_output_enc(bags.x)

    def _latent(self, mean: Tensor, log_std: Tensor, n_samples: int | None) -> Tensor:
        """(T, latent): the mean of samples, or in eval of the posterior where no number is given."""
        if n_samples is None and not self.training:
            return mean
        return self.feat_ext.get_reparameterized_samples(mean, log_std, n_samples or 1).mean(1)

    def _samples(self, mean: Tensor, log_std: Tensor, n_samples: int, bags: PackedBags) -> Tensor:
        """(T, n_samples, latent) of the posteriors; in eval by a fixed seed, so that a bag has one loss."""
        draw = self.feat_ext.get_reparameterized_samples
        if self.training:
            return draw(mean, log_std, n_samples)
        found = []
        with torch.random.fork_rng([mean.device] if mean.is_cuda else []):
            for of_bag in zip(mean.split(bags.sizes), log_std.split(bags.sizes)):
                seed_generators(0)
                found.append(draw(*of_bag, n_samples))
        return torch.cat(found)

    def _classify(self, latent: Tensor, bags: PackedBags) -> tuple[Tensor, Tensor]:
        self.pool.recompute = self.activation_checkpointing
        z, f = self.pool.pool(latent, bags.segments)
        return squeeze_single_output(self.classifier(z)), f

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        Y_pred, f = self._classify(self._latent(*self._posterior(bags), None), bags)
        return (Y_pred, f) if return_att else Y_pred

    def forward(
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        return_att: bool = False,
        return_latent_repr: bool = False,
        n_samples: int | None = None,
    ) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)`` padded bags, or a :class:`~bigbag.PackedBags`.
            mask: ``(B, N)``, zero where there is no instance.
            return_att: also return the attention values before the softmax.
            return_latent_repr: also return what was pooled.
            n_samples: samples of each posterior; None: one in training, its mean in eval.

        Returns:
            Y_pred: ``(B,)`` logits, or ``(B, out_dim)``.
            att: ``(B, N)``; for a pack ``(T,)``.
            latent: ``(B, N, latent)``; for a pack ``(T, latent)``.
        """
        bags = self.pack(X, mask)
        latent = self._latent(*self._posterior(bags), n_samples)
        Y_pred, f = self._classify(latent, bags)
        extras = [part for part, wanted in ((f, return_att), (latent, return_latent_repr)) if wanted]
        if not isinstance(X, PackedBags):
            extras = [bags.to_padded(part) for part in extras]
        return (Y_pred, *extras) if extras else Y_pred

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, mask: Tensor | None = None, n_samples: int = 1
    ) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`, with "VaeELL" over ``n_samples`` samples and "VaeKL"."""
        bags = self.pack(X, mask)
        mean, log_std = self._posterior(bags)
        Y_pred, _ = self._classify(self._latent(mean, log_std, None), bags)
        samples = self._samples(mean, log_std, n_samples, bags)
        terms = self.feat_ext.elbo(bags.x.flatten(1), mean, log_std, samples)
        losses = {type(self.criterion).__name__: self.bag_loss(Y_pred, Y)}
        for name, term in zip(("VaeELL", "VaeKL"), terms):
            losses[name] = reduce_bags(term, bags.segments, self.vae_loss_reduction)
            if self.vae_loss_reduction == "none" and not isinstance(X, PackedBags):
                losses[name] = bags.to_padded(losses[name])
        return Y_pred, losses

    def log_marginal_likelihood_importance_sampling(
        self, X: Tensor, mask: Tensor | None = None, n_samples: int = 1
    ) -> Tensor:
        """``log p(x)`` of every instance of a padded batch, ``(B, N)``: low for what is unlike the training data."""
        bags = self.pack(X, mask)
        found = VariationalAutoEncoder.log_marginal_likelihood_importance_sampling(self.feat_ext, bags.x, n_samples)
        return bags.to_padded(found)
