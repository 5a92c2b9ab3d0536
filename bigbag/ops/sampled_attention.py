"""Attention whose values are Gaussian: pooling with many draws of it, and the draws themselves.

    f_t ~ N(mu_t, exp(log_var_t)), independent, clipped to [-20, 20];   s = softmax of f over each bag

Nothing of size (T, S) exists: kernels make draws, use and forget them row by row, and again in the backward pass. The
noise is the same for all implementations: Box and Muller's transform of a hash of seed, place in the bag and sample.

The custom operators take the noise's ``keys``, a number for each instance, and give the sums over the instances of
exp(f) times values, and of exp(f); the division and its gradient, which are thin, are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag.bags import Segments
from bigbag.ops import distributed
from bigbag.ops.custom import CustomOp, launcher
from bigbag.ops.dropout import hash32
from bigbag.ops.registry import FLOATING, HALF, Operator, choose
from bigbag.segments import on_device

CLIP = 20.0
"""Values are clipped to this, so that sums of their exponentials fit float32 without a shift."""
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}

_DTYPES = {"triton": (*HALF, torch.float32), "cpu": (*HALF, torch.float32), "reference": FLOATING}


def sampled_attention(
    mu: Tensor,
    log_var: Tensor,
    values: Tensor,
    segments: Segments,
    num_samples: int,
    seed: int | Sequence[int] | Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Pool each bag with S draws of its attention.

        y[b, s] = sum_t softmax(f^s)_t values_t,   f^s = clip(mu + exp(log_var / 2) eps^s),   eps^s ~ N(0, 1)

    With ``values = X w`` for a linear layer w, this is what w makes of the S pooled vectors, at K / P of the work.
    Draws are made again in the backward pass. FLOPs: 2 T S (K + 1) forward, twice that backward, and T S normals and
    exponentials each way (about 40 FLOP). Memory: inputs, outputs, 8 bytes per instance, and S (K + 1) sums for each
    2,048 instances (cpu) or each of at most 1,024 programs (triton); the reference: a few blocks of 1 M numbers (16 M
    on a GPU).

    Args:
        mu: (T,) mean of f.
        log_var: (T,) logarithm of its variance.
        values: (T, K), in any precision.
        segments: how the T instances are cut into B bags.
        num_samples: S.
        seed: of the draws, one for all bags, or for each: integers or (B,) int64, which costs no host a wait for the
            device. Draws depend on it and on an instance's place in its bag.
        impl: "reference", "cpu" or "triton"; None chooses by device.

    Returns:
        (B, S, K) float32 (float64 where an input is); zeros for an empty bag.

    Raises:
        ValueError: shapes or a number of seeds that do not fit, no samples, an ``impl`` that can't run.

    Castro-Macias et al., Probabilistic smooth attention for deep multiple instance learning in medical imaging,
    arXiv 2507.14932.
    """
    _check("sampled_attention", mu, log_var, values, segments, num_samples, seed)
    dtype = torch.promote_types(torch.promote_types(mu.dtype, log_var.dtype), values.dtype)
    chosen = choose("sampled_attention", _DTYPES, impl, mu.device.type, dtype)
    with torch.autocast(mu.device.type, enabled=False):
        mu, sigma = gaussian(mu, log_var, dtype)
        args = (mu, sigma, values, segments.offsets, _noise_keys(segments, mu.shape[0], seed), num_samples)
        sums = _reference_sums(segments, *args) if chosen == "reference" else _SUMS[chosen](*args, CLIP)
        if segments.parts is not None:
            sums = distributed.all_sum(sums, segments.parts)
        total = sums[:, -1:]
        return (sums[:, :-1] / torch.where(total == 0, 1, total)).transpose(1, 2)


