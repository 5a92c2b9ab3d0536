"""Exact multi-head self-attention on packs, in linear memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.nn.attention.base import SelfAttention, attention_dropout
from bigbag.nn.linear import readable
from bigbag.nn.rows import by_rows


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

    exact = True

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
            return ops.segment_softmax(torch.cat([*scores, u.new_zeros(0, self.n_heads)]), segments)

    def first_queries(self, q: Tensor) -> Tensor:
        """The queries ``(B, H, d)`` of the first row of each bag as they meet the keys."""
        return q

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of queries, keys and values, each ``(H, d, in_dim)``."""
        if self.qkv_nn is None:
            eye = torch.eye(self.att_dim, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            return (eye.view(self.n_heads, self.head_dim, -1),) * 3
        queries, keys, values = readable(self.qkv_nn).weight.view(3, self.n_heads, self.head_dim, -1).unbind(0)
        return queries, keys, values

    def attention_matrices(self, q: Tensor, k: Tensor, segments: Segments, **kwargs: Any) -> list[Tensor]:
        """The ``(H, N, N)`` attention of each bag: for small bags only."""
        bags = zip(q.split(segments.sizes), k.split(segments.sizes))
        return [(torch.einsum("ihd,jhd->hij", q_b, k_b) / self.head_dim**0.5).softmax(-1) for q_b, k_b in bags]
