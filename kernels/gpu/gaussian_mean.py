"""The mean of attention with Gaussian values over all draws, on the GPU: formulas in kernels/cpu/gaussian_mean.

One program owns BLOCK_T rows of one bag and one of the two chains of levels, and keeps y of all nodes in registers, a
row's in two threads. It goes through the levels until their product is nothing, in ``_log_products`` that of its own
rows. ``_log_products`` and ``_sums`` write a row of levels for each block of rows, which are added bag by bag
afterwards; ``_means`` and ``_gradients`` write one result for each chain. No atomics; nothing waits for the device.

FLOPs: as on the CPU, and those of 23 nodes of weight 0. Bytes: mu and sigma once in each kernel; written and read
again, 4 for each level and BLOCK_T rows (twice that in ``_sums``), 8 for each row in ``_means``, 16 in ``_gradients``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigbag.kernels.gpu import segments

INTERPRETED = triton.knobs.runtime.interpret
# Without register spills on sm_80 and sm_90; the interpreter's cost is per operation, not per element.
BLOCK_T = 512 if INTERPRETED else 16
_LEAST = tl.constexpr(1e-20)
_NOTHING = tl.constexpr(-46.0517)
_ROOT_2 = tl.constexpr(1.4142135)


@triton.jit
def _rows(bags, starts, offsets, BLOCK_T: tl.constexpr):
    """The program's bag, its rows, and which of them there are."""
    bag = tl.load(bags + tl.program_id(0))
    rows = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCK_T).to(tl.int64)
    return bag, rows, rows < tl.load(offsets + bag + 1)


@triton.jit
def _first_level(r, bag):
    return tl.load(r + bag) * tl.where(tl.program_id(1) == 0, 1.0, _ROOT_2)


@triton.jit
def _nodes(nodes, N, BLOCK_N: tl.constexpr):
    """eps and weights, (nodes, 1)."""
    n = tl.arange(0, BLOCK_N)
    eps = tl.load(nodes + n, mask=n < N, other=0.0)
    return eps[:, None], tl.load(nodes + N + n, mask=n < N, other=0.0)[:, None]


@triton.jit
def _values(mu, sigma, rows, inside, eps):
    """f, (nodes, rows)."""
    mean = tl.load(mu + rows, mask=inside, other=0.0)[None, :]
    return mean + tl.load(sigma + rows, mask=inside, other=0.0)[None, :] * eps


@triton.jit
def _exponential(f, clip):
    # What is not a number stays what it is.
    return tl.exp(tl.where(f < -clip, -clip, tl.where(f > clip, clip, f)))


@triton.jit
def _less_than_one(z):
    """1 - exp(-z), z >= 0, by its series where that would cancel."""
    series = z * (1 - z * (1 / 2) * (1 - z * (1 / 3) * (1 - z * (1 / 4) * (1 - z * (1 / 5)))))
    return tl.where(z < 0.1, series, 1 - tl.exp(-z))


@triton.jit
def _log_of_rest(q, phi):
    """log(phi), phi = 1 - q, by a series of q where that is small."""
    series = -q * (1 + q * (1 / 2 + q * (1 / 3 + q * (1 / 4))))
    return tl.where(q < 0.01, series, tl.log(tl.where(phi < _LEAST, _LEAST, phi)))


@triton.jit
def _product(products, level, LEVELS):
    return tl.load(products + level, mask=level < LEVELS, other=0.0)


