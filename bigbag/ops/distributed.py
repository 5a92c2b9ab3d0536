"""Bags that are shared out over several ranks: the few things that their rows have to say to each other.

Every rank of a group runs the same program on its own rows of each bag; what belongs to a bag (sums, logits) is the
same on all of them. The loss of the group is the *sum* of its ranks' losses: a rank takes its loss divided by their
number, and gradients of weights are added up over the ranks. Under this one rule the gradient of a collective is its
adjoint, whatever is computed before and after it: a sum's gradient is a sum, that of sending rows is sending back.

All ranks must call the same collectives in the same order, forward and backward. So each is a node of the graph on
every rank, even where a rank holds no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbag.ops.once import once_differentiable
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
    @once_differentiable
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
    """The rows of other ranks (or one's own) that ``halo`` names, ``(H, ...)``; gradients go back the same way.

    Whether ``x`` requires grad must be the same on all ranks. Bytes: those of the rows, each way once.
    """
    return _Exchange.apply(x, halo)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo, ctx.shape = halo, x.shape
        return send_rows(x[halo.send], halo.send_counts, halo.counts, halo.parts)[halo.order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        halo = ctx.halo
        by_rank = torch.empty_like(grad).index_copy_(0, halo.order, grad)
        returned = send_rows(by_rank, halo.counts, halo.send_counts, halo.parts)
        return grad.new_zeros(ctx.shape).index_add_(0, halo.send, returned), None


def send_rows(rows: Tensor, send_counts: Sequence[int], counts: Sequence[int], parts: Parts) -> Tensor:
    """Send ``send_counts[r]`` of ``rows`` to each rank r, those for rank 0 first, and return what comes, in order."""
    received = rows.new_empty(sum(counts), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(counts), list(send_counts), group=parts.group)
    return received
