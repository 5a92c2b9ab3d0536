"""Benchmarks of the operators: implementation x size against what a user would write in plain PyTorch.

    python launch/bench.py ops --op attention_pool --sizes 10000,100000 --csv out.csv

Every round runs every contender once, in turn, so that a busy machine hurts all of them alike; the numbers are the
median and the spread (interquartile range) over the rounds, and the ratio is that of medians of one run. Beside them
stand the machine's own copy bandwidth and GEMM rate. No ratio is given for an implementation that fails its proof.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.ops import _OPERATORS
from bigbag.ops.registry import why_not
from bigbag.testing import check, samples

WIDTH, DIM = 1024, 128  # instance features and attention units of the benchmark
SEGMENT_WIDTH = 128


@dataclass(frozen=True)
class Row:
    """One contender at one size. Times in ms, rates in 1e9 per second, memory in MiB."""

    op: str
    contender: str
    dtype: str
    instances: int
    median_ms: float
    spread_ms: float
    ratio_to_eager: str
    extra_mib: float
    gb_per_s: float
    gflop_per_s: float
    copy_gb_per_s: float
    gemm_gflop_per_s: float
    machine: str
    torch_version: str


Contender = tuple[str, str | None, torch.dtype, Callable[[], None]]


@dataclass(frozen=True)
class Case:
    """Contenders (name, implementation or None for eager, dtype, step), and what one step must move and compute."""

    contenders: list[Contender]
    num_bytes: int
    num_flops: int


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: str) -> float:
    """GB/s (read + write) of copying 256 MB."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds(lambda: target.copy_(source), device) for _ in range(5)) / 1e9


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of (8192, 1024) @ (1024, 256), the shape of attention pooling's projection."""
    left = torch.randn(8192, WIDTH, device=device).to(dtype)
    right = torch.randn(WIDTH, 2 * DIM, device=device).to(dtype)
    best = min(_seconds(lambda: left @ right, device) for _ in range(5))
    return 2 * left.numel() * right.shape[1] / best / 1e9


def peak_extra_bytes(step: Callable[[], object], device: str) -> int:
    """Most bytes of tensors alive at once during ``step``, beyond those alive before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # The profiler sees the allocations of the thread that started it alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    torch.set_num_threads(threads)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _eager_pool(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, wg: Tensor, bg: Tensor) -> Tensor:
    """Gated attention pooling of one bag as torchmil and the papers' code write it."""
    linear = torch.nn.functional.linear
    hidden = torch.tanh(linear(x, w1, b1)) * torch.sigmoid(linear(x, wg, bg))
    return torch.bmm(x.transpose(1, 2), linear(hidden, w2).softmax(1)).squeeze(2)


