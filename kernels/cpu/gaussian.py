"""Pooling with many draws of Gaussian attention, on CPU, with Numba.

    f[t, s] = mu[t] + sigma[t] eps[t, s]     p = exp(clip(f))     sums[b, k, s] = sum_t p[t, s] v[t, k], v[t, K] = 1

The noise is a function of the instance's key and s (a hash of the two, and Box and Muller's transform): the backward
pass computes it again, whatever the pack, the pieces and the threads. Everything is done row by row on S numbers that
stay in the core's own cache. Loops are plain, so that LLVM makes vectors of them;
logarithm, sine and exponential are polynomials, good to float32, since calls of a library would stay single numbers.
FLOPs: about 40 for each of T S numbers forward, 60 backward. Bytes: mu, sigma, v and keys; partial sums of (K + 1) S
per piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.activations import clipped, exp32
from bigbag.kernels.cpu.attention_pairs import _hash
from bigbag.kernels.cpu.segments import _BLOCK_ROWS, Pieces, _block, _jit, _launch, array

_U, _F, _I = np.uint32, np.float32, np.int32
# A draw takes as long as so many of the additions that threads are counted by.
_WORK = 16


@_block
def _log(u):
    """Of 0 < u <= 1, by the series of artanh: log(m) = 2 artanh(z), z = (m - 1) / (m + 1), m in [0.7, 1.42)."""
    bits = _F(u).view(_U)
    # Exponent and mantissa about sqrt(1/2).
    shifted = _U(bits - _U(0x3F3504F3))
    n = _F(_I(shifted) >> _I(23))
    m = _U((shifted & _U(0x007FFFFF)) + _U(0x3F3504F3)).view(_F)
    z = (m - _F(1)) / (m + _F(1))
    w = z * z
    y = (_F(2 / 9) * w + _F(2 / 7)) * w + _F(2 / 5)
    return ((y * w + _F(2 / 3)) * w + _F(2)) * z + n * _F(0.69314718)


@_block
def _sin_turn(x):
    """sin(2 pi x) for |x| <= 1/4, by its Taylor series."""
    w = x * x
    y = (_F(-15.0946426) * w + _F(42.0586940)) * w + _F(-76.7058598)
    return (((y * w + _F(81.6052493)) * w + _F(-41.3417022)) * w + _F(6.28318531)) * x


@_jit
def _normals(key, eps):
    """Fill eps (an even count): pairs of independent normals, half the length apart."""
    first, second = _U(key & np.uint64(0xFFFFFFFF)), _U(key >> np.uint64(32))
    half = len(eps) // 2
    for s in range(half):
        one = _hash(_U(_hash(_U(_U(s) + first)) ^ second))
        two = _hash(_U(one + _U(0x9E3779B9)))
        # In (0, 1], and in [-1/2, 1/2].
        u = _F(_I(one >> _U(8))) * _F(2.0**-24) + _F(2.0**-25)
        turn = _F(_I(two)) * _F(2.0**-32)
        radius = np.sqrt(_F(-2) * _log(u))
        away = abs(turn)
        eps[s] = radius * _sin_turn(_F(0.25) - away)
        eps[half + s] = radius * _sin_turn(np.copysign(_F(0.25) - abs(away - _F(0.25)), turn))


@_jit
def _draw(begin, end, keys, out):
    eps = np.empty(out.shape[1] + out.shape[1] % 2, np.float32)
    for i in range(begin, end):
        _normals(keys[i], eps)
        out[i] = eps[: out.shape[1]]


@_jit
def _add_exponentials(mu, sigma, clip, eps, v, part):
    num_values = len(part) - 1
    for s in range(part.shape[1]):
        p = exp32(clipped(mu + sigma * eps[s], clip))
        part[num_values, s] += p
        eps[s] = p
    for k in range(num_values):
        for s in range(part.shape[1]):
            part[k, s] += v[k] * eps[s]


@_jit
def _pool(begin, end, starts, ends, keys, mu, sigma, v, clip, out):
    samples = out.shape[2]
    eps = np.empty(samples + samples % 2, np.float32)
    part = np.empty((out.shape[1], samples), np.float32)
    for i in range(begin, end):
        out[i] = 0
        for block in range(starts[i], ends[i], _BLOCK_ROWS):
            part[:] = 0
            for t in range(block, min(block + _BLOCK_ROWS, ends[i])):
                _normals(keys[t], eps)
                _add_exponentials(mu[t], sigma[t], clip, eps, v[t], part)
            out[i] += part


@_jit
def _row_backward(mu, sigma, clip, eps, v, factors, grad_v):
    """Gradients to mu and sigma of one row; writes those to v."""
    num_values, samples = len(factors) - 1, factors.shape[1]
    total, moment = np.float32(0), np.float32(0)
    d = factors[num_values].copy()
    for k in range(num_values):
        for s in range(samples):
            d[s] += v[k] * factors[k, s]
    for s in range(samples):
        f = mu + sigma * eps[s]
        p = exp32(clipped(f, clip))
        slope = np.float32(0) if abs(f) > clip else d[s] * p
        total += slope
        moment += slope * eps[s]
        d[s] = p
    for k in range(num_values):
        grad = np.float32(0)
        for s in range(samples):
            grad += d[s] * factors[k, s]
        grad_v[k] = grad
    return total, moment


@_jit
def _pool_backward(begin, end, starts, ends, keys, mu, sigma, v, clip, bags, factors, grad_mu, grad_sigma, grad_v):
    samples = factors.shape[2]
    eps = np.empty(samples + samples % 2, np.float32)
    for i in range(begin, end):
        for t in range(starts[i], ends[i]):
            _normals(keys[t], eps)
            grad_mu[t], grad_sigma[t] = _row_backward(mu[t], sigma[t], clip, eps, v[t], factors[bags[i]], grad_v[t])


def draw(keys: Tensor, num_samples: int) -> Tensor:
    """(T, S) float32: the noise of instances by their keys (T,) int64."""
    out = torch.empty(keys.shape[0], num_samples)
    _launch(_draw, out.shape[0], _WORK * out.numel(), _unsigned(keys), out.numpy())
    return out


def _unsigned(keys: Tensor) -> np.ndarray:
    return array(keys).view(np.uint64)


def _args(pieces: Pieces, keys: Tensor, mu: Tensor, sigma: Tensor, v: Tensor, clip: float) -> tuple[Any, ...]:
    return pieces.starts, pieces.ends, _unsigned(keys), array(mu), array(sigma), array(v.float()), np.float32(clip)


def pool(mu: Tensor, sigma: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, num_samples: int, clip: float) -> Tensor:
    """mu, sigma (T,) float32, v (T, K), keys (T,) int64 -> (B, K + 1, S) float32: weighted sums of v, and of ones."""
    pieces = Pieces.of(offsets)
    parts = torch.empty(len(pieces), v.shape[1] + 1, num_samples)
    args = _args(pieces, keys, mu, sigma, v, clip)
    _launch(_pool, len(pieces), _WORK * mu.shape[0] * num_samples, *args, parts.numpy())
    return pieces.add(parts.flatten(1)).view(-1, *parts.shape[1:])


def pool_backward(
    factors: Tensor, mu: Tensor, sigma: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``factors`` (B, K + 1, S), the gradients to the sums of :func:`pool` -> those to mu, sigma and v."""
    pieces = Pieces.of(offsets)
    grads = torch.empty(mu.shape), torch.empty(mu.shape), torch.empty(v.shape)
    args = (*_args(pieces, keys, mu, sigma, v, clip), pieces.bags, array(factors))
    work = _WORK * mu.shape[0] * factors.shape[2]
    _launch(_pool_backward, len(pieces), work, *args, *(grad.numpy() for grad in grads))
    return grads[0], grads[1], grads[2].to(v.dtype)
