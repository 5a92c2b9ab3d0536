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
from numba.extending import overload
from torch import Tensor

from bigbag.kernels.cpu import topk
from bigbag.kernels.cpu.half import _wide
from bigbag.kernels.cpu.segments import _BLOCK_ROWS, Pieces, _jit, _launch, array


def _rows(x, start, stop, buffer):
    raise NotImplementedError("compiled code only")


@overload(_rows)
def _rows_overload(x, start, stop, buffer):
    """Rows ``start`` to ``stop``, widened into the buffer if they are stored narrower."""
    if x.dtype == buffer.dtype:
        return lambda x, start, stop, buffer: x[start:stop]

    def widened(x, start, stop, buffer):
        for t in range(start, stop):
            for p in range(x.shape[1]):
                buffer[t - start, p] = _wide(x[t, p])
        return buffer[: stop - start]

    return widened


@_jit
def _dot(u, v):
    acc = v.dtype.type(0)
    for p in range(len(u)):
        acc += u[p] * v[p]
    return acc


@_jit
def _add(rows, weights, part, total):
    """total += sum of weights[t] rows[t], four rows at once; ``part`` is scratch."""
    part[:] = 0
    quads = len(rows) // 4 * 4
    for t in range(0, quads, 4):
        for p in range(len(part)):
            pair = weights[t] * rows[t, p] + weights[t + 1] * rows[t + 1, p]
            part[p] += pair + (weights[t + 2] * rows[t + 2, p] + weights[t + 3] * rows[t + 3, p])
    for t in range(quads, len(rows)):
        for p in range(len(part)):
            part[p] += weights[t] * rows[t, p]
    total += part


@_jit
def _forward(begin, end, x, y, bags, starts, ends, scores, top, total, sums):
    buffer, part = np.empty((_BLOCK_ROWS, x.shape[1]), y.dtype), np.empty(x.shape[1], y.dtype)
    weights = np.empty(_BLOCK_ROWS, y.dtype)
    for i in range(begin, end):
        top[i], total[i], sums[i] = -np.inf, 0, 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            rows = _rows(x, block, min(block + _BLOCK_ROWS, ends[i]), buffer)
            for h in range(y.shape[1]):
                largest = top[i, h]
                for t in range(len(rows)):
                    scores[block + t, h] = _dot(rows[t], y[bags[i], h])
                    largest = max(largest, scores[block + t, h])
                if largest > top[i, h]:
                    shrink = math.exp(top[i, h] - largest)
                    total[i, h] *= shrink
                    sums[i, h] *= shrink
                    top[i, h] = largest
                for t in range(len(rows)):
                    weights[t] = math.exp(scores[block + t, h] - top[i, h])
                    total[i, h] += weights[t]
                _add(rows, weights, part, sums[i, h])


@_jit
def _backward(begin, end, x, grad, z, a, grad_scores, bags, starts, ends, slopes, sums):
    buffer, part = np.empty((_BLOCK_ROWS, x.shape[1]), grad.dtype), np.empty(x.shape[1], grad.dtype)
    for i in range(begin, end):
        sums[i] = 0
        bag = bags[i]
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            rows = _rows(x, block, min(block + _BLOCK_ROWS, ends[i]), buffer)
            for h in range(grad.shape[1]):
                # By the same function as below, so that the difference is 0 where z is the only row.
                mean = _dot(z[bag, h], grad[bag, h])
                for t in range(len(rows)):
                    slope = a[block + t, h] * (_dot(rows[t], grad[bag, h]) - mean)
                    slopes[h, block + t] = slope + grad_scores[block + t, h]
                _add(rows, slopes[h, block:], part, sums[i, h])


def forward(x: Tensor, y: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, P) in any precision, y (B, S, P) in an accumulation dtype -> z (B, S, P), scores and a (T, S)."""
    pieces = Pieces(offsets)
    scores = y.new_empty(x.shape[0], y.shape[1])
    top, total = y.new_empty(len(pieces), y.shape[1]), y.new_empty(len(pieces), y.shape[1])
    sums = y.new_empty(len(pieces), *y.shape[1:])
    found = (scores.numpy(), top.numpy(), total.numpy(), sums.numpy())
    work = x.numel() * y.shape[1]
    _launch(_forward, len(pieces), work, array(x), array(y), pieces.bags, pieces.starts, pieces.ends, *found)
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
    pieces = Pieces(offsets)
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    grad_scores = torch.zeros_like(a) if grad_scores is None else grad_scores
    slopes, sums = a.new_empty(a.shape[1], a.shape[0]), y.new_empty(len(pieces), *y.shape[1:])
    given = (array(x), array(grad_z), array(z), array(a), array(grad_scores))
    where = (pieces.bags, pieces.starts, pieces.ends)
    _launch(_backward, len(pieces), x.numel() * y.shape[1], *given, *where, slopes.numpy(), sums.numpy())
    grad_y = pieces.add(sums.flatten(1)).view(y.shape)
    if not need_x:
        return x.new_empty(0), grad_y
    factors, vectors = torch.cat([a, slopes.t()], 1), torch.cat([grad_z, y], 1)
    return topk.pool_backward(vectors, factors, x, offsets, False, True)[1], grad_y
