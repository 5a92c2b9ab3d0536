"""Benchmark of whole models: one training step on one bag, against torchmil's model of the same name.

    python launch/bench.py models --models SmABMIL,PatchGCN --sizes 50000 --width 1024 --csv models.csv

Each contender runs in a process of its own, so that its peak memory is its own; with several rounds the contenders take
turns, and of each counts its best round, since other users of a machine only ever slow it down. A step is forward, loss
and backward on a lattice-shaped bag of one label. Beside the time stands its limit: the matrix products of the step,
once each, at the machine's own GEMM rate, and three reads of the features at its copy rate. torchmil is taken where it
is installed; a contender that fails or runs out of time is reported as such.

    python launch/bench.py models --models ABMIL --sizes 100000,1000000 --device cuda --memory-gib 24

On a GPU memory is what torch allocates there; ``--memory-gib`` lets no contender have more.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from bigbag import ops
from bigbag.bench.measure import add_device, copy_bandwidth, gemm_rates, machine
from bigbag.config.option_types import output_file, positive, sizes, some_of
from bigbag.engine.precision import autocast
from bigbag.memory import resident_bytes
from bigbag.ops import _OPERATORS

_VAE = {"name": "VariationalAutoEncoderMIL", "layer_sizes": [256, 64], "activations": ["relu", "None"]}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CAMIL": {"n_landmarks": 256},
    "TransMIL": {"n_landmarks": 256},
    "VAEABMIL": {"feat_ext": _VAE},
}
"""Arguments beside ``in_shape`` where a model's defaults do not run in torchmil."""
LIBRARIES = ("bigbag", "torchmil")
_DTYPES = ["float32", "bfloat16"]
_TIMED_OUT = "timed out"
_WARM_UP = 2048
# Squares of multiples of 16: filled up to squares and to landmarks alike. Smaller bags may be computed otherwise.
_COUNTED = (1024, 2304, 4096)