def attention_draws(
    mu: Tensor,
    log_var: Tensor,
    segments: Segments,
    num_samples: int,
    seed: int | Sequence[int] | Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """The draws f of :func:`sampled_attention` of the same arguments.

    Bytes: 4 T S written, read and written once more; with gradients, as much kept. FLOPs: T S normals.

    Returns:
        (T, S) float32 (float64 where an input is).

    Raises:
        ValueError: as :func:`sampled_attention`.
    """
    _check("attention_draws", mu, log_var, None, segments, num_samples, seed)
    dtype = torch.promote_types(mu.dtype, log_var.dtype)
    chosen = choose("attention_draws", _DTYPES, impl, mu.device.type, dtype)
    with torch.autocast(mu.device.type, enabled=False):
        mu, sigma = gaussian(mu, log_var, dtype)
        keys = _noise_keys(segments, mu.shape[0], seed)
        noise = _reference_noise(keys, num_samples, mu) if chosen == "reference" else _NOISE[chosen](keys, num_samples)
        if torch.is_grad_enabled() and (mu.requires_grad or sigma.requires_grad):
            return clipped(torch.addcmul(mu[:, None], sigma[:, None], noise))
        return noise.mul_(sigma[:, None]).add_(mu[:, None]).clamp_(-CLIP, CLIP)


def _check(
    op: str,
    mu: Tensor,
    log_var: Tensor,
    values: Tensor | None,
    segments: Segments,
    num_samples: int,
    seed: int | Sequence[int] | Tensor,
) -> None:
    check_shapes(op, mu, log_var, values, segments)
    if num_samples < 1:
        raise ValueError(f"{op}: num_samples must be at least 1, got {num_samples}")
    given = tuple(seed.shape) if isinstance(seed, Tensor) else (len(seed),) if isinstance(seed, Sequence) else None
    if given not in (None, (segments.offsets.shape[0] - 1,)):
        raise ValueError(f"{op}: expected one seed, or one for each of {segments.num_bags} bags, got shape {given}")


def check_shapes(op: str, mu: Tensor, log_var: Tensor, values: Tensor | None, segments: Segments) -> None:
    """Raise ValueError where the arguments of ``op`` are not what it takes."""
    # The number of rows is not checked while tracing: a compiled graph must not depend on how a pack is cut.
    rows = mu.shape[0] if torch.compiler.is_compiling() and mu.dim() else segments.num_instances
    fits = mu.shape == log_var.shape == (rows,) and (values is None or (values.dim() == 2 and len(values) == rows))
    if not fits or not all(t.is_floating_point() for t in (mu, log_var, values) if t is not None):
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (mu, log_var, values) if t is not None)
        expected = "mu (T,) and log_var (T,)" if values is None else "mu (T,), log_var (T,) and values (T, K)"
        raise ValueError(f"{op}: expected floating {expected} with T = {rows} as in segments, got {found}")


