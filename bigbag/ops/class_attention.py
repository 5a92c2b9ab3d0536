"""Rows of an attention matrix that is never formed: that of a class token, and the mean of all rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops import attention_bias
from bigbag.ops.attention_bias import AttentionBias
from bigbag.ops.masked_attention import _check as _check_attention
from bigbag.ops.registry import FLOATING, HALF, Operator, choose, compute_dtype
from bigbag.ops.segments import segment_softmax
from bigbag.ops.spmm import Graph, accumulation_dtype, edge_dots

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}
_BLOCK_BYTES = 64 << 20
# Keys that one copy of a query meets: copies cost little, and a bag occupies as many workers as there are.
_PIECE = 256


def class_token_attention(
    q_cls: Tensor, k: Tensor, segments: Segments, *, mask: Tensor | None = None, scale: float | None = None,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The attention of one query per bag, such as a class token, to the instances of its bag.

        a[t, h] = softmax over the bag of  scale q_cls[b, h] . k[t, h]

    Scores are dot products along the edges of a graph that joins a query to the keys of its bag, 256 keys to a copy of
    the query. FLOPs: 2 T H d forward, 4 T H d backward. Bytes: k once each way, its gradient, scores (T, H) a few
    times, 16 per instance. Memory: O(T H), and the gradient of k. Differentiable. An empty or wholly masked bag gives
    zeros.

    Args:
        q_cls: (B, H, d) one query per bag.
        k: (T, H, d) keys.
        segments: how the T keys are cut into B bags.
        mask: (T,) bool, True: the instance takes part; the others get 0.
        scale: None: 1 / sqrt(d).
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T, H) in float32 (float64 for float64); each column sums to 1 over a bag that has instances.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an ``impl`` that can't run.
    """
    if q_cls.dim() != 3 or q_cls.shape[0] != segments.num_bags:
        expected = f"(B, H, d) with B = {segments.num_bags}"
        raise ValueError(f"class_token_attention: q_cls has shape {tuple(q_cls.shape)}, expected {expected}")
    tokens = Segments(torch.arange(segments.num_bags + 1, device=segments.offsets.device), (1,) * segments.num_bags)
    _check_attention(q_cls, k, k, tokens, segments, mask, None, 0.0)
    dtype = compute_dtype(q_cls)
    chosen = choose("class_token_attention", _DTYPES, impl, k.device.type, dtype)
    acc = accumulation_dtype(dtype)
    q_cls, k = q_cls.to(dtype), k.to(dtype)
    scale = 1 / math.sqrt(q_cls.shape[2]) if scale is None else float(scale)
    args = (q_cls, k, segments)
    scores = scale * (_reference_scores(*args) if chosen == "reference" else _scores(*args, chosen))
    if mask is not None:
        scores = torch.where(mask[:, None], scores, torch.finfo(acc).min)
    a = segment_softmax(scores, segments, impl=chosen)
    # In a bag that is wholly masked the softmax is uniform.
    return a if mask is None else torch.where(mask[:, None], a, 0)


def _scores(q: Tensor, k: Tensor, segments: Segments, impl: str) -> Tensor:
    """q (B, H, d), k (T, H, d) -> (T, H)."""
    bag_of_piece, graph = _join(segments, k.shape[0])
    # In the accumulation dtype, in which gradients of the copies are added up.
    copies = q.flatten(1).to(accumulation_dtype(q.dtype))[bag_of_piece].to(q.dtype)
    return edge_dots(graph, copies, k.flatten(1), q.shape[1], impl)


def _reference_scores(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    acc = accumulation_dtype(q.dtype)
    rows = k.to(acc).split(segments.sizes)
    with torch.autocast(k.device.type, enabled=False):
        parts = [torch.einsum("hd,thd->th", query, part) for query, part in zip(q.to(acc), rows)]
    return torch.cat(parts) if parts else k.new_zeros(0, k.shape[1], dtype=acc)


def _join(segments: Segments, num_keys: int) -> tuple[Tensor, Graph]:
    """The bag of each piece, and the graph that joins a piece (row) to its instances (columns)."""
    offsets, device = segments.offsets, segments.offsets.device
    counts = -(-offsets.diff() // _PIECE)
    num_pieces = sum(-(-size // _PIECE) for size in segments.sizes)
    bag_of_piece = torch.repeat_interleave(counts, output_size=num_pieces)
    place_in_bag = torch.arange(num_pieces, device=device) - (counts.cumsum(0) - counts)[bag_of_piece]
    crow = torch.cat([offsets[bag_of_piece] + _PIECE * place_in_bag, offsets[-1:]])
    instances = torch.arange(num_keys + 1, device=device)
    piece_of = torch.repeat_interleave(crow.diff(), output_size=num_keys)
    return bag_of_piece, Graph(crow, instances[:-1].int(), instances, piece_of.int(), None)


@torch.no_grad()
def mean_attention(
    q: Tensor, k: Tensor, segments: Segments, kv_segments: Segments | None = None, *, mask: Tensor | None = None,
    bias: AttentionBias | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """How much attention each key gets, averaged over the queries of its bag: column means of the attention matrix.

        a[j, h] = 1 / n_b sum_{i in b} softmax_j(scale q[i, h] . k[j, h] + bias[i, j])

    Blocks of queries against all keys of the bag, each block's softmax being complete, so one pass suffices.
    FLOPs: 2 H N^2 d for a bag of N instances: quadratic time. Memory: O(T H) and a block of at most about 64 MiB (at
    least one query against all keys). A map to look at: not differentiable.

    Args:
        q: (Tq, H, d) queries.
        k: (Tk, H, d) keys.
        segments, kv_segments, mask, bias, scale: as in :func:`bigbag.ops.masked_attention`.

    Returns:
        (Tk, H) in float32 (float64 for float64); columns sum to 1 over a bag with queries and keys, masked keys get 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    kv_segments = segments if kv_segments is None else kv_segments
    _check_attention(q, k, k, segments, kv_segments, mask, bias, 0.0)
    acc = accumulation_dtype(q.dtype)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    out = q.new_zeros(k.shape[0], k.shape[1], dtype=acc)
    starts, kv_starts = segments.starts, kv_segments.starts
    for s, e, ks, ke in zip(starts, starts[1:], kv_starts, kv_starts[1:]):
        keys = torch.arange(ks, ke, device=k.device)
        if mask is not None:
            keys = keys[mask[ks:ke]]
        if e == s or not len(keys):
            continue
        columns = k[keys].to(acc).permute(1, 2, 0)
        total = q.new_zeros(k.shape[1], len(keys), dtype=acc)
        step = max(1, _BLOCK_BYTES // (4 * total.numel()))
        for first in range(s, e, step):
            rows = slice(first, min(first + step, e))
            with torch.autocast(q.device.type, enabled=False):
                scores = torch.bmm(q[rows].to(acc).transpose(0, 1), columns).mul_(scale)
                if bias is not None:
                    scores += attention_bias.matrix(bias, q.to(acc), scale, rows, keys)
            total += torch.softmax(scores, -1).sum(1)
        out[keys] = total.t() / (e - s)
    return out


OPERATORS = (Operator("class_token_attention", class_token_attention, _DTYPES),)
