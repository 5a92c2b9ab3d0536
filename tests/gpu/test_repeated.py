"""Operators at the size of real bags: two runs give the same bits, and parts of a long bag add up to the whole."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from bigbag.bench.cases import MEASURED, make_case, usual_width
from bigbag.ops.spmm import DTYPES
from tests.gpu.device import DEVICE, IMPL
from tests.ops.test_proof import BY_NAME

INSTANCES = 70_000 if DEVICE == "cuda" else 600
QUADRATIC = 8192
WIDTH = None if DEVICE == "cuda" else 32


@pytest.mark.parametrize("op", MEASURED)
def test_two_runs_of_a_long_bag_give_the_same_bits(op: str) -> None:
    """Outputs and gradients in the precision that is stored; and they are close to those of the definition in torch."""
    size = min(INSTANCES, QUADRATIC) if op == "masked_attention" else INSTANCES
    case = make_case(op, size, WIDTH or usual_width(op), DEVICE)
    dtypes = BY_NAME[op].dtypes if op in BY_NAME else DTYPES
    assert op not in BY_NAME or BY_NAME[op].deterministic
    for dtype in (torch.bfloat16, torch.float32):
        if dtype not in dtypes[IMPL]:
            continue
        for function in case.ours.values():
            first, second = (_results(case.leaves, function, dtype) for _ in range(2))
            for one, other in zip(first, second, strict=True):
                assert torch.equal(one, other), f"{op}, {dtype}"
                assert torch.isfinite(one).all(), f"{op}, {dtype}"
    if not case.baseline_fits:
        return
    (function, *_), (_, baseline) = case.ours.values(), case.baseline
    found = _results(case.leaves, function, torch.float32)
    expected = _results(case.leaves, lambda t, _: baseline(t), torch.float32)
    for one, other in zip(found, expected, strict=True):
        # Sums of tens of thousands of float32 in other orders: eps times the root of their number, a hundred times.
        atol = 100 * torch.finfo(torch.float32).eps * size**0.5 * float(other.abs().max())
        torch.testing.assert_close(one.view(other.shape), other, rtol=0.0, atol=atol)


def _results(leaves: Mapping[str, Tensor], function: object, dtype: torch.dtype) -> list[Tensor]:
    given = {name: value.to(dtype).detach().requires_grad_() for name, value in leaves.items()}
    out = function(given, IMPL)  # type: ignore[operator]
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, list(given.values()), incoming.view(out.shape))
    return [out.detach(), *grads]
