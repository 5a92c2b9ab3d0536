"""Attention inside one bag in bfloat16, without bias and dropout, on CPUs with AVX-512 BF16.

    S[i, j] = scale q[i] . k[j],   P = softmax_j S,   out[i] = sum_j P[i, j] v[j]

Products of bfloat16 are summed in float32 by :mod:`bfloat_tiles`; weights and gradients of scores are rounded to
bfloat16, sums are not. What is the right side of a product is copied into panels once per bag, its neighbours in the
contraction side by side: pairs of columns of k and v for scores and gradients of weights, pairs of rows of v, k, q and
the gradient for sums over keys and queries. A worker owns a share of the queries. Forward: for a block of ``QUERIES``,
and of ``KEYS``, it walks over strips of 6 queries, whose scores stay in the first cache: scores, running maximum and
sum, weights, their product with v. Backward (Dao 2023): for a block of keys and one of ``SHORT`` queries, again by
strips, scores, P from the logsumexp, dS = P (dP - delta), the gradient of q; then those of k and v, from P and dS of
all strips. Exponentials are powers of two: scores and logsumexp are multiplied by log2(e) on the way.

Reads: q and out once, k and v once per block of queries (backward: q and the gradient once per block of keys). FLOPs:
4 N^2 d forward, 10 N^2 d backward, per head. Working memory: forward copies of q, k and v; backward, of a head at a
time, seven copies, the gradient of q in float32 and those of k and v for each worker.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.kernels.cpu.attention_pool import _share
from bigbag.kernels.cpu.bfloat_tiles import (
    COLUMNS,
    ROWS,
    add,
    multiply,
    multiply_onto,
    power_of_2,
    store_pairs,
    store_rounded,
    subtract,
    times,
)
from bigbag.kernels.cpu.half import _narrow
from bigbag.kernels.cpu.segments import _block, _jit, array
from bigbag.kernels.cpu.vectors import broadcast, lane_maximum, lane_sum, lanes, larger, load

QUERIES = 240
SHORT = 96
KEYS = 384
# Numbers of k and v, of some heads, whose gradients are computed together: small bags are not cut up, and of large ones
# the copies of a head at a time lie beside the tensors.
_TOGETHER = 1 << 20
_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_LEAST = np.float32(-3e38)


@_block
def _add_product(a, i, b, first, pairs, c, row):
    """C[row : row + ROWS] += A[i : i + ROWS, :pairs] . B[first : first + pairs]"""
    one = np.float32(1)
    for panel in range(b.shape[0]):
        column = COLUMNS * panel
        missing = c.shape[1] - column
        if missing >= 64:
            multiply_onto(4, a, i, b, panel, first, pairs, c, row, column, one)
        elif missing == 48:
            multiply_onto(3, a, i, b, panel, first, pairs, c, row, column, one)
        elif missing == 32:
            multiply_onto(2, a, i, b, panel, first, pairs, c, row, column, one)
        else:
            multiply_onto(1, a, i, b, panel, first, pairs, c, row, column, one)


@_block
def _multiply_strip(q, i, k, start, width, factor, out):
    """out[:, :width] = factor q[i : i + ROWS] . k[start : start + width], and more columns up to whole panels."""
    for column in range(0, width, COLUMNS):
        multiply(4, q, i, k, (start + column) // COLUMNS, 0, q.shape[1], out, 0, column, factor)


@_block
def _score(q, i, k, start, width, factor, out):
    """The same; keys that the last panel lacks get no weight."""
    _multiply_strip(q, i, k, start, width, factor, out)
    for r in range(ROWS):
        for j in range(width, -(-width // COLUMNS) * COLUMNS):
            out[r, j] = _LEAST


@_block
def _peak(like, scores, r, width):
    found, c = like, 0
    while c < width:
        found = larger(load(like, scores, 0, r, c), found)
        c += lanes(like)
    return lane_maximum(found)


@_block
def _weigh(zero, scores, r, width, top, weights):
    """weights[r] = 2^(scores[0, r] - top), and their sum."""
    total, c = zero, 0
    while c < width:
        weight = power_of_2(subtract(load(zero, scores, 0, r, c), top))
        total = add(total, weight)
        store_rounded(weight, weights, r, c)
        c += lanes(zero)
    return lane_sum(total)


@_jit
def _attend(q, k, v, keys, factor, out, lse):
    # q (H, n.., d/2), k (H, panels, d/2, 64), v (H, panels, m/2, 64), out (n, H, dv), lse (n, H)
    count, heads, width = out.shape
    zero, least = broadcast(np.float32(0), 64), broadcast(np.float32(-np.inf), 64)
    scores = np.empty((1, ROWS, KEYS), np.float32)
    weights = np.empty((ROWS, KEYS), np.int16)
    words = weights.view(np.int32)
    top, total = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    sums = np.empty((QUERIES, -(-width // 16) * 16), np.float32)
    for h in range(heads):
        mine, columns, rows = q[h], k[h], v[h]
        for block in range(0, count, QUERIES):
            top[:], total[:], sums[:] = -np.inf, 0, 0
            for start in range(0, keys, KEYS):
                some = min(KEYS, keys - start)
                for i in range(block, min(block + QUERIES, count), ROWS):
                    _score(mine, i, columns, start, some, factor, scores[0])
                    for r in range(ROWS):
                        row = i - block + r
                        highest = max(top[row], _peak(least, scores, r, some))
                        shrink = np.exp2(top[row] - highest)
                        top[row] = highest
                        total[row] = total[row] * shrink + _weigh(zero, scores, r, some, highest, weights)
                        if shrink != 1:
                            for c in range(sums.shape[1]):
                                sums[row, c] *= shrink
                    _add_product(words, 0, rows, start // 2, (some + 1) // 2, sums, i - block)
            for i in range(block, min(block + QUERIES, count)):
                row = i - block
                for c in range(width):
                    out[i, h, c] = _narrow(sums[row, c] / total[row], out[i, h, c])
                lse[i, h] = (top[row] + np.log2(total[row])) * _LN_2


@_block
def _differentiate_two(zero, scores, grads, r, width, i, sums, delta, weights, pairs, half, rows):
    """P and dS of queries i and i + 1, rows r and r + 1 of the strip: both as row ``half`` of pairs; dS as rows too."""
    c = 0
    while c < width:
        one = power_of_2(subtract(load(zero, scores, 0, r, c), sums[i]))
        other = power_of_2(subtract(load(zero, scores, 0, r + 1, c), sums[i + 1]))
        store_pairs(one, other, weights, half, c)
        one = times(one, subtract(load(zero, grads, 0, r, c), delta[i]))
        other = times(other, subtract(load(zero, grads, 0, r + 1, c), delta[i + 1]))
        store_pairs(one, other, pairs, half, c)
        store_rounded(one, rows, r, c)
        store_rounded(other, rows, r + 1, c)
        c += lanes(zero)


@_jit
def _differentiate(
    keys, factor, q, upper, q_rows, upper_rows, k, v, k_rows, sums, delta, for_q, for_k, for_v
):  # fmt: skip
    # One head: q, upper (n.., ./2), q_rows, upper_rows (panels, n/2, 64), k, v (panels, ./2, 64),
    # k_rows (panels, m/2, 64), sums, delta (n..), for_q (n.., d..), for_k, for_v (m.., .)
    zero = broadcast(np.float32(0), 32)
    scores, grads = np.empty((1, ROWS, KEYS), np.float32), np.empty((1, ROWS, KEYS), np.float32)
    rounded = np.empty((ROWS, KEYS), np.int16)
    words, strip, grad_strip = rounded.view(np.int32), scores[0], grads[0]
    # Rows at multiples of an odd number of lines: their columns meet in no set of the cache.
    weights, pairs = np.empty((SHORT // 2, KEYS + 16), np.int32), np.empty((SHORT // 2, KEYS + 16), np.int32)
    weights_across, pairs_across = weights.T, pairs.T
    for start in range(0, keys, KEYS):
        some = min(KEYS, keys - start)
        for block in range(0, len(for_q), SHORT):
            stop = min(block + SHORT, len(for_q))
            for i in range(block, stop, ROWS):
                _score(q, i, k, start, some, factor, strip)
                _multiply_strip(upper, i, v, start, some, np.float32(1), grad_strip)
                for r in range(0, ROWS, 2):
                    half = (i - block + r) // 2
                    _differentiate_two(zero, scores, grads, r, some, i + r, sums, delta, weights, pairs, half, rounded)
                _add_product(words, 0, k_rows, start // 2, (some + 1) // 2, for_q, i)
            for j in range(0, some, ROWS):
                _add_product(weights_across, j, upper_rows, block // 2, (stop - block) // 2, for_v, start + j)
                _add_product(pairs_across, j, q_rows, block // 2, (stop - block) // 2, for_k, start + j)


def _words(x: Tensor) -> Tensor:
    """(H, n, d) -> (H, n.., d/2) int32, pairs of columns; zeros fill up whole strips and pairs."""
    missing = 2 if x.shape[2] == 0 else x.shape[2] % 2
    return F.pad(x, (0, missing, 0, -x.shape[1] % ROWS)).contiguous().view(torch.int32)


def _panels_of_columns(x: Tensor) -> Tensor:
    """(H, n, d) -> (H, panels of 64 rows, d/2, 64) int32: what words are multiplied with, for products x^T."""
    words = _words(F.pad(x, (0, 0, 0, -x.shape[1] % COLUMNS)))[:, : -(-x.shape[1] // COLUMNS) * COLUMNS]
    return words.unflatten(1, (-1, COLUMNS)).transpose(2, 3).contiguous()


def _panels_of_rows(x: Tensor) -> Tensor:
    """(H, n, d) -> (H, panels of 64 columns, n../2, 64) int32, pairs of rows of whole strips."""
    x = F.pad(x, (0, -x.shape[2] % COLUMNS, 0, -x.shape[1] % ROWS)).unflatten(2, (-1, COLUMNS)).unflatten(1, (-1, 2))
    return x.permute(0, 3, 1, 4, 2).contiguous().view(torch.int32)[..., 0]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill out (n, H, dv) and lse (n, H) of one bag: q (H, n, d), k (H, m, d) and v (H, m, dv)."""
    right, factor = [array(_panels_of_columns(k)), array(_panels_of_rows(v))], np.float32(scale) * _LOG2_E

    def part(first: int, last: int) -> None:
        own = array(_words(q[:, first:last]))
        _attend(own, *right, k.shape[1], factor, array(out[first:last]), array(lse[first:last]))

    _share(part, q.shape[1])


