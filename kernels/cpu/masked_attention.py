"""Attention inside each bag on CPU.

    S[i, j] = scale q[i] . k[j] + bias[i, j],   P = softmax_j S,   out[i] = sum_j drop(P)[i, j] v[j]

Masked keys are left out by copying the others, once per bag: nothing is computed for them. Without bias and dropout a
bag goes to PyTorch's own flash attention. With them, blocks of ``BLOCK_ROWS`` x ``BLOCK_KEYS`` scores are GEMMs into
reused buffers with a running maximum and sum; what depends on the pair (distance, bucket, whether dropout keeps it)
is computed once per block and, where possible, for all heads, with Numba. Backward computes the scores again from the
logsumexp (Dao 2023). Blocks compute in float32 (float64 for float64). Each worker thread walks over its own share of
the queries, with its own gradients of k and v, which are added in the order of the shares.

Reads: q and out once, k and v once per block of queries. FLOPs: 4 N^2 d forward, 10 N^2 d backward, per head. Working
memory: copies of k and v of one bag, and per worker a few blocks and the gradients of k and v of that bag.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.kernels.cpu.attention_pool import _share
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _jit, accumulation_dtype

BLOCK_ROWS = 256
BLOCK_KEYS = 1024

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@_jit
def _distances(begin, end, c_q, c_k, out):
    for i in range(begin, end):
        for j in range(c_k.shape[0]):
            rows = out.dtype.type(c_q[i, 0]) - out.dtype.type(c_k[j, 0])
            columns = out.dtype.type(c_q[i, 1]) - out.dtype.type(c_k[j, 1])
            distance = np.sqrt(rows * rows + columns * columns)
            out[i, j] = distance if distance == distance else 0


@_jit
def _buckets(begin, end, c_q, c_k, thresholds, product, out):
    steps = len(thresholds)
    side = np.int32(2 * steps + 1)
    nowhere = side * side if product else side
    for i in range(begin, end):
        row_up, row_right = c_q[i, 0], c_q[i, 1]
        out[i] = steps * side + steps if product else steps
        # One threshold at a time, so that the loop over keys is vectorised.
        for step in range(steps):
            reach = thresholds[step]
            if product:
                for j in range(c_k.shape[0]):
                    up, right = row_up - c_k[j, 0], row_right - c_k[j, 1]
                    out[i, j] += side * (np.int32(up >= reach) - np.int32(-up >= reach))
                    out[i, j] += np.int32(right >= reach) - np.int32(-right >= reach)
            else:
                for j in range(c_k.shape[0]):
                    up, right = row_up - c_k[j, 0], row_right - c_k[j, 1]
                    out[i, j] += np.int32(up * up + right * right >= reach)
        for j in range(c_k.shape[0]):
            place = row_up - c_k[j, 0] + row_right - c_k[j, 1]
            out[i, j] = out[i, j] if place == place else nowhere


@_jit
def _add_weights(begin, end, weights, buckets, scores):
    # weights has one row, or one per row of scores
    for i in range(begin, end):
        row = i if weights.shape[0] > 1 else 0
        for j in range(scores.shape[1]):
            scores[i, j] += weights[row, buckets[i, j]]


@_jit
def _gather_gradient(begin, end, grad_scores, buckets, out):
    for i in range(begin, end):
        for j in range(grad_scores.shape[1]):
            out[i, buckets[i, j]] += grad_scores[i, j]


@_jit
def _hash(x):
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_jit
def _kept(begin, end, seed, head, first_row, columns, drop_below, value, out):
    key = _hash(np.uint32(_hash(np.uint32(seed)) + np.uint32(np.uint32(head) * np.uint32(0x9E3779B1))))
    for i in range(begin, end):
        row = _hash(np.uint32(key + np.uint32(np.uint32(first_row + i) * np.uint32(0x9E3779B1))))
        for j in range(out.shape[1]):
            bits = _hash(np.uint32(row + np.uint32(np.uint32(columns[j]) * np.uint32(0x85EBCA77))))
            out[i, j] = value if bits >= np.uint32(drop_below) else 0


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

    def widen(self) -> None:
        """k and v contiguous in the accumulation dtype, for GEMMs."""
        self.k, self.v = (t.to(self.args.dtype).contiguous() for t in (self.k, self.v))


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
        self.fast = not kind and not dropout
        self.need_weights = False

    def bags(self) -> Iterator[_Bag]:
        """The bags in which there is something to compute."""
        starts, kv_starts = self.starts, self.kv_starts
        for s, e, ks, ke in zip(starts, starts[1:], kv_starts, kv_starts[1:]):
            if e > s and ke > ks and len((bag := _Bag(self, slice(s, e), slice(ks, ke))).columns):
                yield bag


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
        kernel(0, self.shape[0], *args)

    def enter(self, rows: slice, keys: slice) -> None:
        """Compute what all heads share in this block: distances or buckets."""
        self.rows, self.keys = rows, keys
        self.shape = (rows.stop - rows.start, keys.stop - keys.start)
        args, bag = self.args, self.bag
        if not args.kind:
            return
        assert args.coords is not None and args.kv_coords is not None
        where = (args.coords[bag.rows][rows].numpy(), args.kv_coords[bag.take][keys].numpy())
        self.pairs = self.buffer("pairs")
        if args.kind == "distance":
            self.launch(_distances, *where, self.pairs.numpy())
        else:
            self.launch(_buckets, *where, args.thresholds, args.kind == "product", self.pairs.numpy())

    def score(self, head: int, q: Tensor) -> Tensor:
        """Scores (rows, keys) of one head; q (rows, d) is scaled already."""
        scores = torch.mm(q, self.k[head, self.keys].t(), out=self.buffer("scores"))
        if self.args.weights is None:
            return scores
        if self.args.kind == "distance":
            scores.addcmul_(self.pairs, self.args.weights[0, head, :1], value=-1)
        else:
            weights = self.args.weights[:, head]
            weights = weights[self.bag.rows][self.rows] if len(weights) > 1 else weights
            self.launch(_add_weights, weights.numpy(), self.pairs.numpy(), scores.numpy())
        return scores

    def factor(self, head: int) -> Tensor:
        """0 where dropout drops, else 1 / (1 - dropout)."""
        out = self.buffer("factors")
        dropout = self.args.dropout
        bound = min(round(dropout * 2**32), 2**32 - 1)
        first = self.bag.rows.start + self.rows.start
        numbers = (self.args.seed & 0xFFFFFFFF, head, first, self.bag.columns[self.keys], bound, 1 / (1 - dropout))
        self.launch(_kept, *numbers, out.numpy())
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
        self.launch(_gather_gradient, grad_scores.numpy(), self.pairs.numpy(), rows.numpy())
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
    """(H, n, .) -> (1, H, n, widest): columns of zeros change neither scores nor the first columns of out."""
    width = max(t.shape[2] for t in tensors)
    return [F.pad(t, (0, width - t.shape[2]))[None] if t.shape[2] < width else t[None] for t in tensors]


def _attend(bag: _Bag, out: Tensor, lse: Tensor, first: int, last: int) -> None:
    """Fill rows ``first`` to ``last`` of out (n, H, dv) and lse (n, H) of one bag, block by block."""
    blocks, args = _Blocks(bag), bag.args
    for rows in blocks.bounds(first, last, BLOCK_ROWS):
        q = bag.q[:, rows].to(args.dtype) * args.scale
        top = torch.full((*q.shape[:2], 1), -float("inf"), dtype=args.dtype)
        total, acc = torch.zeros_like(top), torch.zeros(*q.shape[:2], blocks.v.shape[2], dtype=args.dtype)
        for keys in blocks.bounds(0, bag.k.shape[1], BLOCK_KEYS):
            blocks.enter(rows, keys)
            for head in range(len(q)):
                scores = blocks.score(head, q[head])
                new_top = torch.maximum(top[head], scores.amax(1, keepdim=True))
                shrink = (top[head] - new_top).exp_()
                weights = scores.sub_(new_top).exp_()
                total[head].mul_(shrink).add_(weights.sum(1, keepdim=True))
                if args.dropout:
                    weights.mul_(blocks.factor(head))
                acc[head].mul_(shrink).addmm_(weights, blocks.v[head, keys])
                top[head] = new_top
        out[rows] = acc.div_(total).transpose(0, 1)
        lse[rows] = total.log_().add_(top)[..., 0].t()


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments as in ``_Arguments`` -> out (Tq, H, dv), lse (Tq, H) in the accumulation dtype.

    With a bias, out is in the accumulation dtype too: its gradients would suffer from a rounded out in backward.
    """
    args = _Arguments(*arguments)
    shape, dtype = (*args.q.shape[:2], args.v.shape[2]), args.dtype if args.kind else args.q.dtype
    out = huge_pages(args.q.new_empty(shape, dtype=dtype)).zero_()
    lse = args.q.new_full(args.q.shape[:2], -float("inf"), dtype=args.dtype)
    for bag in args.bags():
        if args.fast:
            found, sums = _flash(*_same_width(bag.q, bag.k, bag.v), 0.0, False, attn_mask=None, scale=args.scale)
            out[bag.rows] = found[0].transpose(0, 1)[..., : out.shape[2]]
            lse[bag.rows] = sums[0].t()
        else:
            bag.widen()
            _share(partial(_attend, bag, out[bag.rows], lse[bag.rows]), bag.q.shape[1])
    return out, lse