def lattice(num_instances: int) -> Tensor:
    """``(N, 2)`` int64: the places of a square lattice, row by row."""
    side = int(num_instances**0.5 + 0.999)
    index = torch.arange(num_instances)
    return torch.stack([index % side, index // side], 1)


def make_loss(
    library: str, name: str, num_instances: int, width: int, dtype: torch.dtype, recompute: bool, device: str = "cpu"
) -> Any:
    """The model and a function that computes its loss on one bag."""
    from bigbag.graphs import build_adjacency

    torch.manual_seed(0)
    arguments = dict(ARGUMENTS.get(name, {}))
    if "feat_ext" in arguments:
        settings = dict(arguments["feat_ext"])
        module = __import__(f"{library}.nn", fromlist=["nn"])
        arguments["feat_ext"] = getattr(module, settings.pop("name"))(input_shape=(width,), **settings)
    cls = getattr(__import__(f"{library}.models", fromlist=["models"]), name)
    model = cls(in_shape=(width,), **arguments).train().to(device)
    x, y = torch.randn(num_instances, width, device=device), torch.ones(1, device=device)
    coords = lattice(num_instances)
    adj = build_adjacency(coords, radius=1.5, normalize="symmetric")
    if library == "bigbag":
        from bigbag.bags import PackedBags, Segments

        model.activation_checkpointing = recompute
        segments = Segments.from_sizes((num_instances,), device)
        coords, adj = coords.to(device), adj.to(device)
        bags = PackedBags(x.to(dtype), segments.offsets, segments.sizes, y=y, coords=coords, adj=adj)

        def loss_terms() -> Any:
            return model.compute_loss(y, bags)[1]
    else:
        named = {"X": x[None], "adj": adj.to_coo()[None], "coords": coords[None], "mask": torch.ones(1, num_instances)}
        named = {key: value.to(device) for key, value in named.items()}
        taken = model.compute_loss.__code__.co_varnames[: model.compute_loss.__code__.co_argcount]
        # torchmil needs a mask in DTFDMIL only; elsewhere it costs time for nothing.
        batch = {key: named[key] for key in named if key in taken and (key != "mask" or name == "DTFDMIL")}

        def loss_terms() -> Any:
            return model.compute_loss(y, **batch)[1]

    def loss() -> Tensor:
        with autocast(device, "bf16" if dtype == torch.bfloat16 else "fp32"):
            return torch.stack([value.float() for value in loss_terms().values()]).sum()

    return model, loss


def make_step(
    library: str, name: str, num_instances: int, width: int, dtype: torch.dtype, recompute: bool, device: str = "cpu"
) -> Any:
    """A function that does one training step (forward, loss, backward) on one bag and returns the loss."""
    model, loss = make_loss(library, name, num_instances, width, dtype, recompute, device)

    def step() -> float:
        value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def _addmm_flops(left: Tensor, first: Tensor, second: Tensor, **_: Any) -> int:
    """Of the product in place, which torch's counter leaves out."""
    return 2 * first.shape[0] * first.shape[1] * second.shape[1]


def _convolution_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    """As many as forward for each gradient; torch's counter forgets the groups in that of the weight."""
    transposed, wanted = rest[4], rest[-1]
    return sum(wanted[:2]) * conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)


class _Counter(TorchDispatchMode):
    """Adds up the FLOP of matrix products, and of operators that count theirs.

    In a backward pass, what is done with gradients enabled is done again, to save memory, and not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.own_flops = 0
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        out = func(*args, **kwargs)
        if packet in _OWN:
            self.own_flops += _OWN[packet](*args, **kwargs)
        elif packet in _PRODUCTS and not (self.backward and torch.is_grad_enabled()):
            self.flops += _PRODUCTS[packet](*args, **kwargs, out_val=out)
        return out


_PRODUCTS = {
    **flop_registry,
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
_OWN = {getattr(torch.ops.bigbag, name): flops for row in _OPERATORS for name, flops in row.flops.items()}


def _count(name: str, num_instances: int, width: int) -> _Counter:
    """Of a step on a bag, in the references of all operators that do not count themselves."""
    references = {row.name: "reference" for row in _OPERATORS if not row.flops}
    _, loss = make_loss("bigbag", name, num_instances, width, torch.float32, False)
    with ops.use_impl(references), _Counter() as counter:
        value = loss()
        counter.backward = True
        value.backward()
    return counter


def step_flops(name: str, num_instances: int, width: int) -> float:
    """FLOP of the matrix products that a training step of a model cannot do without, forward and backward.

    Counted in the operators' references on three small bags: a polynomial of degree 2 in the number of instances, since
    exact attention has the square. Dilated attention, whose pairs are no polynomial, counts them by itself; with it
    the bag has its own size.
    """
    counters = [_count(name, size, width) for size in _COUNTED]
    if counters[0].own_flops:
        whole = _count(name, num_instances, width)
        return whole.flops + whole.own_flops
    # Lagrange's form of the polynomial through the three counts.
    total = 0.0
    for at, counter in zip(_COUNTED, counters):
        others = [size for size in _COUNTED if size != at]
        total += counter.flops * math.prod((num_instances - other) / (at - other) for other in others)
    return total


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in this process: seconds of a step, and the most bytes beyond those before it: resident ones, or
    those that torch allocates on a GPU."""
    torch.set_num_threads(job["threads"])
    dtype, on_gpu = getattr(torch, job["dtype"]), job["device"] == "cuda"
    if on_gpu and job["memory_gib"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["memory_gib"] * 2**30 / total))
    shape = (job["width"], dtype, job["recompute"], job["device"])
    make_step(job["library"], job["model"], _WARM_UP, *shape)()  # compiles, imports and starts threads
    step = make_step(job["library"], job["model"], job["instances"], *shape)
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS") or 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    loss = step()
    seconds = [time.perf_counter() - started]
    peak = (torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") or 0) - before
    while len(seconds) < job["steps"] and sum(seconds) < job["max_seconds"]:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "peak_bytes": peak, "loss": loss}