@triton.jit
def _log_products(
    mu, sigma, r, nodes, bags, starts, offsets, out, clip, N, LEVELS, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    bag, rows, inside = _rows(bags, starts, offsets, BLOCK_T)
    eps, weight = _nodes(nodes, N, BLOCK_N)
    y = _less_than_one(_first_level(r, bag) * _exponential(_values(mu, sigma, rows, inside, eps), clip))
    level, total = tl.program_id(1), 0.0
    place = out + tl.program_id(0).to(tl.int64) * LEVELS
    # What is not a number goes on.
    while (level < LEVELS) & ((total >= _NOTHING) | (total != total)):
        rest = 1 - y
        each = _log_of_rest(tl.sum(weight * y, 0), tl.sum(weight * rest, 0))
        total = tl.sum(tl.where(inside, each, 0.0), 0)
        tl.store(place + level, total)
        y += y * rest
        level += 2


@triton.jit
def _means(
    mu, sigma, r, nodes, bags, starts, offsets, products, out, clip, T, N, LEVELS,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    bag, rows, inside = _rows(bags, starts, offsets, BLOCK_T)
    eps, weight = _nodes(nodes, N, BLOCK_N)
    e = _exponential(_values(mu, sigma, rows, inside, eps), clip)
    scale = _first_level(r, bag)
    y, slopes = _less_than_one(scale * e), weight * e
    a = tl.zeros([BLOCK_T], tl.float32)
    level = tl.program_id(1)
    product = _product(products + bag * LEVELS, level, LEVELS)
    while (product > 0) | (product != product):
        rest = 1 - y
        phi = tl.sum(weight * rest, 0)
        a += product * scale * tl.sum(slopes * rest, 0) / tl.where(phi < _LEAST, _LEAST, phi)
        y += y * rest
        scale *= 2
        level += 2
        product = _product(products + bag * LEVELS, level, LEVELS)
    tl.store(out + tl.program_id(1).to(tl.int64) * T + rows, a, mask=inside)


@triton.jit
def _sums(
    mu, sigma, r, nodes, bags, starts, offsets, products, grad, out, clip, N, LEVELS,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    bag, rows, inside = _rows(bags, starts, offsets, BLOCK_T)
    eps, weight = _nodes(nodes, N, BLOCK_N)
    e = _exponential(_values(mu, sigma, rows, inside, eps), clip)
    g = tl.load(grad + rows, mask=inside, other=0.0)
    scale = _first_level(r, bag)
    y, slopes = _less_than_one(scale * e), weight * e
    level = tl.program_id(1)
    place = out + tl.program_id(0).to(tl.int64) * 2 * LEVELS
    product = _product(products + bag * LEVELS, level, LEVELS)
    while (product > 0) | (product != product):
        rest = 1 - y
        phi = tl.sum(weight * rest, 0)
        rho = tl.where(inside, tl.sum(slopes * rest, 0) / tl.where(phi < _LEAST, _LEAST, phi), 0.0)
        tl.store(place + level, product * scale * tl.sum(rho, 0))
        tl.store(place + LEVELS + level, product * scale * tl.sum(g * rho, 0))
        y += y * rest
        scale *= 2
        level += 2
        product = _product(products + bag * LEVELS, level, LEVELS)


@triton.jit
def _gradients(
    mu, sigma, r, nodes, bags, starts, offsets, sums, grad, grad_mu, grad_sigma, clip, T, N, LEVELS,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    bag, rows, inside = _rows(bags, starts, offsets, BLOCK_T)
    eps, weight = _nodes(nodes, N, BLOCK_N)
    f = _values(mu, sigma, rows, inside, eps)
    e = _exponential(f, clip)
    g = tl.load(grad + rows, mask=inside, other=0.0)
    scale = _first_level(r, bag)
    # What is clipped has no slope.
    y, slopes = _less_than_one(scale * e), tl.where(tl.abs(f) > clip, 0.0, weight * e)
    to_mu = tl.zeros([BLOCK_T], tl.float32)
    to_sigma = tl.zeros([BLOCK_T], tl.float32)
    level = tl.program_id(1)
    of_bag = sums + bag * 2 * LEVELS
    total = _product(of_bag, level, LEVELS)
    while (total > 0) | (total != total):
        rest = 1 - y
        phi = tl.sum(weight * rest, 0)
        share = scale * (g * total - tl.load(of_bag + LEVELS + level)) / tl.where(phi < _LEAST, _LEAST, phi)
        part = slopes * rest
        to_mu += share * tl.sum(part, 0)
        to_sigma += share * tl.sum(eps * part, 0)
        y += y * rest
        scale *= 2
        level += 2
        total = _product(of_bag, level, LEVELS)
    place = tl.program_id(1).to(tl.int64) * T + rows
    tl.store(grad_mu + place, to_mu, mask=inside)
    tl.store(grad_sigma + place, to_sigma, mask=inside)


def _args(mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor) -> tuple[Any, ...]:
    bags, starts = segments.row_blocks(offsets, mu.shape[0], BLOCK_T)
    return mu.contiguous(), sigma.contiguous(), r.contiguous(), nodes.contiguous(), bags, starts, offsets


def _options(nodes: Tensor) -> dict[str, Any]:
    return {"BLOCK_N": triton.next_power_of_2(nodes.shape[1]), "BLOCK_T": BLOCK_T, "num_warps": 1}


def _of_bags(blocks: Tensor, offsets: Tensor) -> Tensor:
    """(blocks, C) -> (B, C): the sums over the blocks of each bag."""
    counts = (offsets.diff() + BLOCK_T - 1) // BLOCK_T
    return segments.sum_rows(blocks, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def log_products(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, levels: int
) -> Tensor:
    """mu, sigma (T,), r (B,) the first level of each bag, nodes (2, N), eps and weights -> (B, levels), all float32;
    -inf for the logarithm of nothing."""
    if not len(r) * len(mu):
        return mu.new_zeros(len(r), levels)
    args = _args(mu, sigma, offsets, r, nodes)
    out = mu.new_full((len(args[4]), levels), -torch.inf)
    _log_products[len(out), 2](*args, out, clip, nodes.shape[1], levels, **_options(nodes))
    return _of_bags(out, offsets)


def means(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, products: Tensor
) -> Tensor:
    """The same and P (B, levels) -> a (T,)."""
    out = mu.new_empty(2, len(mu))
    if out.numel():
        args = (*_args(mu, sigma, offsets, r, nodes), products.contiguous())
        sizes = (len(mu), nodes.shape[1], products.shape[1])
        _means[len(args[4]), 2](*args, out, clip, *sizes, **_options(nodes))
    return out.sum(0)


def sums(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, products: Tensor, grad: Tensor
) -> Tensor:
    """The same and the gradient to a (T,) -> S and D (B, 2, levels)."""
    num_bags, levels = products.shape
    if not num_bags * len(mu):
        return mu.new_zeros(num_bags, 2, levels)
    args = (*_args(mu, sigma, offsets, r, nodes), products.contiguous(), grad.contiguous())
    out = mu.new_zeros(len(args[4]), 2 * levels)
    _sums[len(out), 2](*args, out, clip, nodes.shape[1], levels, **_options(nodes))
    return _of_bags(out, offsets).view(num_bags, 2, levels)


def gradients(
    mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, clip: float, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, with S and D (B, 2, levels) in place of P -> the gradients to mu and sigma (T,)."""
    to_mu, to_sigma = mu.new_empty(2, len(mu)), mu.new_empty(2, len(mu))
    if len(mu):
        args = (*_args(mu, sigma, offsets, r, nodes), sums.contiguous(), grad.contiguous())
        sizes = (len(mu), nodes.shape[1], sums.shape[2])
        _gradients[len(args[4]), 2](*args, to_mu, to_sigma, clip, *sizes, **_options(nodes))
    return to_mu.sum(0), to_sigma.sum(0)
