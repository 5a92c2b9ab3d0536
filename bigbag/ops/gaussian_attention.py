"""Attention whose values are Gaussian: pooling with many draws of it, and its exact mean.

    f_t ~ N(mu_t, exp(log_var_t)), independent, clipped to [-20, 20];   s = softmax of f over each bag

Nothing of size (T, S) exists: in float32 on a CPU draws are made, used and forgotten row by row
(:mod:`bigbag.kernels.cpu.gaussian`); all else is plain PyTorch over blocks of instances.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag.bags import Segments
from bigbag.ops.segments import segment_max, segment_sum
from bigbag.ops.topk import segment_logsumexp

CLIP = 20.0
"""Values are clipped to this, so that sums of their exponentials fit float32 without a shift."""
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


def sampled_attention(
    mu: Tensor, log_var: Tensor, values: Tensor, segments: Segments, num_samples: int, seed: int | Sequence[int]
) -> Tensor:
    """Pool each bag with S draws of its attention.

        y[b, s] = sum_t softmax(f^s)_t values_t,   f^s = clip(mu + exp(log_var / 2) eps^s),   eps^s ~ N(0, 1)

    With ``values = X w`` for a linear layer w, this is what w makes of the S pooled vectors, at K / P of the work.
    Draws are made again in the backward pass. FLOPs: 2 T S (K + 1) forward, twice that backward, and T S normals and
    exponentials each way (about 40 FLOP). Memory: inputs, outputs, and S (K + 1) sums for each 2,048 instances; in
    float64 or on a GPU a few blocks of 1 M numbers (16 M on a GPU).

    Args:
        mu: (T,) mean of f.
        log_var: (T,) logarithm of its variance.
        values: (T, K), in any precision.
        segments: how the T instances are cut into B bags.
        num_samples: S.
        seed: of the draws, for each bag or one for all; they depend on it, on an instance's place in its bag, and on
            whether they are made on a CPU or a GPU.

    Returns:
        (B, S, K) float32 (float64 where an input is); zeros for an empty bag.

    Castro-Macias et al., Probabilistic smooth attention for deep multiple instance learning in medical imaging,
    arXiv 2507.14932.
    """
    acc = torch.promote_types(torch.promote_types(mu.dtype, values.dtype), torch.float32)
    with torch.autocast(mu.device.type, enabled=False):
        return _Sampled.apply(mu.to(acc), log_var.to(acc), values, segments, num_samples, seed)


def attention_draws(
    mu: Tensor, log_var: Tensor, segments: Segments, num_samples: int, seed: int | Sequence[int]
) -> Tensor:
    """The draws f of :func:`sampled_attention` of the same arguments, (T, S) in the dtype of ``mu``; with gradients."""
    f = mu.new_empty(mu.shape[0], num_samples)
    for _, rows, eps in _blocks(mu, segments, num_samples, seed):
        f[rows] = eps
    sigma = (log_var / 2).exp()
    if torch.is_grad_enabled() and (mu.requires_grad or sigma.requires_grad):
        return torch.addcmul(mu[:, None], sigma[:, None], f).clamp_(-CLIP, CLIP)
    return f.mul_(sigma[:, None]).add_(mu[:, None]).clamp_(-CLIP, CLIP)


def _step(device: torch.device, per_row: int) -> int:
    return max(1, _BLOCK_ELEMENTS.get(device.type, 1 << 24) // max(1, per_row))


def _blocks(
    like: Tensor, segments: Segments, num_samples: int, seed: int | Sequence[int]
) -> Iterator[tuple[int, slice, Tensor]]:
    """Bag, rows and noise (rows, S) of each block."""
    step = _step(like.device, num_samples)
    for bag, (start, end, key) in enumerate(zip(segments.starts, segments.starts[1:], _seeds(seed, segments))):
        on_cpu = like.device.type == "cpu"
        generator = None if on_cpu else torch.Generator(like.device).manual_seed(key)
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            shape = (rows.stop - rows.start, num_samples)
            if on_cpu:
                yield bag, rows, _kernels().draw(key, first - start, *shape).to(like.dtype)
            else:
                yield bag, rows, like.new_empty(shape).normal_(generator=generator)


def _kernels() -> ModuleType:
    # Numba takes a second to import.
    return importlib.import_module("bigbag.kernels.cpu.gaussian")


def _seeds(seed: int | Sequence[int], segments: Segments) -> Sequence[int]:
    return [seed] * segments.num_bags if isinstance(seed, int) else seed


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        log_var: Tensor,
        values: Tensor,
        segments: Segments,
        num_samples: int,
        seed: int | Sequence[int],
    ) -> Tensor:
        sigma = (log_var / 2).exp()
        if _fused(mu):
            keys = _seeds(seed, segments)
            rows_of_sums = _kernels().pool(mu, sigma, values.float(), segments.offsets, keys, num_samples, CLIP)
            sums = rows_of_sums.transpose(1, 2)
        else:
            sums = _sums(mu, sigma, values, segments, num_samples, seed)
        total = sums[:, :, -1:]
        y = torch.where(total == 0, 0.0, sums[:, :, :-1] / total)
        ctx.save_for_backward(mu, sigma, values, y, total)
        ctx.segments, ctx.num_samples, ctx.seed = segments, num_samples, seed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mu, sigma, values, y, total = ctx.saved_tensors
        # df_ts = p_ts / total_s <grad_s, values_t - y_s>
        scaled = torch.where(total == 0, 0.0, grad / total)
        factors = torch.cat([scaled, -(scaled * y).sum(-1, keepdim=True)], -1)
        if _fused(mu):
            keys, by_column = _seeds(ctx.seed, ctx.segments), factors.transpose(1, 2)
            grads = _kernels().pool_backward(mu, sigma, values.float(), ctx.segments.offsets, keys, by_column, CLIP)
            return grads[0], grads[1] * sigma / 2, grads[2].to(values.dtype), None, None, None
        grad_mu, grad_log_var = torch.zeros_like(mu), torch.zeros_like(mu)
        grad_values = torch.zeros_like(values) if ctx.needs_input_grad[2] else None
        for bag, rows, eps in _blocks(mu, ctx.segments, ctx.num_samples, ctx.seed):
            f = torch.addcmul(mu[rows, None], sigma[rows, None], eps)
            d = _with_column(values[rows].to(mu.dtype), 1.0) @ factors[bag].t()
            d.masked_fill_(f.abs() > CLIP, 0.0)
            p = f.clamp_(-CLIP, CLIP).exp_()
            if grad_values is not None:
                grad_values[rows] = (p @ scaled[bag]).to(values.dtype)
            d.mul_(p)
            grad_mu[rows] = d.sum(1)
            grad_log_var[rows] = torch.linalg.vecdot(d, eps) * sigma[rows] / 2
        return grad_mu, grad_log_var, grad_values, None, None, None


def _fused(mu: Tensor) -> bool:
    return mu.device.type == "cpu" and mu.dtype == torch.float32


def _sums(
    mu: Tensor, sigma: Tensor, values: Tensor, segments: Segments, num_samples: int, seed: int | Sequence[int]
) -> Tensor:
    """(B, S, K + 1): the sums over the instances of exp(f) times values, and of exp(f)."""
    sums = mu.new_zeros(segments.num_bags, num_samples, values.shape[1] + 1)
    for bag, rows, eps in _blocks(mu, segments, num_samples, seed):
        p = torch.addcmul(mu[rows, None], sigma[rows, None], eps).clamp_(-CLIP, CLIP).exp_()
        sums[bag] += p.t() @ _with_column(values[rows].to(mu.dtype), 1.0)
    return sums


def _with_column(rows: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 1), value=value)


# Two trapezoidal sums whose error falls exponentially with the number of nodes: over log(r), and over eps.
_LEVELS = 64
_NODES, _REACH = 41, 6.0
# A product with such a factor counts for nothing, and its own factor is divided out again.
_SMALLEST_PHI = 1e-6


def expected_attention(mu: Tensor, log_var: Tensor, segments: Segments) -> Tensor:
    """The mean of the attention over all draws, ``E[softmax(f)]``: what infinitely many samples would average to.

    No sampling, since 1 / x is the integral of exp(-r x) over r > 0, and the f_t are independent:

        E[s_t] = int_0^inf E[e^{f_t} exp(-r e^{f_t})]  prod_{j != t} E[exp(-r e^{f_j})]  dr

    Each factor is an integral over one Gaussian. Both integrals are sums over nodes (64 and 41), good to about 1e-5
    for standard deviations up to 3, and the result is scaled to sum to one.

    Cost: 41 x 64 exponentials per instance. Memory: 128 floats per instance, and a few blocks. Differentiable; blocks
    are computed again in the backward pass.

    Args:
        mu: (T,) mean of f.
        log_var: (T,) logarithm of its variance.
        segments: how the T instances are cut into bags.

    Returns:
        (T,) float32 (float64 for float64), summing to one over each bag.
    """
    acc = torch.promote_types(mu.dtype, torch.float32)
    with torch.autocast(mu.device.type, enabled=False):
        return _expected(mu.to(acc), (log_var.to(acc) / 2).exp(), segments)


def _expected(mu: Tensor, sigma: Tensor, segments: Segments) -> Tensor:
    levels = _levels(mu.detach(), sigma.detach(), segments)
    bag_of = segments.bag_of_instance
    step = _step(mu.device, _LEVELS * _NODES)
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
    """(B, 64): the r of each bag, evenly spaced in log(r), from where the product is still 1 to where it is 0."""
    mean = (mu + sigma.square() / 2).clamp(max=CLIP)
    smallest = segment_max((mu - _REACH * sigma).clamp(-CLIP, CLIP), segments)
    low = math.log(1e-7) - segment_logsumexp(mean, segments).clamp(min=-CLIP)
    high = 3 - smallest
    grid = torch.linspace(0, 1, _LEVELS, dtype=mu.dtype, device=mu.device)
    return (low[:, None] + (high - low)[:, None] * grid).exp()


def _factors(mu: Tensor, sigma: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """With phi = E[exp(-r e^f)]: log(phi), and r E[e^f exp(-r e^f)] / phi, both (rows, 64) for r in ``levels``."""
    eps = torch.linspace(-_REACH, _REACH, _NODES, dtype=mu.dtype, device=mu.device)
    weight = torch.softmax(-eps.square() / 2, 0)
    e = torch.addcmul(mu[:, None], sigma[:, None], eps).clamp(-CLIP, CLIP).exp()
    exponent = -levels[:, :, None] * e[:, None, :]
    # phi - 1 is tiny for each of many instances, and must not be rounded away.
    less = torch.expm1(exponent)
    mean = (less @ weight).clamp_min(_SMALLEST_PHI - 1)
    return torch.log1p(mean), ((1 + less) * exponent) @ -weight / (1 + mean)
