"""Min-cut pooling: the instances of a bag softly assigned to a few clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments

_EPS = 1e-15


def mincut_losses(s: Tensor, adj: Adjacency, segments: Segments) -> tuple[Tensor, Tensor]:
    r"""The two losses of min-cut pooling (Bianchi et al. 2020, arXiv 1907.00481), bag by bag.

    With the assignments S and the row sums D of A,

        cut = -trace(S^T A S) / trace(S^T D S),    ortho = |S^T S / |S^T S| - I / |I||   (Frobenius norms).

    A bag without edges has no cut: its first loss is 0. Cost: 2 E C + 2 T C^2 FLOP forward, twice that backward; S is
    read three times forward. It holds O(E) floats and one (T, C).

    Args:
        s: ``(T, C)`` assignments, rows that sum to 1.
        adj: ``(T, T)`` graph.
        segments: how the T rows are cut into B bags.

    Returns:
        cut: ``(B,)`` in [-1, 0] where no weight is negative.
        ortho: ``(B,)``.
    """
    inside = ops.quadratic_form(adj, s, segments)
    total = ops.segment_sum(ops.degrees(adj).to(s.dtype) * s.square().sum(1), segments)
    has_edges = total != 0
    cut = torch.where(has_edges, -inside / torch.where(has_edges, total, 1), 0)
    overlap = ops.segment_pool(s, s, segments)
    # Squared entries may underflow for no bag but the empty one, which has none.
    filled = segments.offsets.diff()[:, None, None] > 0
    unit = overlap / torch.linalg.matrix_norm(torch.where(filled, overlap, 1), keepdim=True)
    identity = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    return cut, torch.linalg.matrix_norm(unit - identity / s.shape[1] ** 0.5)


def mincut_pool(
    x: Tensor, adj: Adjacency, s: Tensor, segments: Segments, temp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`dense_mincut_pool` of a pack: ``(T, D)`` instances, ``(T, C)`` scores, a sparse graph.

    Cost: 2 T C (D + 2 C) + 4 E C FLOP forward; it holds O(T C + E) beside x.

    Returns:
        ``(B, C, D)``, ``(B, C, C)`` and two scalars.
    """
    s = torch.softmax(_widened(s) / temp, dim=-1)
    coarse = ops.segment_pool(s, ops.spmm(adj, s), segments)
    coarse = coarse * (1 - torch.eye(s.shape[1], dtype=s.dtype, device=s.device))
    degrees = coarse.sum(2)
    scale = torch.where(degrees == 0, 1, degrees).sqrt() + _EPS
    cut, ortho = mincut_losses(s, adj, segments)
    pooled = ops.segment_pool(s, x, segments)
    return pooled, coarse / scale[:, None, :] / scale[:, :, None], cut.mean(), ortho.mean()


def dense_mincut_pool(
    x: Tensor, adj: Tensor, s: Tensor, mask: Tensor | None = None, temp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Min-cut pooling (Bianchi et al. 2020, arXiv 1907.00481) of a padded batch.

    ``S = softmax(s / temp)``; ``X' = S^T X``; ``A' = S^T A S`` without its diagonal, divided by the roots of its row
    sums on both sides; and the means over the bags of the two losses of :func:`mincut_losses`.

    Nothing of the size N x N is formed beside ``adj``. Differs from torchmil, where edges from instances to padding
    count in the cut, and where a bag without edges makes the loss NaN.

    Args:
        x: ``(B, N, D)``, or ``(N, D)`` for one bag, as are the next two.
        adj: ``(B, N, N)``, dense or sparse COO.
        s: ``(B, N, C)`` scores of the clusters, before the softmax.
        mask: ``(B, N)``, zero where there is no instance.
        temp: temperature of the softmax.

    Returns:
        x: ``(B, C, D)`` features of the clusters.
        adj: ``(B, C, C)`` graph of the clusters.
        mincut_loss: scalar.
        ortho_loss: scalar.
    """
    x, adj, s = (value if value.dim() == 3 else value[None] for value in (x, adj, s))
    bags = PackedBags.from_padded(x, mask, adj=adj)
    assert bags.adj is not None
    return mincut_pool(bags.x, bags.adj, PackedBags.from_padded(s, mask).x, bags.segments, temp)


def _widened(s: Tensor) -> Tensor:
    return s if s.dtype == torch.float64 else s.float()
