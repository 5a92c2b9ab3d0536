"""What computations that are done again in the backward pass have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def trained_tensors(modules: Iterable[torch.nn.Module], shared: Iterable[Tensor]) -> list[Tensor]:
    """The parameters of ``modules`` and the ``shared`` tensors that require grad, each once."""
    every = (*shared, *(p for module in modules for p in module.parameters()))
    return list({id(t): t for t in every if t.requires_grad}.values())


class State:
    """What the result of a row-wise computation depends on beside its inputs: autocast, and random numbers."""

    def __init__(self, device: torch.device, modules: Iterable[torch.nn.Module]) -> None:
        kind = device.type
        # Without the cache of casted weights: one that is filled without gradient would be used with gradient.
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
        self.devices = [device] if kind == "cuda" else []
        # Any module may draw numbers in training, those of users included.
        self.random = any(part.training for module in modules for part in module.modules())
        if self.random:
            self.cpu = torch.get_rng_state()
            self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast and the random numbers as they were."""
        with torch.random.fork_rng(self.devices, enabled=self.random), torch.autocast(*self.autocast):
            if self.random:
                torch.set_rng_state(self.cpu)
                for device, state in zip(self.devices, self.cuda):
                    torch.cuda.set_rng_state(state, device)
            yield


def gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> Iterator[Tensor] | None:
    """The gradients of ``wanted`` from those of ``outputs``; None where nothing flows."""
    reached = [(out, grad) for out, grad in zip(outputs, grads) if grad is not None and out.requires_grad]
    if not (reached and wanted):
        return None
    tops, bottoms = [out for out, _ in reached], [grad for _, grad in reached]
    with hooks_aside(wanted):
        return iter(torch.autograd.grad(tops, wanted, bottoms, materialize_grads=True))


@contextmanager
def hooks_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Without the hooks of ``tensors``: those are for the whole gradient, not for that of each chunk."""
    aside = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
    for hooks, _ in aside:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in aside:
            hooks.update(own)
