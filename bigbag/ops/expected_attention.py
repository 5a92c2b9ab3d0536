"""The exact mean of attention whose values are Gaussian, without a draw of it.

Softmax s over a bag, x_t = exp(f_t), is an integral over r > 0 of products of one factor for each instance:

    1 / sum x = int exp(-r sum x) dr        phi_t = E[exp(-r x_t)],   rho_t = E[r x_t exp(-r x_t)] / phi_t
    E[s_t] = int P rho_t dr / r             P = prod_t phi_t,   of what is independent

Its gradient: softmax's own, s_j (g_j - sum_i g_i s_i), is s_j times the sum over i != j of (g_j - g_i) s_i. The mean of
that times c(f_j) = d f_j / d theta, by 1 / (sum x)^2 = int r exp(-r sum x) dr, is

    d/d theta = int P rho_j^c (g_j sum_i rho_i - sum_i g_i rho_i) dr / r,   rho_j^c = E[c r x_j exp(-r x_j)] / phi_j

with c = 1 to mu and eps to sigma, and 0 where f is clipped; the term i = j is 0 by itself. (The same follows by parts
from the derivative of the sum over levels at fixed r, which takes a second moment of x besides.) So backward needs two
sums per bag and level, S = P sum rho and D = P sum g rho, and rho again: nothing is kept of instances x levels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.once import once_differentiable
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.ops.sampled_attention import CLIP, block_rows, check_shapes, clipped, gaussian
from bigbag.ops.segments import segment_max, segment_sum
from bigbag.ops.topk import segment_logsumexp
from bigbag.parts import Parts

# Trapezoidal sums, whose error falls exponentially with the number of nodes, over log(r) and over eps.
_STEP = math.log(2) / 2
_NODES, _REACH = 41, 6.0
# From P = 1 - 1e-7 to the r at which a factor is 1e-20, r exp(f) = 46, were that f clipped at -20 and those of 2^31
# others at 20. So the number does not depend on the data; kernels leave off where P is nothing.
_LEVELS = 1 + math.ceil((math.log(1e7 * 46 * 2**31) + 2 * CLIP) / _STEP)
# A factor counts as at least this: log and division stay finite.
_SMALLEST_PHI = 1e-20

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": (*HALF, torch.float32), "reference": FLOATING}


def expected_attention(mu: Tensor, log_var: Tensor, segments: Segments, *, impl: str | None = None) -> Tensor:
    """The mean of the attention over all draws, ``E[softmax(f)]``: what infinitely many samples would average to.

        f_t ~ N(mu_t, exp(log_var_t)), independent, clipped to [-20, 20]
        E[s_t] = int_0^inf E[e^{f_t} exp(-r e^{f_t})]  prod_{j != t} E[exp(-r e^{f_j})]  dr

    Each factor is an integral over one Gaussian. Both integrals are sums over nodes, 41 of eps up to 6, and of r a
    factor of the root of 2 apart. For standard deviations up to 3 they err by about 1e-5 of themselves and of 1 / T,
    gradients by 1e-5 of the largest; for those up to 7, or where much is clipped, by 5e-4 and 1e-2.

    FLOPs, for each instance, node and level until the product is nothing (some 41 x 90): 14 forward, and 16 backward,
    which computes all again. Bytes: mu and log_var twice each way. Memory: inputs, outputs, and 236 floats for each bag
    and each 2,048 instances (cpu) or 16 (triton), twice as many backward. The reference: 9 FLOP and an exponential,
    200 floats per instance, and blocks of 1 M numbers (16 M on a GPU), made again in the backward pass.

    Args:
        mu: (T,) mean of f.
        log_var: (T,) logarithm of its variance.
        segments: how the T instances are cut into bags.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (T,) float32 (float64 where an input is), summing to one over each bag, to 2e-6.

    Raises:
        ValueError: shapes that do not fit, an ``impl`` that can't run.
    """
    check_shapes("expected_attention", mu, log_var, None, segments)
    dtype = torch.promote_types(mu.dtype, log_var.dtype)
    chosen = choose("expected_attention", _DTYPES, impl, mu.device.type, dtype)
    with torch.autocast(mu.device.type, enabled=False):
        mu, sigma = gaussian(mu, log_var, dtype)
        low = _lowest(mu.detach(), sigma.detach(), segments, chosen)
        if chosen == "reference":
            return _reference(mu, sigma, low, segments)
        return _Mean.apply(mu, sigma, segments.offsets, low.exp(), torch.stack(_nodes(mu)), chosen, segments.parts)


def _lowest(mu: Tensor, sigma: Tensor, segments: Segments, impl: str) -> Tensor:
    """(B,): the log(r) at which the product is still 1, 1 - r sum E[x], and so is its derivative by log sigma,
    r sigma^2 E[x], E[x] = exp(mu + sigma^2 / 2): of what lies below, backward and the derivative of forward differ."""
    variance = sigma.square()
    mean = (mu + variance / 2 + variance.log1p()).clamp(-CLIP, CLIP)
    return math.log(1e-7) - segment_logsumexp(mean, segments, impl=impl).clamp(min=-CLIP)


def _nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """(41,) each: eps, and their weights."""
    eps = torch.linspace(-_REACH, _REACH, _NODES, dtype=like.dtype, device=like.device)
    return eps, torch.softmax(-eps.square() / 2, 0)


def _reference(mu: Tensor, sigma: Tensor, low: Tensor, segments: Segments) -> Tensor:
    """The definition, through autograd, scaled to sum to one."""
    levels, bag_of = _levels(mu.detach(), sigma.detach(), low, segments), segments.bag_of_instance
    step = block_rows(mu.device, levels.shape[1] * _NODES)
    parts = []
    for first in range(0, max(1, mu.shape[0]), step):
        rows = slice(first, first + step)
        args = (mu[rows], sigma[rows], levels[bag_of[rows]])
        parts.append(checkpoint(_factors, *args, use_reentrant=False) if torch.is_grad_enabled() else _factors(*args))
    log_phi, rho = (torch.cat(part) for part in zip(*parts))
    a = (rho * segment_sum(log_phi, segments, impl="reference").exp()[bag_of]).sum(1)
    return a / segment_sum(a, segments, impl="reference")[bag_of]


def _levels(mu: Tensor, sigma: Tensor, low: Tensor, segments: Segments) -> Tensor:
    """(B, levels): the r of each bag, as many as the widest takes until the product is 0."""
    high = 4 - segment_max((mu - _REACH * sigma).clamp(-CLIP, CLIP), segments, impl="reference")
    reach = torch.where((high - low).isfinite(), high - low, 0)
    count = 1 + math.ceil(float(reach.max()) / _STEP) if len(low) else 1
    return (low[:, None] + _STEP * torch.arange(count, dtype=mu.dtype, device=mu.device)).exp()


def _factors(mu: Tensor, sigma: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """log(phi) and rho, both (rows, levels)."""
    eps, weight = _nodes(mu)
    e = clipped(torch.addcmul(mu[:, None], sigma[:, None], eps)).exp()
    exponent = -levels[:, :, None] * e[:, None, :]
    # phi - 1 is tiny for each of many instances, and must not be rounded away; nor must a phi near 0.
    less = torch.expm1(exponent)
    rest = 1 + less
    mean, phi = less @ weight, (rest @ weight).clamp_min(_SMALLEST_PHI)
    log_phi = torch.where(mean > -0.5, torch.log1p(mean.clamp_min(-0.5)), phi.log())
    return log_phi, (rest * exponent) @ -weight / phi


class _Mean(torch.autograd.Function):
    """The kernels, and between them the sums over the ranks that share a bag, which custom operators can't take."""

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, sigma: Tensor, offsets: Tensor, r: Tensor, nodes: Tensor, impl: str, parts: Parts | None
    ) -> Tensor:
        log_products, means, _, _ = _OPS[impl]
        # The operators have no gradients of their own.
        args = (mu.detach(), sigma.detach(), offsets, r, nodes)
        products = _of_all_ranks(log_products(*args, CLIP, _LEVELS), parts).exp() * _STEP
        ctx.save_for_backward(mu, sigma, *args[2:], products)
        ctx.impl, ctx.parts = impl, parts
        return means(*args, CLIP, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, _, sums, gradients = _OPS[ctx.impl]
        *args, products = ctx.saved_tensors
        both = _of_all_ranks(sums(*args, CLIP, products, grad), ctx.parts)
        return *gradients(*args, CLIP, both, grad), None, None, None, None, None


def _of_all_ranks(own: Tensor, parts: Parts | None) -> Tensor:
    return own if parts is None else distributed.all_sum(own, parts)


def _register(impl: str, module: str) -> tuple[Any, ...]:
    """Custom operators ``bigbag::gaussian_{log_products,means,sums,gradients}_{impl}``."""

    def define(function: str, more: str) -> CustomOp:
        schema = f"(Tensor mu, Tensor sigma, Tensor offsets, Tensor r, Tensor nodes, float clip, {more}"
        return CustomOp(f"gaussian_{function}_{impl}", schema, launcher(module, function))

    log_products = define("log_products", "int levels) -> Tensor")
    means = define("means", "Tensor products) -> Tensor")
    sums = define("sums", "Tensor products, Tensor grad) -> Tensor")
    gradients = define("gradients", "Tensor sums, Tensor grad) -> (Tensor, Tensor)")
    log_products.register_fake(lambda mu, *args: args[2].new_empty(args[2].shape[0], args[-1]))
    means.register_fake(lambda mu, *args: mu.new_empty(mu.shape))
    sums.register_fake(lambda *args: args[-2].new_empty(args[-2].shape[0], 2, args[-2].shape[1]))
    gradients.register_fake(lambda mu, *args: (mu.new_empty(mu.shape), mu.new_empty(mu.shape)))
    return log_products, means, sums, gradients


_KERNELS = {"cpu": "bigbag.kernels.cpu.gaussian_mean", "triton": "bigbag.kernels.gpu.gaussian_mean"}
_OPS = {impl: _register(impl, module) for impl, module in _KERNELS.items()}

OPERATORS = (Operator("expected_attention", expected_attention, _DTYPES),)
