"""Attention inside each bag on CPU.

    S[i, j] = scale q[i] . k[j] + bias[i, j],   P = softmax_j S,   out[i] = sum_j drop(P)[i, j] v[j]

Masked keys are left out by copying the others, once per bag: nothing is computed for them. Without bias and dropout a
bag goes to PyTorch's own flash attention, which runs near the speed of float32 GEMMs, or, in bfloat16 and with the
instructions for it, to :mod:`fused_attention`. Else blocks of ``BLOCK_ROWS`` x ``BLOCK_KEYS`` scores are GEMMs into
reused buffers, in float32 (float64 for float64), with a running maximum and sum; Numba turns a block into weights in
one pass. What depends on the pair (distance, bucket, whether dropout keeps it) is computed once per block and, where
possible, for all heads. Backward computes the scores again from the logsumexp (Dao 2023). Each worker thread walks over
its own share of the queries, with its own gradients of k and v, which are added in the order of the shares.

Reads: q and out once, k and v once per block of queries. FLOPs: 4 N^2 d forward, 10 N^2 d backward, per head. Working
memory: copies of k and v of one bag, and per worker a few blocks and the gradients of k and v of that bag.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.extending import overload
from torch import Tensor

from bigbag.kernels.cpu import attention_pairs as pairs
from bigbag.kernels.cpu import bfloat_tiles, fused_attention
from bigbag.kernels.cpu.attention_pool import _share
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _jit, accumulation_dtype, array

BLOCK_ROWS = 256
BLOCK_KEYS = 1024
# Rows of a bag from which on the fused kernel pays.
SMALL = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _exp(value):
    raise NotImplementedError("compiled code only")


@overload(_exp)
def _exp_overload(value):
    if value != numba.types.float32:
        return lambda value: np.exp(value)

    def exp(value):
        """For values up to 0, as a loop can be vectorised with: 2^whole times a polynomial (Moshier, Cephes, exp2f)."""
        power = np.float32(value * np.float32(1.4426950408889634))
        reached = np.float32(-126) if power < np.float32(-126) else power
        whole = np.int32(reached - np.float32(0.5))
        x = np.float32(reached - np.float32(whole))
        y = np.float32(np.float32(1.535336188319500e-4) * x + np.float32(1.339887440266574e-3))
        y = np.float32(y * x + np.float32(9.618437357674640e-3))
        y = np.float32(y * x + np.float32(5.550332471162809e-2))
        y = np.float32(y * x + np.float32(2.402264791363012e-1))
        y = np.float32(y * x + np.float32(6.931472028550421e-1))
        y = np.float32(y * x + np.float32(1))
        scaled = y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
        return np.float32(0) if power < np.float32(-126) else scaled

    return exp


def _key(value):
    raise NotImplementedError("compiled code only")


@overload(_key)
def _key_overload(value):
    """An integer with the order of the floats, and NaN beyond infinity: a maximum that is vectorised."""
    if value != numba.types.float32:

        def wide_key(value):
            bits = np.float64(value).view(np.int64)
            return np.int64(bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))

        return wide_key

    def key(value):
        bits = np.float32(value).view(np.int32)
        return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))

    return key


def _unkey(key):
    raise NotImplementedError("compiled code only")


@overload(_unkey)
def _unkey_overload(key):
    """The float of a key: the mapping is its own inverse."""
    if key == numba.types.int32:
        return lambda key: np.int32(key ^ np.int32((key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    return lambda key: np.int64(key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).view(np.float64)


@_jit
def _weigh(begin, end, scores, top, total, shrink):
    # Scores become exp(scores - top); top and total go on from the blocks before.
    for i in range(begin, end):
        key = _key(top[i])
        for j in range(scores.shape[1]):
            here = _key(scores[i, j])
            key = here if here > key else key
        highest = _unkey(key)
        shrink[i] = _exp(top[i] - highest)
        found = total[i] * shrink[i]
        for j in range(scores.shape[1]):
            weight = _exp(scores[i, j] - highest)
            found += weight
            scores[i, j] = weight
        top[i] = highest
        total[i] = found


@_jit
def _weigh_again(begin, end, scores, sums, grads, delta, kept):
    # Scores become P; grads, gradients of drop(P), become those of scores.
    for i in range(begin, end):
        for j in range(scores.shape[1]):
            weight = _exp(scores[i, j] - sums[i])
            grad = grads[i, j]
            if kept is not None:
                grad *= kept[i, j]
            scores[i, j] = weight
            grads[i, j] = weight * (grad - delta[i])


class _Bag:
    """The tensors of one bag, head by head: q (H, n, d), k (H, m, d) and v (H, m, dv) of the m keys that take part."""

    def __init__(self, args: _Arguments, rows: slice, keys: slice) -> None:
        self.args, self.rows = args, rows
        columns = torch.arange(keys.start, keys.stop)
        taken = columns if args.mask is None else columns[args.mask[keys]]
        # A slice where every key takes part: no copy.
        self.take: slice | Tensor = keys if len(taken) == len(columns) else taken
        self.columns = taken.numpy()
        self.q, self.k, self.v = (t.transpose(0, 1) for t in (args.q[rows], args.k[self.take], args.v[self.take]))
        self.fused = args.fused and rows.stop - rows.start >= SMALL
        self.fast = args.plain and not self.fused

    def prepare(self) -> None:
        """k and v contiguous, for GEMMs."""
        self.k, self.v = (self.args.load(t) for t in (self.k, self.v))


class _Arguments:
    """The arguments of :func:`forward`, by name."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, kv_offsets: Tensor, mask: Tensor | None,
        coords: Tensor | None, kv_coords: Tensor | None, weights: Tensor | None, kind: str, thresholds: list[float],
        dropout: float, seed: int, scale: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.mask, self.coords, self.kv_coords = q, k, v, mask, coords, kv_coords
        self.weights, self.kind, self.thresholds = weights, kind, np.asarray(thresholds, dtype=np.float32)
        self.dropout, self.seed, self.scale = dropout, seed, scale
        self.starts, self.kv_starts = offsets.tolist(), kv_offsets.tolist()
        self.dtype = accumulation_dtype(q.dtype)
        self.plain = not kind and not dropout
        self.need_weights = False
        self.fused = self.plain and q.dtype == torch.bfloat16 and bfloat_tiles.AVAILABLE

    def load(self, x: Tensor) -> Tensor:
        """(H, n, .) for GEMMs."""
        return x.to(self.dtype).contiguous()

    def bags(self) -> Iterator[_Bag]:
        """The bags in which there is something to compute."""
        starts, kv_starts, heads = self.starts, self.kv_starts, self.q.shape[1]
        for s, e, ks, ke in zip(starts, starts[1:], kv_starts, kv_starts[1:]):
            if heads and e > s and ke > ks and len((bag := _Bag(self, slice(s, e), slice(ks, ke))).columns):
                yield bag

    def only_bag(self) -> _Bag | None:
        """The one bag that there is, all keys of which take part, if PyTorch's result is the result: no copy."""
        bag = next(self.bags(), None) if len(self.starts) == 2 and self.mask is None else None
        return bag if bag is not None and bag.fast else None