def _attention_case(rows: int, device: str, impls: Sequence[str]) -> Case:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        value = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return value.to(device).requires_grad_()

    weights = (parameter(DIM, WIDTH), parameter(DIM), parameter(1, DIM), parameter(DIM, WIDTH), parameter(DIM))
    x = torch.randn(rows, WIDTH, generator=generator).to(device)
    stored = {torch.float32: x, torch.bfloat16: x.to(torch.bfloat16)}
    segments = Segments.from_sizes((rows,), device)

    def step(impl: str | None, dtype: torch.dtype, keep: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                if impl is None:
                    z = _eager_pool(stored[dtype][None], *weights)
                else:
                    options: dict[str, Any] = {"keep_preactivations": keep, "impl": impl}
                    z, _ = ops.attention_pool(stored[dtype], segments, *weights, **options)
            torch.autograd.grad(z.float().sum(), weights)

        return run

    contenders: list[Contender] = []
    for dtype in (torch.float32, torch.bfloat16):
        contenders.append(("eager", None, dtype, step(None, dtype, False)))
        for impl in impls:
            if why_not(_dtypes("attention_pool"), impl, device, dtype) is None:
                contenders.append((f"{impl}, recompute", impl, dtype, step(impl, dtype, False)))
                contenders.append((f"{impl}, keep", impl, dtype, step(impl, dtype, True)))
    # The work that no implementation can avoid: one read of x each way, and the two GEMMs.
    return Case(contenders, 2 * x.numel() * x.element_size(), 8 * rows * WIDTH * DIM)


def _eager_segments(op: str, x: Tensor, segments: Segments) -> Tensor:
    """What one writes today: index_add and scatter_reduce over the bag of each instance."""
    bag = segments.bag_of_instance
    index, shape = bag[:, None].expand_as(x), (segments.num_bags, x.shape[1])
    total = x.new_zeros(shape)
    if op == "segment_sum":
        return total.index_add(0, bag, x)
    if op == "segment_mean":
        return total.index_add(0, bag, x) / segments.offsets.diff()[:, None]
    top = total.scatter_reduce(0, index, x, "amax", include_self=False)
    if op == "segment_max":
        return top
    e = (x - top.detach()[bag]).exp()
    return e / total.index_add(0, bag, e)[bag]


def _segment_case(op: str, rows: int, device: str, impls: Sequence[str]) -> Case:
    x = torch.randn(rows, SEGMENT_WIDTH, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    segments = Segments.from_sizes([rows // 4] * 3 + [rows - 3 * (rows // 4)], device)

    def step(impl: str | None) -> Callable[[], None]:
        def run() -> None:
            out = _eager_segments(op, x, segments) if impl is None else getattr(ops, op)(x, segments, impl=impl)
            torch.autograd.grad(out.square().sum(), x)

        return run

    contenders: list[Contender] = [("eager", None, torch.float32, step(None))]
    contenders += [(i, i, torch.float32, step(i)) for i in impls if why_not(_dtypes(op), i, device, x.dtype) is None]
    return Case(contenders, 2 * x.numel() * x.element_size(), 2 * x.numel())


def _dtypes(op: str) -> Any:
    return next(row.dtypes for row in _OPERATORS if row.name == op)


def proof(op: str, impl: str, dtype: torch.dtype, device: str) -> str | None:
    """The first failure of ``impl`` on the operator's samples, or None."""
    try:
        for sample in samples(op):
            check(sample, impl, dtype, device)
    except AssertionError as error:
        return str(error)
    return None


def bench_operator(op: str, sizes: Sequence[int], impls: Sequence[str], device: str, rounds: int) -> list[Row]:
    """Forward and backward of ``op`` for every size, implementation and dtype.

    Raises:
        ValueError: an operator without a benchmark.
    """
    if op != "attention_pool" and not op.startswith("segment_"):
        raise ValueError(f"no benchmark for operator {op!r}: add a case to bigbag/bench.py")
    copy, rows = copy_bandwidth(device), []
    rates = {dtype: gemm_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    failures: dict[tuple[str, torch.dtype], str | None] = {}
    for size in sizes:
        if op == "attention_pool":
            case = _attention_case(size, device, impls)
        else:
            case = _segment_case(op, size, device, impls)
        times: list[list[float]] = [[] for _ in case.contenders]
        for turn in range(rounds + 1):
            for position, (*_, step) in enumerate(case.contenders):
                seconds = _seconds(step, device)
                if turn:  # the first round compiles and warms up
                    times[position].append(seconds)
        eager = statistics.median(times[0])
        for (name, impl, dtype, step), measured in zip(case.contenders, times):
            if impl is not None and (impl, dtype) not in failures:
                failures[impl, dtype] = proof(op, impl, dtype, device)
                if failures[impl, dtype] is not None:
                    print(f"{op}, {impl}, {dtype}: {failures[impl, dtype]}", file=sys.stderr)
            proved = impl is None or failures[impl, dtype] is None
            middle = statistics.median(measured)
            quarters = statistics.quantiles(measured, n=4) if len(measured) > 1 else [middle] * 3
            rows.append(
                Row(
                    op=op,
                    contender=name,
                    dtype=str(dtype)[6:],
                    instances=size,
                    median_ms=round(middle * 1e3, 3),
                    spread_ms=round((quarters[2] - quarters[0]) * 1e3, 3),
                    ratio_to_eager=f"{middle / eager:.2f}" if proved else "proof failed",
                    extra_mib=round(peak_extra_bytes(step, device) / 2**20, 1),
                    gb_per_s=round(case.num_bytes / middle / 1e9 * (dtype.itemsize / 4), 1),
                    gflop_per_s=round(case.num_flops / middle / 1e9, 1),
                    copy_gb_per_s=round(copy, 1),
                    gemm_gflop_per_s=round(rates[dtype], 1),
                    machine=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
                    torch_version=torch.__version__,
                )
            )
    return rows


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} x {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``launch/bench.py``; returns an exit status: 1 if an implementation failed its proof."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--op", choices=[op.name for op in _OPERATORS], help="default: all")
    parser.add_argument("--sizes", default="10000,100000", help="instances, comma-separated")
    parser.add_argument("--impls", default="cpu,triton", help="implementations, comma-separated; those that can run do")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", help="write every column to this file")
    args = parser.parse_args(argv)
    sizes, impls = [int(size) for size in args.sizes.split(",")], args.impls.split(",")
    rows: list[Row] = []
    for op in [args.op] if args.op else [op.name for op in _OPERATORS]:
        rows += bench_operator(op, sizes, impls, args.device, args.rounds)
    first = asdict(rows[0])
    print(f"{first['machine']}, torch {first['torch_version']}; copy {first['copy_gb_per_s']} GB/s; forward + backward")
    shown = [name for name in first if name not in ("machine", "torch_version", "copy_gb_per_s")]
    lines = [shown] + [[str(asdict(row)[name]) for name in shown] for row in rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(first))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return int(any(row.ratio_to_eager == "proof failed" for row in rows))
