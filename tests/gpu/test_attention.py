"""Three implementations of attention beside each other, at the size of real bags."""

from __future__ import annotations

import pytest
import torch

from bigbag import Segments, ops
from bigbag.ops import fused_attention
from bigbag.testing import fixed_random
from tests.gpu.device import DEVICE, IMPL

SIZES = (1000, 37, 4096, 1) if DEVICE == "cuda" else (100, 37, 1)
OTHERS = fused_attention.IMPLS if DEVICE == "cuda" else ("reference",)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_fused_kernels_of_others_and_ours_agree(other: str, masked: bool) -> None:
    """In bfloat16, outputs and gradients: to a few roundings of the largest number (each is proved by itself)."""
    if other in fused_attention.IMPLS and (reason := fused_attention.unavailable(other)) is not None:
        pytest.skip(reason)
    rows, segments = sum(SIZES), Segments.from_sizes(SIZES, DEVICE)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, 8, 64, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_() for _ in range(3)
    )
    mask = (torch.arange(rows) % 5 != 0).to(DEVICE) if masked else None

    def results(impl: str) -> list[torch.Tensor]:
        out = ops.masked_attention(q, k, v, segments, mask=mask, impl=impl)
        (weight,) = fixed_random([out])
        return [out, *torch.autograd.grad(out, (q, k, v), weight.to(out.dtype))]

    for found, expected in zip(results(IMPL), results(other)):
        atol = 8 * torch.finfo(torch.bfloat16).eps * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)
