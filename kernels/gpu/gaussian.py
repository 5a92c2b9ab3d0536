"""Pooling with many draws of Gaussian attention, on the GPU: see kernels/cpu/gaussian for the formulas.

``_pool_draws``: one program owns BLOCK_S pairs of samples, BLOCK_K of the K + 1 columns (the values, and ones) and one
split of a bag's rows; a radius and an angle give two normals, S / 2 samples apart. The splits are added afterwards.
``_pool_draws_backward``: one program owns BLOCK_T rows of one bag and walks over all samples, making the noise again;
that of the first block of columns also reduces the gradients to mu and sigma. ``_draw`` writes the noise. No atomics.

The noise is that of the CPU's kernels but for the rounding of logarithm, sine and cosine.
FLOPs: about 40 for each of T S numbers forward, 60 backward, and 2 and 4 T S BLOCK_K in products of matrices, once per
block of columns. Bytes: mu, sigma, v and keys once per block of samples forward, once backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigbag.kernels.gpu import segments
from bigbag.kernels.gpu.masked_attention import _hash
from bigbag.kernels.gpu.segments import _rows_of_split

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _sin_turn(x):
    """sin(2 pi x) for |x| <= 1/4, by its Taylor series: the library's takes arguments of any size, and 300 KB."""
    w = x * x
    y = (-15.0946426 * w + 42.0586940) * w - 76.7058598
    return (((y * w + 81.6052493) * w - 41.3417022) * w + 6.28318531) * x


