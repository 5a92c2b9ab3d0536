"""Functions with gradients that have none of their own: asked for a second derivative, they say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward pass of a ``torch.autograd.Function`` that is not differentiable.

    torch's decorator of this name cuts its results off from what they were computed from, with an error at the cut:
    whoever asks for the derivative to certain tensors, by ``torch.autograd.grad``, never gets there, and takes what
    comes by other ways for the whole of it. These results stay tied to the gradients that came in, to saved tensors
    and to ``ctx.parameters``, by a function whose backward pass raises.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():  # which refuses second derivatives itself
            return backward(ctx, *grads)
        context = _Context(ctx)
        with torch.no_grad():
            found = backward(context, *grads)
        if not torch.is_grad_enabled():
            return found
        known = (*grads, *context.saved_tensors, *getattr(ctx, "parameters", ()))
        sources = [t for t in known if t is not None and t.requires_grad]
        results = found if isinstance(found, tuple) else (found,)
        return tuple(_Tied.apply(t, backward.__module__, *sources) if sources and t is not None else t for t in results)

    return wrapper


class _Context:
    """``ctx`` whose saved tensors are unpacked once: ``torch.utils.checkpoint`` gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = self._ctx.saved_tensors
        return saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, module: str, *sources: Tensor) -> Tensor:
        ctx.module = module
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.module}: gradients have no gradients here (they were asked for by create_graph=True)")
