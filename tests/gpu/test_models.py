"""Models compute on the device what they compute on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigbag.models import MODELS
from tests.gpu.device import DEVICE
from tests.models.test_models import DRAWS, SMALL, build, make_pack


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_cpu(name: str) -> None:
    """In float32 and evaluation mode."""

    def results(device: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        # Training has dropout and groups by chance.
        model: Any = build(name, SMALL.get(name, {})).to(device).eval()
        pack = make_pack().to(device)
        torch.manual_seed(0)
        _, losses = model.compute_loss(pack.y, pack)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return {n: loss.item() for n, loss in losses.items()}, grads

    if name in DRAWS and DEVICE != "cpu":
        pytest.skip("its losses draw numbers, of which each device has its own")
    (losses, grads), (expected, wanted) = results(DEVICE), results("cpu")
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert grads.keys() == wanted.keys() and grads
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, wanted[parameter], rtol=1e-3, atol=1e-4 * largest, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_training_in_bfloat16_lowers_the_loss(name: str) -> None:
    model, pack = build(name, SMALL.get(name, {})).to(DEVICE).train(), make_pack().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(20):
        with torch.autocast(DEVICE, torch.bfloat16):
            _, losses = model.compute_loss(pack.y, pack)
        loss = torch.stack([loss.float() for loss in losses.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.after_step()
        found.append(loss.detach())
    curve = torch.stack(found).tolist()
    assert all(torch.isfinite(torch.tensor(curve))) and min(curve[-5:]) < curve[0], curve
