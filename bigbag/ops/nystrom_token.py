"""Nystrom attention of one row per bag, such as a class token: what the last layer of a model needs, and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import nystrom, pseudo_inverse


def landmark_means(x: Tensor, segments: Segments, *, num_landmarks: int = 256, impl: str | None = None) -> Tensor:
    """Means of the rows of each group of :func:`bigbag.ops.nystrom_attention`.

    They commute with what is linear: the landmarks of ``x W`` are the landmarks of ``x`` times ``W``.

    FLOPs: T P. Bytes: x once forward; its gradient once backward.

    Args:
        x: (T, P) floating.
        segments: how the T rows are cut into B bags.
        num_landmarks: most landmarks per bag.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (B, M, P) float32 (float64 for float64), M the most landmarks that a bag has; zeros beyond those of a bag.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    if x.dim() != 2 or x.shape[0] != segments.num_instances or num_landmarks < 1:
        raise ValueError(
            f"landmark_means: expected x ({segments.num_instances}, P) as in segments and num_landmarks >= 1, "
            f"got {tuple(x.shape)} and {num_landmarks}"
        )
    chosen = nystrom._choose(impl, x, segments)
    landmarks = nystrom._Landmarks(segments, num_landmarks)
    if chosen != "reference":
        return landmarks.means(x.unsqueeze(1), chosen)[:, 0]
    rows, bounds = x.to(nystrom._acc(x.dtype)), landmarks.bounds.tolist()
    means = [rows[s:e].sum(0) / max(e - s, 1) for s, e in zip(bounds, bounds[1:])]
    return (torch.stack(means) if means else rows[:0]).view(segments.num_bags, landmarks.most, x.shape[1])


def nystrom_token_attention(
    tokens: Tensor,
    query_landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    num_landmarks: int = 256,
    num_iterations: int = 6,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """The row of :func:`bigbag.ops.nystrom_attention` of one token per bag, from the landmarks of the queries.

        out[b] = softmax(s tokens[b] kl^T) pinv(softmax(s ql kl^T)) softmax(s ql k^T) v      over the rows of bag b

    FLOPs: T H m (2 d + 2 dv) forward, T H m (6 d + 4 dv) backward: half of what all rows cost, and no queries but
    their landmarks (:func:`landmark_means`). Bytes: k and v once forward and once more backward.

    Args:
        tokens: (B, H, d) one query per bag.
        query_landmarks: (B, M, H, d) floating.
        k: (T, H, d) floating.
        v: (T, H, dv), of the dtype of k.
        segments: how the T rows are cut into B bags.
        num_landmarks, num_iterations, scale, impl: as in :func:`bigbag.ops.nystrom_attention`.

    Returns:
        (B, H, dv) float32 (float64 for float64); zeros for an empty bag.

    Raises:
        ValueError: shapes or dtypes that do not fit, an ``impl`` that can't run.
    """
    nystrom._check("nystrom_token_attention", k, k, v, segments, num_landmarks, num_iterations)
    landmarks = nystrom._Landmarks(segments, num_landmarks)
    expected = (segments.num_bags, landmarks.most, *k.shape[1:])
    if tuple(query_landmarks.shape) != expected or tuple(tokens.shape) != (expected[0], *expected[2:]):
        raise ValueError(
            f"nystrom_token_attention: expected query_landmarks {expected} and tokens {(expected[0], *expected[2:])}, "
            f"got {tuple(query_landmarks.shape)} and {tuple(tokens.shape)}"
        )
    chosen = nystrom._choose(impl, k, segments)
    scale = k.shape[2] ** -0.5 if scale is None else scale
    acc = nystrom._acc(k.dtype)
    with torch.autocast(k.device.type, enabled=False):
        ql = query_landmarks.to(acc).transpose(1, 2) * scale
        if chosen == "reference":
            kl = landmark_means(k.flatten(1), segments, num_landmarks=num_landmarks, impl=chosen)
            kl = kl.view(expected).transpose(1, 2)
            gathered = _reference_gather(ql, k.to(acc), v.to(acc), segments)
        else:
            kl = landmarks.means(k, chosen)
            gathered, _ = landmarks.gather(ql.contiguous(), k, v, chosen)
        middle = pseudo_inverse.inverse_times(ql, kl, gathered, landmarks.counts, landmarks.groups, num_iterations)
        valid = (torch.arange(landmarks.most, device=k.device) < landmarks.counts[:, None])[:, None, None]
        scores = tokens.to(acc)[:, :, None] * scale @ kl.mT
        first = scores.masked_fill(~valid, torch.finfo(acc).min).softmax(3) * valid
        return (first @ middle)[:, :, 0]


def _reference_gather(ql: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    starts = segments.starts
    bags = []
    for queries, s, e in zip(ql, starts, starts[1:]):
        weights = (queries @ k[s:e].permute(1, 2, 0)).softmax(2) if e > s else queries.new_zeros(*queries.shape[:2], 0)
        bags.append(weights @ v[s:e].transpose(0, 1))
    # Without bags, an empty sum keeps its place in the graph.
    return torch.stack(bags) if bags else ql.new_zeros(*ql.shape[:3], v.shape[2]) + v.sum()
