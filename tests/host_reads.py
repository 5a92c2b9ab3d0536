"""Finds where a computation waits for the device, on a machine that has none: it reads numbers back, or copies some
there without saying that it need not wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Not numpy(), which raises where there is a device: only CPU kernels call it.
METHODS = {Tensor.item, Tensor.tolist, Tensor.cpu}
METHODS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
# They fill a tensor on the device with numbers of the host, waiting for all that was asked of the device before.
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount"}


class Device:
    """Which tensors would lie on a device, if the pack and the weights did: what is computed from them, and what is
    made or moved there by a ``torch.device``. Where there is no device, this is how it can be known."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._storages: dict[int, Any] = {}  # kept, so that no address comes twice
        self.reads: Counter[str] = Counter()
        self.take(tensors)

    def take(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._storages[storage._cdata] = storage

    def holds(self, values: Any) -> bool:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        return any(value.untyped_storage()._cdata in self._storages for value in tensors)


class Operators(TorchDispatchMode):
    """Results of operators on what is on the device are there too; some have a size that the host waits for."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device.holds((args, kwargs)):
            name = func._schema.name.removeprefix("aten::")
            masked = name in ("index", "index_put_") and any(
                mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1]
            )
            unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
            if name in SIZED_BY_VALUES or masked or unsized or name == "_local_scalar_dense":
                self.device.reads[name] += 1
            found = func(*args, **kwargs)
            self.device.take((found, args[0] if func._schema.is_mutable else None))
            return found
        return func(*args, **kwargs)


class Calls(TorchFunctionMode):
    """Methods that hand numbers to Python, and what is put on the device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METHODS and self.device.holds(args[:1]):
            self.device.reads[func.__name__] += 1
        if func in MAKERS and isinstance(kwargs.get("device"), torch.device):  # "cpu" by name is the host
            self.device.reads[func.__name__] += 1
        if func is Tensor.to and not self.device.holds(args[:1]) and _moves(args, kwargs):
            self.device.reads["to"] += 1
        found = func(*args, **kwargs)
        if any(isinstance(value, torch.device) for value in (*args, *kwargs.values())):
            self.device.take(found)
        return found


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``Tensor.to`` names a device, or a tensor on it, and waits for the copy."""
    named = any(isinstance(value, torch.device | Tensor) for value in (*args[1:], *kwargs.values()))
    return named and not kwargs.get("non_blocking", False)


@contextmanager
def watched(tensors: list[Tensor]) -> Iterator[Device]:
    """Counts where the host waits for ``tensors`` and what is computed from them: ``device.reads``."""
    device = Device(tensors)
    with Operators(device), Calls(device):
        yield device
