"""Projections of large bags, against torch's own layers in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag.nn.linear import gelu_project, project


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
