"""Attention pooling with the Sm operator, of which no (T, P) tensor is smoothed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.nn.encoded import Encoded, rows_of, weighted_sum
from bigbag.nn.linear import project, readable
from bigbag.nn.sm import Sm
from bigbag.ops.attention_pool import ACTIVATIONS
from bigbag.ops.registry import compute_dtype

_PLACES = ("early", "mid", "late", "none")


class SmAttentionPool(torch.nn.Module):
    r"""Attention pooling that smooths over the graph of the bag (Castro-Macias et al., NeurIPS 2024, arXiv 2410.03276).

        early:  X <- Sm(X),  f = act(X W1^T + b1) w2        mid:  f = act(Sm(X W1^T + b1)) w2
        late:   f = Sm(act(X W1^T + b1) w2)                 z = X^T softmax(f)

    Sm is linear, so "early" needs no smoothed features: ``Sm(X) W1^T = Sm(X W1^T)`` smooths ``(T, att_dim)``, and
    ``z = Sm(X)^T s = X^T Sm^T(s)``, with the adjoint Sm^T, smooths the attention ``(T,)``.

    Cost at T instances of width P, E edges: 2 T P att_dim FLOP forward, as much backward (for each of W1 and, where it
    requires grad, X), 2 E att_dim per step of Sm forward and backward; X is read twice forward and twice backward.
    Keeps X as it is stored and three (T, att_dim) tensors, or one with ``recompute``.

    Args:
        in_dim: instance width.
        att_dim: width of the attention space.
        act: "tanh", "relu" or "gelu".
        sm_mode: "approx" or "exact".
        sm_alpha: coefficient of Sm, see :class:`bigbag.nn.Sm`; 0 switches Sm off.
        sm_steps: steps of the approximate Sm; 0 switches Sm off.
        sm_where: "early", "mid", "late" or "none".
        spectral_norm: divide the weights of the layers after Sm (both for "none") by their largest singular value.

    Raises:
        ValueError: an unknown ``act``, ``sm_where`` (torchmil takes any), ``sm_mode`` or ``sm_alpha``.
    """

    def __init__(
        self,
        in_dim: int,
        att_dim: int = 128,
        act: str = "gelu",
        sm_mode: str = "approx",
        sm_alpha: float | str = "trainable",
        sm_steps: int = 10,
        sm_where: str = "early",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"[{type(self).__name__}] act must be 'tanh', 'relu' or 'gelu', got {act!r}")
        if sm_where not in _PLACES:
            raise ValueError(f"[{type(self).__name__}] sm_where must be one of {', '.join(_PLACES)}, got {sm_where!r}")
        self.in_dim = in_dim
        self.att_dim = att_dim
        self.act = act
        self.sm_mode = sm_mode
        self.sm_alpha = sm_alpha
        self.sm_steps = sm_steps
        self.sm_where = sm_where
        self.spectral_norm = spectral_norm
        self.recompute = False
        """Smooth and activate again in the backward pass instead of storing the results (less memory, more time)."""
        smooths = sm_steps > 0 and sm_alpha != 0 and sm_where != "none"
        self.sm = Sm(alpha=sm_alpha, num_steps=sm_steps, mode=sm_mode) if smooths else torch.nn.Identity()
        self.proj1 = torch.nn.Linear(in_dim, att_dim)
        self.proj2 = torch.nn.Linear(att_dim, 1, bias=False)
        if spectral_norm and sm_where in ("early", "none"):
            torch.nn.utils.parametrizations.spectral_norm(self.proj1)
        if spectral_norm and sm_where != "late":
            torch.nn.utils.parametrizations.spectral_norm(self.proj2)

    def pool(self, x: Tensor | Encoded, segments: Segments, adj: Adjacency | None) -> tuple[Tensor, Tensor]:
        """Pool a pack.

        Args:
            x: ``(T, D)`` instances; where they are :class:`~bigbag.nn.encoded.Encoded`, they never exist all at once.
            segments: how they are cut into bags.
            adj: the graph over the T instances; None only where there is no Sm.

        Returns:
            z: ``(B, D)``, in the dtype of the computation.
            f: ``(T,)`` attention values before the softmax.
        """
        # Once: in training, spectral normalisation iterates at each use.
        w1, w2 = readable(self.proj1).weight, readable(self.proj2).weight
        if not isinstance(self.sm, Sm):
            if isinstance(x, Encoded):
                z, f = x.pool(
                    lambda rows, *weights: (rows, self._score(rows, *weights)),
                    segments=segments,
                    shared=[w1, w2, self.proj1.bias],
                )
                return z.to(compute_dtype(w1)).squeeze(1), f.squeeze(1)
            z, f = ops.attention_pool(
                x, segments, w1, self.proj1.bias, w2, act=self.act, keep_preactivations=not self.recompute
            )
            return z.squeeze(1), f.squeeze(1)
        if adj is None:
            raise ValueError(f"{type(self).__name__} needs adj to smooth over: pass the adjacency of the bags")
        if self.sm_mode == "exact":
            adj = ops.marked_symmetric(adj)
        projected = rows_of(x, lambda rows: project(rows, w1), shared=[w1])
        if self.recompute and torch.is_grad_enabled():
            f = checkpoint(self._scores, projected, w2, adj, use_reentrant=False)
        else:
            f = self._scores(projected, w2, adj)
        s = ops.segment_softmax(f, segments)
        if self.sm_where == "early":
            s = self.sm.forward_packed(s, adj, adjoint=True)
        z = weighted_sum(s[:, None], x, segments).squeeze(1)
        return z.to(projected.dtype), f

    def _score(self, rows: Tensor, w1: Tensor, w2: Tensor, b1: Tensor) -> Tensor:
        """Without Sm: ``(n, D)`` instances to attention values ``(n, 1)``."""
        return ops.attention_scores(project(rows, w1), b1, w2, act=self.act)

    def _scores(self, projected: Tensor, w2: Tensor, adj: Adjacency) -> Tensor:
        """``X W1^T`` ``(T, att_dim)`` to attention values ``(T,)``, these in float32 (float64)."""
        assert isinstance(self.sm, Sm)
        h = projected
        bias: Tensor | None = self.proj1.bias
        if self.sm_where == "early":
            h = self.sm.forward_packed(h, adj)
        if self.sm_where == "mid":
            h, bias = self.sm.forward_packed(h + self.proj1.bias.to(h.dtype), adj), None
        f = ops.attention_scores(h, bias, w2, act=self.act).squeeze(1)
        return self.sm.forward_packed(f, adj) if self.sm_where == "late" else f

    def forward(
        self, X: Tensor, adj: Tensor | None = None, mask: Tensor | None = None, return_att: bool = False
    ) -> Any:
        """Pool a padded batch.

        Args:
            X: ``(B, N, in_dim)``.
            adj: ``(B, N, N)``, dense or sparse COO.
            mask: ``(B, N)``.
            return_att: also return the attention values.

        Returns:
            z: ``(B, in_dim)``.
            f: ``(B, N)`` attention values before the softmax, zero in padded places, if ``return_att``.
        """
        bags = PackedBags.from_padded(X, mask, adj)
        z, f = self.pool(bags.x, bags.segments, bags.adj)
        return (z, bags.to_padded(f)) if return_att else z
