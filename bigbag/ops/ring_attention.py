"""Softmax attention inside bags that ranks share: keys and values pass round a ring of the ranks.

Rank r keeps its queries. In step s it has the keys and values of rank r - s, attends to them, and meanwhile sends them
to rank r + 1. What the steps find is joined by their logsumexps; so it is exact. Heads take turns, so that what
travels is thin. Backward is a second turn of the ring, in which the gradients of keys and values travel with them,
and each block's weights are exp(S - logsumexp over the whole bag), as in :func:`bigbag.ops.masked_attention`.

The other way is DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): two all-to-alls give each rank all rows of some of
the heads. It sends less: of a bag of N rows 4 N D / R numbers a rank forward, where the ring sends 2 N D. But R must
divide the heads, of which models of bags have 4 or 8; and the ring's transfers go on behind 4 N^2 D / R FLOP, N / (2 R)
for each byte: 10^4 and more for the bags that are shared out at all.

Liu, Zaharia and Abbeel, Ring attention with blockwise transformers for near-infinite context, ICLR 2024 (arXiv
2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.once import once_differentiable
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
    dtype. Memory: what travels is one head's, T d numbers ten times over; else as on one rank, for this rank's rows.

    Args:
        q, k: (T, H, d) of this rank's rows.
        v: (T, H, dv).
        segments: how they are cut, with ``parts``.
        dropout: share of the attention weights set to 0.
        seeds: of the dropout, for each head and each rank's keys: H R of them.
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
        ctx.ring = _Steps(parts, q.device, dropout, seeds, scale, impl)
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
        for head in range(q.shape[1]):
            out[:, head : head + 1], lse[:, head : head + 1] = ctx.ring.attend(head, *_head((q, k, v), head))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        found = [torch.empty_like(t) for t in (q, k, v)]
        for head in range(q.shape[1]):
            given = _head((grad.to(q.dtype), out, lse, q, k, v), head)
            for whole, part in zip(found, ctx.ring.differentiate(head, *given)):
                whole[:, head : head + 1] = part
        return *found, *[None] * 5


def _head(tensors: Sequence[Tensor], head: int) -> list[Tensor]:
    return [t[:, head : head + 1].contiguous() for t in tensors]


@dataclass(frozen=True)
class _Steps:
    """The turns of the ring for one head, whose tensors are (T, 1, .)."""

    parts: Parts
    device: torch.device
    dropout: float
    seeds: Sequence[int]
    scale: float
    impl: str

    @cached_property
    def _offsets(self) -> list[Tensor]:
        """How the rows of each rank are cut into bags."""
        return [Segments.from_sizes(sizes, self.device).offsets for sizes in self.parts.sizes]

    def _turn(self, head: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """In each step: whose keys are here, and what the operators take behind q, k and v."""
        for step in range(self.parts.num_ranks):
            source = (self.parts.rank - step) % self.parts.num_ranks
            cut = (self._offsets[self.parts.rank], self._offsets[source])
            seed = self.seeds[head * self.parts.num_ranks + source]
            yield source, (*cut, *_NO_BIAS, self.dropout, seed, self.scale)

    def _pass_on(self, block: list[Tensor], source: int) -> _Passing | None:
        """``block`` on its way, unless the next rank is the one it came from."""
        return None if (self.parts.rank + 1) % self.parts.num_ranks == source else _Passing(block, self.parts, source)

    def attend(self, head: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        attend, dtype = getattr(torch.ops.bigbag, f"masked_attention_{self.impl}"), accumulation_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
        lse, block = q.new_full(q.shape[:2], -torch.inf, dtype=dtype), [k, v]
        for source, options in self._turn(head):
            coming = self._pass_on(block, source)
            found, sums = attend(q, *block, *options)
            total = torch.logaddexp(lse, sums)
            # Rows that no key was found for yet stay zero.
            base = torch.where(total == -torch.inf, 0, total)
            out.mul_((lse - base).exp_()[..., None]).addcmul_(found.to(dtype), (sums - base).exp_()[..., None])
            lse, block = total, block if coming is None else coming.wait()
        return out, lse

    def differentiate(
        self, head: int, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> list[Tensor]:
        differentiate = getattr(torch.ops.bigbag, f"masked_attention_{self.impl}_backward")
        block, grad_q = [k, v], torch.zeros_like(q, dtype=lse.dtype)
        grads = [torch.zeros_like(t, dtype=lse.dtype) for t in block]
        for source, options in self._turn(head):
            coming = self._pass_on(block, source)
            for total, part in zip((grad_q, *grads), differentiate(grad, out, lse, q, *block, *options, False)):
                total += part
            # After the last step they are one rank short of home.
            grads = _Passing(grads, self.parts, source).wait()
            block = block if coming is None else coming.wait()
        return [grad_q, *grads]


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
