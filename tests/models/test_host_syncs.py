"""A training step reads no number back from the device, and copies none there in a way that waits."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from bigbag.models import MODELS
from bigbag.segments import on_device
from tests.host_reads import watched

from .test_models import SMALL, build, make_pack


def reads(name: str, arguments: dict[str, Any]) -> Counter[str]:
    """What forward and backward pass of a model read from the device."""
    model, pack = build(name, arguments).train(), make_pack()
    model.compute_loss(pack.y, pack)  # what is read once and kept does not count
    there = [*model.parameters(), *model.buffers(), *vars(pack).values(), *vars(pack.adj).values()]
    with watched([value for value in there if isinstance(value, Tensor)]) as device:
        _, losses = model.compute_loss(pack.y, pack)
        sum(losses.values()).backward()
    return device.reads


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_wait_for_nothing(name):
    assert not reads(name, SMALL.get(name, {}))


def test_only_windows_with_strides_are_counted_on_the_device():
    """How many tokens PMF makes follows from the coordinates."""
    assert reads("SETMIL", SMALL["SETMIL"] | {"use_pmf": True})


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda t: t[0].item(), "item"),
        (lambda t: (t * 2).tolist(), "tolist"),
        (lambda t: float(t.sum()), "__float__"),
        (lambda t: 1 if t.any() else 0, "__bool__"),
        (lambda t: t[t > 1], "index"),
        (lambda t: t.nonzero(), "nonzero"),
        (lambda t: torch.arange(3, device=t.device).max().item(), "item"),
        (lambda t: torch.arange(3).max().item(), None),
        (lambda t: t[torch.arange(2)], None),
        (lambda t: torch.tensor([1, 2], device=t.device), "tensor"),
        (lambda t: torch.arange(3).to(t.device), "to"),
        (lambda t: torch.arange(3).to(t.device, non_blocking=True), None),
        (lambda t: t.to(t.device), None),
        (lambda t: on_device([1, 2], t.device), None),
    ],
)
def test_what_counts_as_reading(read, found):
    values = torch.arange(4.0)
    with watched([values]) as device:
        read(values)
    assert found in device.reads if found else not device.reads
