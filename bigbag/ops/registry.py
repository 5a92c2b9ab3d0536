"""Which implementation of an operator runs, and why.

An operator is a row of facts, :class:`Operator`; an implementation is a name (``reference``, ``cpu``, ``triton``) and
what it can take. ``impl=None`` takes the first that can run, in the operator's order, and says so once per run; an
explicit request never falls back: it raises and says why.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigbag.ops import fused_attention

log = logging.getLogger("bigbag.ops")

HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Operator:
    """One row of the table that choice, proof, benchmark and :func:`bigbag.ops.explain` walk.

    Attributes:
        name: name of the public function in ``bigbag.ops``.
        function: that function; it takes ``impl``.
        dtypes: implementation -> dtypes of the first argument that it takes, in order of preference.
        deterministic: two runs give the same bits.
        excludes: implementation -> the calls that it does not take, whatever their dtype; the next one gets them.
        flops: custom operator -> FLOP of a call, from its arguments: where the reference's own would be too many.
    """

    name: str
    function: Callable[..., Any]
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    deterministic: bool = True
    excludes: Mapping[str, str] = field(default_factory=dict)
    flops: Mapping[str, Callable[..., int]] = field(default_factory=dict)


def _find(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_HAS_NUMBA = _find("numba")
_HAS_TRITON = _find("triton")
# Triton reads the variable when kernels are defined, so a later change would do nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_overrides: dict[str, str] = {}
_announced: set[tuple[str, str, str, torch.dtype]] = set()


class use_impl:
    """Fix the implementation of operators for the rest of the run, or for a ``with`` block.

    Args:
        choices: operator -> implementation, for calls that leave ``impl`` at None. Requests are as strict as ``impl``.
    """

    def __init__(self, choices: Mapping[str, str]) -> None:
        self._before = dict(_overrides)
        _overrides.update(choices)

    def __enter__(self) -> use_impl:
        return self

    def __exit__(self, *_: object) -> None:
        _overrides.clear()
        _overrides.update(self._before)


def why_not(dtypes: Mapping[str, tuple[torch.dtype, ...]], impl: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``impl`` can't run on ``device`` ("cpu", "cuda") with ``dtype``, or None if it can."""
    if impl not in dtypes:
        return f"there is no such implementation; there are {', '.join(dtypes)}"
    if impl == "cpu" and device != "cpu":
        return f"it needs tensors on the CPU, got {device}"
    if impl == "cpu" and not _HAS_NUMBA:
        return "numba is not installed"
    if impl == "triton" and not _HAS_TRITON:
        return "triton is not installed"
    if impl == "triton" and device != "cuda" and not (device == "cpu" and INTERPRETED):
        return f"it needs a CUDA device, got {device} (TRITON_INTERPRET=1 at start runs it on the CPU, slowly)"
    if impl in fused_attention.IMPLS:
        if device != "cuda":
            return f"it needs a CUDA device, got {device}"
        if (missing := fused_attention.unavailable(impl)) is not None:
            return missing
    if impl != "reference" and forward_ad._current_level >= 0:
        return "it has no derivative in forward mode"
    if dtype not in dtypes[impl]:
        return f"it takes {', '.join(str(d)[6:] for d in dtypes[impl])}, got {str(dtype)[6:]}"
    return None


def _preference(dtypes: Mapping[str, tuple[torch.dtype, ...]], device: str) -> list[str]:
    """Implementations in the order in which ``impl=None`` tries them; interpreted Triton only when asked for."""
    return [impl for impl in dtypes if not (impl == "triton" and device == "cpu")]


def choose(
    name: str, dtypes: Mapping[str, tuple[torch.dtype, ...]], impl: str | None, device: str, dtype: torch.dtype
) -> str:
    """The implementation that a call runs.

    Raises:
        ValueError: the requested implementation can't run, or none takes ``dtype``.
    """
    requested = impl if impl is not None else _overrides.get(name)
    if requested is not None:
        reason = why_not(dtypes, requested, device, dtype)
        if reason is not None:
            raise ValueError(f"ops.{name}: implementation {requested!r} can't run: {reason}")
        return requested
    refused: list[str] = []
    for candidate in _preference(dtypes, device):
        reason = why_not(dtypes, candidate, device, dtype)
        if reason is None:
            if not torch.compiler.is_compiling():
                _announce(name, candidate, device, dtype, refused)
            return candidate
        refused.append(f"{candidate}: {reason}")
    raise ValueError(f"ops.{name}: no implementation can run: {'; '.join(refused)}")


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """In what layers compute with it: in autocast's dtype where autocast is on, float64 excepted, else in its own."""
    kind = parameter.device.type
    if torch.is_autocast_enabled(kind) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return parameter.dtype


def _announce(name: str, impl: str, device: str, dtype: torch.dtype, refused: list[str]) -> None:
    if (name, impl, device, dtype) not in _announced:
        _announced.add((name, impl, device, dtype))
        because = f" ({'; '.join(refused)})" if refused else ""
        log.info("%s on %s with %s: %s%s", name, device, str(dtype)[6:], impl, because)


def table(operators: tuple[Operator, ...], device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """Rows of operator, implementation, whether it would be chosen for ``device`` and ``dtype``, and why (not)."""
    rows = []
    for op in operators:
        chosen = choose(op.name, op.dtypes, None, device, dtype)
        for impl in op.dtypes:
            reason = why_not(op.dtypes, impl, device, dtype)
            if impl == chosen:
                reason = "requested by use_impl" if op.name in _overrides else "first that can run"
            elif reason is None:
                reason = "on request only" if impl not in _preference(op.dtypes, device) else f"{chosen} comes first"
            if impl == chosen and impl in op.excludes:
                reason += f" (not with {op.excludes[impl]})"
            rows.append({"operator": op.name, "impl": impl, "chosen": "yes" if impl == chosen else "", "why": reason})
    return rows
