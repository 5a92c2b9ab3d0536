"""Exact attention of the rows of one bag to those of another, in linear memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.attention.base import Attention, attention_dropout
from bigbag.nn.linear import readable


class MultiheadCrossAttention(Attention):
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

    q_nn: torch.nn.Linear | None
    kv_nn: torch.nn.Linear | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        learn_weights: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads, dropout, learn_weights, {"q_nn": 1, "kv_nn": 2})
        self.in_dim = in_dim

    def forward_packed(self, x: Tensor, segments: Segments, y: Tensor, y_segments: Segments) -> Tensor:
        """Rows ``(T, in_dim)`` that ask and rows ``(S, in_dim)`` that answer, bag by bag, to ``(T, out_dim)``.

        Args:
            x: the rows that ask.
            segments: how they are cut into B bags.
            y: the rows that answer.
            y_segments: how those are cut into the same B bags. A bag without any gives zeros before ``out_proj``.
        """
        asks, answers = (None if layer is None else readable(layer).weight for layer in (self.q_nn, self.kv_nn))
        (q,), (k, v) = self.heads(x, asks, 1), self.heads(y, answers, 2)
        out = ops.masked_attention(q, k, v, segments, y_segments, **attention_dropout(self))
        return self.out_proj(out.flatten(1))

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
