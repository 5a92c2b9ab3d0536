"""The exact mean of attention whose values are Gaussian: values and gradients against integrals done otherwise."""

import math
import sys

import pytest
import torch

from bigbag import Segments
from bigbag.memory import peak_bytes
from bigbag.ops import attention_draws, expected_attention
from tests.host_reads import watched

# The package's name for the module is that of its function.
MODULE = sys.modules["bigbag.ops.expected_attention"]
SIZES = (4, 0, 1, 9)


def inputs(sizes=SIZES, dtype=torch.float64, device="cpu"):
    mu, log_var = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [t.to(device, dtype).requires_grad_() for t in (2 * mu, log_var)]
    return *leaves, Segments.from_sizes(sizes, device)


@pytest.mark.parametrize(
    "gaussians", [(0.0, 1.0, 0.5, 1.5), (2.0, -1.0, 3.0, 0.1), (5.0, 5.0, 0.01, 2.0), (-3.0, 0.0, 1.0, 1.0)]
)
def test_mean_of_two_is_the_mean_of_a_sigmoid(gaussians, any_impl, device):
    """E[softmax(f)]_1 = E[sigmoid(f_1 - f_2)], one Gaussian integral, and its derivatives to all four numbers."""
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    weight = torch.softmax(-grid.square() / 2, 0)
    mu, sigma = torch.tensor(gaussians, dtype=torch.float64).view(2, 2)
    leaves = mu.requires_grad_(), (2 * sigma.log()).requires_grad_()
    spread = leaves[1].exp().sum().sqrt()
    expected = weight @ torch.sigmoid(mu[0] - mu[1] + grid * spread)
    of_expected = torch.autograd.grad(expected, leaves)
    ours = [t.detach().to(device, torch.float32).requires_grad_() for t in leaves]
    a = expected_attention(*ours, Segments.from_sizes((2,), device), impl=any_impl)
    found = torch.autograd.grad(a[0], ours)
    torch.testing.assert_close(a.cpu().double(), torch.stack([expected, 1 - expected]), rtol=0, atol=2e-6)
    # The integral over three standard deviations with steps of 0.9 of f costs the most.
    for value, exact in zip(found, of_expected):
        torch.testing.assert_close(value.cpu().double(), exact, rtol=0, atol=5e-6)


def test_gradients_of_a_wide_instance_err_by_no_more_than_rounding(impl, device):
    """Backward and the reference, differentiated, differ by what lies below the first level, times sigma^2."""
    mu, log_var = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    log_var = log_var / 2
    mu[:, 0], log_var[:, 0] = -0.5, 2 * math.log(3)
    weights = torch.randn(mu.numel(), generator=torch.Generator().manual_seed(1))
    results = []
    for name, dtype, where in (("reference", torch.float64, "cpu"), (impl, torch.float32, device)):
        own = [t.flatten().to(where, dtype).requires_grad_() for t in (mu, log_var)]
        a = expected_attention(*own, Segments.from_sizes((16, 16), where), impl=name)
        results.append([t.double().cpu() for t in torch.autograd.grad((a * weights.to(where)).sum(), own)])
    for value, exact in zip(*reversed(results)):
        torch.testing.assert_close(value, exact, rtol=0, atol=8 * 2**-23 * float(exact.abs().max()))


@pytest.mark.parametrize("spread", [(1.0, 0.5), (3.0, 3.0), (0.1, 2.0), (5.0, 0.01)])
def test_kernel_equals_a_fine_quadrature_in_float64(spread, impl, device, monkeypatch):
    """Values and gradients, of bags longer than a piece, of one instance, of none."""
    mu, log_var, _ = inputs(sizes := (2100, 0, 1, 2, 70))
    leaves = (mu / 2 * spread[0]).detach(), (2 * (log_var.sigmoid() * spread[1]).log()).detach()
    weights = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    results = []
    for fine, name, dtype, where in ((True, "reference", torch.float64, "cpu"), (False, impl, torch.float32, device)):
        with monkeypatch.context() as patched:
            for constant, value in (("_STEP", 0.25), ("_NODES", 81), ("_REACH", 7.0)) if fine else ():
                patched.setattr(MODULE, constant, value)
            own = [t.to(where, dtype).requires_grad_() for t in leaves]
            a = expected_attention(*own, Segments.from_sizes(sizes, where), impl=name)
            grads = torch.autograd.grad((a * weights.to(where)).sum(), own)
            results.append([t.detach().double().cpu() for t in (a, *grads)])
    # What is far below the mean of its bag comes from beyond six standard deviations too.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=6e-6, atol=6e-6 / 2100)
    # Moments of a narrow Gaussian cancel to sigma of their terms.
    tolerances = 1e-5, 1e-5 + 2**-23 / spread[1]
    for found, expected, tolerance in zip(results[1][1:], results[0][1:], tolerances):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mean_agrees_with_many_draws(dtype):
    mu, log_var, segments = inputs((300, 12))
    a = expected_attention(mu.to(dtype), log_var.to(dtype), segments)
    draws = attention_draws(mu.detach(), log_var.detach(), segments, 20_000, 3)
    s = torch.cat([part.softmax(0) for part in draws.split([300, 12])])
    error = s.std(1) / 20_000**0.5
    # Of 312 normal variables one exceeds 5 by chance once in 5,600 seeds; the seed is fixed.
    assert a.dtype == dtype and bool(((a - s.mean(1)).abs() < 5 * error).all())


