"""CAMIL: Nystrom attention over the whole bag, and attention of each instance to its neighbours in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.models.base import GraphMILModel, feature_dim, squeeze_single_output
from bigbag.nn import NystromTransformerLayer
from bigbag.nn.linear import readable
from bigbag.nn.pool_rows import pool_rows
from bigbag.nn.pools import attention_values
from bigbag.nn.rows import Projection, Widen, by_rows
from bigbag.ops.registry import compute_dtype


class CAMILSelfAttention(torch.nn.Module):
    r"""How well an instance agrees with its neighbours, as a weight on its value (Fourkioti et al. 2024).

    ``l_i = softmax_i(sum_j a_ij q_i . k_j / sqrt(d)) v_i``, the softmax over the bag. The sum runs over the edges of
    the graph; see :func:`bigbag.ops.neighbor_scores` for the cost. Differs from torchmil, where padding takes part in
    the softmax.

    Args:
        in_dim: instance width.
        att_dim: d.
    """

    def __init__(self, in_dim: int, att_dim: int = 512) -> None:
        super().__init__()
        self.qk_nn = torch.nn.Linear(in_dim, 2 * att_dim, bias=False)
        self.v_nn = torch.nn.Linear(in_dim, in_dim, bias=False)

    def weights_and_values(self, x: Tensor, segments: Segments, adj: Adjacency) -> tuple[Tensor, Tensor]:
        """``(T, in_dim)`` instances of a pack and their graph to weights ``(T, 1)`` and values ``(T, in_dim)``."""
        # One projection for all three, and so one gradient of the size of x.
        weights = [readable(layer).weight for layer in (self.qk_nn, self.v_nn)]
        widths = (self.qk_nn.out_features // 2, self.qk_nn.out_features // 2, self.v_nn.out_features)
        projection = Projection(torch.cat(weights), widths=widths)
        q, k, v = by_rows(Widen(compute_dtype(weights[0])), x, projection=projection)
        a = ops.segment_softmax(ops.neighbor_scores(q, k, adj), segments)
        return a[:, None], v

    def forward_packed(self, x: Tensor, segments: Segments, adj: Adjacency) -> Tensor:
        """``(T, in_dim)`` instances of a pack and their graph to ``(T, in_dim)``."""
        a, v = self.weights_and_values(x, segments, adj)
        return a.to(v.dtype) * v

    def forward(self, X: Tensor, adj: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, in_dim)``, adjacency ``(B, N, N)`` and mask ``(B, N)`` to ``(B, N, in_dim)``."""
        bags = PackedBags.from_padded(X, mask, adj=adj)
        assert bags.adj is not None
        return bags.to_padded(self.forward_packed(bags.x, bags.segments, bags.adj))


