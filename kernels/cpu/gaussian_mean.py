"""The mean of attention with Gaussian values over all draws, on CPU, with Numba; see bigbag/ops/expected_attention.

    y[t, n] = 1 - exp(-r e[t, n]),   e[t, n] = exp(clip(mu[t] + sigma[t] eps[n]))     phi = 1 - sum_n w[n] y[n]
    rho[t, l] = r_l sum_n w[n] e[n] (1 - y[n]) / phi[l]
    log_products  log P[b, l] = sum_t log phi[t, l]                 means  a[t] = sum_l P[l] rho[t, l]
    sums          S[b, l] = P[l] sum_t rho[t, l],   D[b, l] = P[l] sum_t g[t] rho[t, l],   g the gradient to a
    gradients     sum_l (g[t] S[l] - D[l]) rho_c[t, l],   rho_c: rho with c[n] w[n] in place of w[n] in its numerator,
                  c = 1 to mu, eps[n] to sigma, and 0 where f is clipped

Levels of r are powers of the root of 2, r_l = 2^(l / 2) r_0. Then y of a level comes from that of the one before the
last, y <- y + y (1 - y): two chains, and no number of instances x levels x nodes takes an exponential. (One chain, its
levels a factor of 2 apart, errs by 2 |Gamma(1 + 2 pi i / log 2)| = 1e-5 where sigma is small; two by 1e-11.) Instances
go through the levels _LANES at a time, in a core's own cache, until the product of their factors is nothing.
FLOPs, for each of T x nodes x levels: 7 each in log_products, means and sums, 9 in gradients; and for each of T x
levels a logarithm or a division. Bytes: mu and sigma once in each, g once in the last two, each result once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.activations import clipped, exp32
from bigbag.kernels.cpu.gaussian import _log
from bigbag.kernels.cpu.segments import Pieces, _block, _jit, _launch, array

_F = np.float32
_LANES = 64
_ROOT_2 = _F(math.sqrt(2))
# A factor counts as at least this, and so does the product of all: what is less is nothing.
_LEAST = _F(1e-20)
_NOTHING = _F(math.log(1e-20))
# A level of an instance takes as long as so many of the additions that threads are counted by.
_WORK = 64


@_block
def _less_than_one(z):
    """1 - exp(-z), z >= 0, by its series where that would cancel."""
    series = z * (_F(1) - z * _F(1 / 2) * (_F(1) - z * _F(1 / 3) * (_F(1) - z * _F(1 / 4) * (_F(1) - z * _F(1 / 5)))))
    return series if z < _F(0.1) else _F(1) - exp32(clipped(-z, _F(80)))


@_block
def _log_of_rest(q, phi):
    """log(phi), phi = 1 - q, by a series of q where that is small."""
    series = -q * (_F(1) + q * (_F(1 / 2) + q * (_F(1 / 3) + q * _F(1 / 4))))
    return series if q < _F(0.01) else _log(_LEAST if phi < _LEAST else phi)


@_jit
def _begin(mu, sigma, first, count, nodes, r, clip, slopes, y, we):
    """Of ``count`` instances: y at the first level, and the weighted exponentials, or their ``slopes``, which are 0
    where they are clipped; further lanes are like the last."""
    for n in range(nodes.shape[1]):
        for i in range(_LANES):
            t = first + min(i, count - 1)
            f = mu[t] + sigma[t] * nodes[0, n]
            e = exp32(clipped(f, clip))
            we[n, i] = _F(0) if slopes and abs(f) > clip else nodes[1, n] * e
            y[n, i] = _less_than_one(r * e)


@_jit
def _weigh(weight, y, q, phi):
    """q = sum of weight[n] y[n], phi that of weight[n] (1 - y[n]): each is exact where the other is near 1. Then y goes
    to the next level."""
    q[:] = 0
    phi[:] = 0
    for n in range(len(weight)):
        for i in range(_LANES):
            rest = _F(1) - y[n, i]
            q[i] += weight[n] * y[n, i]
            phi[i] += weight[n] * rest
            y[n, i] += y[n, i] * rest


@_jit
def _weigh_slopes(weight, we, y, slope, phi):
    """slope = sum of we[n] (1 - y[n]), phi and y as above."""
    slope[:] = 0
    phi[:] = 0
    for n in range(len(weight)):
        for i in range(_LANES):
            rest = _F(1) - y[n, i]
            slope[i] += we[n, i] * rest
            phi[i] += weight[n] * rest
            y[n, i] += y[n, i] * rest


@_jit
def _weigh_moments(nodes, we, y, slope, moment, phi):
    """moment = sum of eps[n] we[n] (1 - y[n]), the others as above."""
    slope[:] = 0
    moment[:] = 0
    phi[:] = 0
    for n in range(nodes.shape[1]):
        for i in range(_LANES):
            rest = _F(1) - y[n, i]
            part = we[n, i] * rest
            slope[i] += part
            moment[i] += nodes[0, n] * part
            phi[i] += nodes[1, n] * rest
            y[n, i] += y[n, i] * rest


@_jit
def _log_products(begin, end, bags, starts, ends, mu, sigma, r, nodes, clip, out):
    y, we = np.empty((nodes.shape[1], _LANES), _F), np.empty((nodes.shape[1], _LANES), _F)
    q, phi = np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        out[piece] = 0
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            for chain in range(2):
                scale = r[bags[piece]] * (_ROOT_2 if chain else _F(1))
                _begin(mu, sigma, first, count, nodes, scale, clip, False, y, we)
                for level in range(chain, out.shape[1], 2):
                    _weigh(nodes[1], y, q, phi)
                    total = _F(0)
                    for i in range(count):
                        total += _log_of_rest(q[i], phi[i])
                    out[piece, level] += total
                    if out[piece, level] < _NOTHING:
                        # Products only fall from level to level.
                        out[piece, level::2] = -np.inf
                        break


@_jit
def _means(begin, end, bags, starts, ends, mu, sigma, r, nodes, clip, products, out):
    y, we = np.empty((nodes.shape[1], _LANES), _F), np.empty((nodes.shape[1], _LANES), _F)
    phi, slope, a = np.empty(_LANES, _F), np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        bag = bags[piece]
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            a[:] = 0
            for chain in range(2):
                scale = r[bag] * (_ROOT_2 if chain else _F(1))
                _begin(mu, sigma, first, count, nodes, scale, clip, False, y, we)
                for level in range(chain, products.shape[1], 2):
                    share = products[bag, level] * scale
                    if products[bag, level] <= 0:
                        break
                    _weigh_slopes(nodes[1], we, y, slope, phi)
                    for i in range(_LANES):
                        a[i] += share * slope[i] / max(phi[i], _LEAST)
                    scale *= _F(2)
            out[first : first + count] = a[:count]


@_jit
def _sums(begin, end, bags, starts, ends, mu, sigma, r, nodes, clip, products, g, out):
    y, we = np.empty((nodes.shape[1], _LANES), _F), np.empty((nodes.shape[1], _LANES), _F)
    phi, slope = np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        bag = bags[piece]
        out[piece] = 0
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            for chain in range(2):
                scale = r[bag] * (_ROOT_2 if chain else _F(1))
                _begin(mu, sigma, first, count, nodes, scale, clip, False, y, we)
                for level in range(chain, products.shape[1], 2):
                    share = products[bag, level] * scale
                    if products[bag, level] <= 0:
                        break
                    _weigh_slopes(nodes[1], we, y, slope, phi)
                    total, weighted = _F(0), _F(0)
                    for i in range(count):
                        rho = slope[i] / max(phi[i], _LEAST)
                        total += rho
                        weighted += g[first + i] * rho
                    out[piece, 0, level] += share * total
                    out[piece, 1, level] += share * weighted
                    scale *= _F(2)


@_jit
def _gradients(begin, end, bags, starts, ends, mu, sigma, r, nodes, clip, sums, g, grad_mu, grad_sigma):
    y, we = np.empty((nodes.shape[1], _LANES), _F), np.empty((nodes.shape[1], _LANES), _F)
    phi, slope, moment = np.empty(_LANES, _F), np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        bag = bags[piece]
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            grad_mu[first : first + count] = 0
            grad_sigma[first : first + count] = 0
            for chain in range(2):
                scale = r[bag] * (_ROOT_2 if chain else _F(1))
                _begin(mu, sigma, first, count, nodes, scale, clip, True, y, we)
                for level in range(chain, sums.shape[2], 2):
                    total, weighted = sums[bag, 0, level] * scale, sums[bag, 1, level] * scale
                    if sums[bag, 0, level] <= 0:
                        break
                    _weigh_moments(nodes, we, y, slope, moment, phi)
                    for i in range(count):
                        share = (g[first + i] * total - weighted) / max(phi[i], _LEAST)
                        grad_mu[first + i] += share * slope[i]
                        grad_sigma[first + i] += share * moment[i]
                    scale *= _F(2)


def _args(pieces: Pieces, mu: Tensor, sigma: Tensor, r: Tensor, nodes: Tensor, clip: float) -> tuple[Any, ...]:
    cut = pieces.bags, pieces.starts, pieces.ends
    return *cut, array(mu), array(sigma), array(r), array(nodes), np.float32(clip)


def log_products(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, levels: int
) -> Tensor:
    """mu, sigma (T,), r (B,) the first level of each bag, nodes (2, N), eps and weights -> (B, levels), all float32;
    -inf for the logarithm of nothing."""
    pieces = Pieces.of(offsets)
    parts = torch.empty(len(pieces), levels)
    args = _args(pieces, mu, sigma, r, nodes, clip)
    _launch(_log_products, len(pieces), _WORK * levels * mu.shape[0], *args, parts.numpy())
    return pieces.add(parts)


def means(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, products: Tensor
) -> Tensor:
    """The same and P (B, levels) -> a (T,)."""
    pieces = Pieces.of(offsets)
    out = torch.empty(mu.shape)
    args = (*_args(pieces, mu, sigma, r, nodes, clip), array(products))
    _launch(_means, len(pieces), _WORK * products.shape[1] * mu.shape[0], *args, out.numpy())
    return out


def sums(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, products: Tensor, grad: Tensor
) -> Tensor:
    """The same and the gradient to a (T,) -> S and D (B, 2, levels)."""
    pieces = Pieces.of(offsets)
    parts = torch.empty(len(pieces), 2, products.shape[1])
    args = (*_args(pieces, mu, sigma, r, nodes, clip), array(products), array(grad))
    _launch(_sums, len(pieces), _WORK * products.shape[1] * mu.shape[0], *args, parts.numpy())
    return pieces.add(parts.flatten(1)).view(-1, *parts.shape[1:])


def gradients(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, with S and D (B, 2, levels) in place of P -> the gradients to mu and sigma (T,)."""
    pieces = Pieces.of(offsets)
    out = torch.empty(mu.shape), torch.empty(mu.shape)
    args = (*_args(pieces, mu, sigma, r, nodes, clip), array(sums), array(grad))
    _launch(_gradients, len(pieces), _WORK * sums.shape[2] * mu.shape[0], *args, *(o.numpy() for o in out))
    return out
