"""The mean of attention with Gaussian values over all draws, on CPU, with Numba; see bigbag/ops/expected_attention.

    y[t, n] = 1 - exp(-r e[t, n]),   e[t, n] = exp(clip(mu[t] + sigma[t] eps[n]))     phi = 1 - sum_n w[n] y[n]
    total[b, l] = sum_t log phi[t, l]          a[t] = sum_l exp(total[b, l]) r_l sum_n w[n] e[n] (1 - y[n]) / phi[l]

Levels of r are powers of the root of 2, r_l = 2^(l / 2) r_0. Then y of a level comes from that of the one before the
last, y <- y (2 - y): two chains, and no number of instances x levels x nodes takes an exponential. (One chain, its
levels a factor of 2 apart, errs by 2 |Gamma(1 + 2 pi i / log 2)| = 1e-5 where sigma is small; two by 1e-11.) Instances
go through the levels _LANES at a time, in a core's own cache, until the product of their factors is nothing.
FLOPs: 14 for each of T x levels x nodes, and a logarithm for each of T x levels. Bytes: mu and sigma twice, a once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.activations import clipped, exp32
from bigbag.kernels.cpu.gaussian import _log
from bigbag.kernels.cpu.segments import Pieces, _block, _jit, _launch, array

_F = np.float32
_LANES = 64
# As much as nothing: of a product of factors its logarithm.
_NOTHING = _F(-60)
# A level of an instance takes as long as so many of the additions that threads are counted by.
_WORK = 64


@_block
def _less_than_one(z):
    """1 - exp(-z), z >= 0, by its series where that would cancel."""
    series = z * (_F(1) - z * _F(1 / 2) * (_F(1) - z * _F(1 / 3) * (_F(1) - z * _F(1 / 4) * (_F(1) - z * _F(1 / 5)))))
    return series if z < _F(0.1) else _F(1) - exp32(clipped(-z, _F(80)))


@_block
def _log_of_rest(q, phi, least):
    """log(phi), phi = 1 - q, by a series of q where that is small."""
    series = -q * (_F(1) + q * (_F(1 / 2) + q * (_F(1 / 3) + q * _F(1 / 4))))
    return series if q < _F(0.01) else _log(least if phi < least else phi)


@_jit
def _begin(mu, sigma, first, count, eps, weight, r, clip, y, we):
    """Of ``count`` instances: y at the first level, and the weighted exponentials; further lanes are like the last."""
    for n in range(len(eps)):
        for i in range(_LANES):
            t = first + min(i, count - 1)
            e = exp32(clipped(mu[t] + sigma[t] * eps[n], clip))
            we[n, i] = weight[n] * e
            y[n, i] = _less_than_one(r * e)


@_jit
def _weigh(weight, y, q, phi):
    """q = sum of weight[n] y[n], phi that of weight[n] (1 - y[n]): each is exact where the other is near 1."""
    q[:] = 0
    phi[:] = 0
    for n in range(len(weight)):
        for i in range(_LANES):
            q[i] += weight[n] * y[n, i]
            phi[i] += weight[n] * (_F(1) - y[n, i])


@_jit
def _weigh_slopes(weight, we, y, slope, phi):
    """slope = sum of we[n] (1 - y[n]), phi as above"""
    slope[:] = 0
    phi[:] = 0
    for n in range(len(we)):
        for i in range(_LANES):
            slope[i] += we[n, i] * (_F(1) - y[n, i])
            phi[i] += weight[n] * (_F(1) - y[n, i])


@_jit
def _double(y):
    for n in range(len(y)):
        for i in range(_LANES):
            y[n, i] *= _F(2) - y[n, i]


@_jit
def _log_products(begin, end, bags, starts, ends, mu, sigma, eps, weight, r, clip, least, out):
    y, we = np.empty((len(eps), _LANES), _F), np.empty((len(eps), _LANES), _F)
    q, phi = np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        out[piece] = 0
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            for chain in range(2):
                _begin(mu, sigma, first, count, eps, weight, r[bags[piece], chain], clip, y, we)
                for level in range(chain, out.shape[1], 2):
                    _weigh(weight, y, q, phi)
                    total = _F(0)
                    for i in range(count):
                        total += _log_of_rest(q[i], phi[i], least)
                    out[piece, level] += total
                    if out[piece, level] < _NOTHING:
                        # Products only fall from level to level.
                        out[piece, level::2] = _NOTHING
                        break
                    _double(y)


@_jit
def _means(begin, end, bags, starts, ends, mu, sigma, eps, weight, r, clip, least, products, out):
    y, we = np.empty((len(eps), _LANES), _F), np.empty((len(eps), _LANES), _F)
    phi, slope, a = np.empty(_LANES, _F), np.empty(_LANES, _F), np.empty(_LANES, _F)
    for piece in range(begin, end):
        bag = bags[piece]
        for first in range(starts[piece], ends[piece], _LANES):
            count = min(_LANES, ends[piece] - first)
            a[:] = 0
            for chain in range(2):
                _begin(mu, sigma, first, count, eps, weight, r[bag, chain], clip, y, we)
                # Relative to the first level: a's factor is each bag's own.
                scale = r[bag, chain] / r[bag, 0]
                for level in range(chain, products.shape[1], 2):
                    share = products[bag, level] * scale
                    if share <= 0:
                        break
                    _weigh_slopes(weight, we, y, slope, phi)
                    for i in range(_LANES):
                        a[i] += share * slope[i] / (least if phi[i] < least else phi[i])
                    _double(y)
                    scale *= _F(2)
            for i in range(count):
                out[first + i] = a[i]


class Nodes(NamedTuple):
    """eps and weights (N,) of the nodes; r (B, 2), each bag's first levels; the largest f; the least phi."""

    eps: Tensor
    weight: Tensor
    r: Tensor
    clip: float
    least: float


def _args(pieces: Pieces, mu: Tensor, sigma: Tensor, nodes: Nodes) -> tuple[Any, ...]:
    bounds = np.float32(nodes.clip), np.float32(nodes.least)
    cut = pieces.bags, pieces.starts, pieces.ends
    return *cut, array(mu), array(sigma), array(nodes.eps), array(nodes.weight), array(nodes.r), *bounds


def log_products(mu: Tensor, sigma: Tensor, offsets: Tensor, nodes: Nodes, levels: int) -> Tensor:
    """mu, sigma (T,) -> (B, levels), all float32; what is below -60 counts as that for each piece of a bag."""
    pieces = Pieces(offsets)
    parts = torch.empty(len(pieces), levels)
    work = _WORK * levels * mu.shape[0]
    _launch(_log_products, len(pieces), work, *_args(pieces, mu, sigma, nodes), parts.numpy())
    return pieces.add(parts)


def means(mu: Tensor, sigma: Tensor, offsets: Tensor, nodes: Nodes, products: Tensor) -> Tensor:
    """The same and the products of all factors (B, levels) -> a (T,), up to a factor of each bag."""
    pieces = Pieces(offsets)
    out = torch.empty(mu.shape)
    work = _WORK * products.shape[1] * mu.shape[0]
    _launch(_means, len(pieces), work, *_args(pieces, mu, sigma, nodes), array(products), out.numpy())
    return out
