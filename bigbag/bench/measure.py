"""What every benchmark measures with: time, memory, and the machine's own limits."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch


def seconds(step: Callable[[], object], device: str) -> float:
    """Of the device's clock where it has one: what the host takes to ask and to hear is not part of it."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """GB/s (read + write) of copying 256 MiB, on a GPU 4 GiB, into memory that is there already."""
    source = torch.zeros(1 << (30 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(5)) / 1e9


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of (8192, 1024) @ (1024, 256), the shape of attention pooling's projection; on a GPU of 2^20 rows."""
    left = torch.randn(1 << 20 if device == "cuda" else 8192, 1024, device=device).to(dtype)
    right = torch.randn(1024, 256, device=device).to(dtype)
    best = min(seconds(lambda: left @ right, device) for _ in range(5))
    return 2 * left.numel() * right.shape[1] / best / 1e9


def machine(device: str) -> str:
    """The name of the device, on CPU with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} x {torch.get_num_threads()} threads"
