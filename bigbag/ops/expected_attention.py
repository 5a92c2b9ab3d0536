"""The exact mean of attention whose values are Gaussian, without a draw of it."""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.registry import why_not
from bigbag.ops.sampled_attention import CLIP, block_rows
from bigbag.ops.segments import segment_max, segment_sum
from bigbag.ops.topk import segment_logsumexp

_KERNEL = {"cpu": (torch.float32,)}
# Two trapezoidal sums whose error falls exponentially with the number of nodes: over log(r), and over eps. The kernel's
# levels are a factor apart, as many as it takes; those of autograd are 64, however far apart.
_LEVELS = 64
_NODES, _REACH = 41, 6.0
# A product with such a factor counts for nothing, and its own factor is divided out again.
_SMALLEST_PHI = 1e-20


def expected_attention(mu: Tensor, log_var: Tensor, segments: Segments) -> Tensor:
    """The mean of the attention over all draws, ``E[softmax(f)]``: what infinitely many samples would average to.

    No sampling, since 1 / x is the integral of exp(-r x) over r > 0, and the f_t are independent:

        E[s_t] = int_0^inf E[e^{f_t} exp(-r e^{f_t})]  prod_{j != t} E[exp(-r e^{f_j})]  dr

    Each factor is an integral over one Gaussian. Both integrals are sums over nodes (64 or more, and 41), good to about
    1e-5 for standard deviations up to 3, and the result is scaled to sum to one.

    Cost, in float32 on a CPU, without gradients: 14 FLOP for each of some 41 x 100 nodes of an instance, nothing kept
    but the result (:mod:`bigbag.kernels.cpu.gaussian_mean`). Else: 41 x 64 exponentials per instance, and 128 floats
    kept; blocks of them are computed again in the backward pass.

    Args:
        mu: (T,) mean of f.
        log_var: (T,) logarithm of its variance.
        segments: how the T instances are cut into bags.

    Returns:
        (T,) float32 (float64 for float64), summing to one over each bag.
    """
    acc = torch.promote_types(mu.dtype, torch.float32)
    with torch.autocast(mu.device.type, enabled=False):
        mu, sigma = mu.to(acc), (log_var.to(acc) / 2).exp()
        tracked = torch.is_grad_enabled() and (mu.requires_grad or sigma.requires_grad)
        kernel_runs = why_not(_KERNEL, "cpu", mu.device.type, acc) is None
        if kernel_runs and not tracked and not torch.compiler.is_compiling():
            return _by_kernel(mu, sigma, segments)
        return _expected(mu, sigma, segments)


def _by_kernel(mu: Tensor, sigma: Tensor, segments: Segments) -> Tensor:
    # Numba takes a second to import.
    kernels = importlib.import_module("bigbag.kernels.cpu.gaussian_mean")
    low, high = _reach(mu, sigma, segments)
    finite = torch.where(low.isfinite() & high.isfinite(), high - low, 0)
    levels = 1 + math.ceil(float(finite.max()) / math.log(2) * 2) if len(low) else 1
    first = torch.stack([low.exp(), (low + math.log(2) / 2).exp()], 1)
    args = (mu, sigma, segments.offsets, kernels.Nodes(*_nodes(mu), first, CLIP, _SMALLEST_PHI))
    products = kernels.log_products(*args, levels)
    if segments.parts is not None:
        products = distributed.all_sum(products, segments.parts)
    a = kernels.means(*args, products.exp())
    return a / segment_sum(a, segments)[segments.bag_of_instance]


def _expected(mu: Tensor, sigma: Tensor, segments: Segments) -> Tensor:
    levels = _levels(mu.detach(), sigma.detach(), segments)
    bag_of = segments.bag_of_instance
    step = block_rows(mu.device, _LEVELS * _NODES)
    parts = []
    for first in range(0, max(1, mu.shape[0]), step):
        rows = slice(first, first + step)
        args = (mu[rows], sigma[rows], levels[bag_of[rows]])
        parts.append(checkpoint(_factors, *args, use_reentrant=False) if torch.is_grad_enabled() else _factors(*args))
    log_factor, ratio = (torch.cat(part) for part in zip(*parts))
    products = segment_sum(log_factor, segments).exp()
    a = (ratio * products[bag_of]).sum(1)
    return a / segment_sum(a, segments)[bag_of]


def _levels(mu: Tensor, sigma: Tensor, segments: Segments) -> Tensor:
    """(B, 64): the r of each bag, evenly spaced in log(r)."""
    low, high = _reach(mu, sigma, segments)
    grid = torch.linspace(0, 1, _LEVELS, dtype=mu.dtype, device=mu.device)
    return (low[:, None] + (high - low)[:, None] * grid).exp()


def _reach(mu: Tensor, sigma: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """(B,) each: the log(r) at which the product is still 1, and that at which it is 0."""
    mean = (mu + sigma.square() / 2).clamp(max=CLIP)
    smallest = segment_max((mu - _REACH * sigma).clamp(-CLIP, CLIP), segments)
    low = math.log(1e-7) - segment_logsumexp(mean, segments).clamp(min=-CLIP)
    return low, 3 - smallest


def _nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """(41,) each: eps, and their weights."""
    eps = torch.linspace(-_REACH, _REACH, _NODES, dtype=like.dtype, device=like.device)
    return eps, torch.softmax(-eps.square() / 2, 0)


def _factors(mu: Tensor, sigma: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """With phi = E[exp(-r e^f)]: log(phi), and r E[e^f exp(-r e^f)] / phi, both (rows, 64) for r in ``levels``."""
    eps, weight = _nodes(mu)
    e = torch.addcmul(mu[:, None], sigma[:, None], eps).clamp(-CLIP, CLIP).exp()
    exponent = -levels[:, :, None] * e[:, None, :]
    # phi - 1 is tiny for each of many instances, and must not be rounded away; nor must a phi near 0.
    less = torch.expm1(exponent)
    rest = 1 + less
    mean, phi = less @ weight, (rest @ weight).clamp_min(_SMALLEST_PHI)
    log_phi = torch.where(mean > -0.5, torch.log1p(mean.clamp_min(-0.5)), phi.log())
    return log_phi, (rest * exponent) @ -weight / phi
