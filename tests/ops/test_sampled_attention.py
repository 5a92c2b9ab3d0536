"""Attention whose values are Gaussian: draws, and their gradients."""

import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from bigbag import Segments
from bigbag.memory import peak_bytes
from bigbag.ops import attention_draws, sampled_attention

# The package's name for the module is that of its function.
BLOCKS = sys.modules["bigbag.ops.sampled_attention"]._BLOCK_ELEMENTS
SIZES = (4, 0, 1, 9)


def inputs(sizes=SIZES, width=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    mu = torch.randn(total, generator=generator, dtype=dtype) * 2
    log_var = torch.randn(total, generator=generator, dtype=dtype)
    return mu, log_var, torch.randn(total, width, generator=generator, dtype=dtype), Segments.from_sizes(sizes)


@pytest.mark.parametrize("block", [1 << 20, 30])
def test_pooling_with_draws_is_softmax_of_the_draws(monkeypatch, block):
    """Values and gradients, through blocks of several rows and of three; some draws are clipped."""
    monkeypatch.setitem(BLOCKS, "cpu", block)
    mu, log_var, values, segments = inputs()
    mu[5], mu[6] = 19.5, -19.5
    leaves = [t.requires_grad_() for t in (mu, log_var, values)]
    y = sampled_attention(mu, log_var, values, segments, 10, 7)
    f = attention_draws(mu.detach(), log_var.detach(), segments, 10, 7)
    eps = (f - mu.detach()[:, None]) / (log_var.detach() / 2).exp()[:, None]
    assert 0 < int((f.abs() == 20).sum()) < 20 and abs(float(eps.mean())) < 0.5
    # What clips is constant in mu and log_var.
    free = mu[:, None] + (log_var / 2).exp()[:, None] * eps
    drawn = torch.where(f.abs() < 20, free, f)
    expected = [drawn[s:e].softmax(0).t() @ values[s:e] for s, e in zip(segments.starts, segments.starts[1:])]
    torch.testing.assert_close(y, torch.stack(expected))
    weights = torch.randn(y.shape, dtype=y.dtype)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (torch.stack(expected), y)]
    torch.testing.assert_close(grads[1], grads[0])


