"""Bags that are shared out over several ranks: the few things that their rows have to say to each other.

Every rank of a group runs the same program on its own rows of each bag; what belongs to a bag (sums, logits) is the
same on all of them. The loss of the group is the *sum* of its ranks' losses: a rank takes its loss divided by their
number, and gradients of weights are added up over the ranks. Under this one rule the gradient of a collective is its
adjoint, whatever is computed before and after it: a sum's gradient is a sum, that of sending rows is sending back.

All ranks must call the same collectives in the same order, forward and backward. So each is a node of the graph on
every rank, even where a rank holds no rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.parts import Halo, Parts


def _anchor() -> Tensor:
    """Something that requires grad, so that a collective has a backward on ranks whose input has none."""
    return torch.zeros((), requires_grad=True)


def all_sum(x: Tensor, parts: Parts) -> Tensor:
    """``x`` added up over the ranks, on all of them; in float32 (float64 for float64), differentiable."""
    return _AllSum.apply(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), _anchor(), parts)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=parts.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.parts.group)
        return grad, None, None


@torch.no_grad()
def all_max(x: Tensor, parts: Parts) -> Tensor:
    """The largest ``x`` of all ranks, element by element, on all of them; not differentiable."""
    top = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=parts.group)
    return top


@torch.no_grad()
def all_stack(x: Tensor, parts: Parts) -> Tensor:
    """``(R, ...)``: ``x`` of every rank, on all of them; not differentiable."""
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(parts.num_ranks)]
    dist.all_gather(found, x.detach().contiguous(), group=parts.group)
    return torch.stack(found)


def shares(log_sums: Tensor, parts: Parts) -> Tensor:
    """What this rank's softmax counts for in that of all ranks: ``exp(l_r) / sum_r exp(l_r)``, differentiable.

    Args:
        log_sums: l, the log of the sum of exponentials over this rank's rows; -inf where it has none.

    Returns:
        The same shape; zero where no rank has rows.
    """
    top = all_max(log_sums, parts)
    mine = (log_sums - torch.where(top == -torch.inf, 0, top)).exp()
    total = all_sum(mine, parts)
    return mine / torch.where(total > 0, total, 1)


def exchange(x: Tensor, halo: Halo) -> Tensor:
    """The rows of other ranks (or one's own) that ``halo`` names, ``(H, ...)``; gradients go back the same way."""
    return _Exchange.apply(x, _anchor(), halo)


def _send(rows: Tensor, send_counts: tuple[int, ...], counts: tuple[int, ...], parts: Parts) -> Tensor:
    received = rows.new_empty(sum(counts), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(counts), list(send_counts), group=parts.group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, halo: Halo) -> Tensor:
        ctx.halo, ctx.shape = halo, x.shape
        return _send(x[halo.send], halo.send_counts, halo.counts, halo.parts)[halo.order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        halo = ctx.halo
        return return_rows(grad, halo, grad.new_zeros(ctx.shape)), None, None


def return_rows(rows: Tensor, halo: Halo, total: Tensor) -> Tensor:
    """Send ``rows``, which stand for those that :func:`exchange` gave, to their owners, who add them to ``total``."""
    by_rank = torch.empty_like(rows).index_copy_(0, halo.order, rows)
    return total.index_add_(0, halo.send, _send(by_rank, halo.counts, halo.send_counts, halo.parts))


def join_parts(pack: PackedBags, group: Any = None) -> PackedBags:
    """Tell a pack of parts of bags of the other ranks' parts; all ranks of the group call it.

    Args:
        pack: this rank's parts (:meth:`bigbag.Bag.part`), on its device, and in ``parts`` who holds what.
        group: the process group; None: that of all ranks.

    Raises:
        ValueError: a pack of whole bags, or of parts of other sizes.
    """
    if pack.parts is None or pack.parts.sizes[pack.parts.rank] != pack.sizes:
        raise ValueError(
            f"join_parts: the pack has {pack.sizes} instances, its parts say {pack.parts}: make it of Bag.part, with "
            "parts=Parts.even(sizes of the whole bags, number of ranks, rank)"
        )
    parts = replace(pack.parts, group=group)
    adj = None if pack.adj is None else _join_graph(pack.adj, pack.segments, parts)
    return replace(pack, parts=parts, adj=adj)


def _join_graph(adj: Adjacency, segments: Segments, parts: Parts) -> Adjacency:
    """The graph with its columns beyond this rank's rows numbered after those, in the order of ``halo``."""
    bag = segments.bag_of_instance[adj.rows()].cpu().numpy()
    starts, ends = np.asarray(segments.starts)[bag], np.asarray(segments.starts)[bag + 1]
    whole = np.cumsum([0, *parts.totals])[bag] + np.asarray(parts.before, dtype=np.int64)[bag]
    col = adj.col.cpu().numpy().astype(np.int64)
    outside = (col < starts) | (col >= ends)
    wanted, places = np.unique((col - starts + whole)[outside], return_inverse=True)
    every: list[Any] = [None] * parts.num_ranks
    dist.all_gather_object(every, wanted, group=parts.group)
    col[outside] = adj.num_nodes + places
    joined = torch.from_numpy(col.astype(np.int32)).to(adj.col.device)
    return replace(adj, col=joined, symmetric=False, halo=Halo.of(parts, every, adj.col.device))


def squared(adj: Adjacency) -> Adjacency:
    """A graph with halo as a square one, over this rank's rows and those of the halo, which have no edges."""
    assert adj.halo is not None
    crow = torch.cat([adj.crow, adj.crow[-1:].expand(adj.halo.num_rows)])
    return Adjacency(crow, adj.col, adj.weight)
