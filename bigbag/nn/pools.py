"""Pooling layers: from the instances of each bag to one vector.

Every layer takes a padded batch with a mask, as torchmil's do, or computes on a pack through :meth:`pool`; both are the
same computation, since the padded form is packed at entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.encoded import Encoded, segment_max
from bigbag.nn.linear import LazyLinear, project, readable
from bigbag.ops.attention_pool import ACTIVATIONS
from bigbag.ops.registry import compute_dtype


class MeanPool(torch.nn.Module):
    r"""Mean of the instances: ``z = 1/N sum_n x_n``; zeros for a bag without instances."""

    def pool(self, x: Tensor | Encoded, segments: Segments) -> Tensor:
        """``(T, D)`` instances of a pack to ``(B, D)``."""
        if isinstance(x, Tensor):
            return ops.segment_mean(x, segments)
        shares = (1 / segments.bag_sizes.clamp_min(1))[segments.bag_of_instance]
        return x.weighted_sum(shares[:, None], segments).squeeze(1)

    def forward(self, X: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, D)`` and its mask ``(B, N)`` to ``(B, D)``."""
        bags = PackedBags.from_padded(X, mask)
        return self.pool(bags.x, bags.segments)


class MaxPool(torch.nn.Module):
    r"""Largest value of each feature: ``z_d = max_n x_nd``; zeros for a bag without instances.

    Differs from torchmil, which rejects the uint8 masks that its own ``collate_fn`` makes.
    """

    def pool(self, x: Tensor | Encoded, segments: Segments) -> Tensor:
        """``(T, D)`` instances of a pack to ``(B, D)``."""
        return segment_max(x, segments)

    def forward(self, X: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, D)`` and its mask ``(B, N)`` to ``(B, D)``."""
        bags = PackedBags.from_padded(X, mask)
        return self.pool(bags.x, bags.segments)


def attention_values(x: Tensor, layers: Sequence[torch.nn.Linear], w2: Tensor, act: str = "tanh") -> Tensor:
    """``(act(x W1^T + b1) [* sigmoid(x Wg^T + bg)]) w2^T``, where the rows that they weigh are pooled elsewhere.

    Args:
        x: ``(T, D)`` instances.
        layers: the projection to the attention space and, if there is a gate, the gate's.
        w2: ``(H, att_dim)``.
        act: "tanh", "relu" or "gelu".

    Returns:
        ``(T, H)`` in float32 (float64 for float64).
    """
    weight, bias = (torch.cat([getattr(readable(layer), name) for layer in layers]) for name in ("weight", "bias"))
    return ops.attention_scores(project(x, weight), bias, w2, act=act, gated=len(layers) > 1)


class AttentionPool(torch.nn.Module):
    r"""Attention pooling (Ilse, Tomczak and Welling 2018, arXiv 1802.04712).

    ``f = act(X W1 + b1) w`` or, gated, ``f = (act(X W1 + b1) * sigmoid(X Wg + bg)) w``; then
    ``z = sum_n softmax(f)_n x_n``.

    Args:
        in_dim: instance width; None learns it from the first input.
        att_dim: width of the attention space.
        act: "tanh", "relu" or "gelu".
        gated: use the gated form.
        n_heads: rows of ``w``, each with an attention and a pooled vector of its own. Results get an axis for them
            where there are several: z ``(B, n_heads, D)``, f ``(T, n_heads)``.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        in_dim: int | None = None,
        att_dim: int = 128,
        act: str = "tanh",
        gated: bool = False,
        n_heads: int = 1,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"[{type(self).__name__}] act must be 'tanh', 'relu' or 'gelu', got {act!r}")
        self.in_dim = in_dim
        self.att_dim = att_dim
        self.act = act
        self.gated = gated
        self.recompute = False
        """Recompute the attention space in the backward pass instead of storing it (less memory, more time)."""
        self.fc1 = LazyLinear(in_dim, att_dim)
        self.fc2 = torch.nn.Linear(att_dim, n_heads, bias=False)
        if gated:
            self.fc_gated = LazyLinear(in_dim, att_dim)

    def pool(self, x: Tensor | Encoded, segments: Segments) -> tuple[Tensor, Tensor]:
        """Pool a pack.

        Args:
            x: ``(T, D)`` instances; where they are :class:`~bigbag.nn.encoded.Encoded`, they never exist all at once.
            segments: how they are cut into bags.

        Returns:
            z: ``(B, D)``.
            f: ``(T,)`` attention values before the softmax.
        """
        fc1 = readable(self.fc1.materialize(x.shape[-1]))
        gate: dict[str, Any] = {}
        if self.gated:
            fc_gated = readable(self.fc_gated.materialize(x.shape[-1]))
            gate = {"wg": fc_gated.weight, "bg": fc_gated.bias}
        if isinstance(x, Encoded):
            z, scores = x.pool(lambda rows: (rows, self.score(rows)), segments=segments, modules=[self])
            return z.to(compute_dtype(fc1.weight)).squeeze(1), scores.squeeze(1)
        z, scores = ops.attention_pool(
            x,
            segments,
            fc1.weight,
            fc1.bias,
            readable(self.fc2).weight,
            **gate,
            act=self.act,
            keep_preactivations=not self.recompute,
        )
        return z.squeeze(1), scores.squeeze(1)

    def score(self, x: Tensor) -> Tensor:
        """``(n, D)`` instances to their attention values ``(n, n_heads)``, in float32 (float64)."""
        layers = [self.fc1.module, self.fc_gated.module] if self.gated else [self.fc1.module]
        return attention_values(x, layers, readable(self.fc2).weight, self.act)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """Pool a padded batch.

        Args:
            X: ``(B, N, in_dim)``.
            mask: ``(B, N)``.
            return_att: also return the attention values.

        Returns:
            z: ``(B, in_dim)``.
            f: ``(B, N)`` attention values before the softmax, zero in padded places, if ``return_att``.
        """
        bags = PackedBags.from_padded(X, mask)
        z, f = self.pool(bags.x, bags.segments)
        return (z, bags.to_padded(f)) if return_att else z


def masked_softmax(X: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax along dimension 1 over the places where ``mask`` is not zero.

    Args:
        X: ``(B, N, ...)``.
        mask: ``(B, N)``, or with the trailing dimensions of X; None masks nothing.

    Returns:
        ``(B, N, ...)``, zero in masked places and, unlike torchmil's NaN, in rows that are masked throughout.
    """
    if mask is None:
        return torch.softmax(X, dim=1)
    valid = mask.reshape(*mask.shape, *[1] * (X.dim() - mask.dim())) != 0
    return torch.nan_to_num(torch.softmax(X.masked_fill(~valid, -torch.inf), dim=1)).masked_fill(~valid, 0.0)


class MaskedSoftmax(torch.nn.Module):
    """:func:`masked_softmax` as a module."""

    def forward(self, X: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, ...)`` and its mask ``(B, N)`` to ``(B, N, ...)``."""
        return masked_softmax(X, mask)
