"""Benchmarks of the operators: implementation x size against what a user would write in plain PyTorch.

    python launch/bench.py ops --op attention_pool --sizes 10000,100000 --csv out.csv --plot out.png

Every round runs every contender once, in turn, so that a busy machine hurts all of them alike; the numbers are the
median and the spread (interquartile range) over the rounds, and the ratio is that of medians of one run. Beside them
stand the machine's own copy bandwidth and GEMM rate, and which share of the limit that binds (unavoidable bytes at the
copy bandwidth, or arithmetic at the GEMM rate) is reached. No ratio is given for an implementation whose proof fails.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bigbag.bench.cases import MEASURED, Case, make_case, too_large, usual_width
from bigbag.bench.measure import add_device, copy_bandwidth, gemm_rates, machine, seconds
from bigbag.config.option_types import output_file, positive, sizes, some_of
from bigbag.memory import is_out_of_memory, peak_bytes, return_freed
from bigbag.ops import _OPERATORS
from bigbag.ops.registry import why_not
from bigbag.ops.spmm import DTYPES
from bigbag.testing import check, samples

# What is made of operators and has no row in their table takes what they take.
_DTYPES = dict.fromkeys(MEASURED, DTYPES) | {row.name: row.dtypes for row in _OPERATORS}
_IMPLS = dict.fromkeys(impl for row in _OPERATORS for impl in row.dtypes)
_BENCH_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """One contender at one size. Times in ms, rates in 1e9 per second, memory in MiB."""

    op: str
    contender: str
    dtype: str
    instances: int
    width: int
    median_ms: float
    spread_ms: float
    ratio: str
    extra_mib: float
    gb_per_s: float
    gflop_per_s: float
    share_of_limit: float
    limit: str
    copy_gb_per_s: float
    gemm_gflop_per_s: float
    machine: str
    torch_version: str


@dataclass(frozen=True)
class Contender:
    """A named step; ``impl`` is None for the baseline."""

    name: str
    impl: str | None
    dtype: torch.dtype
    step: Callable[[], object]


def _step(
    case: Case, function: Callable[[Mapping[str, Tensor]], Tensor], dtype: torch.dtype, backward: bool
) -> Callable[[], object]:
    """One pass of ``function`` over inputs of ``dtype``; with a dense gradient, not a broadcast one, coming in."""
    device = next(iter(case.leaves.values())).device.type
    leaves = {
        name: value.to(dtype if name in (case.stored or case.leaves) else value.dtype).detach()
        for name, value in case.leaves.items()
    }
    # Stored features are data: gradients flow to the weights.
    wanted = [leaf.requires_grad_(backward) for name, leaf in leaves.items() if name not in case.stored]
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=bool(case.stored) and dtype == torch.bfloat16)
    incoming: list[Tensor] = []

    def step() -> object:
        with autocast:
            out = function(leaves)
        if not backward:
            return out
        if not incoming:
            incoming.append(torch.randn(out.shape, device=device).to(out.dtype))
        return torch.autograd.grad(out, wanted, incoming[0])

    return step


def contenders(
    op: str, case: Case, impls: Sequence[str], dtypes: Sequence[torch.dtype], device: str, backward: bool
) -> list[Contender]:
    name, baseline = case.baseline
    found = []
    for dtype in _BENCH_DTYPES:
        # The baseline in float32 always, all ratios being to it; in bfloat16 too where the features are what is stored
        # so (torch.sparse has none).
        if case.baseline_fits and (dtype == torch.float32 or (case.stored and dtype in dtypes)):
            found.append(Contender(name, None, dtype, _step(case, baseline, dtype, backward)))
        for impl in impls if dtype in dtypes else ():
            if why_not(_DTYPES[op], impl, device, dtype) is None:
                for variant, function in case.ours.items():
                    run = lambda t, f=function, i=impl: f(t, i)  # noqa: E731
                    label = f"{impl}, {variant}" if variant else impl
                    found.append(Contender(label, impl, dtype, _step(case, run, dtype, backward)))
    return found


def proof(op: str, impl: str, dtype: torch.dtype, device: str) -> str | None:
    """The first failure of ``impl`` on the operator's samples, or None.

    A function made of operators, which are proved, has no samples: it is compared with its baseline on a small bag.
    """
    if op not in {row.name for row in _OPERATORS}:
        return _differs_from_baseline(op, impl, dtype, device)
    try:
        for sample in samples(op):
            check(sample, impl, dtype, device)
    except AssertionError as error:
        return str(error)
    return None


def _differs_from_baseline(op: str, impl: str, dtype: torch.dtype, device: str) -> str | None:
    case = make_case(op, 64, 16, device)
    expected = case.baseline[1](case.leaves)
    for function in case.ours.values():
        found = function({name: value.to(dtype) for name, value in case.leaves.items()}, impl)
        error, size = (found.to(expected.dtype) - expected).abs().max(), expected.abs().max()
        # A few roundings of the largest number; written so that a NaN fails.
        if not bool(error <= 8 * torch.finfo(dtype).eps * size):
            return f"{op}, {impl}, {dtype}: errs by {error:.3g} beside a baseline of up to {size:.3g}"
    return None


class Bench:
    """The machine's limits, and which proofs have failed, for all operators of one run."""

    def __init__(
        self, impls: Sequence[str], dtypes: Sequence[torch.dtype], device: str, rounds: int, backward: bool
    ) -> None:
        self.impls, self.dtypes, self.device, self.rounds, self.backward = impls, dtypes, device, rounds, backward
        self.copy = copy_bandwidth(device)
        self.gemm = gemm_rates(device, dtypes)
        self._failures: dict[tuple[str, str, torch.dtype], str | None] = {}

    def proved(self, op: str, impl: str, dtype: torch.dtype) -> bool:
        key = (op, impl, dtype)
        if key not in self._failures:
            self._failures[key] = proof(op, impl, dtype, self.device)
            if self._failures[key] is not None:
                print(f"{op}, {impl}, {dtype}: {self._failures[key]}", file=sys.stderr)
        return self._failures[key] is None

    def rows(self, op: str, num_instances: int, width: int) -> list[Row]:
        """Every contender of ``op`` at one size."""
        case = make_case(op, num_instances, width, self.device)
        found = contenders(op, case, self.impls, self.dtypes, self.device, self.backward)
        found = [contender for contender in found if self._runs(op, num_instances, contender)]  # compiles and warms up
        times: list[list[float]] = [[] for _ in found]
        for _ in range(self.rounds):
            for contender, measured in zip(found, times):
                measured.append(seconds(contender.step, self.device))
        base = statistics.median(times[0]) if found and found[0].impl is None else None
        rows = len(next(iter(case.leaves.values()))) if op != "class_token_attention" else num_instances
        return [self._row(op, case, rows, width, c, measured, base) for c, measured in zip(found, times)]

    def _runs(self, op: str, num_instances: int, contender: Contender) -> bool:
        """Whether memory suffices for one step; says so where it does not."""
        try:
            contender.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        else:
            return True
        return_freed()
        print(f"{op}, {num_instances} instances, {contender.name}, {contender.dtype}: {problem}", file=sys.stderr)
        return False

    def _row(
        self, op: str, case: Case, rows: int, width: int, contender: Contender, times: list[float], base: float | None
    ) -> Row:
        middle = statistics.median(times)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [middle] * 3
        ratio = "" if base is None else f"{middle / base:.2f}"
        if contender.impl is not None and not self.proved(op, contender.impl, contender.dtype):
            ratio = "proof failed"
        passes = 2 if self.backward else 1
        moved = sum(case.num_bytes[:passes]) * contender.dtype.itemsize / 4
        flops = sum(case.num_flops[:passes])
        limits = {"copy": moved / self.copy / 1e9, "gemm": flops / self.gemm[contender.dtype] / 1e9}
        binding = max(limits, key=lambda name: limits[name])
        return Row(
            op=op,
            contender=contender.name,
            dtype=str(contender.dtype)[6:],
            instances=rows,
            width=width,
            median_ms=round(middle * 1e3, 3),
            spread_ms=round((quarters[2] - quarters[0]) * 1e3, 3),
            ratio=ratio,
            extra_mib=round(peak_bytes(contender.step, self.device) / 2**20, 1),
            gb_per_s=round(moved / middle / 1e9, 1),
            gflop_per_s=round(flops / middle / 1e9, 1),
            share_of_limit=round(limits[binding] / middle, 2),
            limit=binding,
            copy_gb_per_s=round(self.copy, 1),
            gemm_gflop_per_s=round(self.gemm[contender.dtype], 1),
            machine=machine(self.device),
            torch_version=torch.__version__,
        )


