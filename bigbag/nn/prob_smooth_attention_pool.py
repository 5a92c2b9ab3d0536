"""Attention pooling with a Gaussian over the attention values, regularised to be smooth over the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.nn.encoded import Encoded
from bigbag.nn.linear import LazyLinear, gelu_project, project, readable
from bigbag.nn.rows import by_rows
from bigbag.ops import distributed


class ProbSmoothAttentionPool(torch.nn.Module):
    r"""Probabilistic smooth attention pooling (Castro-Macias et al., arXiv 2507.14932; 2307.09457 for "zero").

        H = MLP(X);   q(f) = N(mu, diag(sigma^2)),   mu = H w_mu + b_mu,   log sigma^2 = H w_sigma + b_sigma
        z^m = X^T softmax(f^m),   f^m ~ q clipped to [-20, 20];   with covar_mode "zero": f = mu, one z
        KL = 1/N (mu^T (I - A) mu + trace((I - A) Sigma) - 1/2 log det Sigma)

    Draws exist in blocks of instances only, and once more in the backward pass: see
    :func:`bigbag.ops.sampled_attention`. The KL term costs O(E), and no dense matrix.

    Cost at T instances of width P, H = 2 att_dim: 2 T H (P + H) FLOP forward, about twice that backward. Keeps four
    (T, H) tensors, or X alone with ``recompute``.

    Differs from torchmil: N and the sums of the KL term are those of the bag's own instances, not of the padding.

    Args:
        in_dim: instance width; None learns it from the first input.
        att_dim: half the width of the MLP.
        covar_mode: "diag" or "zero".
        n_samples_train: draws in training.
        n_samples_test: draws in evaluation.

    Raises:
        ValueError: another ``covar_mode``.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        att_dim: int = 128,
        covar_mode: str = "diag",
        n_samples_train: int = 1000,
        n_samples_test: int = 5000,
    ) -> None:
        super().__init__()
        if covar_mode not in ("diag", "zero"):
            raise ValueError(f"[{type(self).__name__}] covar_mode must be 'diag' or 'zero', got {covar_mode!r}")
        self.covar_mode = covar_mode
        self.n_samples_train = n_samples_train
        self.n_samples_test = n_samples_test
        self.recompute = False
        """Keep of the MLP its first layer alone, and compute the others again in the backward pass."""
        width = 2 * att_dim
        self.in_mlp = torch.nn.Sequential(
            LazyLinear(in_dim, width), torch.nn.GELU(), torch.nn.Linear(width, width), torch.nn.GELU()
        )
        self.mu_f_nn = torch.nn.Linear(width, 1)
        if covar_mode == "diag":
            self.log_diag_Sigma_nn = torch.nn.Linear(width, 1)

    def distribution(self, x: Tensor | Encoded) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the attention values of ``(T, D)`` instances.

        Returns:
            mu: ``(T,)``, in the precision of the weights.
            log_var: ``(T,)``; None for covar_mode "zero".
        """
        self._first_layer(x)
        if isinstance(x, Encoded):
            heads = x.map(self._heads, modules=[self])
        else:
            h = self._project(x)
            heads = by_rows(self._from_first, h, modules=[self]) if self.recompute else self._from_first(h)
        return heads[:, 0], heads[:, 1] if self.covar_mode == "diag" else None

    def _first_layer(self, x: Tensor | Encoded) -> torch.nn.Linear:
        first = self.in_mlp[0]
        assert isinstance(first, LazyLinear)
        return readable(first.materialize(x.shape[-1]))

    def _project(self, x: Tensor) -> Tensor:
        first = self._first_layer(x)
        return project(x, first.weight, first.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return self._from_first(self._project(x))

    def _from_first(self, h: Tensor) -> Tensor:
        second = readable(self.in_mlp[2])
        h = gelu_project(h, second.weight, second.bias)
        layers = [self.mu_f_nn] + ([self.log_diag_Sigma_nn] if self.covar_mode == "diag" else [])
        weight, bias = (torch.cat([getattr(readable(at), name) for at in layers]) for name in ("weight", "bias"))
        return ops.attention_scores(h, None, weight, act="gelu") + bias

    def sample(
        self,
        mu: Tensor,
        log_var: Tensor | None,
        values: Tensor,
        segments: Segments,
        n_samples: int | None = None,
        return_draws: bool = False,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Pool ``values`` with draws of the attention.

        Args:
            mu: ``(T,)``.
            log_var: ``(T,)``, or None: no draws, S = 1.
            values: ``(T, K)``: the instances, or a linear map of them.
            segments: how the instances are cut into bags.
            n_samples: S; None: ``n_samples_train`` or ``n_samples_test``.
            return_draws: also return the draws.
            seed: of the draws of each bag; None: a new one for each.

        Returns:
            pooled: ``(B, S, K)``.
            f: ``(T, S)``, or None.
        """
        if log_var is None:
            pooled = ops.segment_pool(ops.segment_softmax(mu, segments)[:, None], values, segments)
            return pooled, mu[:, None] if return_draws else None
        if n_samples is None:
            n_samples = self.n_samples_train if self.training else self.n_samples_test
        draws = (segments, n_samples, _new_seeds(segments) if seed is None else seed)
        pooled = ops.sampled_attention(mu, log_var, values, *draws)
        return pooled, ops.attention_draws(mu, log_var, *draws) if return_draws else None

    def mean(self, mu: Tensor, log_var: Tensor | None, values: Tensor, segments: Segments) -> Tensor:
        """``(B, K)``: the exact mean of :meth:`sample` over all draws, without a draw."""
        a = ops.segment_softmax(mu, segments) if log_var is None else ops.expected_attention(mu, log_var, segments)
        return ops.segment_pool(a[:, None], values, segments).squeeze(1)

    def kl_div(self, mu: Tensor, log_var: Tensor | None, adj: Adjacency, segments: Segments) -> Tensor:
        """The KL term, averaged over the bags, up to a constant; a scalar."""
        terms = mu.square()
        if log_var is not None:
            terms = terms + (1 - adj.diagonal()) * log_var.exp() - log_var / 2
        total = ops.segment_sum(terms, segments) - ops.quadratic_form(adj, mu[:, None], segments)
        return (total / segments.bag_sizes.clamp_min(1)).mean()

    def forward(
        self,
        X: Tensor,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_att_samples: bool = False,
        return_att_dist: bool = False,
        return_kl_div: bool = False,
        n_samples: int | None = None,
    ) -> Any:
        """Pool a padded batch. With covar_mode "zero", S = 1 and ``diag_Sigma_f`` is None.

        Args:
            X: ``(B, N, in_dim)``.
            adj: ``(B, N, N)``, dense or sparse COO; for the KL term only.
            mask: ``(B, N)``.
            return_att_samples: also return f.
            return_att_dist: also return mu_f and diag_Sigma_f.
            return_kl_div: also return the KL term.
            n_samples: S; None: ``n_samples_train`` or ``n_samples_test``.

        Returns:
            z: ``(B, in_dim, S)``.
            f: ``(B, N, S)`` draws of the attention values.
            mu_f: ``(B, N, 1)``.
            diag_Sigma_f: ``(B, N, 1)``, the logarithm of the variances, as in torchmil.
            kl_div: scalar.
        """
        bags = PackedBags.from_padded(X, mask, adj)
        mu, log_var = self.distribution(bags.x)
        z, f = self.sample(mu, log_var, bags.x, bags.segments, n_samples, return_att_samples)
        out: list[Any] = [z.transpose(1, 2)]
        if f is not None:
            out.append(bags.to_padded(f))
        if return_att_dist:
            out += [bags.to_padded(mu[:, None]), None if log_var is None else bags.to_padded(log_var[:, None])]
        if return_kl_div:
            if bags.adj is None:
                raise ValueError(f"{type(self).__name__} needs adj for the KL term: pass the adjacency of the batch")
            out.append(self.kl_div(mu, log_var, bags.adj, bags.segments))
        return tuple(out) if len(out) > 1 else out[0]


def _new_seeds(segments: Segments) -> Tensor:
    """One for each bag; the same on ranks that share the bags, whose generators differ."""
    seeds = torch.randint(2**62, (segments.offsets.shape[0] - 1,), device=segments.offsets.device)
    return seeds if segments.parts is None else distributed.all_max(seeds, segments.parts)
