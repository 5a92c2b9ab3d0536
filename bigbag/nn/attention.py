"""Attention layers on packs: exact softmax attention in linear memory.

A self-attention layer is three steps, so that a transformer layer can run what is row-wise in chunks:

    project(x, ...)             row-wise   instances to queries, keys and values
    attend(q, k, v, segments)   across the rows of a bag
    out_proj                    row-wise
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.rows import Padding, Projection, Widen, by_rows, stream_dtype


class SelfAttention(torch.nn.Module):
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
    out_proj: torch.nn.Module

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        learn_weights: bool = True,
    ) -> None:
        super().__init__()
        att_dim = att_dim if learn_weights else in_dim
        out_dim = in_dim if out_dim is None else out_dim
        self.head_dim = _head_dim(type(self).__name__, att_dim, n_heads, learn_weights)
        self.n_heads, self.att_dim = n_heads, att_dim
        self.dropout = dropout
        self.learn_weights = learn_weights
        self.qkv_nn = torch.nn.Linear(in_dim, 3 * att_dim, bias=False) if learn_weights else None
        self.out_proj = torch.nn.Linear(att_dim, out_dim) if out_dim != att_dim else torch.nn.Identity()

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
        if self.qkv_nn is None:
            plain = enter is None and padding is None
            rows = x if plain else by_rows(enter or torch.nn.Identity(), x, padding=padding)
            parts = (rows,) * len(which)
        else:
            first = "qkv".index(which)
            weight = self.qkv_nn.weight[first * self.att_dim : (first + len(which)) * self.att_dim]
            entered = Widen(stream_dtype(x, weight)) if enter is None else enter
            found = by_rows(entered, x, projection=Projection(weight, parts=len(which)), padding=padding)
            parts = (found,) if len(which) == 1 else found
        return tuple(t.unflatten(-1, (self.n_heads, self.head_dim)) for t in parts)

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


class MultiheadSelfAttention(SelfAttention):
    r"""Multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762), exact, in O(N) memory.

    ``Q, K, V = X W_Q, X W_K, X W_V``; per head ``Y = softmax(Q K^T / sqrt(d)) V``, inside each bag; then, where
    ``out_dim != att_dim``, a linear layer.

    Cost for a bag of N instances: 4 N^2 att_dim FLOP forward, 10 N^2 att_dim backward; see
    :func:`bigbag.ops.masked_attention`. Differs from torchmil in three places: masked instances never take part (with
    ``return_att`` torchmil leaves out the *valid* ones), dropout acts in training only, and no ``(N, N)`` mask exists.

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """Queries, keys and values ``(T, H, d)`` of a pack to ``(T, att_dim)``, before ``out_proj``."""
        return ops.masked_attention(q, k, v, segments, **attention_dropout(self), **kwargs).flatten(1)

    def attend_first(
        self, x: Tensor, segments: Segments, enter: torch.nn.Module | None = None, **kwargs: Any
    ) -> Tensor:
        r"""The rows of :meth:`attend` that stand first in their bag: ``(T, in_dim)`` to ``(B, att_dim)``.

        With ``u = W_K^T q`` per bag and head, ``a = softmax(X u)`` and the result is ``W_V (X^T a)``: neither keys nor
        values are formed. FLOPs: 4 T H in_dim forward, 8 T H in_dim backward.
        """
        x = x if enter is None else by_rows(enter, x)
        queries, _, values = self._weights(x)
        a = self.first_attention(x, segments, **kwargs)
        a = torch.nn.functional.dropout(a, self.dropout, self.training)
        pooled = ops.segment_pool(a, x, segments)
        return torch.einsum("bhi,hdi->bhd", pooled.to(queries.dtype), values).flatten(1)

    def first_attention(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, H)``: the attention of the first row of each bag to all its rows, from instances ``(T, in_dim)``."""
        queries, keys, _ = self._weights(x)
        first = x[segments.offsets[:-1]].to(queries.dtype)
        with torch.autocast(x.device.type, enabled=False):
            q = self.first_queries(torch.einsum("bi,hdi->bhd", first, queries))
            u = torch.einsum("bhd,hdj->bhj", q, keys) / self.head_dim**0.5
            bags = x.split(segments.sizes) if segments.num_bags > 1 else [x]
            scores = [
                by_rows(lambda rows, u_b=u_b: rows.to(u_b.dtype) @ u_b.t(), rows, shared=[u_b])
                for rows, u_b in zip(bags, u.unbind(0))
            ]
            return ops.segment_softmax(torch.cat(scores), segments)

    def first_queries(self, q: Tensor) -> Tensor:
        """The queries ``(B, H, d)`` of the first row of each bag as they meet the keys."""
        return q

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of queries, keys and values, each ``(H, d, in_dim)``."""
        if self.qkv_nn is None:
            eye = torch.eye(self.att_dim, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            return (eye.view(self.n_heads, self.head_dim, -1),) * 3
        queries, keys, values = self.qkv_nn.weight.view(3, self.n_heads, self.head_dim, -1).unbind(0)
        return queries, keys, values

    def attention_matrices(self, q: Tensor, k: Tensor, segments: Segments, **kwargs: Any) -> list[Tensor]:
        """The ``(H, N, N)`` attention of each bag: for small bags only."""
        bags = zip(q.split(segments.sizes), k.split(segments.sizes))
        return [(torch.einsum("ihd,jhd->hij", q_b, k_b) / self.head_dim**0.5).softmax(-1) for q_b, k_b in bags]


class MultiheadCrossAttention(torch.nn.Module):
    r"""Multi-head attention of the rows of one bag to those of another (Vaswani et al. 2017, arXiv 1706.03762).

    ``Q = X W_Q``; ``K, V = Y W_K, Y W_V``; per head ``Z = softmax(Q K^T / sqrt(d)) V``; then, where
    ``out_dim != att_dim``, a linear layer. Exact, in O(N + M) memory.

    Differs from torchmil, which lays the mask of the N rows of X over the M rows of Y (and so fails unless N = M):
    here ``mask`` says which rows of X exist, whose outputs are zeros, and the new ``y_mask`` which rows of Y take part.
    Dropout acts in training only.

    Args:
        in_dim: width of both.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        dropout: share of the attention weights set to zero in training.
        learn_weights: False: queries, keys and values are the rows themselves, and ``att_dim`` is ``in_dim``.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        learn_weights: bool = True,
    ) -> None:
        super().__init__()
        att_dim = att_dim if learn_weights else in_dim
        out_dim = in_dim if out_dim is None else out_dim
        self.head_dim = _head_dim(type(self).__name__, att_dim, n_heads, learn_weights)
        self.in_dim, self.att_dim, self.n_heads = in_dim, att_dim, n_heads
        self.dropout = dropout
        self.learn_weights = learn_weights
        self.q_nn = torch.nn.Linear(in_dim, att_dim, bias=False) if learn_weights else None
        self.kv_nn = torch.nn.Linear(in_dim, 2 * att_dim, bias=False) if learn_weights else None
        self.out_proj = torch.nn.Linear(att_dim, out_dim) if out_dim != att_dim else torch.nn.Identity()

    def forward_packed(self, x: Tensor, segments: Segments, y: Tensor, y_segments: Segments) -> Tensor:
        """Rows ``(T, in_dim)`` that ask and rows ``(S, in_dim)`` that answer, bag by bag, to ``(T, out_dim)``.

        Args:
            x: the rows that ask.
            segments: how they are cut into B bags.
            y: the rows that answer.
            y_segments: how those are cut into the same B bags. A bag without any gives zeros before ``out_proj``.
        """
        (q,), (k, v) = self._project(x, self.q_nn, 1), self._project(y, self.kv_nn, 2)
        out = ops.masked_attention(q, k, v, segments, y_segments, **attention_dropout(self))
        return self.out_proj(out.flatten(1))

    def _project(self, rows: Tensor, linear: torch.nn.Linear | None, parts: int) -> tuple[Tensor, ...]:
        found = (rows,) * parts
        if linear is not None:
            widen = Widen(stream_dtype(rows, linear.weight))
            results = by_rows(widen, rows, projection=Projection(linear.weight, parts=parts))
            found = (results,) if parts == 1 else results
        return tuple(t.unflatten(-1, (self.n_heads, self.head_dim)) for t in found)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
        """Padded form.

        Args:
            x: ``(B, N, in_dim)``.
            y: ``(B, M, in_dim)``.
            mask: ``(B, N)``, zero where x has no row.
            y_mask: ``(B, M)``, zero where y has no row.

        Returns:
            ``(B, N, out_dim)``, zeros in padded places.
        """
        asking, answering = PackedBags.from_padded(x, mask), PackedBags.from_padded(y, y_mask)
        return asking.to_padded(self.forward_packed(asking.x, asking.segments, answering.x, answering.segments))


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


def _head_dim(name: str, att_dim: int, n_heads: int, learn_weights: bool) -> int:
    if att_dim % n_heads:
        width = "att_dim" if learn_weights else "in_dim"
        raise ValueError(f"{name}: {width} = {att_dim} is not divisible by n_heads = {n_heads}")
    return att_dim // n_heads