def run_job(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """:func:`measure` in a fresh process; ``{"error": ...}`` if it fails."""
    code = (
        "import json, sys; from bigbag.bench.models import measure; print(json.dumps(measure(json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"{_TIMED_OUT} ({timeout_s:.0f} s)"}
    if done.returncode != 0:
        killed = done.returncode == -9
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": "out of memory" if killed else last[:120]}
    return json.loads(done.stdout.splitlines()[-1])


def bench_model(name: str, instances: int, options: argparse.Namespace, gemm: Any, copy: float) -> list[dict[str, Any]]:
    """Rows of one model at one size: bigbag in each precision, kept and recomputed, and torchmil in fp32."""
    import importlib.util

    shared = {"model": name, "instances": instances, "width": options.width, "threads": options.threads}
    shared |= {"steps": options.steps, "max_seconds": options.seconds}
    shared |= {"device": options.device, "memory_gib": options.memory_gib}
    contenders = [("bigbag", d, r) for d in options.dtypes for r in (False, True)]
    theirs = importlib.util.find_spec("torchmil") is not None and name not in ("CLAM_MB", "MeanMIL", "MaxMIL")
    if theirs and not options.without_torchmil:
        contenders.insert(0, ("torchmil", "float32", False))
    jobs = [shared | {"library": library, "dtype": d, "recompute": r} for library, d, r in contenders]
    rounds = [[run_job(job, options.timeout) for job in jobs] for _ in range(options.rounds)]
    rows = [job | _best(found) for job, found in zip(jobs, zip(*rounds))]
    flops, baseline = step_flops(name, instances, options.width), rows[0] if rows[0]["library"] == "torchmil" else {}
    for row in rows:
        if "error" not in row:
            features = instances * options.width * getattr(torch, row["dtype"]).itemsize
            row["limit_s"] = flops / gemm[row["dtype"]] + 3 * features / copy
            row["times_limit"] = row["seconds"] / row["limit_s"]
            if "seconds" in baseline:
                row["time_ratio"] = row["seconds"] / baseline["seconds"]
                row["memory_ratio"] = row["peak_bytes"] / baseline["peak_bytes"] if baseline["peak_bytes"] else math.nan
        print(_line(row), flush=True)
    return rows


def _best(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round with the shortest time; the first error, if no round has one."""
    return min(found, key=lambda result: result.get("seconds", math.inf))


def _line(row: dict[str, Any]) -> str:
    label = f"{row['library']} {row['dtype']}" + (", recomputed" if row["recompute"] else "")
    head = f"{row['model']:<28} {row['instances']:>8}  {label:<28}"
    if "error" in row:
        return f"{head}{row['error']}"
    ratios = ""
    if "time_ratio" in row:
        ratios = f"  x{row['time_ratio']:.2f} time  x{row['memory_ratio']:.2f} memory of torchmil"
    size = f"{row['seconds']:>8.2f} s  {row['peak_bytes'] / 2**20:>7.0f} MiB"
    return f"{head}{size}  {row['times_limit']:>5.1f} x limit  loss {row['loss']:.4f}{ratios}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bigbag bench models``; returns an exit status: 1 if a model of bigbag failed."""
    from bigbag.models import MODELS

    parser = argparse.ArgumentParser(prog="bigbag bench models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=some_of(MODELS), default=list(MODELS), help="comma-separated; default: all")
    parser.add_argument("--sizes", type=sizes, default=[50_000], help="instances, comma-separated")
    parser.add_argument("--width", type=positive, default=1024, help="features per instance")
    parser.add_argument("--dtypes", type=some_of(_DTYPES), default=_DTYPES, help="precisions, comma-separated")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    add_device(parser)
    parser.add_argument("--memory-gib", type=float, help="of a GPU's memory, as much as a contender may have")
    parser.add_argument("--steps", type=positive, default=15, help="most steps timed")
    parser.add_argument("--rounds", type=positive, default=1, help="turns of each contender, of which the best counts")
    parser.add_argument("--seconds", type=float, default=10, help="no further step after so many seconds")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a contender is given up")
    parser.add_argument("--without-torchmil", action="store_true")
    parser.add_argument("--csv", type=output_file(), help="write every row to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rates = gemm_rates(options.device, [getattr(torch, name) for name in options.dtypes])
    gemm = {str(dtype)[6:]: rate * 1e9 for dtype, rate in rates.items()}
    copy = copy_bandwidth(options.device) * 1e9
    shown = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in gemm.items())
    print(f"{machine(options.device)}, GEMM {shown}, copy {copy / 1e9:.1f} GB/s, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for instances in options.sizes:
            rows += bench_model(name, instances, options, gemm, copy)
    if options.csv:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return int(any("error" in row for row in rows if row["library"] == "bigbag"))