class CAMILAttentionPool(torch.nn.Module):
    r"""Attention pooling of ``M`` by attention values of ``T``.

    ``f = w^T (tanh(T W) * sigmoid(T U))``, the second factor only if ``gated``; ``z = sum_n softmax(f)_n m_n``.

    Args:
        in_dim: instance width.
        att_dim: width of the attention space.
        gated: use the gated form.
    """

    def __init__(self, in_dim: int, att_dim: int = 128, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = torch.nn.Linear(in_dim, att_dim)
        self.fc2 = torch.nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = torch.nn.Linear(in_dim, att_dim)

    def scores(self, t: Tensor) -> Tensor:
        """``(T, in_dim)`` to the attention values before the softmax ``(T, 1)``."""
        layers = [self.fc1, self.fc_gated] if self.gated else [self.fc1]
        return attention_values(t, layers, readable(self.fc2).weight)

    def forward(self, T: Tensor, M: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """``(B, N, in_dim)`` twice and the mask ``(B, N)`` to ``z`` and, if ``return_att``, ``f`` ``(B, N)``."""
        bags = PackedBags.from_padded(T, mask)
        f = self.scores(bags.x)
        z = ops.segment_pool(ops.segment_softmax(f, bags.segments), PackedBags.from_padded(M, mask).x, bags.segments)
        return (z.squeeze(1), bags.to_padded(f.squeeze(1))) if return_att else z.squeeze(1)


class CAMIL(GraphMILModel):
    r"""Context-aware MIL (Fourkioti, De Vries and Bakal 2024, arXiv 2305.05314).

    ``T = NystromTransformerLayer(fc1(feat_ext(X)))``; ``L = CAMILSelfAttention(T, A)``;
    ``M = sigmoid(L) L + (1 - sigmoid(L)) T``; ``z, f = CAMILAttentionPool(T, M)``; the logits are ``W z + b``. The
    instance scores are the attention values ``f`` before the softmax.

    Nothing of the size N x N is formed. Differs from torchmil, where the defaults raise (``n_landmarks=None``) and
    padding takes part in both attentions. Landmarks are groups of neighbouring rows: without
    ``zero_padding=False`` and at least as many landmarks as instances, the order of the instances matters a little.

    Args:
        in_shape: shape of one instance.
        nystrom_att_dim: width inside; ``n_heads`` must divide it.
        pool_att_dim: width of the attention space of the pooling.
        gated_pool: use gated attention in the pooling.
        n_heads: heads of the Nystrom layer.
        n_landmarks: its landmarks; None: 256, as in the authors' code.
        pinv_iterations: steps of its pseudo-inverse.
        dropout: of its MLP.
        use_mlp: whether it has one.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
        zero_padding: as in :class:`~bigbag.nn.NystromAttention`, as is the next.
        conv_residual: add a convolution of the values along the bag.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        nystrom_att_dim: int = 512,
        pool_att_dim: int = 128,
        gated_pool: bool = False,
        n_heads: int = 4,
        n_landmarks: int | None = None,
        pinv_iterations: int = 6,
        dropout: float = 0.0,
        use_mlp: bool = False,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        zero_padding: bool = True,
        conv_residual: bool = False,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim, width = feature_dim(self.feat_ext, in_shape), nystrom_att_dim
        assert feat_dim is not None
        self.fc1 = torch.nn.Linear(feat_dim, width) if feat_dim != width else torch.nn.Identity()
        self.nystrom_transformer_layer = NystromTransformerLayer(
            width,
            att_dim=width,
            n_heads=n_heads,
            n_landmarks=256 if n_landmarks is None else n_landmarks,
            pinv_iterations=pinv_iterations,
            dropout=dropout,
            use_mlp=use_mlp,
            zero_padding=zero_padding,
            conv_residual=conv_residual,
        )
        self.camil_self_attention = CAMILSelfAttention(width, width)
        self.camil_att_pool = CAMILAttentionPool(width, pool_att_dim, gated_pool)
        self.classifier = torch.nn.Linear(width, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        self.nystrom_transformer_layer.recompute = self.activation_checkpointing
        x = self.encode(self.feat_ext, bags.x)
        if isinstance(self.fc1, torch.nn.Linear):
            fc1 = readable(self.fc1)
            x = by_rows(Widen(compute_dtype(fc1.weight)), x, projection=Projection(fc1.weight, fc1.bias))
        else:
            x = self.fc1(x)
        t = self.nystrom_transformer_layer.forward_packed(x, bags.segments)
        if self.activation_checkpointing and torch.is_grad_enabled():
            z, f = checkpoint(self._pool_in_context, t, bags.segments, bags.adj, use_reentrant=False)
        else:
            z, f = self._pool_in_context(t, bags.segments, bags.adj)
        Y_pred = squeeze_single_output(self.classifier(z))
        return (Y_pred, f) if return_att else Y_pred

    def _pool_in_context(self, t: Tensor, segments: Segments, adj: Any) -> tuple[Tensor, Tensor]:
        a, v = self.camil_self_attention.weights_and_values(t, segments, adj)
        z, f = pool_rows(_in_context, t, a, v, self.camil_att_pool.scores(t), segments=segments)
        return z.squeeze(1), f.squeeze(1)


def _in_context(t: Tensor, a: Tensor, v: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``M``, which are wanted in the pool alone, and their attention values."""
    local = a.to(v.dtype) * v
    gate = torch.sigmoid(local)
    return gate * local + (1 - gate) * t, f
