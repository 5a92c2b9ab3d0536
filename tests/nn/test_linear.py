"""Projections of large bags, against torch's own layers in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.nn.linear import are_precise, gelu_project, linear_error, project


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [0, 1, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_and_their_gradients_are_torch_s(rows: int, dtype: torch.dtype) -> None:
    """h in either precision, weights in fp32: what is stored in bf16 is computed in fp32."""
    tensors = [randn(rows, 40, seed=0).to(dtype), randn(24, 40, seed=1) / 6, randn(24, seed=2)]
    incoming = randn(rows, 24, seed=3)
    for ours, theirs in ((project, F.linear), (gelu_project, lambda h, w, b: F.linear(F.gelu(h), w, b))):
        low = [t.clone().requires_grad_() for t in tensors]
        exact = [t.double().requires_grad_() for t in tensors]
        out, truth = ours(*low), theirs(*exact)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(out, low, incoming)
        expected = torch.autograd.grad(truth, exact, incoming.double())
        for name, one, other in zip(("x", "weight", "bias"), found, expected):
            # The gradient of h is rounded to the precision h is stored in: 2^-9 of each number.
            rtol = 2**-8 if name == "x" and dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=2e-4 if name != "x" else 1e-5)


def test_under_autocast_they_are_computed_in_its_dtype() -> None:
    h, weight, bias = randn(300, 40, seed=0), randn(24, 40, seed=1), randn(24, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = [project(h, weight, bias), gelu_project(h, weight, bias)]
    assert [out.dtype for out in found] == [torch.bfloat16] * 2
    low = h.bfloat16().double()
    for out, rows in zip(found, (low, F.gelu(low))):
        expected = F.linear(rows, weight.bfloat16().double(), bias.bfloat16().double())
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("rows", [0, 1, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_errors_of_a_layer_and_all_their_gradients(rows: int, dtype: torch.dtype) -> None:
    tensors = [randn(rows, 40, seed=0).to(dtype), randn(rows, 12, seed=1), randn(40, 12, seed=2) / 3, randn(40, seed=3)]
    low = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    out = linear_error(*low)
    truth = (exact[0] - F.linear(*exact[1:])).square().sum(1)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    incoming = randn(rows, seed=4)
    found = torch.autograd.grad(out, low, incoming)
    expected = torch.autograd.grad(truth, exact, incoming.double())
    for name, one, other in zip(("x", "h", "weight", "bias"), found, expected):
        rtol = 2**-8 if name == "x" and dtype == torch.bfloat16 else 1e-5
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [0, 1, 2048, 5000])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_squared_errors_with_products_in_16_bits(rows: int, stored: torch.dtype) -> None:
    """Against the formula in float64, of what is rounded: x, h, the layer's output, and what products are made of."""
    tensors = [
        randn(rows, 40, seed=0).to(stored),
        randn(rows, 12, seed=1),
        randn(40, 12, seed=2) / 3,
        randn(40, seed=3),
    ]
    low = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_error(*low)
    assert out.dtype == torch.float32
    truth = (exact[0] - F.linear(*exact[1:])).square().sum(1)
    torch.testing.assert_close(out.double(), truth, rtol=2**-6, atol=1e-3)
    incoming = randn(rows, seed=4)
    found = torch.autograd.grad(out, low, incoming)
    expected = torch.autograd.grad(truth, exact, incoming.double())
    for one, other, leaf in zip(found, expected, low):
        assert one.dtype == leaf.dtype
        assert (one.double() - other).norm() <= 2**-6 * other.norm()


@pytest.mark.parametrize("explained", [0.9, 0.999])
def test_squared_errors_near_the_targets_round_as_promised(explained: float) -> None:
    """By 1 / (1 - R^2) more than squares one by one: a few units of 2^-24 of |x'|^2, and of its products."""
    h, weight, bias = randn(3000, 64, seed=0), randn(256, 64, seed=1) / 8, randn(256, seed=2)
    noise = randn(3000, 256, seed=3) * (1 / explained - 1) ** 0.5
    x = F.linear(h, weight, bias) + noise
    truth = (x.double() - F.linear(h.double(), weight.double(), bias.double())).square().sum(1)
    error = (linear_error(x, h, weight, bias).double() - truth).abs().max()
    size = (x - bias).double().square().sum(1).max()
    assert error <= 16 * 2**-24 * size
    assert error / truth.mean() <= 16 * 2**-24 / (1 - explained) * size / (x - bias).square().sum(1).mean()


def test_products_are_precise_unless_torch_may_round_their_factors() -> None:
    single, double = torch.zeros(2, 2), torch.zeros(2, 2).double()
    before = torch.get_float32_matmul_precision()
    assert are_precise(single) and are_precise(double)
    with torch.autocast("cpu", torch.bfloat16):
        assert not are_precise(single) and are_precise(double)
    try:
        torch.set_float32_matmul_precision("medium")
        assert not are_precise(single) and are_precise(double)
    finally:
        torch.set_float32_matmul_precision(before)
