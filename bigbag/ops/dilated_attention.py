"""Dilated attention: each instance attends to a few keys at several distances, in time linear in the bag.

A branch cuts every bag into segments and thins them out; what is left are finer segments, on which the kernels of
:func:`bigbag.ops.masked_attention` run. Since branches are weighed by their softmax denominators, all branches together
are one softmax over the union of their keys. So backward runs the same kernels, branch by branch, with the output and
the logsumexp of the whole, and nothing is kept for a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbag.bags import Segments
from bigbag.ops.custom import CustomOp
from bigbag.ops.registry import FLOATING, HALF, Operator, choose, compute_dtype
from bigbag.segments import on_device

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": FLOATING, "reference": FLOATING}


class Branch(NamedTuple):
    """The rows that take part in one branch, in the order of its finer segments.

    Attributes:
        length: instances of a segment before it is thinned out.
        dilation: r; head h keeps the places p of a segment with p % r == h % r.
        groups: heads of one group share their places: head h is of group h % groups.
        rows: (R,) int64 row in the pack, or None where the branch is the whole pack in order.
        group: (R,) int64 group of heads that the row stands for; None as ``rows``.
        offsets: (F + 1,) int64, how the R rows are cut into finer segments.
    """

    length: int
    dilation: int
    groups: int
    rows: Tensor | None
    group: Tensor | None
    offsets: Tensor


def dilated_branches(
    segments: Segments, heads: int, segment_lengths: Sequence[int], dilations: Sequence[int]
) -> tuple[Branch, ...]:
    """The branches of :func:`dilated_attention` for a pack; the same for all layers with so many heads.

    Bytes: 16 T min(r, H) / r for each branch with a dilation r above 1.

    Args:
        segments: how the T rows are cut into bags.
        heads: H.
        segment_lengths: of each branch, in instances.
        dilations: of each branch; one up to H must divide H.

    Raises:
        ValueError: lists of different lengths, numbers below 1, a dilation that does not divide the heads.
    """
    if len(segment_lengths) != len(dilations) or not segment_lengths:
        got = f"{list(segment_lengths)} and {list(dilations)}"
        raise ValueError(f"dilated_branches: expected as many segment_lengths as dilations, at least one, got {got}")
    return tuple(_branch(segments, heads, int(w), int(r)) for w, r in zip(segment_lengths, dilations))


def _branch(segments: Segments, heads: int, length: int, dilation: int) -> Branch:
    if length < 1 or dilation < 1 or (dilation <= heads and heads % dilation):
        raise ValueError(
            f"dilated_branches: segment length {length} and dilation {dilation}: expected both at least 1, and a "
            f"dilation that divides the {heads} heads or exceeds their number"
        )
    device = segments.offsets.device
    groups = min(dilation, heads)
    starts, sizes = np.asarray(segments.starts[:-1], np.int64), np.asarray(segments.sizes, np.int64)
    per_bag = -(-sizes // length)
    bag = np.repeat(np.arange(len(sizes)), per_bag)
    within = (np.arange(len(bag)) - np.repeat(np.cumsum(per_bag) - per_bag, per_bag)) * length
    first, left = starts[bag] + within, np.minimum(length, sizes[bag] - within)
    # Finer segments: for each segment one per group, every r-th row from the group's own first place on.
    place = np.arange(groups)
    counts = np.maximum(-(-(left[:, None] - place) // dilation), 0).ravel()
    total = int(counts.sum())
    # What is as long as the pack is made where it is used.
    offsets = on_device(np.concatenate([[0], np.cumsum(counts)]), device, torch.int64)
    if dilation == 1:
        return Branch(length, dilation, 1, None, None, offsets)
    cut = offsets.diff()
    begin = on_device((first[:, None] + place).ravel(), device, torch.int64) - dilation * offsets[:-1]
    rows = torch.repeat_interleave(begin, cut, output_size=total) + dilation * torch.arange(total, device=device)
    of_segment = torch.arange(groups, device=device).repeat(len(first))
    group = torch.repeat_interleave(of_segment, cut, output_size=total)
    return Branch(length, dilation, groups, rows, group, offsets)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    branches: Sequence[Branch],
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention to the keys that share a thinned-out segment, over all branches at once.

        out[i, h] = sum_b sum_{j in K_b(i, h)} exp(S[i, j, h]) v[j, h] / sum_b sum_{j in K_b(i, h)} exp(S[i, j, h])
        S[i, j, h] = scale q[i, h] . k[j, h]

    K_b(i, h) are the places of i's segment in branch b that head h keeps, and none where head h does not keep i
    itself. This is the sum over the branches weighed by their softmax denominators, as in the paper; a key that several
    branches share counts once for each. A query that no branch keeps gives zeros. No segment crosses a bag.

    Cost, with segment lengths w and dilations r: 4 T H d sum_b w_b / r_b^2 FLOP forward (w / (r H) instead of w / r^2
    where r exceeds H), 10 instead of 4 backward. Memory beyond inputs, outputs and gradients: the rows of one branch,
    T H d min(r, H) / r each, and (T, H) in the accumulation dtype.

    Args:
        q: (T, H, d) queries.
        k: (T, H, d) keys.
        v: (T, H, dv) values.
        segments: how the T rows are cut into B bags.
        branches: from :func:`dilated_branches`, for the same segments and heads.
        scale: None: 1 / sqrt(d).
        impl: "triton", "cpu" or "reference"; None chooses by device.

    Returns:
        (T, H, dv) in the dtype of the computation (autocast's where it is on, else that of ``q``).

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.

    Ding et al., LongNet: scaling transformers to 1,000,000,000 tokens, 2023, arXiv 2307.02486.
    """
    fits = q.dim() == 3 and k.shape == q.shape and v.dim() == 3 and v.shape[:2] == q.shape[:2]
    if not fits or (not torch.compiler.is_compiling() and q.shape[0] != segments.num_instances):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("q", q), ("k", k), ("v", v)))
        rows = segments.num_instances
        raise ValueError(f"dilated_attention: expected q, k (T, H, d) and v (T, H, dv) with T = {rows}, got {shapes}")
    q, k, v = (t.to(compute_dtype(q)) for t in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    chosen = choose("dilated_attention", _DTYPES, impl, q.device.type, q.dtype)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return _reference(q, k, v, segments, branches, scale)
    whole = [branch for branch in branches if branch.rows is None]
    thinned = [branch for branch in branches if branch.rows is not None]
    places = [branch.rows for branch in thinned], [branch.group for branch in thinned]
    offsets = [branch.offsets for branch in (*whole, *thinned)]
    groups = [branch.groups for branch in (*whole, *thinned)]
    return _dilated(q, k, v, *places, offsets, groups, scale, chosen)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, branches: Sequence[Branch], scale: float) -> Tensor:
    """The definition, with its (H, N, N) matrix of how often each key counts."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    head = torch.arange(q.shape[1], device=q.device)[:, None]
    out = []
    for start, end in zip(segments.starts, segments.starts[1:]):
        place = torch.arange(end - start, device=q.device)
        times = torch.zeros(len(head), end - start, end - start, dtype=acc, device=q.device)
        for branch in branches:
            kept = place % branch.length % branch.dilation == head % branch.dilation
            together = place[:, None] // branch.length == place // branch.length
            times += (kept[:, :, None] & kept[:, None] & together).to(acc)
        scores = torch.einsum("ihd,jhd->hij", q[start:end].to(acc), k[start:end].to(acc)) * scale
        seen = times.sum(2, keepdim=True) > 0
        weights = torch.where(seen, scores + times.log(), 0.0).softmax(2) * seen
        weights = weights.to(q.dtype).to(acc)
        out.append(torch.einsum("hij,jhd->ihd", weights, v[start:end].to(acc)).to(q.dtype))
    return torch.cat([*out, v[:0]]) + q[:0].sum() + k[:0].sum()


class _Rows:
    """The rows of a branch in tensors (T, H, ...), as (R, H / groups, ...)."""

    def __init__(self, groups: int, rows: Tensor | None, group: Tensor | None) -> None:
        self.groups, self.rows, self.group = groups, rows, group

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (x.shape[1] // self.groups, self.groups))

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else self._grouped(x)[self.rows, :, self.group]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Each row of a branch occurs once, so what is put there overwrites no other."""
        if self.rows is None:
            x.copy_(values)
        else:
            self._grouped(x)[self.rows, :, self.group] = values.to(x.dtype)

    def add(self, x: Tensor | None, values: Tensor) -> Tensor:
        """``x`` with ``values`` added to the branch's rows; None: ``values``, which are of all rows."""
        if x is None:
            return values
        if self.rows is None:
            return x.add_(values)
        self.put(x, self.take(x).add_(values))
        return x


