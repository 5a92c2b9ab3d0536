"""Operators of torch around bigbag's kernels: one node to ``torch.compile``, whose gradients are defined here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch._C import _any_requires_grad, _AutoDispatchBelowAutograd

_LIBRARY = torch.library.Library("bigbag", "FRAGMENT")


class CustomOp:
    """``torch.ops.bigbag.<name>``; what it returns shares no memory with what it takes.

    As ``torch.library.custom_op``, whose own checks and wrappers in Python cost a training step on a small bag a tenth
    of its time. Until gradients are registered it has none, and says so to whoever asks for them.

    Args:
        name: of the operator.
        schema: its arguments, without defaults, and results: ``(Tensor x, int k) -> Tensor``.
        run: what computes it, without gradients.
    """

    def __init__(self, name: str, schema: str, run: Callable[..., Any]) -> None:
        self._name = name
        self._setup: Callable[..., None] | None = None
        self._differentiate: Callable[..., Any] | None = None
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        self._op = getattr(torch.ops.bigbag, name).default
        methods = {"forward": staticmethod(self._forward), "backward": staticmethod(self._backward)}
        self._function: Any = type(name, (torch.autograd.Function,), methods)
        _LIBRARY.impl(name, self._above, "Autograd")

    def __call__(self, *args: Any) -> Any:
        return self._op(*args)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """``fake`` makes empty tensors like those that the operator returns, from tensors without data."""
        torch.library.register_fake(f"bigbag::{self._name}", fake, lib=_LIBRARY)

    def register_autograd(self, differentiate: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """``differentiate(ctx, *grads)`` gives the gradients of all arguments, None for those that have none, from what
        ``setup_context(ctx, inputs, output)`` kept."""
        self._differentiate, self._setup = differentiate, setup_context

    def _above(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return self._function.apply(*args)
        with _AutoDispatchBelowAutograd():
            return self._op(*args)

    def _forward(self, ctx: Any, *args: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            output = self._op(*args)
        if self._setup is not None:
            self._setup(ctx, args, output)
        return output

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        if self._differentiate is None:
            raise RuntimeError(
                f"bigbag::{self._name}: gradients have no gradients here (they were asked for by create_graph=True)"
            )
        return self._differentiate(ctx, *grads)


def launcher(module: str, function: str) -> Callable[..., Any]:
    """``function`` of a module that the first call imports: kernels take seconds to be compiled, or need a GPU."""

    @cache
    def kernels() -> ModuleType:
        return importlib.import_module(module)

    return lambda *args: getattr(kernels(), function)(*args)
