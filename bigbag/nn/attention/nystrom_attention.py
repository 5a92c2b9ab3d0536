"""Nystrom attention on packs: attention in linear time, through landmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.nn.attention.base import SelfAttention
from bigbag.nn.linear import readable
from bigbag.nn.rows import Padding, by_rows
from bigbag.nn.take import take_of_bags
from bigbag.ops.join import windows
from bigbag.segments import on_device

_REACH = 16
"""Rows to either side of the convolution of values."""


class NystromAttention(SelfAttention):
    r"""Nystrom approximation of multi-head self-attention (Xiong et al. 2021, arXiv 2102.03902), in O(N M).

    With landmarks ``Ql, Kl``, the means of ``Q, K`` over M groups of neighbouring rows, per head

    ``Y = softmax(Q Kl^T / sqrt(d)) pinv(softmax(Ql Kl^T / sqrt(d))) softmax(Ql K^T / sqrt(d)) V``.

    See :func:`bigbag.ops.nystrom_attention` for the cost. Differs from torchmil in that each bag is padded to a
    multiple of M by itself, and masked instances count for nothing: a bag gives the same alone, padded or packed.
    (torchmil's mask excludes the rows of zeros that it adds in front, and keeps them without a mask.) With
    ``learn_weights=False`` scores are scaled by the width that the heads have, not by ``att_dim``'s. The attention
    that it returns carries no gradient.

    Args:
        in_dim: instance width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        learn_weights: False: queries, keys and values are the instances themselves, and ``att_dim`` is ``in_dim``.
        n_landmarks: M.
        pinv_iterations: steps of the pseudo-inverse.
        zero_padding: put rows of zeros in front of each bag up to a multiple of M, which then take part like
            instances, as torchmil and the authors' code do. False: none; a bag of N instances has min(M, N) landmarks,
            the means over floor(N / M) or one more instances each.
        conv_residual: add a depth-wise convolution of the values along the bag (33 wide, one kernel per head,
            ``res_conv``), as the authors' code and TransMIL do; torchmil left it out.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        learn_weights: bool = True,
        n_landmarks: int = 256,
        pinv_iterations: int = 6,
        zero_padding: bool = True,
        conv_residual: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads, learn_weights=learn_weights)
        self.n_landmarks = n_landmarks
        self.pinv_iterations = pinv_iterations
        self.zero_padding = zero_padding
        self.conv_residual = conv_residual
        if conv_residual:
            shape = {"kernel_size": (2 * _REACH + 1, 1), "padding": (_REACH, 0)}
            self.res_conv = torch.nn.Conv2d(n_heads, n_heads, groups=n_heads, bias=False, **shape)  # type: ignore

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_landmarks": self.n_landmarks, "num_iterations": self.pinv_iterations}

    def padding(self, segments: Segments) -> Padding | None:
        """Rows of zeros before each bag, up to a multiple of M; on the first of the ranks that share it."""
        pads = self._pads(segments)
        return Padding(segments.sizes, pads) if any(pads) and segments.holds_first else None

    def _pads(self, segments: Segments) -> tuple[int, ...]:
        return tuple(-size % self.n_landmarks if self.zero_padding else 0 for size in segments.totals)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """Queries, keys and values of a pack, padded, to ``(T, att_dim)``, before ``out_proj``."""
        rows = segments.extended(self._pads(segments))
        out = ops.nystrom_attention(q, k, v, rows, **self._options)
        if self.conv_residual:
            out = out + self._convolve(v, rows)
        return _strip_front(out, self.padding(segments)).flatten(1)

    def attend_first(
        self, x: Tensor, segments: Segments, enter: torch.nn.Module | None = None, **kwargs: Any
    ) -> Tensor:
        """The rows of :meth:`attend` that stand first in their bag: ``(T, in_dim)`` to ``(B, att_dim)``.

        Landmarks commute with projections, so of the queries only their landmarks and those of the tokens are formed.
        """
        padding, pads = self.padding(segments), self._pads(segments)
        rows = segments.extended(pads)
        entered, tokens = take_of_bags(by_rows(enter or torch.nn.Identity(), x, padding=padding), rows, pads)
        means = ops.landmark_means(entered, rows, num_landmarks=self.n_landmarks)
        k, v = self.project(x, "kv", enter, padding)
        with torch.autocast(x.device.type, enabled=False):
            # Together, since both are few.
            (queries,) = self.project(torch.cat([means.flatten(0, 1), tokens.to(means.dtype)]), "q")
            landmarks, queries = queries.split([means.shape[0] * means.shape[1], len(tokens)])
            landmarks = landmarks.unflatten(0, means.shape[:2])
            out = ops.nystrom_token_attention(queries, landmarks, k, v, rows, **self._options)
        if self.conv_residual:
            out = out + self._convolve_first(v, rows, pads)
        return out.flatten(1)

    @torch.no_grad()
    def first_attention(self, x: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
        """``(T, H)``: the attention of the first row of each bag to all its rows, from instances ``(T, in_dim)``."""
        padding, pads = self.padding(segments), self._pads(segments)
        q, k = self.project(x, "qk", padding=padding)
        rows = segments.extended(pads)
        # Where pads differ, bags are looked at one by one: the token stands behind the pad.
        found = []
        for bag, (q_b, k_b) in enumerate(zip(q.split(rows.sizes), k.split(rows.sizes))):
            options = {"token": pads[bag], **self._options}
            found.append(ops.nystrom_class_token_attention(q_b, k_b, rows.bag(bag), **options))
        return _strip_front(torch.cat(found), padding)

    def attention_matrices(self, q: Tensor, k: Tensor, segments: Segments, **kwargs: Any) -> list[Tensor]:
        """The ``(H, N, N)`` attention of each bag, row by row: for small bags only."""
        found = []
        for q_b, k_b, size in zip(q.split(segments.sizes), k.split(segments.sizes), segments.sizes):
            padding = self.padding(Segments.from_sizes((size,), q.device))
            pad = 0 if padding is None else padding.pads[0]
            rows = Segments.from_sizes((pad + size,), q.device)
            queries, keys = (F.pad(t, (0, 0, 0, 0, pad, 0)) for t in (q_b, k_b))
            found.append(q.new_zeros(self.n_heads, size, size))
            for i in range(size):
                row = ops.nystrom_class_token_attention(queries, keys, rows, token=pad + i, **self._options)
                found[-1][:, i] = row[pad:].t()
        return found

    def _convolve(self, v: Tensor, rows: Segments) -> Tensor:
        """The residual of all rows from their values ``(T, H, d)``."""
        if rows.parts is None:
            return self._convolve_bags(v, rows)
        parts = rows.parts
        around = [
            [(max(0, first - _REACH), min(total, end + _REACH)) for (first, end), total in zip(bounds, parts.totals)]
            for bounds in parts.bounds
        ]
        skips = [before - first for before, (first, _) in zip(parts.before, around[parts.rank])]
        sizes = [end - first for first, end in around[parts.rank]]
        found = self._convolve_bags(torch.cat(windows(v, parts, around)), Segments.from_sizes(sizes, v.device))
        return torch.cat([bag[skip : skip + size] for bag, skip, size in zip(found.split(sizes), skips, rows.sizes)])

    def _convolve_first(self, v: Tensor, rows: Segments, pads: tuple[int, ...]) -> Tensor:
        """The residual of the row behind the pad of each bag, ``(B, H, d)``."""
        # The kernel reaches from that row to both sides, of which one is zeros.
        places = [[rows.place(bag, pad + i) for i in range(_REACH + 1)] for bag, pad in enumerate(pads)]
        reach = ops.take_rows(v.flatten(1), on_device(places, v.device), rows)
        bags = Segments.from_sizes([_REACH + 1] * len(pads), v.device)
        return self._convolve_bags(reach.view(-1, *v.shape[1:]), bags)[:: _REACH + 1]

    def _convolve_bags(self, v: Tensor, bags: Segments) -> Tensor:
        """The residual of whole bags from their values ``(T, H, d)``: of grids one column wide."""
        weight = readable(self.res_conv).weight
        return ops.depthwise_conv(v.flatten(1), bags, [1] * bags.num_bags, weight).view(v.shape)


def _strip_front(x: Tensor, padding: Padding | None) -> Tensor:
    """Take the padding of each bag away."""
    if padding is None:
        return x
    parts = x.split([part for size, pad in zip(*padding) for part in (pad, size)])[1::2]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