def _all_rows(rows: list[Tensor], group: list[Tensor], groups: list[int]) -> list[_Rows]:
    plain = len(groups) - len(rows)
    return [_Rows(1, None, None)] * plain + [_Rows(*parts) for parts in zip(groups[plain:], rows, group)]


def _arguments(offsets: Tensor, scale: float) -> tuple[Any, ...]:
    """What the operators of masked_attention take after q, k and v: no mask, no bias, no dropout."""
    return (offsets, offsets, None, None, None, None, "", [], 0.0, 0, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rows: list[Tensor], group: list[Tensor], offsets: list[Tensor],
    groups: list[int], scale: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attend = getattr(torch.ops.bigbag, f"masked_attention_{impl}")
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = v.new_zeros(v.shape, dtype=acc)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=acc)
    for of_branch, cut in zip(_all_rows(rows, group, groups), offsets):
        part, part_lse = attend(*(of_branch.take(t).contiguous() for t in (q, k, v)), *_arguments(cut, scale))
        before = of_branch.take(lse)
        total = torch.logaddexp(before, part_lse)
        old, new = ((sums - total).exp_().nan_to_num_(0.0)[..., None] for sums in (before, part_lse))
        of_branch.put(out, of_branch.take(out).mul_(old).addcmul_(new, part))
        of_branch.put(lse, total)
    return out.to(q.dtype), lse


