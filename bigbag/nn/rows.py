"""Row-wise computations in chunks of rows, of which nothing but the inputs is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ROWS = {"cpu": 2048, "cuda": 16_384}


def by_rows(
    function: Callable[..., Any],
    *inputs: Tensor,
    modules: Iterable[torch.nn.Module] = (),
    shared: Iterable[Tensor] = (),
) -> Any:
    """``function(*inputs)``, chunk by chunk, where each row of the result depends on that row of the inputs only.

    Backward computes each chunk again and differentiates it, so that intermediate values (normalised rows, the hidden
    layer of an MLP) exist for one chunk at a time. Cost: the FLOP of ``function`` once more; kept: ``inputs``. Dropout
    and autocast are the same in both passes. Not twice differentiable.

    Args:
        function: takes and returns tensors (one or several) whose first dimension is the rows of a chunk.
        inputs: tensors of T rows.
        modules: the modules whose parameters ``function`` uses; others get no gradient.
        shared: tensors beside ``inputs`` and parameters that ``function`` uses and that need gradients.

    Returns:
        What ``function`` returns, with T rows.
    """
    modules = tuple(modules)
    parameters = [t for t in (*shared, *(p for module in modules for p in module.parameters())) if t.requires_grad]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *parameters)):
        state = _State(inputs[0].device, modules)
        outputs = _ByRows.apply(function, state, len(inputs), *inputs, *parameters)
    else:
        outputs = _run(function, inputs)
    return outputs[0] if len(outputs) == 1 else outputs


def stream_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype in which the rows of layers go on: autocast's where it is on, else that of the parameters."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return parameter.dtype


def _chunks(rows: int, device: torch.device) -> list[slice]:
    step = _ROWS.get(device.type, _ROWS["cuda"])
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _run(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rows = inputs[0].shape[0]
    chunks = _chunks(rows, inputs[0].device)
    if len(chunks) == 1:
        return _as_tuple(function(*inputs))
    found: list[Tensor] = []
    for chunk in chunks:
        parts = _as_tuple(function(*(t[chunk] for t in inputs)))
        found = found or [part.new_empty(rows, *part.shape[1:]) for part in parts]
        for whole, part in zip(found, parts):
            whole[chunk] = part
    return tuple(found)


class _State:
    """What a chunk's value depends on beside its inputs: autocast and, where there is dropout, random numbers."""

    def __init__(self, device: torch.device, modules: tuple[torch.nn.Module, ...]) -> None:
        kind = device.type
        # Without the cache of casted weights: one that is filled without gradient would be used with gradient.
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
        self.devices = [device] if kind == "cuda" else []
        parts = (part for module in modules for part in module.modules())
        self.random = any(isinstance(part, torch.nn.Dropout) and part.p > 0 and part.training for part in parts)
        if self.random:
            self.cpu = torch.get_rng_state()
            self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def restored(self) -> Any:
        with torch.random.fork_rng(self.devices, enabled=self.random), torch.autocast(*self.autocast):
            if self.random:
                torch.set_rng_state(self.cpu)
                for device, state in zip(self.devices, self.cuda):
                    torch.cuda.set_rng_state(state, device)
            yield


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, state: _State, num_inputs: int, *tensors: Tensor) -> Any:
        ctx.function, ctx.state, ctx.num_inputs = function, state, num_inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:num_inputs])
        # Not as saved tensors: under torch.utils.checkpoint those would be copies that ``function`` doesn't use.
        ctx.parameters = tensors[num_inputs:]
        ctx.versions = [t._version for t in ctx.parameters]
        with torch.autocast(*state.autocast):
            return _run(function, tensors[:num_inputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        inputs, parameters = ctx.saved_tensors, ctx.parameters
        if ctx.versions != [t._version for t in parameters]:
            raise RuntimeError("a parameter was changed between the forward pass and its backward pass")
        needed = ctx.needs_input_grad[3 : 3 + ctx.num_inputs]
        found = [torch.empty_like(t) if need else None for t, need in zip(inputs, needed)]
        totals = [torch.zeros_like(p) for p in parameters]
        if all(grad is None for grad in grads):
            return None, None, None, *[None] * (len(found) + len(totals))
        with ctx.state.restored():
            for chunk in _chunks(inputs[0].shape[0], inputs[0].device):
                with torch.enable_grad():
                    rows = [t[chunk].detach().requires_grad_(need) for t, need in zip(inputs, needed)]
                    outputs = _as_tuple(ctx.function(*rows))
                reached = [
                    (out, grad[chunk]) for out, grad in zip(outputs, grads) if grad is not None and out.requires_grad
                ]
                wanted = [row for row in rows if row.requires_grad]
                given = torch.autograd.grad(
                    [out for out, _ in reached],
                    [*wanted, *parameters],
                    [grad for _, grad in reached],
                    materialize_grads=True,
                )
                for whole, part in zip((whole for whole in found if whole is not None), given):
                    whole[chunk] = part
                for total, part in zip(totals, given[len(wanted) :]):
                    total += part
        return None, None, None, *found, *totals