@triton.jit
def _normals(keys, rows, inside, pair):
    """(rows, pairs) cosines and sines."""
    key = tl.load(keys + rows, mask=inside, other=0)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    one = _hash(_hash(pair.to(tl.uint32)[None, :] + low[:, None]) ^ high[:, None])
    two = _hash(one + 0x9E3779B9)
    u = (one >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    turn = two.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    away = tl.abs(turn)
    # The sine of |turn|, mirrored at a quarter, has the sign of turn.
    sine = _sin_turn(0.25 - tl.abs(away - 0.25))
    return radius * _sin_turn(0.25 - away), radius * tl.where(turn < 0, -sine, sine)


@triton.jit
def _exponential(f, clip):
    # What is not a number stays what it is.
    return tl.exp(tl.where(f < -clip, -clip, tl.where(f > clip, clip, f)))


@triton.jit
def _columns(v, rows, inside, column, K):
    """(rows, columns) of v, and after its last column one of ones."""
    tile = tl.load(v + rows[:, None] * K + column[None, :], mask=inside[:, None] & (column < K)[None, :], other=0.0)
    return tl.where((column == K)[None, :] & inside[:, None], 1.0, tile.to(tl.float32))


@triton.jit
def _draw(keys, out, T, S, HALF, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    near, far = _normals(keys, rows, rows < T, pair)
    inside = (rows < T)[:, None] & (pair < HALF)[None, :]
    place = out + rows[:, None] * S + pair[None, :]
    tl.store(place, near, mask=inside)
    tl.store(place + HALF, far, mask=inside & (pair + HALF < S)[None, :])


@triton.jit
def _pool_draws(
    mu, sigma, v, keys, offsets, out, clip, S, HALF, K, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K + 1, BLOCK_K)
    pair = (tl.program_id(0) // blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    column = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    split, bag = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = _rows_of_split(offsets, bag, split, tl.num_programs(1))
    sum_near = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
    sum_far = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = rows < end
        mean = tl.load(mu + rows, mask=inside, other=0.0)[:, None]
        scale = tl.load(sigma + rows, mask=inside, other=0.0)[:, None]
        values = tl.trans(_columns(v, rows, inside, column, K))
        near, far = _normals(keys, rows, inside, pair)
        sum_near = tl.dot(values, _exponential(mean + scale * near, clip), sum_near, input_precision=PRECISION)
        sum_far = tl.dot(values, _exponential(mean + scale * far, clip), sum_far, input_precision=PRECISION)
    stored = (column <= K)[:, None] & (pair < HALF)[None, :]
    row = (split * tl.num_programs(2) + bag) * (K + 1) + column[:, None].to(tl.int64)
    place = out + row * S + pair[None, :]
    tl.store(place, sum_near, mask=stored)
    tl.store(place + HALF, sum_far, mask=stored & (pair + HALF < S)[None, :])


@triton.jit
def _pool_draws_backward(
    mu, sigma, v, keys, factors, bags, starts, offsets, grad_mu, grad_sigma, grad_v, clip, S, HALF, K,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    bag = tl.load(bags + tl.program_id(0))
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    inside = rows < tl.load(offsets + bag + 1)
    own = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Gradients to mu and sigma take all columns, and one program.
    reach = tl.where(tl.program_id(1) == 0, K + 1, 0)
    mean = tl.load(mu + rows, mask=inside, other=0.0)[:, None]
    scale = tl.load(sigma + rows, mask=inside, other=0.0)[:, None]
    sum_v = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    base = factors + bag * (K + 1) * S
    for first in range(0, HALF, BLOCK_S):
        pair = first + tl.arange(0, BLOCK_S)
        near, far = _normals(keys, rows, inside, pair)
        for side in tl.static_range(2):
            eps = near if side == 0 else far
            sample = pair + side * HALF
            real = (pair < HALF) & (sample < S)
            f = mean + scale * eps
            p = _exponential(f, clip)
            of_own = base + own[None, :].to(tl.int64) * S + sample[:, None]
            own_factor = tl.load(of_own, mask=(own < K)[None, :] & real[:, None], other=0.0)
            sum_v = tl.dot(p, own_factor, sum_v, input_precision=PRECISION)
            d = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
            for k in range(0, reach, BLOCK_K):
                column = k + tl.arange(0, BLOCK_K)
                place = base + column[:, None].to(tl.int64) * S + sample[None, :]
                factor = tl.load(place, mask=(column <= K)[:, None] & real[None, :], other=0.0)
                d = tl.dot(_columns(v, rows, inside, column, K), factor, d, input_precision=PRECISION)
            slope = tl.where(tl.abs(f) > clip, 0.0, d * p)
            total += tl.sum(slope, 1)
            moment += tl.sum(slope * eps, 1)
    out = grad_v + rows[:, None] * K + own[None, :]
    tl.store(out, sum_v.to(grad_v.dtype.element_ty), mask=inside[:, None] & (own < K)[None, :])
    tl.store(grad_mu + rows, total, mask=inside & (reach > 0))
    tl.store(grad_sigma + rows, moment, mask=inside & (reach > 0))


def _options(num_columns: int) -> dict[str, Any]:
    exact = torch.get_float32_matmul_precision() == "highest"
    # Those without register spills on sm_80 and sm_90.
    tiles: dict[str, Any] = {"BLOCK_T": 32, "BLOCK_S": 32, "BLOCK_K": 16, "num_warps": 4}
    tiles["num_stages"] = 2 if num_columns <= tiles["BLOCK_K"] else 1
    if INTERPRETED:  # the interpreter's cost is per operation, not per element
        tiles = {"BLOCK_T": 256, "BLOCK_S": 128, "BLOCK_K": max(16, triton.next_power_of_2(num_columns))}
    return {**tiles, "PRECISION": "ieee" if exact else "tf32"}


def draw(keys: Tensor, num_samples: int) -> Tensor:
    """(T, S) float32: the noise of instances by their keys (T,) int64."""
    keys, half = keys.contiguous(), (num_samples + 1) // 2
    out = keys.new_empty(keys.shape[0], num_samples, dtype=torch.float32)
    if out.numel():
        tiles = {"BLOCK_T": 16 if not INTERPRETED else 1024, "BLOCK_S": 128}
        grid = (triton.cdiv(len(keys), tiles["BLOCK_T"]), triton.cdiv(half, tiles["BLOCK_S"]))
        _draw[grid](keys, out, len(keys), num_samples, half, **tiles)
    return out


def pool(mu: Tensor, sigma: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, num_samples: int, clip: float) -> Tensor:
    """mu, sigma (T,) float32, v (T, K), keys (T,) int64 -> (B, K + 1, S) float32: weighted sums of v, and of ones."""
    mu, sigma, v, keys = (t.contiguous() for t in (mu, sigma, v, keys))
    (num_rows, width), num_bags, half = v.shape, offsets.shape[0] - 1, (num_samples + 1) // 2
    if num_bags * num_rows == 0:
        return mu.new_zeros(num_bags, width + 1, num_samples)
    options = _options(width + 1)
    tiles = triton.cdiv(half, options["BLOCK_S"]) * triton.cdiv(width + 1, options["BLOCK_K"])
    splits = segments.num_splits(tiles * num_bags, num_rows // num_bags)
    parts = mu.new_empty(splits, num_bags, width + 1, num_samples)
    _pool_draws[tiles, splits, num_bags](mu, sigma, v, keys, offsets, parts, clip, num_samples, half, width, **options)
    return parts.sum(0)


def pool_backward(
    factors: Tensor, mu: Tensor, sigma: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``factors`` (B, K + 1, S), the gradients to the sums of :func:`pool` -> those to mu, sigma and v."""
    mu, sigma, v, keys, factors = (t.contiguous() for t in (mu, sigma, v, keys, factors))
    (num_rows, width), num_samples = v.shape, factors.shape[2]
    grads = torch.empty_like(mu), torch.empty_like(sigma), torch.empty_like(v)
    if num_rows:
        options = _options(width + 1)
        bags, starts = segments.row_blocks(offsets, num_rows, options["BLOCK_T"])
        half = (num_samples + 1) // 2
        grid = (len(bags), triton.cdiv(width + 1, options["BLOCK_K"]))
        _pool_draws_backward[grid](
            mu, sigma, v, keys, factors, bags, starts, offsets, *grads, clip, num_samples, half, width, **options
        )
    return grads