def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: list[Tensor], group: list[Tensor],
    offsets: list[Tensor], groups: list[int], scale: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    differentiate = getattr(torch.ops.bigbag, f"masked_attention_{impl}_backward")
    found: list[Any] = [None] * 3 if len(groups) > len(rows) else [t.new_zeros(t.shape) for t in (q, k, v)]
    for of_branch, cut in zip(_all_rows(rows, group, groups), offsets):
        taken = (of_branch.take(t).contiguous() for t in (grad, out, lse, q, k, v))
        *parts, _ = differentiate(*taken, *_arguments(cut, scale), False)
        found = [of_branch.add(whole, part) for whole, part in zip(found, parts)]
        del parts
    return found[0], found[1], found[2]


_LISTS = "Tensor[] rows, Tensor[] group, Tensor[] offsets, int[] groups, float scale, str impl"
_dilated = CustomOp("dilated_attention", f"(Tensor q, Tensor k, Tensor v, {_LISTS}) -> (Tensor, Tensor)", _forward)
_dilated_backward = CustomOp(
    "dilated_attention_backward",
    f"(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_LISTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
)


@_dilated.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(v.shape), q.new_empty(q.shape[:2], dtype=acc)


@_dilated_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, rows, group, offsets, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.counts = (len(rows), len(offsets))
    ctx.save_for_backward(out, lse, q, k, v, *rows, *group, *offsets)


def _differentiate(ctx: Any, grad: Any, _: Any) -> Any:
    if grad is None:
        return (None,) * 9
    out, lse, q, k, v, *lists = ctx.saved_tensors
    thinned, _ = ctx.counts
    rows, group, offsets = lists[:thinned], lists[thinned : 2 * thinned], lists[2 * thinned :]
    grads = _dilated_backward(grad, out, lse, q, k, v, rows, group, offsets, *ctx.rest)
    return *grads, *[None] * 6


_dilated.register_autograd(_differentiate, setup_context=_setup)


def _pairs(heads: int, offsets: Sequence[Tensor], groups: Sequence[int]) -> int:
    """Pairs of a query and a key, in all heads and branches together."""
    return sum(heads // count * int(cut.diff().square().sum()) for cut, count in zip(offsets, groups))


def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, rows: Any, group: Any, offsets: Sequence[Tensor], groups: Sequence[int], *_: Any
) -> int:
    """Of a pair: its score, and its share of the output."""
    return 2 * (q.shape[2] + v.shape[2]) * _pairs(q.shape[1], offsets, groups)


def _backward_flops(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *lists: Any) -> int:
    """Of a pair: its score again, and the gradients to q and k; that to its weight, and the one to v."""
    _, _, offsets, groups, *_ = lists
    return 2 * (3 * q.shape[2] + 2 * v.shape[2]) * _pairs(q.shape[1], offsets, groups)


_FLOPS: dict[str, Callable[..., int]] = {
    "dilated_attention": _forward_flops,
    "dilated_attention_backward": _backward_flops,
}

OPERATORS = (Operator("dilated_attention", dilated_attention, _DTYPES, flops=_FLOPS),)
