"""No operator and no training step of a model waits for the device."""

from __future__ import annotations

import pytest
import torch

from bigbag.models import MODELS
from bigbag.ops import _OPERATORS
from bigbag.ops.registry import Operator
from bigbag.testing import fixed_random
from tests.gpu.device import DEVICE, IMPL, no_waiting
from tests.models.test_models import SMALL, build, make_pack
from tests.ops.test_proof import NAMED

WAITING = {"smooth_exact": "it goes on until the residual is small enough, which it reads every few steps"}


def test_waiting_is_noticed() -> None:
    if DEVICE != "cuda":
        pytest.skip("there is nothing to wait for")
    for wait in (lambda t: t.sum().item(), lambda t: torch.tensor([1], device=DEVICE)):
        with pytest.raises(RuntimeError, match="synchroniz"), no_waiting([]):
            wait(torch.ones(3, device=DEVICE))


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in _OPERATORS])
def test_operators_wait_for_nothing(op: Operator) -> None:
    if op.name in WAITING and DEVICE == "cuda":
        pytest.skip(WAITING[op.name])
    sample = NAMED[f"{op.name}, several"]
    tensors, structure = sample.tensors(torch.float32, DEVICE), sample.structure(DEVICE)

    def step(incoming: list[torch.Tensor] | None) -> list[torch.Tensor]:
        out = sample.apply(tensors, structure, IMPL)
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if incoming is not None:
            torch.autograd.grad(outputs, list(tensors.values()), incoming)
        return outputs

    outputs = step(None)
    incoming = [weight.to(out.dtype) for weight, out in zip(fixed_random(outputs), outputs)]
    step(incoming)  # compiles, and what is kept from then on
    parts = [vars(value) if hasattr(value, "__dict__") else value for value in structure.values()]
    with no_waiting([*tensors.values(), *parts]):
        step(incoming)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_waits_for_nothing(name: str, precision: str) -> None:
    """Forward, losses, backward, clipping, the optimiser, and what the model does afterwards."""
    model, pack = build(name, SMALL.get(name, {})).to(DEVICE).train(), make_pack().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            _, losses = model.compute_loss(pack.y, pack)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.after_step()

    step()
    before = [p.detach().clone() for p in model.parameters()]
    with no_waiting([*model.parameters(), *model.buffers(), *vars(pack).values(), *vars(pack.adj).values()]):
        step()
    assert any((p != b).any() for p, b in zip(model.parameters(), before))
