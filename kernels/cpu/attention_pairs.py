"""What a block of attention scores takes from its pairs of rows and keys: distances, buckets, dropout.

Each function fills or reads rows ``begin`` to ``end`` of a block (rows, keys); ``masked_attention`` launches them.
"""

from __future__ import annotations

import numpy as np

from bigbag.kernels.cpu.segments import _jit


@_jit
def distances(begin, end, c_q, c_k, out):
    for i in range(begin, end):
        for j in range(c_k.shape[0]):
            rows = out.dtype.type(c_q[i, 0]) - out.dtype.type(c_k[j, 0])
            columns = out.dtype.type(c_q[i, 1]) - out.dtype.type(c_k[j, 1])
            distance = np.sqrt(rows * rows + columns * columns)
            out[i, j] = distance if distance == distance else 0


@_jit
def buckets(begin, end, c_q, c_k, thresholds, product, out):
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
def add_weights(begin, end, weights, buckets, scores):
    # weights has one row, or one per row of scores
    for i in range(begin, end):
        row = i if weights.shape[0] > 1 else 0
        for j in range(scores.shape[1]):
            scores[i, j] += weights[row, buckets[i, j]]


@_jit
def gather_gradient(begin, end, grad_scores, buckets, out):
    for i in range(begin, end):
        for j in range(grad_scores.shape[1]):
            out[i, buckets[i, j]] += grad_scores[i, j]


@_jit
def _hash(x):
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_jit
def kept(begin, end, seed, head, first_row, columns, drop_below, value, out):
    key = _hash(np.uint32(_hash(np.uint32(seed)) + np.uint32(np.uint32(head) * np.uint32(0x9E3779B1))))
    for i in range(begin, end):
        row = _hash(np.uint32(key + np.uint32(np.uint32(first_row + i) * np.uint32(0x9E3779B1))))
        for j in range(out.shape[1]):
            bits = _hash(np.uint32(row + np.uint32(np.uint32(columns[j]) * np.uint32(0x85EBCA77))))
            out[i, j] = value if bits >= np.uint32(drop_below) else 0
