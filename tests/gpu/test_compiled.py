"""``torch.compile(fullgraph=True)``: operators are one graph on the device, with the same results."""

from __future__ import annotations

import pytest
import torch

from bigbag.ops import _OPERATORS
from bigbag.ops.registry import Operator
from tests.gpu.device import DEVICE, IMPL
from tests.ops.test_proof import BY_NAME, compiled_and_not


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in _OPERATORS])
def test_operators_compile_to_one_graph(op: Operator) -> None:
    for found, expected in compiled_and_not(op, IMPL, DEVICE, "aot_eager"):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["attention_pool", "masked_attention", "nystrom_attention", "smooth"])
def test_what_surrounds_our_kernels_compiles_with_inductor(name: str) -> None:
    for found, expected in compiled_and_not(BY_NAME[name], IMPL, DEVICE, "inductor"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
