"""The precision of a run's matrix products, on a processor that may know bfloat16 or not."""

from __future__ import annotations

from functools import cache

import torch
from llvmlite.binding import get_host_cpu_features

_INSTRUCTIONS = ("avx512bf16", "amx-bf16", "bf16")  # of x86, its tiles, and ARM


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32.

    GPUs do, and processors that have instructions for it. On others torch widens number by number: a step of ABMIL on
    50,000 x 1024 takes 4 times as long as in float32, one of VAEABMIL 24 times (AVX2, 2 threads).
    """
    return device_type != "cpu" or any(get_host_cpu_features().get(name, False) for name in _INSTRUCTIONS)


def autocast(device_type: str, precision: str) -> torch.autocast:
    """What a step is computed under: products of bfloat16 for "bf16", where the device has them, else of float32."""
    enabled = precision == "bf16" and multiplies_bfloat16(device_type)
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def in_words(device_type: str, precision: str) -> str:
    """The precision, and what becomes of it on a device."""
    if precision == "fp32" or multiplies_bfloat16(device_type):
        return precision
    return f"{precision} (products in fp32, for which this processor has instructions)"