def plot(rows: Sequence[Row], path: str) -> None:
    """Median time over the number of instances, one panel per operator, one line per contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.op for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.op == name:
                lines.setdefault(f"{row.contender}, {row.dtype}", []).append(row)
        for label, points in lines.items():
            axis.loglog([p.instances for p in points], [p.median_ms for p in points], marker="o", label=label)
        axis.set(title=name, xlabel="instances", ylabel="ms")
        axis.legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def _print(rows: Sequence[Row], backward: bool) -> None:
    first = asdict(rows[0])
    passes = "forward + backward" if backward else "forward"
    print(f"{first['machine']}, torch {first['torch_version']}; copy {first['copy_gb_per_s']} GB/s; {passes}")
    shown = [name for name in first if name not in ("machine", "torch_version", "copy_gb_per_s")]
    lines = [shown] + [[str(asdict(row)[name]) for name in shown] for row in rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbag bench ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", choices=MEASURED, help="default: all")
    parser.add_argument("--sizes", type=sizes, default=[10_000, 100_000], help="instances, comma-separated")
    parser.add_argument("--widths", type=sizes, help="features of an instance; default: as usual per operator")
    parser.add_argument(
        "--impls", type=some_of(_IMPLS), default=["cpu", "triton"],
        help="implementations, comma-separated; those that can run do",
    )  # fmt: skip
    names = [str(dtype)[6:] for dtype in _BENCH_DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names, help="precisions; default: both")
    add_device(parser)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    parser.add_argument("--csv", type=output_file(), help="write every column to this file")
    parser.add_argument(
        "--plot",
        type=output_file(".png", ".pdf", ".svg"),
        help="file of a figure: median times over sizes",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bigbag bench ops``; returns an exit status: 1 if an implementation failed its proof."""
    args = _parser().parse_args(argv)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    bench = Bench(args.impls, dtypes, args.device, args.rounds, not args.forward)
    rows: list[Row] = []
    for op in [args.op] if args.op else MEASURED:
        for width in args.widths or [usual_width(op)]:
            for size in args.sizes:
                if too_large(op, size, args.device):
                    print(f"{op}, {size} instances: left out, its time is quadratic", file=sys.stderr)
                else:
                    rows += bench.rows(op, size, width)
    if not rows:
        return 0
    _print(rows, bench.backward)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if args.plot:
        plot(rows, args.plot)
    return int(any(row.ratio == "proof failed" for row in rows))
