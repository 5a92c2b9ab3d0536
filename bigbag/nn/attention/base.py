"""What self-attention layers on packs share.

A self-attention layer is three steps, so that a transformer layer can run what is row-wise in chunks:

    project(x, ...)             row-wise   instances to queries, keys and values
    attend(q, k, v, segments)   across the rows of a bag
    out_proj                    row-wise
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigbag.bags import PackedBags, Segments
from bigbag.nn.linear import readable
from bigbag.nn.rows import Padding, Projection, Widen, by_rows
from bigbag.ops.registry import compute_dtype


class Attention(torch.nn.Module):
    """What attention layers share: widths, and the projections at both ends.

    Args:
        in_dim, out_dim, att_dim, n_heads, dropout, learn_weights: as in :class:`SelfAttention`.
        projections: name of a linear layer without bias to how many of queries, keys and values it makes; without
            weights there is None in its place.
    """

    out_proj: torch.nn.Module

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        att_dim: int,
        n_heads: int,
        dropout: float,
        learn_weights: bool,
        projections: Mapping[str, int],
    ) -> None:
        super().__init__()
        att_dim = att_dim if learn_weights else in_dim
        out_dim = in_dim if out_dim is None else out_dim
        self.head_dim = head_width(type(self).__name__, att_dim, n_heads, learn_weights)
        self.n_heads, self.att_dim = n_heads, att_dim
        self.dropout = dropout
        self.learn_weights = learn_weights
        for name, parts in projections.items():
            setattr(self, name, torch.nn.Linear(in_dim, parts * att_dim, bias=False) if learn_weights else None)
        self.out_proj = torch.nn.Linear(att_dim, out_dim) if out_dim != att_dim else torch.nn.Identity()

    def heads(
        self,
        x: Tensor,
        weight: Tensor | None,
        parts: int,
        enter: torch.nn.Module | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, ...]:
        """``parts`` times ``(T, H, d)``: rows times ``weight`` ``(parts * att_dim, in_dim)``, or the rows themselves.

        ``enter`` and ``padding`` as in :meth:`SelfAttention.project`.
        """
        if weight is None:
            plain = enter is None and padding is None
            found = (x if plain else by_rows(enter or torch.nn.Identity(), x, padding=padding),) * parts
        else:
            entered = Widen(compute_dtype(weight)) if enter is None else enter
            found = by_rows(entered, x, projection=Projection(weight, widths=(self.att_dim,) * parts), padding=padding)
            found = (found,) if parts == 1 else found
        return tuple(t.unflatten(-1, (self.n_heads, self.head_dim)) for t in found)


class SelfAttention(Attention):
    """What self-attention layers share: projections and the padded form. A subclass defines :meth:`attend`.

    Args:
        in_dim: instance width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        dropout: share of the attention weights set to zero in training.
        learn_weights: False: queries, keys and values are the instances themselves, and ``att_dim`` is ``in_dim``.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    qkv_nn: torch.nn.Linear | None

    exact: ClassVar[bool] = False
    """Whether all pairs of rows are compared, in quadratic time."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        learn_weights: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads, dropout, learn_weights, {"qkv_nn": 3})

    def padding(self, segments: Segments) -> Padding | None:
        """Rows of zeros that :meth:`attend` wants before the queries, keys and values of each bag."""
        return None

    def project(
        self,
        x: Tensor,
        which: str = "qkv",
        enter: torch.nn.Module | None = None,
        padding: Padding | None = None,
    ) -> tuple[Tensor, ...]:
        """Instances to queries, keys and values, or to those that ``which`` names.

        Args:
            x: ``(T, in_dim)``.
            which: "qkv" or a part of it.
            enter: row-wise module that the instances go through first, such as a normalisation; its values are not
                kept for the backward pass.
            padding: rows of zeros to put between those of the results.

        Returns:
            As many ``(T, H, d)`` as ``which`` has letters.
        """
        weight = None
        if self.qkv_nn is not None:
            weight = readable(self.qkv_nn).weight
            if which != "qkv":  # the gradient of a slice is a copy of the whole
                first = "qkv".index(which)
                weight = weight[first * self.att_dim : (first + len(which)) * self.att_dim]
        return self.heads(x, weight, len(which), enter, padding)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """Queries, keys and values ``(T, H, d)`` of a pack to ``(T, att_dim)``, before ``out_proj``.

        They are what :meth:`project` makes with :meth:`padding`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend(q, k, v, segments)")

    def attend_first(
        self, x: Tensor, segments: Segments, enter: torch.nn.Module | None = None, **kwargs: Any
    ) -> Tensor:
        """The rows of :meth:`attend` that stand first in their bag: ``(T, in_dim)`` to ``(B, att_dim)``.

        ``enter`` as in :meth:`project`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend_first(x, segments)")

    def first_attention(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, H)``: the attention of the first row of each bag to all its rows, from instances ``(T, in_dim)``."""
        raise NotImplementedError(f"{type(self).__name__} must define first_attention(x, segments)")

    def attention_matrices(self, q: Tensor, k: Tensor, segments: Segments, **kwargs: Any) -> list[Tensor]:
        """The ``(H, N, N)`` attention of each bag from queries and keys ``(T, H, d)``: for small bags only."""
        raise NotImplementedError(f"{type(self).__name__} must define attention_matrices(q, k, segments)")

    def forward_packed(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, in_dim)`` instances of a pack to ``(T, out_dim)``.

        Args:
            x: the instances.
            segments: how they are cut into bags.
            kwargs: what :meth:`attend` takes beside them.
        """
        q, k, v = self.project(x, padding=self.padding(segments))
        return self.out_proj(self.attend(q, k, v, segments, **kwargs))

    def pack(self, x: Tensor, mask: Tensor | None = None) -> tuple[PackedBags, dict[str, Any]]:
        """A padded batch as a pack, and what :meth:`attend` takes beside its rows. Subclasses add arguments."""
        return PackedBags.from_padded(x, mask), {}

    def forward(self, x: Tensor, mask: Tensor | None = None, return_att: bool = False, **kwargs: Any) -> Any:
        """Attention inside each bag of a padded batch.

        Args:
            x: ``(B, N, in_dim)``.
            mask: ``(B, N)``, zero where there is no instance.
            return_att: also return the attention weights, which costs O(B H N^2) memory: for small bags.
            kwargs: what :meth:`pack` takes beside them.

        Returns:
            y: ``(B, N, out_dim)``, zeros in padded places.
            att: ``(B, H, N, N)``, zeros in padded places; only if ``return_att``.
        """
        bags, extras = self.pack(x, mask, **kwargs)
        y = bags.to_padded(self.forward_packed(bags.x, bags.segments, **extras))
        return (y, self.padded_attention(bags, **extras)) if return_att else y

    def padded_attention(self, bags: PackedBags, **kwargs: Any) -> Tensor:
        """The attention of every bag of a pack as one ``(B, H, N, N)`` tensor: for small bags only."""
        q, k = self.project(bags.x, "qk")
        return pad_matrices(bags, self.attention_matrices(q, k, bags.segments, **kwargs))


def attention_dropout(module: Any) -> dict[str, Any]:
    """Arguments ``dropout`` and ``seed`` of :func:`bigbag.ops.masked_attention`: none outside of training."""
    if not (module.training and module.dropout > 0):
        return {}
    return {"dropout": module.dropout, "seed": int(torch.randint(2**31 - 1, ()))}


def pad_matrices(bags: PackedBags, matrices: list[Tensor]) -> Tensor:
    """One (H, n, n) matrix per bag to (B, H, N, N), zeros in padded places."""
    mask = bags.mask()
    heads, length = matrices[0].shape[0], mask.shape[1]
    out = matrices[0].new_zeros(len(matrices), heads, length, length)
    for bag, matrix in enumerate(matrices):
        places = torch.nonzero(mask[bag]).squeeze(1)
        out[bag][:, places[:, None], places] = matrix
    return out


def head_width(name: str, att_dim: int, n_heads: int, learn_weights: bool = True) -> int:
    """Width of a head; without weights the heads share the instances, ``in_dim`` wide.

    Raises:
        ValueError: a width that the heads do not divide, or less than one of either.
    """
    if att_dim < 1 or n_heads < 1:
        raise ValueError(f"{name}: att_dim is {att_dim}, n_heads {n_heads}, expected at least 1 of each")
    if att_dim % n_heads:
        width = "att_dim" if learn_weights else "in_dim"
        raise ValueError(f"{name}: {width} = {att_dim} is not divisible by n_heads = {n_heads}")
    return att_dim // n_heads