class _Blocks:
    """Pairs of one bag, one block at a time, in the accumulation dtype; the buffers of one worker."""

    def __init__(self, bag: _Bag) -> None:
        self.bag, self.args, self.k, self.v = bag, bag.args, bag.k, bag.v
        size = min(BLOCK_ROWS, bag.q.shape[1]) * min(BLOCK_KEYS, bag.k.shape[1])
        kind, dtype = self.args.kind, self.args.dtype
        self.buffers = {name: torch.empty(size, dtype=dtype) for name in ("scores", "grads")}
        if self.args.dropout:
            self.buffers["factors"] = torch.empty(size, dtype=dtype)
        if kind:
            self.buffers["pairs"] = torch.empty(size, dtype=dtype if kind == "distance" else torch.int32)

    def bounds(self, first: int, last: int, size: int) -> list[slice]:
        return [slice(start, min(start + size, last)) for start in range(first, last, size)]

    def buffer(self, name: str) -> Tensor:
        return self.buffers[name][: self.shape[0] * self.shape[1]].view(self.shape)

    def launch(self, kernel, *args) -> None:
        kernel(0, self.shape[0], *(array(t) if isinstance(t, Tensor) else t for t in args))

    def enter(self, rows: slice, keys: slice) -> None:
        """Compute what all heads share in this block: distances or buckets."""
        self.rows, self.keys = rows, keys
        args, bag = self.args, self.bag
        self.shape = (rows.stop - rows.start, keys.stop - keys.start)
        if not args.kind:
            return
        assert args.coords is not None and args.kv_coords is not None
        where = (args.coords[bag.rows][rows], args.kv_coords[bag.take][keys])
        self.pairs = self.buffer("pairs")
        if args.kind == "distance":
            self.launch(pairs.distances, *where, self.pairs)
        else:
            self.launch(pairs.buckets, *where, args.thresholds, args.kind == "product", self.pairs)

    def score(self, head: int, q: Tensor) -> Tensor:
        """Scores (rows, keys) of one head; q (rows, d)."""
        scores = torch.mm(q, self.k[head, self.keys].t(), out=self.buffer("scores"))
        if self.args.weights is None:
            return scores
        if self.args.kind == "distance":
            scores.addcmul_(self.pairs, self.args.weights[0, head, :1], value=-1)
        else:
            weights = self.args.weights[:, head]
            weights = weights[self.bag.rows][self.rows] if len(weights) > 1 else weights
            self.launch(pairs.add_weights, weights, self.pairs, scores)
        return scores

    def factor(self, head: int) -> Tensor:
        """0 where dropout drops, else 1 / (1 - dropout)."""
        out = self.buffer("factors")
        dropout = self.args.dropout
        bound = min(round(dropout * 2**32), 2**32 - 1)
        first = self.bag.rows.start + self.rows.start
        numbers = (self.args.seed & 0xFFFFFFFF, head, first, self.bag.columns[self.keys], bound, 1 / (1 - dropout))
        self.launch(pairs.kept, *numbers, out)
        return out

    def begin_rows(self) -> None:
        """For the gradient of slopes, per head and row: sums of dS * distance, dS and P * distance."""
        self.moments = torch.zeros(self.bag.q.shape[0], 3, BLOCK_ROWS, dtype=self.args.dtype)

    def add_to_weights(self, out: Tensor, head: int, weights: Tensor, grad_scores: Tensor) -> None:
        """Add the gradient of the bias weights to ``out`` (R, H, C), or to the moments."""
        if self.args.kind == "distance":
            moments = self.moments[head, :, : self.shape[0]]
            moments[1] += grad_scores.sum(1)
            moments[0] += grad_scores.mul_(self.pairs).sum(1)
            moments[2] += weights.mul_(self.pairs).sum(1)
            return
        rows = torch.zeros(self.shape[0], out.shape[2], dtype=out.dtype)
        self.launch(pairs.gather_gradient, grad_scores, self.pairs, rows)
        if out.shape[0] == 1:
            out[0, head] += rows.sum(0)
        else:
            out[self.bag.rows][self.rows, head] += rows

    def end_rows(self, out: Tensor) -> None:
        if self.args.kind == "distance":
            # dS sums to 0 over a row, but for the rounding of delta, which enters as P: take its share out again.
            found, rest, mean = self.moments.unbind(1)
            out[0, :, 0] -= (found - rest * mean).sum(1)