def gaussian(mu: Tensor, log_var: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in at least float32."""
    acc = torch.promote_types(dtype, torch.float32)
    return mu.to(acc), (log_var.to(acc) / 2).exp()


def _signed(number: int, bits: int = 64) -> int:
    """The signed integer of as many bits with the same low bits."""
    return (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _noise_keys(segments: Segments, rows: int, seed: int | Sequence[int] | Tensor) -> Tensor:
    """(T,) int64: the seed of each instance's noise, by SplitMix64 (Steele et al., OOPSLA 2014) of its bag's.

    In 64 bits, wrapping; on ranks that share a bag, places count from the whole bag's start.
    """
    offsets = segments.offsets
    bags = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    first = offsets[:-1] - 1
    if segments.parts is not None:
        first = first - on_device(segments.parts.before, offsets.device)
    base = first * -_signed(0x9E3779B97F4A7C15)
    if isinstance(seed, Tensor):
        base += seed
    elif isinstance(seed, Sequence):
        base += on_device(list(map(_signed, seed)), offsets.device, torch.int64)
    else:
        base += _signed(int(seed))
    keys = torch.arange(rows, device=offsets.device) * _signed(0x9E3779B97F4A7C15)
    keys += base[torch.repeat_interleave(bags, offsets.diff(), output_size=rows)]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ _shifted(keys, shift)) * _signed(factor)
    return keys ^ _shifted(keys, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of an int64 taken as unsigned."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _reference_noise(keys: Tensor, num_samples: int, like: Tensor) -> Tensor:
    """(T, S) in the dtype of ``like``: the cosines of pairs of normals, then the sines."""
    half = (num_samples + 1) // 2
    low, high = (keys & 0xFFFFFFFF)[:, None], _shifted(keys, 32)[:, None]
    one = hash32(hash32(torch.arange(half, device=keys.device) + low) ^ high)
    two = hash32(one + 0x9E3779B9)
    # Both are float32 by definition: u in (0, 1], turn in [-1/2, 1/2].
    u = (one >> 8).float() * 2.0**-24 + 2.0**-25
    turn = (two - ((two >> 31) << 32)).float() * 2.0**-32
    radius, angle = (u.to(like.dtype).log() * -2).sqrt(), turn.to(like.dtype) * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :num_samples]


def block_rows(device: torch.device, per_row: int) -> int:
    """How many rows a block has of which each makes as many numbers."""
    return max(1, _BLOCK_ELEMENTS.get(device.type, 1 << 24) // max(1, per_row))


def _reference_sums(
    segments: Segments, mu: Tensor, sigma: Tensor, values: Tensor, offsets: Tensor, keys: Tensor, num_samples: int
) -> Tensor:
    ones = torch.nn.functional.pad(values.to(mu.dtype), (0, 1), value=1)
    step = block_rows(mu.device, num_samples)
    bags = []
    for start, end in zip(segments.starts, segments.starts[1:]):
        total = mu.new_zeros(ones.shape[1], num_samples)
        for first in range(start, max(end, start + 1), step):  # an empty bag has a gradient too, of zeros
            rows = slice(first, min(first + step, end))
            args = (mu[rows], sigma[rows], ones[rows], keys[rows], num_samples)
            total = total + (checkpoint(_block, *args, use_reentrant=False) if _tracks(*args) else _block(*args))
        bags.append(total)
    return torch.stack(bags) if bags else mu.new_zeros(0, ones.shape[1], num_samples)


def _tracks(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(a.requires_grad for a in args if isinstance(a, Tensor))


def _block(mu: Tensor, sigma: Tensor, ones: Tensor, keys: Tensor, num_samples: int) -> Tensor:
    noise = _reference_noise(keys, num_samples, mu)
    return ones.t() @ clipped(torch.addcmul(mu[:, None], sigma[:, None], noise)).exp()


def clipped(f: Tensor) -> Tensor:
    """As clamp, whose gradient hides what is not a number."""
    return torch.where(f.abs() > CLIP, f.detach().clamp(-CLIP, CLIP), f)


def _register(impl: str, module: str) -> tuple[Any, Any]:
    """Custom operators ``bigbag::sampled_sums_{impl}``, ``..._backward`` and ``attention_noise_{impl}``."""

    def define(name: str, function: str, schema: str) -> CustomOp:
        return CustomOp(f"{name}_{impl}", schema, launcher(module, function))

    noise = define("attention_noise", "draw", "(Tensor keys, int num_samples) -> Tensor")
    inputs = "Tensor mu, Tensor sigma, Tensor values, Tensor offsets, Tensor keys"
    sums = define("sampled_sums", "pool", f"({inputs}, int num_samples, float clip) -> Tensor")
    backward = define(
        "sampled_sums_backward",
        "pool_backward",
        f"(Tensor grad, {inputs}, float clip) -> (Tensor, Tensor, Tensor)",
    )
    noise.register_fake(lambda keys, num_samples: keys.new_empty(keys.shape[0], num_samples, dtype=torch.float32))

    @sums.register_fake
    def _(mu: Tensor, sigma: Tensor, values: Tensor, offsets: Tensor, keys: Tensor, num_samples: int, clip: Any) -> Any:
        return mu.new_empty(offsets.shape[0] - 1, values.shape[1] + 1, num_samples)

    @backward.register_fake
    def _(grad: Tensor, mu: Tensor, sigma: Tensor, values: Tensor, *_: Any) -> Any:
        return tuple(t.new_empty(t.shape) for t in (mu, sigma, values))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.clip = inputs[6]

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        return *backward(grad, *ctx.saved_tensors, ctx.clip), None, None, None, None

    sums.register_autograd(differentiate, setup_context=setup)
    return sums, noise


_KERNELS = {"cpu": "bigbag.kernels.cpu.gaussian", "triton": "bigbag.kernels.gpu.gaussian"}
_REGISTERED = {impl: _register(impl, module) for impl, module in _KERNELS.items()}
_SUMS = {impl: sums for impl, (sums, _) in _REGISTERED.items()}
_NOISE = {impl: noise for impl, (_, noise) in _REGISTERED.items()}

OPERATORS = (
    Operator("sampled_attention", sampled_attention, _DTYPES),
    Operator("attention_draws", attention_draws, _DTYPES),
)
