"""Self-attention with image relative position encoding (iRPE) on packs, without an N x N bias."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.nn.attention.base import attention_dropout
from bigbag.nn.attention.multihead_self_attention import MultiheadSelfAttention
from bigbag.ops import RelativePositionBias, attention_bias

METHODS = {"euc": "euclidean", "quant": "quant", "cross": "cross", "product": "product"}
_BLOCK_ELEMENTS = 1 << 22


class RelativePositionTable(torch.nn.Module):
    """The encodings of the buckets of relative positions: torchmil's ``rpe_q``, ``rpe_k`` or ``rpe_v``.

    Args:
        heads: heads, or 1 where they share.
        dim: width of a head.
        buckets: number of buckets (of each direction for "cross"), that of tokens without a place included.
        mode: "bias" or "contextual".
        method: "euc", "quant", "cross" or "product".
        on_values: the table is added to values: ``(heads, buckets, dim)`` instead of ``(heads, dim, buckets)``.
    """

    def __init__(self, heads: int, dim: int, buckets: int, mode: str, method: str, on_values: bool) -> None:
        super().__init__()
        self.on_values = on_values
        if method == "cross":
            self.rp_rows = RelativePositionTable(heads, dim, buckets, mode, "", on_values)
            self.rp_cols = RelativePositionTable(heads, dim, buckets, mode, "", on_values)
        elif mode == "bias":
            self.lookup_table_bias = torch.nn.Parameter(torch.zeros(heads, buckets))
        else:
            shape = (heads, buckets, dim) if on_values else (heads, dim, buckets)
            self.lookup_table_weight = torch.nn.Parameter(torch.zeros(shape))

    def table(self) -> Tensor:
        """As :class:`bigbag.ops.RelativePositionBias` takes it: ``(heads, [dim,] [2,] buckets)``."""
        if hasattr(self, "rp_rows"):
            return torch.stack([self.rp_rows.table(), self.rp_cols.table()], -2)
        table = self.lookup_table_bias if hasattr(self, "lookup_table_bias") else self.lookup_table_weight
        return table.mT if self.on_values else table


class iRPEMultiheadSelfAttention(MultiheadSelfAttention):
    r"""Multi-head self-attention with relative position encoding (Wu et al. 2021, ICCV, eq. 18-24).

    With ``b`` the bucket of the offset ``c_i - c_j`` of two positions, per head

    ``S_ij = q_i . k_j / sqrt(d) + r^k_ij + r^q_ji``, ``y_i = sum_j softmax(S)_ij (v_j + t^v_b)``

    where ``r`` is ``t_b`` in mode "bias" and, in mode "contextual", ``q_i . t^k_b / sqrt(d)`` on keys and
    ``k_i . t^q_b / sqrt(d)`` on queries. Buckets are found pair by pair, in O(N) memory. On keys, or in mode "bias",
    by :func:`bigbag.ops.masked_attention`; contextual encodings of queries and values go block by block in PyTorch,
    which is slower.

    Differs from torchmil, which cuts ``(N, att_dim)`` into heads without a transpose, so that heads and positions are
    mixed; whose mask leaves out the valid instances; which raises unless there are a square number of positions, and
    for ``rpe_mode=None``.

    Args:
        in_dim: instance width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width of queries, keys and values, all heads together.
        n_heads: heads.
        dropout: share of the attention weights set to zero in training.
        learn_weights: False: queries, keys and values are the instances themselves, and ``att_dim`` is ``in_dim``.
        rpe_ratio: each of the offsets up to it has its own bucket; beyond, buckets widen up to 8 times it.
        rpe_method: "euc" (distance), "quant" (squared distance), "cross" (a table for rows and one for columns, added)
            or "product" (rows and columns together).
        rpe_mode: "bias", "contextual" or None for no encoding.
        rpe_shared_head: the heads share a table.
        rpe_skip: tokens without a place before the others: 0, or 1 for a class token, which has a bucket of its own.
        rpe_on: what is encoded: "q", "k", "v", "qk", "kv" or "qkv".
        torchmil_layout: mix heads and positions as torchmil does, for its checkpoints.

    Raises:
        ValueError: an argument that is none of these; values are encoded, but not in mode "contextual".
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        dropout: float = 0.0,
        learn_weights: bool = True,
        rpe_ratio: float = 1.9,
        rpe_method: str = "product",
        rpe_mode: str | None = "contextual",
        rpe_shared_head: bool = True,
        rpe_skip: int = 1,
        rpe_on: str = "k",
        torchmil_layout: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, att_dim, n_heads, dropout, learn_weights)
        for name, value, allowed in (
            ("rpe_method", rpe_method, tuple(METHODS)),
            ("rpe_mode", rpe_mode, (None, "bias", "contextual")),
            ("rpe_on", rpe_on, ("q", "k", "v", "qk", "kv", "qkv")),
            ("rpe_skip", rpe_skip, (0, 1)),
        ):
            if value not in allowed:
                raise ValueError(f"{type(self).__name__}: {name} must be one of {allowed}, got {value!r}")
        if "v" in rpe_on and rpe_mode == "bias":
            raise ValueError(f"{type(self).__name__}: rpe_on={rpe_on!r} encodes values: rpe_mode must be 'contextual'")
        self.rpe_skip, self.rpe_mode = rpe_skip, rpe_mode
        self.torchmil_layout = torchmil_layout
        self.grid: dict[str, Any] = {
            "method": METHODS[rpe_method],
            "alpha": rpe_ratio,
            "beta": 2 * rpe_ratio,
            "gamma": 8 * rpe_ratio,
        }
        heads = 1 if rpe_shared_head else n_heads
        buckets = attention_bias.num_buckets(METHODS[rpe_method], 2 * rpe_ratio)[-1] + rpe_skip

        def table(letter: str) -> RelativePositionTable | None:
            if rpe_mode is None or letter not in rpe_on:
                return None
            return RelativePositionTable(heads, self.head_dim, buckets, rpe_mode, rpe_method, letter == "v")

        self.rpe_q, self.rpe_k, self.rpe_v = table("q"), table("k"), table("v")

    def pack(
        self, x: Tensor, mask: Tensor | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[PackedBags, dict[str, Any]]:
        """A padded batch as a pack with places: behind ``rpe_skip`` tokens, a grid row by row.

        Args:
            x: ``(B, N, in_dim)``.
            mask: ``(B, N)``.
            height: rows of the grid; None: as many as are needed.
            width: its columns; None: a square.
        """
        count = x.shape[1] - self.rpe_skip
        if width is None:
            width = math.ceil(math.sqrt(max(count, 1))) if height is None else -(-count // height)
        number = torch.arange(-self.rpe_skip, count, device=x.device)
        places = torch.stack([number.div(width, rounding_mode="floor"), number.remainder(width)], 1).float()
        places[: self.rpe_skip] = torch.nan
        bags = PackedBags.from_padded(x, mask, coords=places.expand(x.shape[0], -1, -1))
        return bags, {"coords": bags.coords}

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_att: bool = False,
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """As :meth:`SelfAttention.forward`; ``height`` and ``width`` of the grid as in :meth:`pack`."""
        return super().forward(x, mask, return_att, height=height, width=width)

    def attend(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, coords: Tensor
    ) -> Tensor:
        """Queries, keys and values ``(T, H, d)`` of a pack to ``(T, att_dim)``, before ``out_proj``.

        Args:
            q, k, v: the rows.
            segments: how they are cut into bags.
            coords: ``(T, 2)`` places on a grid of step 1; NaN for a token that has none.
        """
        q, k, v = (self._layout(t, segments) for t in (q, k, v))
        return self._attend(q, k, v, segments, segments, coords, coords).flatten(1)

    def attend_first(  # type: ignore[override]
        self, x: Tensor, segments: Segments, enter: torch.nn.Module | None = None, *, coords: Tensor
    ) -> Tensor:
        """The rows of :meth:`attend` that stand first in their bag; with ``rpe_skip=1`` they must be class tokens.

        A class token has the same bucket towards all: on keys its encoding adds the same number to all its scores,
        which the softmax takes out again.
        """
        first = segments.offsets[:-1]
        if self.torchmil_layout:
            q, k, v = self.project(x, enter=enter)
            return self.attend(q, k, v, segments, coords)[first]
        if self.rpe_skip:
            out = super().attend_first(x, segments, enter).unflatten(-1, (self.n_heads, -1))
            return (out if self.rpe_v is None else out + self._nowhere(self.rpe_v)).flatten(1)
        (q,), (k, v) = self.project(x[first], "q", enter), self.project(x, "kv", enter)
        ones = Segments.from_sizes([1] * segments.num_bags, x.device)
        return self._attend(q, k, v, ones, segments, coords[first], coords).flatten(1)

    def first_attention(self, x: Tensor, segments: Segments, coords: Tensor | None = None) -> Tensor:  # type: ignore
        """``(T, H)``: the attention of the first row of each bag to all its rows, from instances ``(T, in_dim)``."""
        if self.rpe_skip and not self.torchmil_layout:
            return super().first_attention(x, segments)
        assert coords is not None
        q, k = (self._layout(t, segments) for t in self.project(x, "qk"))
        bags = zip(*(t.split(segments.sizes) for t in (q, k, coords)))
        return torch.cat([self._scores(q_b[:1], k_b, c_b[:1], c_b).softmax(-1)[:, 0].t() for q_b, k_b, c_b in bags])

    def first_queries(self, q: Tensor) -> Tensor:
        """The queries ``(B, H, d)`` of class tokens as they meet the keys: encoded, if queries are."""
        if self.rpe_q is None or self.rpe_mode == "bias":
            return q
        return q + self._nowhere(self.rpe_q)

    def attention_matrices(  # type: ignore[override]
        self, q: Tensor, k: Tensor, segments: Segments, coords: Tensor
    ) -> list[Tensor]:
        """The ``(H, N, N)`` attention of each bag: for small bags only."""
        q, k = self._layout(q, segments), self._layout(k, segments)
        bags = zip(*(t.split(segments.sizes) for t in (q, k, coords)))
        return [self._scores(q_b, k_b, c_b, c_b).softmax(-1) for q_b, k_b, c_b in bags]

    def _layout(self, t: Tensor, segments: Segments) -> Tensor:
        """torchmil reads the ``(N, H d)`` of each bag as ``(H, N, d)``."""
        if not self.torchmil_layout:
            return t
        return torch.cat(
            [bag.reshape(self.n_heads, -1, self.head_dim).transpose(0, 1) for bag in t.split(segments.sizes)]
        )

    def _nowhere(self, table: RelativePositionTable) -> Tensor:
        """``(H or 1, d)``: the contextual encoding of tokens without a place."""
        values = table.table()[..., -1]
        return values.sum(-1) if values.dim() == 3 else values

    def _bias(self, table: Tensor, c_q: Tensor, c_k: Tensor) -> RelativePositionBias:
        assert self.rpe_mode is not None
        return RelativePositionBias(c_q, table, self.rpe_mode, kv_coords=c_k, **self.grid)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, c_q: Tensor, c_k: Tensor
    ) -> Tensor:
        contextual = self.rpe_mode == "contextual"
        if contextual and (self.rpe_q is not None or self.rpe_v is not None):
            return self._by_blocks(q, k, v, segments, kv_segments, c_q, c_k)
        tables = [] if self.rpe_k is None else [self.rpe_k.table()]
        if self.rpe_q is not None:
            tables.append(self._mirrored(self.rpe_q.table()))
        bias = self._bias(sum(tables[1:], tables[0]), c_q, c_k) if tables else None
        return ops.masked_attention(q, k, v, segments, kv_segments, bias=bias, **attention_dropout(self))

    def _mirrored(self, table: Tensor) -> Tensor:
        """The table of ``c_j - c_i`` as one of ``c_i - c_j``: distances are the same, directions turn round."""
        if self.grid["method"] not in ("product", "cross"):
            return table
        places = table.shape[-1] - self.rpe_skip
        return torch.cat([table[..., :places].flip(-1), table[..., places:]], -1)

    def _scores(self, q: Tensor, k: Tensor, c_q: Tensor, c_k: Tensor) -> Tensor:
        """The scores ``(H, n, m)`` of n queries towards m keys of one bag: a block, never the whole of a large bag."""
        scale = self.head_dim**-0.5
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        if self.rpe_k is not None:
            scores = scores + attention_bias.matrix(self._bias(self.rpe_k.table(), c_q, c_k), q, scale)
        if self.rpe_q is not None:
            scores = scores + attention_bias.matrix(self._bias(self.rpe_q.table(), c_k, c_q), k, scale).mT
        return scores

    def _by_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kv_segments: Segments, c_q: Tensor, c_k: Tensor
    ) -> Tensor:
        """Attention a block of queries at a time, each computed again in the backward pass."""
        found = []
        queries = zip(q.split(segments.sizes), c_q.split(segments.sizes))
        keys = zip(*(t.split(kv_segments.sizes) for t in (k, v, c_k)))
        for (q_b, c_b), bag in zip(queries, keys):
            step = max(1, _BLOCK_ELEMENTS // (self.n_heads * max(len(bag[0]), 1)))
            for rows, places in zip(q_b.split(step), c_b.split(step)):
                found.append(checkpoint(self._block, rows, places, *bag, use_reentrant=False))
        return torch.cat([*found, q[:0]])

    def _block(self, q: Tensor, c_q: Tensor, k: Tensor, v: Tensor, c_k: Tensor) -> Tensor:
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            weights = self._scores(q.to(acc), k.to(acc), c_q, c_k).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training)
            out = torch.einsum("hij,jhd->ihd", weights, v.to(acc))
            if self.rpe_v is not None:
                bias = self._bias(self.rpe_v.table(), c_q, c_k)
                table, index = attention_bias.full_table(bias, self.n_heads), attention_bias.buckets(bias)
                shares = weights.new_zeros(*weights.shape[:2], table.shape[-1])
                shares = shares.scatter_add(2, index.expand_as(weights), weights)
                out = out + torch.einsum("hic,hdc->ihd", shares, table.to(acc))
        return out.to(q.dtype)
