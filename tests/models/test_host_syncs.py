"""A training step reads no number back from the device: on a GPU the host would wait for it."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from bigbag.models import MODELS

from .test_models import SMALL, build, make_pack

WAITING = {
    "_local_scalar_dense",  # .item(), int(), float(), bool()
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "bincount",
}
READING = {"DTFDMIL", "ProbSmoothABMIL", "TransformerProbSmoothABMIL", "SETMIL", "LongNetMIL"}
"""Models that read numbers: seeds and constants, which are on the host, and LongNetMIL the last of its offsets."""


class Waiting(TorchDispatchMode):
    """Counts the operators whose result, or its size, the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.update({func._schema.name.removeprefix("aten::")} & WAITING)
        return func(*args, **(kwargs or {}))


def waits(name: str) -> Counter[str]:
    model, pack = build(name, SMALL.get(name, {})).train(), make_pack()
    model.compute_loss(pack.y, pack)  # what is read once and kept does not count
    with Waiting() as waiting:
        _, losses = model.compute_loss(pack.y, pack)
        sum(losses.values()).backward()
    return waiting.found


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_wait_for_nothing(name):
    assert bool(waits(name)) == (name in READING)