def _differentiate(
    bag: _Bag, grad: Tensor, out: Tensor, lse: Tensor, grad_q: Tensor, by_row: Tensor | None, first: int, last: int
) -> list[Tensor]:
    """Gradients from rows ``first`` to ``last`` of one bag: fill grad_q (n, H, d), add to by_row (Tq, H, C);
    return those of k and v (H, m, .), and of weights (1, H, C) where they have no rows."""
    blocks, args = _Blocks(bag), bag.args
    grad_k, grad_v = torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    shared = (
        [] if args.weights is None or by_row is not None or not args.need_weights else [torch.zeros_like(args.weights)]
    )
    grad_weights = shared[0] if shared else by_row
    for rows in blocks.bounds(first, last, BLOCK_ROWS):
        q, upper = bag.q[:, rows].to(args.dtype) * args.scale, grad[rows].transpose(0, 1).to(args.dtype)
        delta = (upper * out[rows].transpose(0, 1).to(args.dtype)).sum(2, keepdim=True)
        sums = lse[rows].t()[..., None]
        found = torch.zeros_like(q)
        blocks.begin_rows()
        for keys in blocks.bounds(0, bag.k.shape[1], BLOCK_KEYS):
            blocks.enter(rows, keys)
            for head in range(len(q)):
                weights = blocks.score(head, q[head]).sub_(sums[head]).exp_()
                grads = torch.mm(upper[head], blocks.v[head, keys].t(), out=blocks.buffer("grads"))
                dropped = weights
                if args.dropout:
                    factor = blocks.factor(head)
                    grads.mul_(factor)
                    dropped = factor.mul_(weights)
                grad_v[head, keys].addmm_(dropped.t(), upper[head])
                grads.sub_(delta[head]).mul_(weights)
                found[head].addmm_(grads, blocks.k[head, keys], alpha=args.scale)
                grad_k[head, keys].addmm_(grads.t(), q[head])
                if grad_weights is not None:
                    blocks.add_to_weights(grad_weights, head, weights, grads)
        if grad_weights is not None:
            blocks.end_rows(grad_weights)
        grad_q[rows] = found.transpose(0, 1)
    return [grad_k, grad_v, *shared]


def backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of weights or (0,)."""
    args = _Arguments(*arguments[:-1])
    args.need_weights = arguments[-1]
    grad_q, grad_k, grad_v = (huge_pages(t.new_empty(t.shape)).zero_() for t in (args.q, args.k, args.v))
    grad_weights = torch.zeros_like(args.weights) if args.need_weights and args.weights is not None else None
    by_row = grad_weights if grad_weights is not None and len(grad_weights) > 1 else None
    for bag in args.bags():
        if args.fast:
            outer = (t[bag.rows].transpose(0, 1) for t in (grad, out))
            q, k, v, upper, value = _same_width(bag.q, bag.k, bag.v, *outer)
            sums = lse[bag.rows].t()[None]
            found = _flash_backward(upper, q, k, v, value, sums, 0.0, False, attn_mask=None, scale=args.scale)
            for_q, for_k, for_v = (t[0] for t in found)
            grad_q[bag.rows] = for_q.transpose(0, 1)[..., : grad_q.shape[2]]
        else:
            bag.widen()
            mine = bag.rows
            part = partial(_differentiate, bag, grad[mine], out[mine], lse[mine], grad_q[mine], by_row)
            # Summed in the order of the shares.
            for_k, for_v, *for_weights = (sum(parts) for parts in zip(*_share(part, bag.q.shape[1])))
            if for_weights and grad_weights is not None:
                grad_weights += for_weights[0]
        grad_k[bag.take] = for_k.transpose(0, 1)[..., : grad_k.shape[2]].to(grad_k.dtype)
        grad_v[bag.take] = for_v.transpose(0, 1)[..., : grad_v.shape[2]].to(grad_v.dtype)
    return grad_q, grad_k, grad_v, lse.new_empty(0) if grad_weights is None else grad_weights
