"""Softmax pooling by inner products, on CPU, with Numba: one pass over x forward, one backward.

    s[t, h] = x[t] . y[b, h],   a = softmax of s per bag,   z[b, h] = sum_t a[t, h] x[t]

Blocks of ``_BLOCK_ROWS`` rows stay in the caches between their inner products and their weighted sum. Forward, each
piece of a bag has its own maximum, so that its sums are shrunk when a larger score comes; pieces are joined at the end.
Backward, the gradient of the softmax needs one number per bag, which is known before: with g the gradient of z,

    ds[t] = a[t] (g . x[t] - g . z) + (gradient of s)[t],   dy = sum_t ds[t] x[t]

FLOPs: 4 T S P each way, 4 T S P more for the gradient of x. Bytes: x once each way.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu import topk
from bigbag.kernels.cpu.segments import _BLOCK_ROWS, Pieces, _add_dots, _block, _jit, _launch, array, row_dots
from bigbag.kernels.cpu.vectors import NARROW, WIDE, broadcast, fits, in_order, lanes, load, multiply_add, store, tail


@_block
def _add_rows(zero, c, x, start, stop, weights, out, i, h):
    """out[i, h] += sum of weights[t - start, h] x[t] over rows start to stop, in as many blocks of columns as fit from
    c on; returns where they end. The rows lie in the caches: block after block, sums stay in registers."""
    while fits(zero, c, x.shape[2]):
        total = zero
        for t in range(start, stop):
            total = multiply_add(total, weights[t - start, h], load(zero, x, t, 0, c))
        store(multiply_add(total, weights.dtype.type(1), load(zero, out, i, h, c)), out, i, h, c)
        c += lanes(zero)
    return c


@_jit
def _forward(begin, end, x, y, bags, starts, ends, scores, top, total, sums):
    zero = y.dtype.type(0)
    ordered, wide, narrow, rest = in_order(zero), broadcast(zero, WIDE), broadcast(zero, NARROW), tail(zero, NARROW)
    weights = np.empty((_BLOCK_ROWS, y.shape[1]), y.dtype)
    for i in range(begin, end):
        top[i], total[i], sums[i] = -np.inf, 0, 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            stop = min(block + _BLOCK_ROWS, ends[i])
            for h in range(y.shape[1]):
                c = _add_dots(ordered, 0, x, block, stop, y, bags[i], h, scores)
                c = _add_dots(narrow, c, x, block, stop, y, bags[i], h, scores)
                _add_dots(rest, c, x, block, stop, y, bags[i], h, scores)
                largest = top[i, h]
                for t in range(block, stop):
                    largest = max(largest, scores[t, h])
                if largest > top[i, h]:
                    shrink = math.exp(top[i, h] - largest)
                    total[i, h] *= shrink
                    sums[i, h] *= shrink
                    top[i, h] = largest
                for t in range(block, stop):
                    weights[t - block, h] = math.exp(scores[t, h] - top[i, h])
                    total[i, h] += weights[t - block, h]
                c = _add_rows(wide, 0, x, block, stop, weights, sums, i, h)
                c = _add_rows(narrow, c, x, block, stop, weights, sums, i, h)
                _add_rows(rest, c, x, block, stop, weights, sums, i, h)


@_jit
def _backward(begin, end, x, grad, means, a, grad_scores, bags, starts, ends, slopes, sums):
    zero = grad.dtype.type(0)
    ordered, wide, narrow, rest = in_order(zero), broadcast(zero, WIDE), broadcast(zero, NARROW), tail(zero, NARROW)
    for i in range(begin, end):
        sums[i] = 0
        bag = bags[i]
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            stop = min(block + _BLOCK_ROWS, ends[i])
            for h in range(grad.shape[1]):
                c = _add_dots(ordered, 0, x, block, stop, grad, bag, h, slopes)
                c = _add_dots(narrow, c, x, block, stop, grad, bag, h, slopes)
                _add_dots(rest, c, x, block, stop, grad, bag, h, slopes)
                for t in range(block, stop):
                    slopes[t, h] = a[t, h] * (slopes[t, h] - means[bag, h]) + grad_scores[t, h]
                c = _add_rows(wide, 0, x, block, stop, slopes[block:], sums, i, h)
                c = _add_rows(narrow, c, x, block, stop, slopes[block:], sums, i, h)
                _add_rows(rest, c, x, block, stop, slopes[block:], sums, i, h)


def forward(x: Tensor, y: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, P) in any precision, y (B, S, P) in an accumulation dtype -> z (B, S, P), scores and a (T, S)."""
    pieces = Pieces.of(offsets)
    scores = y.new_zeros(x.shape[0], y.shape[1])
    top, total = y.new_empty(len(pieces), y.shape[1]), y.new_empty(len(pieces), y.shape[1])
    sums = y.new_empty(len(pieces), *y.shape[1:])
    found = (scores.numpy(), top.numpy(), total.numpy(), sums.numpy())
    work = x.numel() * y.shape[1]
    _launch(_forward, len(pieces), work, array(x)[:, None], array(y), pieces.bags, pieces.starts, pieces.ends, *found)
    bags = torch.from_numpy(pieces.bags)
    most = y.new_full(y.shape[:2], -torch.inf).scatter_reduce_(0, bags[:, None].expand_as(top), top, "amax")
    shrink = (top - most[bags]).exp_()
    total = torch.zeros_like(most).index_add_(0, bags, total * shrink)
    z = torch.zeros_like(y).index_add_(0, bags, sums * shrink[..., None]) / torch.where(total == 0, 1, total)[..., None]
    of_row = torch.repeat_interleave(offsets.diff(), output_size=x.shape[0])
    return z, scores, (scores - most[of_row]).exp_().div_(total[of_row])


def backward(
    grad_z: Tensor | None, grad_scores: Tensor | None, x: Tensor, y: Tensor, offsets: Tensor, z: Tensor, a: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x (T, P) or (0,), and y (B, S, P)."""
    pieces = Pieces.of(offsets)
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    grad_scores = torch.zeros_like(a) if grad_scores is None else grad_scores
    slopes, sums = torch.zeros_like(a), y.new_empty(len(pieces), *y.shape[1:])
    # By the same function as the slopes, so that their difference is 0 where z is the only row.
    means = row_dots(z.flatten(0, 1), grad_z.reshape(-1, 1, z.shape[2]), torch.arange(z.shape[0] * z.shape[1] + 1))
    given = (array(x)[:, None], array(grad_z), means.view(z.shape[:2]).numpy(), array(a), array(grad_scores))
    where = (pieces.bags, pieces.starts, pieces.ends)
    _launch(_backward, len(pieces), x.numel() * y.shape[1], *given, *where, slopes.numpy(), sums.numpy())
    grad_y = pieces.add(sums.flatten(1)).view(y.shape)
    if not need_x:
        return x.new_empty(0), grad_y
    factors, vectors = torch.cat([a, slopes], 1), torch.cat([grad_z, y], 1)
    return topk.pool_backward(vectors, factors, x, offsets, False, True)[1], grad_y