def _wide_zeros(x: Tensor) -> Tensor:
    """Zeros for sums (H, n, .) of whole strips and whole registers."""
    return torch.zeros(len(x), x.shape[1] + -x.shape[1] % ROWS, x.shape[2] + -x.shape[2] % 16)


def differentiate(
    q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor, out: Tensor, lse: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill grad_q (n, H, d); return the gradients of k (H, m, d) and v (H, m, dv)."""
    for_k, for_v = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
    step = max(1, _TOGETHER // (k.shape[1] * (k.shape[2] + v.shape[2])))
    for first in range(0, len(q), step):
        heads = slice(first, first + step)
        given = (q[heads], k[heads], v[heads], scale, grad[:, heads], out[:, heads], lse[:, heads], grad_q[:, heads])
        (sum_k, sum_v), *others = _share(
            partial(_differentiate_share, _right_sides(k[heads], v[heads]), *given), q.shape[1]
        )
        for own_k, own_v in others:  # in their order
            sum_k += own_k
            sum_v += own_v
        for_k[heads], for_v[heads] = (t[:, : k.shape[1], : own.shape[2]] for t, own in ((sum_k, k), (sum_v, v)))
    return for_k, for_v


def _right_sides(k: Tensor, v: Tensor) -> list[np.ndarray]:
    return [array(t) for t in (_panels_of_columns(k), _panels_of_columns(v), _panels_of_rows(k))]


def _differentiate_share(
    right: list[np.ndarray], q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor, out: Tensor, lse: Tensor,
    grad_q: Tensor, first: int, last: int,
) -> list[Tensor]:  # fmt: skip
    """Fill rows of grad_q; return what these queries add to the gradients of k and v, (H, m.., .) in float32."""
    mine, upper = q[:, first:last], grad[first:last].transpose(0, 1)
    left = [array(t) for t in (_words(mine), _words(upper), _panels_of_rows(mine), _panels_of_rows(upper))]
    delta = (grad[first:last].float() * out[first:last]).sum(2)
    rows = [array(F.pad(t.t(), (0, -len(t) % ROWS))) for t in (lse[first:last] * float(_LOG2_E), delta)]
    found = [_wide_zeros(t) for t in (mine, k, v)]
    for head in zip(*left, *right, *rows, *map(array, found)):
        _differentiate(k.shape[1], np.float32(scale) * _LOG2_E, *head)
    for_q, for_k, for_v = found
    grad_q[first:last] = for_q.mul_(scale).transpose(0, 1)[: last - first, :, : q.shape[2]]
    return [for_k.mul_(scale), for_v]
