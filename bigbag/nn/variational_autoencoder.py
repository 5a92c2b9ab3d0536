"""Variational autoencoders of instances, alone or in bags.

Encoder and decoder run in chunks of rows. Kept for the backward pass are the instances, the posterior, the random
numbers and, unless they are to be computed again, the hidden layers; never a reconstruction (T, P).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.linear import MLP, linear_error, readable, share_gram
from bigbag.nn.rows import Projection, by_rows
from bigbag.ops.registry import compute_dtype


class VariationalAutoEncoder(torch.nn.Module):
    r"""Gaussian variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114).

        q(z | x) = N(mu(x), s(x)^2),   p(x | z) = N(m(z), t(z)^2),   p(z) = N(0, 1)
        VaeELL = -E_q log p(x | z),    VaeKL = KL(q(z | x) || p(z));   their sum is minus the evidence bound

    Cost of :meth:`compute_loss` with S samples, E encoder and as many decoder weights, most of them at the instances:
    (4 + 4 S) T E FLOP; beyond inputs and parameters it holds O(T S hidden) numbers and one chunk. With ``recompute``,
    (6 + 6 S) T E FLOP and O(T S latent) numbers. (With "diagonal", in 16 bits or TF32, (4 + 8 S) and (6 + 8 S).)
    Of one standard deviation per instance only the sum of its squared errors is needed: in float32 and float64, the
    decoder's last layer is not computed for more rows than twice its inputs, see :func:`bigbag.nn.linear.linear_error`.

    Differs from torchmil: the importance weights use the same prior as ``VaeKL``, N(0, 1) (torchmil: a standard
    deviation of e).

    Args:
        input_shape: shape of one instance, flattened: (P,).
        layer_sizes: widths of the encoder's layers, the last one that of z; the decoder mirrors them.
        activations: taken for torchmil's sake; ReLU between layers, none at the end.
        covar_mode: "single": one standard deviation per instance; "diagonal": one per dimension.
        jitter: added to log s before sampling.
        layer_norm: normalise what enters the encoder, see :class:`bigbag.nn.MLP`; the likelihood is that of x itself.

    Raises:
        NotImplementedError: another ``covar_mode``.
    """

    recompute: bool = False
    """Compute hidden layers again in the backward pass instead of storing them (less memory, more time)."""

    def __init__(
        self,
        input_shape: tuple[int, ...] = (512,),
        layer_sizes: Sequence[int] = (128, 64),
        activations: Sequence[str] = ("relu", "None"),
        covar_mode: str = "single",
        jitter: float = 1e-7,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if covar_mode not in ("single", "diagonal"):
            raise NotImplementedError(f"covar_mode {covar_mode!r} is not valid; expected 'single' or 'diagonal'")
        self.input_dim = input_shape
        self.output_size = input_shape[0]
        self.layer_sizes = list(layer_sizes)
        self.covar_mode = covar_mode
        self.jitter = jitter
        single = covar_mode == "single"
        self.d_var_enc, self.d_var_dec = (1, 1) if single else (self.layer_sizes[-1], self.output_size)
        hidden = self.layer_sizes[:-1]
        activations = ["relu"] * len(hidden) + ["none"]
        latent = self.layer_sizes[-1]
        self.encoder = MLP(self.output_size, [*hidden, latent + self.d_var_enc], activations, layer_norm=layer_norm)
        self.decoder = MLP(latent, [*hidden[::-1], self.output_size + self.d_var_dec], activations)

    def get_raw_output_enc(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, ...)`` instances to the posterior's mean ``(n, latent)`` and log s ``(n, 1)`` or ``(n, latent)``."""
        x = X.flatten(1)
        if not self._keeps_hidden or len(self.encoder.net) == 1:  # a single layer has no hidden one to keep
            return by_rows(self._encode, x, modules=[self.encoder])
        first = readable(self.encoder.net[0])
        hidden = by_rows(self._enter, x, modules=[self.encoder.norm], projection=Projection(first.weight, first.bias))
        return _mean_and_log_std(self.encoder.net[1:], hidden, self.d_var_enc)

    def get_raw_output_dec(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, latent)`` to the likelihood's mean and log t, each ``(n, P)``."""
        mean, log_std = self._decode(samples)
        return mean, log_std.expand_as(mean)

    @property
    def _keeps_hidden(self) -> bool:
        return torch.is_grad_enabled() and not self.recompute

    def _enter(self, x: Tensor) -> Tensor:
        return self.encoder.norm(x.to(compute_dtype(next(self.encoder.net.parameters()))))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _mean_and_log_std(self.encoder.net, self._enter(x), self.d_var_enc)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return _mean_and_log_std(self.decoder.net, z, self.d_var_dec)

    def get_reparameterized_samples(self, mean: Tensor, log_std: Tensor, n_samples: int = 1) -> Tensor:
        """Samples ``(n, n_samples, latent)`` around ``mean`` ``(n, latent)``; ``log_std`` as wide, or ``(n, 1)``."""
        noise = torch.randn(*mean.shape, n_samples, dtype=mean.dtype, device=mean.device)
        return (noise * (log_std + self.jitter).exp()[..., None] + mean[..., None]).transpose(1, 2)

    def get_posterior_samples(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Any:
        """As :meth:`VariationalAutoEncoder.forward`."""
        mean, log_std = self.get_raw_output_enc(X)
        samples = self.get_reparameterized_samples(mean, log_std, n_samples)
        return (samples, mean, log_std.expand_as(mean)) if return_mean_logstd else samples

    def forward(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Any:
        """Encode.

        Args:
            X: ``(n, ...)`` instances.
            n_samples: samples of each posterior.
            return_mean_logstd: also return the posterior.

        Returns:
            ``(n, n_samples, latent)`` samples and, if ``return_mean_logstd``, mean and log s, each ``(n, latent)``.
        """
        return VariationalAutoEncoder.get_posterior_samples(self, X, n_samples, return_mean_logstd)

    def complete_forward_samples(self, X: Tensor, n_samples: int = 1) -> Tensor:
        """``(n, P)`` instances, encoded, sampled and decoded; the mean over ``n_samples``."""
        samples = VariationalAutoEncoder.get_posterior_samples(self, X, n_samples)
        decoded = [by_rows(self._decode, z, modules=[self.decoder])[0] for z in samples.unbind(1)]
        return torch.stack(decoded).mean(0)

    def elbo(self, x: Tensor, mean: Tensor, log_std: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the expected log-likelihood and the KL divergence of each instance.

        Args:
            x: ``(n, P)``.
            mean: ``(n, latent)`` of the posterior.
            log_std: ``(n, 1)`` or ``(n, latent)`` of the posterior.
            samples: ``(n, S, latent)`` of the posterior.

        Returns:
            ``VaeELL`` and ``VaeKL``, each ``(n,)``.
        """
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).sum(1)
        return -self._log_likelihoods(x, samples).mean(1), kl

    def _log_likelihoods(self, x: Tensor, samples: Tensor) -> Tensor:
        """``log p(x | z)`` (n, S) of samples (n, S, latent)."""
        layers, gram = self.decoder.net, self._gram(x)

        def of_latent(rows: Tensor, z: Tensor) -> Tensor:
            return self._log_likelihood(rows, layers[:-1](z), gram)

        def of_hidden(rows: Tensor, hidden: Tensor) -> Tensor:
            return self._log_likelihood(rows, hidden, None)

        if not self._keeps_hidden:
            return torch.stack([by_rows(of_latent, x, z, modules=[layers]) for z in samples.unbind(1)], 1)
        if self.covar_mode == "single":
            return torch.stack([of_latent(x, z) for z in samples.unbind(1)], 1)
        kept = [layers[:-1](z) for z in samples.unbind(1)]
        return torch.stack([by_rows(of_hidden, x, hidden, modules=[layers[-1]]) for hidden in kept], 1)

    @torch.no_grad()
    def _gram(self, x: Tensor) -> Tensor | None:
        """Of the decoder's last layer for :func:`linear_error`, where the likelihood needs but the sum of a row's
        squared errors and it pays."""
        last = readable(self.decoder.net[-1])
        if self.covar_mode != "single" or not share_gram(x, last.weight):
            return None
        return last.weight[:-1].t() @ last.weight[:-1]

    def _log_likelihood(self, x: Tensor, hidden: Tensor, gram: Tensor | None) -> Tensor:
        """``log p(x | z)`` (n,) from what the last layer of the decoder sees."""
        last = readable(self.decoder.net[-1])
        if self.covar_mode != "single":
            return _log_normal(_wide(x), *_mean_and_log_std([last], hidden, self.d_var_dec))
        (weight, of_std), (bias, std_bias) = last.weight.tensor_split([-1]), last.bias.tensor_split([-1])
        log_std = F.linear(hidden, of_std, std_bias)[:, 0]
        return _log_isotropic(linear_error(x, hidden, weight, bias, gram), log_std, x.shape[1])

    def compute_loss(
        self, X: Tensor, reduction: str = "mean", n_samples: int = 1, return_samples: bool = False
    ) -> dict | tuple[dict, Tensor]:
        """Minus the evidence bound, in two terms.

        Args:
            X: ``(n, ...)`` instances.
            reduction: over the instances: "mean", "sum" or "none".
            n_samples: samples of each posterior.
            return_samples: also return them.

        Returns:
            ``{"VaeELL": ..., "VaeKL": ...}``, scalars or ``(n,)``; and ``(n * n_samples, latent)`` samples.
        """
        ell, kl, samples = self._terms(X.flatten(1), n_samples)
        losses = {"VaeELL": _reduce(ell, reduction), "VaeKL": _reduce(kl, reduction)}
        return (losses, samples.flatten(0, 1)) if return_samples else losses

    def _terms(self, x: Tensor, n_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = self.get_raw_output_enc(x)
        samples = self.get_reparameterized_samples(mean, log_std, n_samples)
        return *self.elbo(x, mean, log_std, samples), samples

    def log_marginal_likelihood_importance_sampling(self, X: Tensor, n_samples: int = 1) -> Tensor:
        """``log p(x)`` (n,) of ``(n, ...)`` instances as ``log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x)``."""
        x = X.flatten(1)
        mean, log_std = self.get_raw_output_enc(x)
        samples = self.get_reparameterized_samples(mean, log_std, n_samples)
        prior = _log_normal(samples, torch.zeros_like(samples), samples.new_zeros(1))
        posterior = _log_normal(samples, mean[:, None], log_std[:, None])
        weights = self._log_likelihoods(x, samples) + prior - posterior
        return torch.logsumexp(weights, 1) - math.log(n_samples)


class VariationalAutoEncoderMIL(VariationalAutoEncoder):
    """:class:`VariationalAutoEncoder` of the instances of padded bags ``(B, N, ...)``.

    Differs from torchmil: the mask takes padding out of the losses, which are the mean over the bags of each bag's mean
    or sum, and samples that :meth:`compute_loss` returns stay with their instance where there are several.

    Arguments as in :class:`VariationalAutoEncoder`.
    """

    def forward(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Any:
        """As :meth:`VariationalAutoEncoder.forward`: ``(B, N, n_samples, latent)`` and twice ``(B, N, latent)``.

        ``(N, P)`` stands for one bag.
        """
        X = X[None] if X.dim() == 2 else X
        found = super().forward(X.flatten(0, 1), n_samples, True)
        samples, mean, log_std = (part.unflatten(0, X.shape[:2]) for part in found)
        return (samples, mean, log_std) if return_mean_logstd else samples

    def complete_forward_samples(self, X: Tensor, n_samples: int = 1) -> Tensor:
        """``(B, N, P)`` instances, encoded, sampled and decoded; the mean over ``n_samples``."""
        return super().complete_forward_samples(X.flatten(0, 1), n_samples).unflatten(0, X.shape[:2])

    def compute_loss(  # type: ignore[override]
        self,
        X: Tensor,
        mask: Tensor | None = None,
        reduction: str = "mean",
        n_samples: int = 1,
        return_samples: bool = False,
    ) -> dict | tuple[dict, Tensor]:
        """As :meth:`VariationalAutoEncoder.compute_loss`.

        Args:
            X: ``(B, N, ...)``.
            mask: ``(B, N)``, zero where there is no instance.
            reduction: over the instances of a bag, whose mean over the bags is taken then: "mean", "sum"; or "none".
            n_samples: samples of each posterior.
            return_samples: also return them.

        Returns:
            losses, scalars or ``(B, N)`` with zeros in padded places; and ``(B, n_samples, N, latent)`` samples.
        """
        bags = PackedBags.from_padded(X, mask)
        *terms, samples = self._terms(bags.x.flatten(1), n_samples)
        losses = dict(zip(("VaeELL", "VaeKL"), (reduce_bags(term, bags.segments, reduction) for term in terms)))
        if reduction == "none":
            losses = {name: bags.to_padded(loss) for name, loss in losses.items()}
        return (losses, bags.to_padded(samples).transpose(1, 2)) if return_samples else losses

    def log_marginal_likelihood_importance_sampling(  # type: ignore[override]
        self, X: Tensor, mask: Tensor | None = None, n_samples: int = 1
    ) -> Tensor:
        """``log p(x)`` of every instance of ``(B, N, ...)``: ``(B, N)``, zeros where ``mask`` is zero."""
        bags = PackedBags.from_padded(X, mask)
        return bags.to_padded(super().log_marginal_likelihood_importance_sampling(bags.x, n_samples))


def reduce_bags(values: Tensor, segments: Segments, reduction: str) -> Tensor:
    """(T,) values to the mean over the bags of each bag's "mean" or "sum", or as they are for "none"."""
    if reduction == "none":
        return values
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}; expected 'mean', 'sum' or 'none'")
    of_bags = (ops.segment_mean if reduction == "mean" else ops.segment_sum)(values, segments)
    return of_bags.sum() / max(1, segments.num_bags)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    return reduce_bags(values, Segments.from_sizes([len(values)], values.device), reduction)


def _mean_and_log_std(layers: Any, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A network's output as mean and, its last ``width`` columns, log standard deviation, both unrounded."""
    *before, last = layers
    for layer in before:
        x = layer(x)
    last = readable(last)
    # Apart: a product with 1025 columns takes 1.7 times as long as one with 1024.
    parts = zip(last.weight.tensor_split([-width]), last.bias.tensor_split([-width]))
    mean, log_std = (_wide(F.linear(x, weight, bias)) for weight, bias in parts)
    return mean, log_std


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density (...) of x (..., K) under independent normals; one ``log_std`` may stand for all dimensions."""
    errors = (x - mean).square()
    if log_std.shape[-1] == 1:
        return _log_isotropic(errors.sum(-1), log_std[..., 0], x.shape[-1])
    total = (errors * (-2 * log_std).exp() + 2 * log_std).sum(-1)
    return -0.5 * (x.shape[-1] * math.log(2 * math.pi) + total)


def _log_isotropic(errors: Tensor, log_std: Tensor, width: int) -> Tensor:
    """The same of one standard deviation for ``width`` dimensions, from the sum of their squared errors."""
    return -0.5 * (width * math.log(2 * math.pi) + errors * (-2 * log_std).exp() + 2 * width * log_std)
