"""What every benchmark measures with: time, memory, and the machine's own limits."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable

import torch


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The option ``--device`` of a benchmark; a GPU, where there is one, unless ``default`` says something else."""

    def present(text: str) -> str:
        if text not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
        if text == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("cuda: torch finds no such device here")
        return text

    default = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=present, default=default, help="cpu or cuda")


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
    times: list[float] = []
    while len(times) < 5 and sum(times) < 1:  # a product of 16 bits takes many seconds where there is no instruction
        times.append(seconds(lambda: left @ right, device))
    return 2 * left.numel() * right.shape[1] / min(times) / 1e9


def gemm_rates(device: str, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, float]:
    """:func:`gemm_rate` in float32 and in each of ``dtypes``, where it is that of float32 if that is higher.

    Without instructions for 16 bits a machine multiplies them faster in 32.
    """
    single = gemm_rate(device, torch.float32)
    others = set(dtypes) - {torch.float32}
    return {torch.float32: single} | {dtype: max(single, gemm_rate(device, dtype)) for dtype in others}


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
