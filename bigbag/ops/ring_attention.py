"""Softmax attention inside bags that ranks share: keys and values pass round a ring of the ranks.

Rank r keeps its queries. In step s it has the keys and values of rank r - s, attends to them, and meanwhile sends them
to rank r + 1. What the steps find is joined by their logsumexps; so it is exact, and no rank ever holds more than two
parts of the keys. Backward is a second turn of the ring, in which the gradients of keys and values travel with them,
and each block's weights are exp(S - logsumexp over the whole bag), as in :func:`bigbag.ops.masked_attention`.

The other way is DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): two all-to-alls give each rank all rows of some of
the heads. It sends less: of a bag of N rows 4 N D / R numbers a rank forward, where the ring sends 2 N D. But R must
divide the heads, of which models of bags have 4 or 8; and the ring's transfers go on behind 4 N^2 D / R FLOP, N / (2 R)
for each byte: 10^4 and more for the bags that are shared out at all.

Liu, Zaharia and Abbeel, Ring attention with blockwise transformers for near-infinite context, ICLR 2024 (arXiv
2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.spmm import accumulation_dtype
from bigbag.parts import Parts

_NO_BIAS: tuple[Any, ...] = (
    None,
    None,
    None,
    None,
    "",
    [],
)  # mask, coordinates of queries and keys, weights, kind, thresholds


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float, seeds: Sequence[int], scale: float, impl: str
) -> Tensor:
    """:func:`bigbag.ops.masked_attention` of bags that ranks share; all of them call it.

    FLOPs: 1 / R of those of the whole bags for each of R equal parts. Bytes sent by a rank, of bags of N rows in all:
    N (R - 1) / R rows of k and v forward; backward the same again, and N rows of their gradients in the accumulation
    dtype. Memory: one more part of k and v, backward also of their gradients; out in the accumulation dtype.

    Args:
        q, k: (T, H, d) of this rank's rows.
        v: (T, H, dv).
        segments: how they are cut, with ``parts``.
        dropout: share of the attention weights set to 0.
        seeds: of the dropout, for the keys of each rank.
        scale: factor of the scores.
        impl: "cpu" or "triton".

    Returns:
        (T, H, dv) in the dtype of q.
    """
    return _Ring.apply(q, k, v, segments, dropout, seeds, scale, impl)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float, seeds: Sequence[int],
        scale: float, impl: str,
    ) -> Tensor:  # fmt: skip
        parts = segments.parts
        assert parts is not None
        cuts = [segments.of_parts(parts.seen_by(rank), q.device).offsets for rank in range(parts.num_ranks)]
        ctx.parts, ctx.cuts, ctx.dropout, ctx.seeds, ctx.scale, ctx.impl = parts, cuts, dropout, seeds, scale, impl
        attend = getattr(torch.ops.bigbag, f"masked_attention_{impl}")
        dtype = accumulation_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
        block = [k.contiguous(), v.contiguous()]
        for step in range(parts.num_ranks):
            source = (parts.rank - step) % parts.num_ranks
            coming = _Passing(block, parts, source) if step + 1 < parts.num_ranks else None
            options = (dropout, seeds[source], scale)
            found, sums = attend(q, *block, cuts[parts.rank], cuts[source], *_NO_BIAS, *options)
            total = torch.logaddexp(lse, sums)
            # Rows that no key was found for yet stay zero.
            base = torch.where(total == -torch.inf, 0, total)
            out.mul_((lse - base).exp_()[..., None]).addcmul_(found.to(dtype), (sums - base).exp_()[..., None])
            lse = total
            block = block if coming is None else coming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        parts, grad = ctx.parts, grad.contiguous()
        differentiate = getattr(torch.ops.bigbag, f"masked_attention_{ctx.impl}_backward")
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        block = [k.contiguous(), v.contiguous()]
        grads = [torch.zeros_like(t, dtype=lse.dtype) for t in block]
        for step in range(parts.num_ranks):
            source = (parts.rank - step) % parts.num_ranks
            coming = _Passing(block, parts, source) if step + 1 < parts.num_ranks else None
            options = (ctx.dropout, ctx.seeds[source], ctx.scale)
            cut = (ctx.cuts[parts.rank], ctx.cuts[source])
            found = differentiate(grad, out, lse, q, *block, *cut, *_NO_BIAS, *options, False)
            for total, part in zip((grad_q, *grads), found):
                total += part
            # After the last step they are one rank short of home.
            grads = _Passing(grads, parts, source).wait()
            block = block if coming is None else coming.wait()
        return grad_q.to(q.dtype), *(g.to(t.dtype) for g, t in zip(grads, (k, v))), *[None] * 5


class _Passing:
    """Tensors on their way to the next rank, and those of the rank before on their way here."""

    def __init__(self, tensors: list[Tensor], parts: Parts, source: int) -> None:
        """``source``: the rank whose rows ``tensors`` stand for."""
        last, num_ranks = (source - 1) % parts.num_ranks, parts.num_ranks
        self.sent, self.work = tensors, []
        self.received = [t.new_empty(sum(parts.sizes[last]), *t.shape[1:]) for t in tensors]
        if num_ranks == 1:
            self.received = tensors
            return
        ways = ((dist.isend, tensors, parts.rank + 1), (dist.irecv, self.received, parts.rank - 1))
        peers = [r if parts.group is None else dist.get_global_rank(parts.group, r) for r in range(num_ranks)]
        # Nothing is sent where there are no rows, which both sides know.
        operations = [
            dist.P2POp(way, tensor, peers[rank % num_ranks], parts.group)
            for way, group, rank in ways
            for tensor in group
            if len(tensor)
        ]
        self.work = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """What has come."""
        for work in self.work:
            work.wait()
        return self.received