def test_mean_without_variance_is_the_softmax(any_impl, device):
    mu, _, segments = inputs(dtype=torch.float32, device=device)
    log_var = torch.full_like(mu, -60.0).requires_grad_()
    a = expected_attention(mu, log_var, segments, impl=any_impl)
    expected = torch.cat([part.softmax(0) for part in mu.split(list(SIZES))])
    weights = torch.arange(len(mu), device=device, dtype=torch.float32)
    grads = torch.autograd.grad((a * weights).sum(), (mu, log_var))
    (of_expected,) = torch.autograd.grad((expected * weights).sum(), mu)
    torch.testing.assert_close(a, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grads[0], of_expected, rtol=0, atol=1e-5)
    assert float(grads[1].abs().max()) < 1e-10


def test_sums_to_one_whatever_the_spread(impl, device):
    mu, log_var, segments = inputs((500, 1, 0, 30), torch.float32, device)
    for mean, scale, shift in ((0.0, 8.0, -8.0), (18.0, 1.0, 1.0), (-19.0, 1.0, 1.0), (0.0, 0.01, 3.0)):
        a = expected_attention(mean + scale * mu, log_var + shift, segments, impl=impl).detach()
        total = torch.stack([part.sum() for part in a.split([500, 1, 0, 30])])
        torch.testing.assert_close(total, torch.tensor([1.0, 1, 0, 1], device=device), rtol=0, atol=3e-6)


def test_what_is_clipped_has_no_gradient(any_impl, device):
    mu = torch.tensor([19.0, 30.0, 18.0], device=device).requires_grad_()
    log_var = torch.full_like(mu, -4.0).requires_grad_()
    a = expected_attention(mu, log_var, Segments.from_sizes((3,), device), impl=any_impl)
    at_limit = torch.where(mu > 20, 20, mu), torch.where(mu > 20, -60, log_var)
    same = expected_attention(*at_limit, Segments.from_sizes((3,), device), impl=any_impl)
    torch.testing.assert_close(a, same, rtol=0, atol=1e-6)
    for grad in torch.autograd.grad(a[0], (mu, log_var)):
        assert grad[1] == 0 and float(grad[0].abs()) > 1e-4


def test_what_is_not_a_number_shows_in_its_bag_alone(any_impl, device):
    mu, log_var, segments = inputs(dtype=torch.float32, device=device)
    with torch.no_grad():
        mu[0] = math.nan
    a = expected_attention(mu, log_var, segments, impl=any_impl)
    for found in (a, *torch.autograd.grad(a.square().sum(), (mu, log_var))):
        assert found[:4].isnan().all() and found[4:].isfinite().all()


def test_backward_keeps_inputs_and_levels_of_bags_alone():
    mu, log_var, segments = inputs((6000,), torch.float32)
    pieces, vector = 3, 4 * 6000

    def step():
        torch.autograd.grad(expected_attention(mu, log_var, segments).square().sum(), [mu, log_var])

    peak = peak_bytes(step)
    # S and D of each piece, and what is as long as mu: sigma, the result and its square, three gradients, thin steps.
    assert peak < 2 * 4 * MODULE._LEVELS * (pieces + 2) + 10 * vector < 4 * 6000 * MODULE._LEVELS / 20


def test_nothing_is_read_from_the_device():
    """The number of levels is known beforehand."""
    mu, log_var, segments = inputs(dtype=torch.float32)
    with watched([mu, log_var, segments.offsets]) as device:
        expected_attention(mu, log_var, segments).square().sum().backward()
    assert not device.reads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.zeros(3)}, r"with T = 14 as in segments, got \(3,\) torch.float32"),
        ({"log_var": torch.zeros(14, 1)}, r"\(14, 1\)"),
        ({"mu": torch.zeros(14, dtype=torch.int64)}, "expected floating"),
        ({"impl": "cpu"}, "it takes float16, bfloat16, float32, got float64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    mu, log_var, segments = inputs()
    args = {"mu": mu, "log_var": log_var, "segments": segments}
    with pytest.raises(ValueError, match=f"expected_attention: .*{message}"):
        expected_attention(**(args | change))