def _same_width(*tensors: Tensor) -> list[Tensor]:
    """(H, n, .) -> (1, H, n, widest): columns of zeros change neither scores nor the first columns of out.

    Neighbouring columns are neighbours in memory, as the kernel takes for granted.
    """
    width = max(t.shape[2] for t in tensors)
    padded = [F.pad(t, (0, width - t.shape[2])) if t.shape[2] < width else t for t in tensors]
    return [(t if t.stride(2) == 1 else t.contiguous())[None] for t in padded]


def _attend(bag: _Bag, out: Tensor, lse: Tensor, first: int, last: int) -> None:
    """Fill rows ``first`` to ``last`` of out (n, H, dv) and lse (n, H) of one bag, block by block."""
    blocks, args = _Blocks(bag), bag.args
    for rows in blocks.bounds(first, last, BLOCK_ROWS):
        q = args.load(bag.q[:, rows]) * args.scale
        top = torch.full(q.shape[:2], -float("inf"), dtype=args.dtype)
        total, shrink = torch.zeros_like(top), torch.empty_like(top)
        acc = torch.zeros(*q.shape[:2], blocks.v.shape[2], dtype=args.dtype)
        for keys in blocks.bounds(0, bag.k.shape[1], BLOCK_KEYS):
            blocks.enter(rows, keys)
            for head in range(len(q)):
                weights = blocks.score(head, q[head])
                blocks.launch(_weigh, weights, top[head], total[head], shrink[head])
                if args.dropout:
                    weights.mul_(blocks.factor(head))
                acc[head].mul_(shrink[head, :, None]).addmm_(weights, blocks.v[head, keys])
        out[rows] = acc.div_(total[..., None]).transpose(0, 1)
        lse[rows] = total.log_().add_(top).t()