def test_draws_are_differentiable():
    mu, log_var, _, segments = inputs()
    draws = attention_draws(mu, log_var, segments, 10, 7)
    leaves = mu.requires_grad_(), log_var.requires_grad_()
    torch.testing.assert_close(attention_draws(*leaves, segments, 10, 7), draws)
    assert torch.autograd.gradcheck(lambda m, v: attention_draws(m, v, segments, 10, 7), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_a_bag_do_not_depend_on_its_pack(dtype, monkeypatch):
    """Through blocks of three rows; bags with one seed share the noise of their first instances, others do not."""
    monkeypatch.setitem(BLOCKS, "cpu", 30)
    mu, log_var, values, segments = inputs((7, 0, 12), dtype=dtype)
    alone = [slice(0, 7), slice(7, 7), slice(7, 19)]
    for seeds in ([3, 4, 5], 3):
        packed = attention_draws(mu, log_var, segments, 10, seeds)
        pooled = sampled_attention(mu, log_var, values, segments, 10, seeds)
        for bag, rows in enumerate(alone):
            seed = seeds if isinstance(seeds, int) else seeds[bag]
            args = (mu[rows], log_var[rows])
            own = Segments.from_sizes((rows.stop - rows.start,))
            assert torch.equal(attention_draws(*args, own, 10, seed), packed[rows])
            torch.testing.assert_close(sampled_attention(*args, values[rows], own, 10, seed)[0], pooled[bag])
        noise = (packed - mu[:, None]) / (log_var / 2).exp()[:, None]
        assert torch.allclose(noise[:6], noise[7:13], atol=1e-4) == isinstance(seeds, int)


def noise_of(seed: int, place: int, sample: int, num_samples: int) -> float:
    """The definition, in whole numbers and float64."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    key ^= key >> 31
    half = (num_samples + 1) // 2
    one = mix(mix((sample % half + key) % 2**32) ^ key >> 32)
    two = mix((one + 0x9E3779B9) % 2**32)
    u = np.float32((one >> 8) / 2**24) + np.float32(2**-25)
    turn = np.float32((two - 2**32 * (two >> 31)) / 2**32)
    return math.sqrt(-2 * math.log(u)) * (math.cos, math.sin)[sample // half](2 * math.pi * float(turn))


def test_noise_is_box_and_mullers_of_a_hash(any_impl, device):
    """Every instance and sample of a bag, to the rounding of float32 in logarithm, sine and product: radius up to 5.8,
    of which 3e-7, and where it is near zero the rounding of the logarithm of u near one."""
    zero, cut = torch.zeros(300, device=device), Segments.from_sizes((300,), device)
    noise = attention_draws(zero, zero, cut, 21, 2**61 + 5, impl=any_impl).cpu()
    expected = [[noise_of(2**61 + 5, place, sample, 21) for sample in range(21)] for place in range(300)]
    torch.testing.assert_close(noise.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("direction", ["instances", "samples", "halves"])
def test_noise_is_normal_and_independent(direction):
    zero = torch.zeros(2000)
    noise = attention_draws(zero, zero, Segments.from_sizes((2000,)), 1000, 9).double().numpy()
    assert scipy.stats.kstest(noise.ravel()[::7], "norm").pvalue > 1e-3
    if direction == "halves":  # the two that come of one radius, and their squares
        pairs = [(noise[:, :500].ravel() ** power, noise[:, 500:].ravel() ** power) for power in (1, 2)]
        found, count = max(abs(np.corrcoef(*pair)[0, 1]) for pair in pairs), 1_000_000
    else:
        rows = noise[:200] if direction == "instances" else noise[:, :200].T
        found, count = np.abs(np.corrcoef(rows) - np.eye(200)).max(), rows.shape[1]
    # Of 20,000 correlations of independent rows, the largest is beyond 5.5 standard errors once in a thousand times.
    assert found < 5.5 / math.sqrt(count)


def test_kernel_equals_float64(impl, device):
    """Bags with seeds of their own, negative and beyond 64 bits among them; longer than a piece, empty, and of one."""
    mu, log_var, values, segments = inputs((2500, 0, 1, 40), width=3)
    seeds = [1, 2, -(2**63) - 3, 2**64 - 1]
    num_samples = 33
    mu[5], mu[6] = 19.8, -19.8  # some of their draws are clipped
    weights = torch.randn(4, num_samples, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for name, dtype, where in ((impl, torch.float32, device), ("reference", torch.float64, "cpu")):
        leaves = [t.to(where, dtype).requires_grad_() for t in (mu, log_var, values)]
        y = sampled_attention(*leaves, Segments.from_sizes(segments.sizes, where), num_samples, seeds, impl=name)
        grads = torch.autograd.grad((y * weights.to(where, dtype)).sum(), leaves)
        found.append([t.double().cpu() for t in (y.detach(), *grads)])
    for single, double in zip(*found):
        # Exponents up to 20 round at 1e-6 of themselves; sums of 2,500 terms add little.
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5 * float(double.abs().max()))


def test_one_instance_is_its_value_whatever_is_drawn(any_impl, device):
    """And its mean has no gradient but rounding: of 40 samples of three values of order one, some 1e-7 each."""
    mu, log_var, values, _ = inputs((1,), dtype=torch.float32)
    leaves = [t.to(device).requires_grad_() for t in (mu, log_var, values)]
    y = sampled_attention(*leaves, Segments.from_sizes((1,), device), 40, 3, impl=any_impl)
    torch.testing.assert_close(y, leaves[2][None].expand(1, 40, 3))
    grad_mu, grad_log_var, grad_values = torch.autograd.grad(y.sum(), leaves)
    assert abs(float(grad_mu)) < 1e-4 and abs(float(grad_log_var)) < 1e-4
    torch.testing.assert_close(grad_values, torch.full_like(grad_values, 40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1, 2]}, r"expected one seed, or one for each of 4 bags, got shape \(2,\)"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"mu": torch.zeros(3)}, r"with T = 14 as in segments, got \(3,\) torch.float32"),
        ({"log_var": torch.zeros(14, 1)}, r"\(14, 1\)"),
        ({"values": torch.zeros(14)}, r"values \(T, K\)"),
        ({"values": torch.zeros(14, 1, dtype=torch.int64)}, "expected floating"),
        ({"impl": "cpu"}, "it takes float16, bfloat16, float32, got float64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    mu, log_var, values, segments = inputs()
    args = {"mu": mu, "log_var": log_var, "values": values, "segments": segments, "num_samples": 2, "seed": 1}
    with pytest.raises(ValueError, match=f"sampled_attention: .*{message}"):
        sampled_attention(**(args | change))


def test_seeds_of_no_bags_and_of_other_integers():
    nothing, none = torch.zeros(0), Segments.from_sizes(())
    assert attention_draws(nothing, nothing, none, 3, []).shape == (0, 3)
    assert sampled_attention(nothing, nothing, torch.zeros(0, 2), none, 3, []).shape == (0, 3, 2)
    mu, log_var, _, segments = inputs()
    found, expected = (attention_draws(mu, log_var, segments, 3, seed) for seed in (np.int64(5), 5))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_a_number_shows_in_its_bag_alone(dtype):
    mu, log_var, values, segments = inputs(dtype=dtype)
    mu[0] = math.nan
    leaves = [t.requires_grad_() for t in (mu, log_var, values)]
    y = sampled_attention(*leaves, segments, 10, 7)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert grad[:4].isnan().all() and grad[4:].isfinite().all()


def test_draws_differ_by_seed_and_have_the_right_spread():
    mu, log_var, _, segments = inputs((500,))
    log_var[:] = 0.6
    one, other = (attention_draws(mu, log_var, segments, 400, seed) for seed in (1, 2))
    assert not torch.equal(one, other) and torch.equal(one, attention_draws(mu, log_var, segments, 400, 1))
    # 200,000 draws: the standard error of the mean is 0.003, that of the standard deviation 0.002.
    noise = one - mu[:, None]
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1.3499) < 0.01


def test_memory_does_not_hold_the_draws(monkeypatch):
    """Forward and backward: inputs, gradients and blocks, far below one (T, S) matrix."""
    monkeypatch.setitem(BLOCKS, "cpu", 1 << 14)
    mu, log_var, values, segments = inputs((4000,), 1, torch.float32)
    leaves = [t.requires_grad_() for t in (mu, log_var, values)]

    def step():
        torch.autograd.grad(sampled_attention(*leaves, segments, 500, 1).square().sum(), leaves)

    peak = peak_bytes(step)
    assert peak < 12 * 4 * (1 << 14) < 4 * 4000 * 500 / 8
