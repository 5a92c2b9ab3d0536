"""The long factors of Nystrom attention in bfloat16, on CPUs with AVX-512 BF16: see ``nystrom`` for what they compute.

One head after another, blocks of ``BLOCK`` rows, strips of 6 rows: the scores of a strip with all landmarks stay in the
first cache. Products are tiles of :mod:`bfloat_tiles`; what stands on their right is packed once per bag (landmarks) or
block (rows). Sums are float32. Rounding to bfloat16 is kept away from what the pseudo-inverse would magnify:

    scores            landmarks are two numbers of bfloat16, their rounded value and what it lacks: 16 bits
    weights, spread   times values less their mean over the landmarks, since weights add up to 1; and for the gradient
                      of values as weights less 1 / count, since close to equal ones would lose their differences
    weights, gather   are divided by the sum of rounded ones, so that what all values share comes out as it is
    gradients of      add up to 0 over what the softmax is taken of: in ``spread`` they meet keys less their mean, in
      scores          ``gather`` what rounding adds up to is taken off again, times a row that stands for k

FLOPs: 2 T H M (2 d + dv) forward, 2 T H M (4 d + 2 dv) backward, for each. Working memory: panels of landmarks, at most
five copies; a thread has the scores of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.kernels.cpu.bfloat_tiles import (
    COLUMNS,
    ROWS,
    add,
    power_of_2,
    rounded,
    store_pairs,
    store_rounded,
    subtract,
    times,
)
from bigbag.kernels.cpu.fused_attention import (
    _LEAST,
    _LN_2,
    _LOG2_E,
    _add_product,
    _multiply_strip,
    _panels_of_columns,
    _panels_of_rows,
    _peak,
    _score,
    _weigh,
)
from bigbag.kernels.cpu.half import _narrow, _wide
from bigbag.kernels.cpu.segments import _block, _jit, array
from bigbag.kernels.cpu.vectors import broadcast, lane_sum, lanes, larger, load, store

if TYPE_CHECKING:
    from bigbag.kernels.cpu.nystrom import _Piece

BLOCK = 96
_ONE = np.float32(1)


Work: TypeAlias = "Callable[[list[_Piece], int], None]"
"""What a thread does with some pieces, the number of the first among all given."""


@_block
def _copy_strip(x, t, h, left, first):
    """left[:, first : first + d] = x[t : t + ROWS, h]; zeros for rows past the end."""
    width = x.shape[2]
    for r in range(ROWS):
        if t + r < x.shape[0]:
            for c in range(width):
                left[r, first + c] = x[t + r, h, c]
        else:
            for c in range(width):
                left[r, first + c] = 0


@_block
def _pack_rows(x, start, stop, h, panels):
    """panels[c // 64, p, c % 64]: the pair of x[start + 2 p, h, c] and the number below it."""
    width = x.shape[2]
    for panel in range(panels.shape[0]):
        first = 64 * panel
        for t in range(start, stop, 2):
            pair = (t - start) // 2
            for c in range(min(64, width - first)):
                low = np.int32(x[t, h, first + c]) & np.int32(0xFFFF)
                high = np.int32(x[t + 1, h, first + c]) if t + 1 < stop else np.int32(0)
                panels[panel, pair, c] = low | (high << np.int32(16))


@_block
def _write_strip(sums, x, t, h):
    """x[t : t + ROWS, h] = sums, as far as there are rows."""
    for r in range(min(ROWS, x.shape[0] - t)):
        for c in range(x.shape[2]):
            x[t + r, h, c] = _narrow(sums[r, c], x[t + r, h, c])


@_block
def _add_rows(x, start, stop, h, total):
    """total[h] += the sum of x[start:stop, h]"""
    for t in range(start, stop):
        for c in range(x.shape[2]):
            total[h, c] += _wide(x[t, h, c])


@_jit
def _spread(q, keys, values, means, count, out, norms):
    # q, out (n, H, .), keys (H, panels, d, 64), values (H, panels, M/2, 64), means (H, dv), norms (2, n, H)
    zero, least = broadcast(np.float32(0), 64), broadcast(np.float32(-np.inf), 64)
    left = np.zeros((ROWS, 2 * keys.shape[2]), np.int16)
    scores = np.empty((1, ROWS, 64 * keys.shape[1]), np.float32)
    weights = np.empty(scores.shape[1:], np.int16)
    sums = np.empty((ROWS, -(-out.shape[2] // 16) * 16), np.float32)
    words, left_words = weights.view(np.int32), left.view(np.int32)
    for h in range(q.shape[1]):
        for start in range(0, len(q), ROWS):
            _copy_strip(q, start, h, left, 0)
            _copy_strip(q, start, h, left, keys.shape[2])
            _score(left_words, 0, keys[h], 0, count, _LOG2_E, scores[0])
            missing = min(ROWS, len(q) - start)
            for r in range(missing):
                top = _peak(least, scores, r, count)
                norms[0, start + r, h] = top * _LN_2
                norms[1, start + r, h] = _weigh(zero, scores, r, count, top, weights)
            sums[:] = 0
            _add_product(words, 0, values[h], 0, (count + 1) // 2, sums, 0)
            for r in range(missing):
                for c in range(out.shape[2]):
                    sums[r, c] = sums[r, c] / norms[1, start + r, h] + means[h, c]
            _write_strip(sums, out, start, h)


@_block
def _weights_of_row(like, scores, grads, r, width, top, scale):
    """scores[0, r] = scale 2^(scores - top), the weights P, and the sum of P grads[0, r]."""
    total, c = like, 0
    while c < width:
        weight = times(power_of_2(subtract(load(like, scores, 0, r, c), top)), scale)
        total = add(total, times(weight, load(like, grads, 0, r, c)))
        store(weight, scores, 0, r, c)
        c += lanes(like)
    return lane_sum(total)


@_block
def _spread_two(like, scores, grads, r, width, delta, other_delta, even, weights, pairs, half, rows):
    """Of rows r and r + 1 of the strip: P less ``even`` and dS as row ``half`` of pairs, dS as rows too."""
    c = 0
    while c < width:
        one, other = load(like, scores, 0, r, c), load(like, scores, 0, r + 1, c)
        store_pairs(subtract(one, even), subtract(other, even), weights, half, c)
        one = times(one, subtract(load(like, grads, 0, r, c), delta))
        other = times(other, subtract(load(like, grads, 0, r + 1, c), other_delta))
        store_pairs(one, other, pairs, half, c)
        store_rounded(one, rows, r, c)
        store_rounded(other, rows, r + 1, c)
        c += lanes(like)


@_jit
def _spread_backward(grad, q, keys, key_rows, values, norms, count, grad_q, for_keys, for_values, sum_grad):
    # grad, q, grad_q (n, H, .), keys (H, panels, d, 64), key_rows (H, panels, M/2, 64), values (H, panels, dv/2, 64),
    # norms (2, n, H), for_keys, for_values (H, M.., .), sum_grad (H, dv)
    like, even = broadcast(np.float32(0), 32), np.float32(1 / count)
    columns = 64 * keys.shape[1]
    left, upper = np.zeros((ROWS, 2 * keys.shape[2]), np.int16), np.zeros((ROWS, 2 * values.shape[2]), np.int16)
    scores, grads = np.empty((1, ROWS, columns), np.float32), np.empty((1, ROWS, columns), np.float32)
    delta, rows = np.empty(ROWS, np.float32), np.empty((ROWS, columns), np.int16)
    weights, pairs = np.zeros((BLOCK // 2, columns + 16), np.int32), np.zeros((BLOCK // 2, columns + 16), np.int32)
    q_rows = np.zeros((-(-q.shape[2] // 64), BLOCK // 2, 64), np.int32)
    upper_rows = np.zeros((-(-grad.shape[2] // 64), BLOCK // 2, 64), np.int32)
    sums = np.empty((ROWS, for_keys.shape[2]), np.float32)
    words, left_words, upper_words = rows.view(np.int32), left.view(np.int32), upper.view(np.int32)
    weights_across, pairs_across = weights.T, pairs.T
    for h in range(q.shape[1]):
        for block in range(0, len(q), BLOCK):
            stop = min(block + BLOCK, len(q))
            for start in range(block, stop, ROWS):
                _copy_strip(q, start, h, left, 0)
                _copy_strip(q, start, h, left, keys.shape[2])
                _copy_strip(grad, start, h, upper, 0)
                _score(left_words, 0, keys[h], 0, count, _LOG2_E, scores[0])
                _multiply_strip(upper_words, 0, values[h], 0, count, _ONE, grads[0])
                for r in range(ROWS):
                    top, scale = np.float32(0), np.float32(0)  # rows past the end get no weights
                    if start + r < len(q):
                        top, scale = norms[0, start + r, h] * _LOG2_E, _ONE / norms[1, start + r, h]
                    delta[r] = _weights_of_row(like, scores, grads, r, count, top, scale)
                for r in range(0, ROWS, 2):
                    half = (start - block + r) // 2
                    _spread_two(like, scores, grads, r, count, delta[r], delta[r + 1], even, weights, pairs, half, rows)
                sums[:] = 0
                _add_product(words, 0, key_rows[h], 0, (count + 1) // 2, sums, 0)
                _write_strip(sums, grad_q, start, h)
            _pack_rows(q, block, stop, h, q_rows)
            _pack_rows(grad, block, stop, h, upper_rows)
            _add_rows(grad, block, stop, h, sum_grad)
            for i in range(0, count, ROWS):
                _add_product(weights_across, i, upper_rows, 0, (stop - block + 1) // 2, for_values[h], i)
                _add_product(pairs_across, i, q_rows, 0, (stop - block + 1) // 2, for_keys[h], i)


@_block
def _score_block(x, block, stop, h, queries, count, left, left_words, scores):
    """scores[0, t - block] of rows block to stop with all queries; rows that a last strip lacks get no weights."""
    for start in range(block, stop, ROWS):
        _copy_strip(x, start, h, left, 0)
        _copy_strip(x, start, h, left, queries.shape[1])
        _score(left_words, 0, queries, 0, count, _LOG2_E, scores[0, start - block : start - block + ROWS])
    for t in range(stop - block, -(-(stop - block) // ROWS) * ROWS):
        for c in range(scores.shape[2]):
            scores[0, t, c] = _LEAST


@_block
def _raise_tops(least, scores, rows, count, tops, shrink, h):
    """tops[0, h]: the largest scores so far; shrink[0, 0] what the weights until now are multiplied by."""
    c = 0
    while c < count:
        before = load(least, tops, 0, h, c)
        top = before
        for t in range(rows):
            top = larger(load(least, scores, 0, t, c), top)
        store(power_of_2(subtract(before, top)), shrink, 0, 0, c)
        store(top, tops, 0, h, c)
        c += lanes(least)


@_block
def _weigh_block(zero, scores, rows, count, tops, totals, h, pairs):
    """pairs: the weights 2^(scores - tops) of two rows each; their sums, and those when rounded, are added to
    totals[:, h]."""
    c = 0
    while c < count:
        top, total, sums = load(zero, tops, 0, h, c), load(zero, totals, 0, h, c), load(zero, totals, 1, h, c)
        for t in range(0, rows, 2):
            one = power_of_2(subtract(load(zero, scores, 0, t, c), top))
            other = power_of_2(subtract(load(zero, scores, 0, t + 1, c), top))
            total = add(add(total, one), other)
            sums = add(add(sums, rounded(one)), rounded(other))
            store_pairs(one, other, pairs, t // 2, c)
        store(total, totals, 0, h, c)
        store(sums, totals, 1, h, c)
        c += lanes(zero)


@_jit
def _gather(k, v, queries, count, sums, tops, totals):
    # k, v (n, H, .), queries (H, panels, d, 64), sums (H, M.., dv..), tops (1, H, 64 panels), totals (2, H, 64 panels)
    zero, least = broadcast(np.float32(0), 64), broadcast(np.float32(-np.inf), 64)
    columns = 64 * queries.shape[1]
    left = np.zeros((ROWS, 2 * queries.shape[2]), np.int16)
    scores, shrink = np.empty((1, BLOCK, columns), np.float32), np.empty((1, 1, columns), np.float32)
    pairs = np.zeros((BLOCK // 2, columns + 16), np.int32)
    v_rows = np.zeros((-(-v.shape[2] // 64), BLOCK // 2, 64), np.int32)
    left_words, across = left.view(np.int32), pairs.T
    for h in range(k.shape[1]):
        for block in range(0, len(k), BLOCK):
            stop = min(block + BLOCK, len(k))
            rows = stop - block
            _score_block(k, block, stop, h, queries[h], count, left, left_words, scores)
            _raise_tops(least, scores, rows, count, tops, shrink, h)
            for i in range(count):
                if shrink[0, 0, i] != 1:
                    totals[0, h, i] *= shrink[0, 0, i]
                    totals[1, h, i] *= shrink[0, 0, i]
                    for c in range(sums.shape[2]):
                        sums[h, i, c] *= shrink[0, 0, i]
            _weigh_block(zero, scores, rows, count, tops, totals, h, pairs)
            _pack_rows(v, block, stop, h, v_rows)
            for i in range(0, count, ROWS):
                _add_product(across, i, v_rows, 0, (rows + 1) // 2, sums[h], i)


@_block
def _gather_row(like, scores, grads, r, count, tops, centre, slack, h, weights, slopes):
    """P = 2^(scores - tops) of a row as weights[r]; scores[0, r] = dS = P (grads - centre), rounded as slopes[r], and
    what rounding adds is added to slack[0, h]."""
    c = 0
    while c < count:
        weight = power_of_2(subtract(load(like, scores, 0, r, c), load(like, tops, 0, h, c)))
        slope = times(weight, subtract(load(like, grads, 0, r, c), load(like, centre, 0, h, c)))
        store(add(load(like, slack, 0, h, c), subtract(rounded(slope), slope)), slack, 0, h, c)
        store_rounded(weight, weights, r, c)
        store_rounded(slope, slopes, r, c)
        store(slope, scores, 0, r, c)
        c += lanes(like)


@_block
def _pair_slopes(like, scores, r, count, pairs, half):
    c = 0
    while c < count:
        store_pairs(load(like, scores, 0, r, c), load(like, scores, 0, r + 1, c), pairs, half, c)
        c += lanes(like)


@_jit
def _gather_backward(
    k, v, queries, query_rows, upper, upper_rows, tops, centre, count, grad_k, grad_v, for_queries, slack
):  # fmt: skip
    # k, v, grad_k, grad_v (n, H, .), queries (H, panels, d, 64), upper (H, panels, dv/2, 64), query_rows, upper_rows
    # (H, panels, M/2, 64), tops, centre, slack (1, H, 64 panels), for_queries (H, M.., d..)
    like = broadcast(np.float32(0), 32)
    columns = 64 * queries.shape[1]
    left, right = np.zeros((ROWS, 2 * queries.shape[2]), np.int16), np.zeros((ROWS, 2 * upper.shape[2]), np.int16)
    scores, grads = np.empty((1, ROWS, columns), np.float32), np.empty((1, ROWS, columns), np.float32)
    weights, slopes = np.empty((ROWS, columns), np.int16), np.empty((ROWS, columns), np.int16)
    pairs = np.zeros((BLOCK // 2, columns + 16), np.int32)
    k_rows = np.zeros((-(-k.shape[2] // 64), BLOCK // 2, 64), np.int32)
    sum_k = np.empty((ROWS, -(-k.shape[2] // 16) * 16), np.float32)
    sum_v = np.empty((ROWS, -(-v.shape[2] // 16) * 16), np.float32)
    left_words, right_words, across = left.view(np.int32), right.view(np.int32), pairs.T
    weight_words, slope_words = weights.view(np.int32), slopes.view(np.int32)
    for h in range(k.shape[1]):
        for block in range(0, len(k), BLOCK):
            stop = min(block + BLOCK, len(k))
            for start in range(block, stop, ROWS):
                _score_block(k, start, min(start + ROWS, stop), h, queries[h], count, left, left_words, scores)
                _copy_strip(v, start, h, right, 0)
                _multiply_strip(right_words, 0, upper[h], 0, count, _ONE, grads[0])
                for r in range(ROWS):
                    _gather_row(like, scores, grads, r, count, tops, centre, slack, h, weights, slopes)
                for r in range(0, ROWS, 2):
                    _pair_slopes(like, scores, r, count, pairs, (start - block + r) // 2)
                sum_k[:], sum_v[:] = 0, 0
                _add_product(slope_words, 0, query_rows[h], 0, (count + 1) // 2, sum_k, 0)
                _add_product(weight_words, 0, upper_rows[h], 0, (count + 1) // 2, sum_v, 0)
                _write_strip(sum_k, grad_k, start, h)
                _write_strip(sum_v, grad_v, start, h)
            _pack_rows(k, block, stop, h, k_rows)
            for i in range(0, count, ROWS):
                _add_product(across, i, k_rows, 0, (stop - block + 1) // 2, for_queries[h], i)


def _pad(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _room(heads: int, landmarks: int, width: int) -> np.ndarray:
    """Zeros for sums of whole strips and whole registers."""
    return np.zeros((heads, _pad(landmarks, ROWS), _pad(width, 16)), np.float32)


def _of_bags(pack: Callable[[Tensor], Tensor], landmarks: Tensor) -> np.ndarray:
    """Panels (B, H, ...) of bfloat16 landmarks (B, H, M, .)."""
    return array(pack(landmarks.to(torch.bfloat16).flatten(0, 1)).unflatten(0, landmarks.shape[:2]))


def _in_two(landmarks: Tensor) -> np.ndarray:
    """Panels of columns (B, H, panels, d, 64): of the rounded landmarks (B, H, M, d), then of what they lack."""
    high = landmarks.to(torch.bfloat16)
    return _of_bags(_panels_of_columns, torch.cat([high, (landmarks - high).to(torch.bfloat16)], 3))


def _means(landmarks: Tensor, counts: Tensor) -> Tensor:
    """Those of each bag and head (B, H, 1, .)."""
    return landmarks.sum(2, keepdim=True) / counts.clamp_min(1)[:, None, None, None]


def spread(q: Tensor, keys: Tensor, values: Tensor, counts: Tensor, out: Tensor, norms: Tensor) -> Work:
    """Of ``nystrom.spread``: fills rows of out and norms."""
    means = _means(values, counts)
    right = (_in_two(keys), _of_bags(_panels_of_rows, values - means), array(means[:, :, 0]))
    mine, found, sums = array(q), array(out), array(norms)

    def work(pieces: list[_Piece], _: int) -> None:
        for piece in pieces:
            rows = slice(piece.start, piece.end)
            _spread(mine[rows], *(x[piece.bag] for x in right), piece.count, found[rows], sums[:, rows])

    return work


def spread_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, norms: Tensor, counts: Tensor,
    grad_q: Tensor, key_parts: Tensor, value_parts: Tensor,
) -> Work:  # fmt: skip
    """Of ``nystrom.spread_backward``: fills rows of grad_q, and the pieces' sums (pieces, H, M, .)."""
    centred = keys - _means(keys, counts), values - _means(values, counts)
    right = (_in_two(keys), _of_bags(_panels_of_rows, centred[0]), _of_bags(_panels_of_columns, centred[1]))
    upper, mine, sums, found = (array(x) for x in (grad, q, norms, grad_q))

    def work(pieces: list[_Piece], first: int) -> None:
        for number, piece in enumerate(pieces, first):
            rows, count = slice(piece.start, piece.end), piece.count
            for_keys, for_values = (_room(keys.shape[1], count, x.shape[3]) for x in (keys, values))
            sum_grad = np.zeros((keys.shape[1], values.shape[3]), np.float32)
            given = (upper[rows], mine[rows], *(x[piece.bag] for x in right), sums[:, rows], count)
            _spread_backward(*given, found[rows], for_keys, for_values, sum_grad)
            for_values[..., : values.shape[3]] += sum_grad[:, None] / np.float32(count)
            for parts, own in ((key_parts, for_keys), (value_parts, for_values)):
                parts[number, :, :count] = torch.from_numpy(own)[:, :count, : parts.shape[3]]

    return work


def gather(queries: Tensor, k: Tensor, v: Tensor, parts: Tensor, tops: Tensor, totals: Tensor) -> Work:
    """Of ``nystrom.gather``: fills the pieces' sums (pieces, H, M, dv), maxima and totals (pieces, H, M, 1)."""
    right, keys, values = _in_two(queries), array(k), array(v)

    def work(pieces: list[_Piece], first: int) -> None:
        for number, piece in enumerate(pieces, first):
            rows, count, own = slice(piece.start, piece.end), piece.count, right[piece.bag]
            sums = _room(len(own), count, v.shape[2])
            top = np.full((1, len(own), COLUMNS * own.shape[1]), -np.inf, np.float32)
            total = np.zeros((2, *top.shape[1:]), np.float32)
            _gather(keys[rows], values[rows], own, count, sums, top, total)
            exact, multiplied = torch.from_numpy(total)[:, :, :count, None]
            # Else what all values share would not come out as it is.
            parts[number, :, :count] = torch.from_numpy(sums)[:, :count, : parts.shape[3]] * (exact / multiplied)
            tops[number, :, :count, 0] = torch.from_numpy(top)[0, :, :count] * float(_LN_2)
            totals[number, :, :count] = exact

    return work


def gather_backward(
    grad: Tensor, queries: Tensor, k: Tensor, v: Tensor, y: Tensor, norms: Tensor, offsets: Tensor,
    grad_k: Tensor, grad_v: Tensor, parts: Tensor,
) -> Work:  # fmt: skip
    """Of ``nystrom.gather_backward``: fills rows of grad_k and grad_v, and the pieces' sums (pieces, H, M, d)."""
    totals = torch.where(norms[1] > 0, norms[1], 1)  # what lies beyond a bag's landmarks has none
    upper = (grad / totals.unsqueeze(3)).to(torch.bfloat16)
    centres = F.pad((upper * y).sum(3), (0, -y.shape[2] % COLUMNS))
    tops = F.pad(norms[0] * float(_LOG2_E), (0, -y.shape[2] % COLUMNS))
    right = (_in_two(queries), _of_bags(_panels_of_rows, queries))
    above = (_of_bags(_panels_of_columns, upper), _of_bags(_panels_of_rows, upper))
    bags = (*right, *above, *(array(x[:, None]) for x in (tops, centres)))
    keys, values, for_k, for_v = (array(x) for x in (k, v, grad_k, grad_v))
    starts = offsets.tolist()

    def work(pieces: list[_Piece], first: int) -> None:
        for number, piece in enumerate(pieces, first):
            rows, count, bag = slice(piece.start, piece.end), piece.count, piece.bag
            sums, slack = _room(k.shape[1], count, k.shape[2]), np.zeros_like(bags[4][bag])
            own = (x[bag] for x in bags)
            _gather_backward(keys[rows], values[rows], *own, count, for_k[rows], for_v[rows], sums, slack)
            # A row that stands for all of the bag.
            like = k[starts[bag] : min(starts[bag] + BLOCK, starts[bag + 1])].float().mean(0)
            excess = torch.from_numpy(slack)[0, :, :count, None]
            parts[number, :, :count] = torch.from_numpy(sums)[:, :count, : k.shape[2]] - excess * like[:, None]

    return work