def _attend_fast(bag: _Bag) -> tuple[Tensor, Tensor]:
    """out (n, H, dv) and lse (n, H) of one bag by PyTorch's flash attention."""
    out, lse = _flash(*_same_width(bag.q, bag.k, bag.v), 0.0, False, attn_mask=None, scale=bag.args.scale)
    return out[0].transpose(0, 1)[..., : bag.v.shape[2]].contiguous(), lse[0].t().contiguous()


def _differentiate_fast(bag: _Bag, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    """Gradients of q, k and v (H, ., .) of one bag by PyTorch's flash attention."""
    outer = (t[bag.rows].transpose(0, 1) for t in (grad, out))
    q, k, v, upper, value = _same_width(bag.q, bag.k, bag.v, *outer)
    sums = lse[bag.rows].t()[None]
    found = _flash_backward(upper, q, k, v, value, sums, 0.0, False, attn_mask=None, scale=bag.args.scale)
    return [t[0, ..., : own.shape[2]] for t, own in zip(found, (bag.q, bag.k, bag.v))]


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments as in ``_Arguments`` -> out (Tq, H, dv), lse (Tq, H) in the accumulation dtype.

    With a bias, out is in the accumulation dtype too: its gradients would suffer from a rounded out in backward.
    """
    args = _Arguments(*arguments)
    shape, dtype = (*args.q.shape[:2], args.v.shape[2]), args.dtype if args.kind else args.q.dtype
    if (only := args.only_bag()) is not None:
        return _attend_fast(only)
    out = huge_pages(args.q.new_empty(shape, dtype=dtype)).zero_()
    lse = args.q.new_full(args.q.shape[:2], -float("inf"), dtype=args.dtype)
    for bag in args.bags():
        if bag.fast:
            out[bag.rows], lse[bag.rows] = _attend_fast(bag)
        elif bag.fused:
            fused_attention.attend(bag.q, bag.k, bag.v, args.scale, out[bag.rows], lse[bag.rows])
        else:
            bag.prepare()
            _share(partial(_attend, bag, out[bag.rows], lse[bag.rows]), bag.q.shape[1])
    return out, lse


def _differentiate(
    bag: _Bag, grad: Tensor, out: Tensor, lse: Tensor, grad_q: Tensor, by_row: Tensor | None, first: int, last: int
) -> list[Tensor]:
    """Gradients from rows ``first`` to ``last`` of one bag: fill grad_q (n, H, d), add to by_row (Tq, H, C);
    return those of k and v (H, m, .), and of weights (1, H, C) where they have no rows."""
    blocks, args = _Blocks(bag), bag.args
    grad_k, grad_v = (torch.zeros(t.shape, dtype=args.dtype) for t in (blocks.k, blocks.v))
    shared = (
        [] if args.weights is None or by_row is not None or not args.need_weights else [torch.zeros_like(args.weights)]
    )
    grad_weights = shared[0] if shared else by_row
    for rows in blocks.bounds(first, last, BLOCK_ROWS):
        q = args.load(bag.q[:, rows]) * args.scale
        upper, value = (args.load(t[rows].transpose(0, 1)) for t in (grad, out))
        delta, sums = (upper * value).sum(2), lse[rows].t().contiguous()
        found = torch.zeros(q.shape, dtype=args.dtype)
        blocks.begin_rows()
        for keys in blocks.bounds(0, bag.k.shape[1], BLOCK_KEYS):
            blocks.enter(rows, keys)
            for head in range(len(q)):
                weights = blocks.score(head, q[head])
                grads = torch.mm(upper[head], blocks.v[head, keys].t(), out=blocks.buffer("grads"))
                factor = blocks.factor(head) if args.dropout else None
                blocks.launch(_weigh_again, weights, sums[head], grads, delta[head], factor)
                dropped = weights if factor is None else factor.mul_(weights)
                grad_v[head, keys].addmm_(dropped.t(), upper[head])
                found[head].addmm_(grads, blocks.k[head, keys], alpha=args.scale)
                grad_k[head, keys].addmm_(grads.t(), q[head])
                if grad_weights is not None:
                    blocks.add_to_weights(grad_weights, head, weights, grads)
        if grad_weights is not None:
            blocks.end_rows(grad_weights)
        grad_q[rows] = found.transpose(0, 1)
    return [grad_k, grad_v, *shared]


def _added(shares: list[list[Tensor]]) -> list[Tensor]:
    """The sums of several lists, in their order and in the memory of the first."""
    first, *others = shares
    for other in others:
        for total, value in zip(first, other):
            total += value
    return first


def backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of weights or (0,)."""
    args = _Arguments(*arguments[:-1])
    args.need_weights = arguments[-1]
    if (only := args.only_bag()) is not None:
        for_q, for_k, for_v = (t.transpose(0, 1).contiguous() for t in _differentiate_fast(only, grad, out, lse))
        return for_q, for_k, for_v, lse.new_empty(0)
    grad_q, grad_k, grad_v = (huge_pages(t.new_empty(t.shape)).zero_() for t in (args.q, args.k, args.v))
    grad_weights = torch.zeros_like(args.weights) if args.need_weights and args.weights is not None else None
    by_row = grad_weights if grad_weights is not None and len(grad_weights) > 1 else None
    for bag in args.bags():
        mine = bag.rows
        if bag.fast:
            for_q, for_k, for_v = _differentiate_fast(bag, grad, out, lse)
            grad_q[bag.rows] = for_q.transpose(0, 1)
        elif bag.fused:
            own = (args.scale, grad[mine], out[mine], lse[mine], grad_q[mine])
            for_k, for_v = fused_attention.differentiate(bag.q, bag.k, bag.v, *own)
        else:
            bag.prepare()
            part = partial(_differentiate, bag, grad[mine], out[mine], lse[mine], grad_q[mine], by_row)
            for_k, for_v, *for_weights = _added(_share(part, bag.q.shape[1]))
            if for_weights and grad_weights is not None:
                grad_weights += for_weights[0]
        grad_k[bag.take] = for_k.transpose(0, 1)[: len(bag.columns), :, : grad_k.shape[2]].to(grad_k.dtype)
        grad_v[bag.take] = for_v.transpose(0, 1)[: len(bag.columns), :, : grad_v.shape[2]].to(grad_v.dtype)
    return grad_q, grad_k, grad_v, lse.new_empty(0) if grad_weights is None else grad_weights
