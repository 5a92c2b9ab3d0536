"""Benchmark of the loader: packs streamed from mapped shards, beside the machine's own copy of the same arrays.

    python launch/bench.py loader --bags 48 --instances 10000 --width 1024 --workers 0,1,2

Every round runs each contender once, in turn, over a warm set: copying ``np.load(file, mmap_mode="r")`` views of the
same arrays into one buffer; an epoch of ``stream`` for each number of reading threads, started and ended within the
time; WebDataset's own decoding of the same shards. A pack holds one bag. GB/s are of features; the ratio is that of
medians of this run. Beside them stands the memory of this process after each epoch, maps of files not counted.

With ``--models ABMIL`` and the like, epochs of the engine follow, and the share of one in which steps wait for packs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bigbag.bags import Bag
from bigbag.bench.measure import machine, seconds
from bigbag.config.option_types import numbers, positive, some_of
from bigbag.data import ShardStore, open_store, pack, plan_epoch, stream
from bigbag.data.sources import MemorySource
from bigbag.memory import resident_bytes
from bigbag.models import MODELS

COPY, WEBDATASET = "np.load copies", "webdataset decode"


def make_set(folder: Path, num_bags: int, num_instances: int, width: int) -> tuple[ShardStore, list[Path]]:
    """A packed set of random float16 bags in one shard each 256 MiB, and the same arrays as ``.npy`` files."""
    rng = np.random.default_rng(0)
    shape = (num_instances, width)
    bags = [Bag(rng.integers(0, 2**14, shape, np.uint16).view(np.float16), i % 2, f"bag{i}") for i in range(num_bags)]
    files = [folder / f"{bag.key}.npy" for bag in bags]
    for file, bag in zip(files, bags):
        np.save(file, bag.x)
    pack(MemorySource(bags, ["train"] * num_bags), folder / "shards", progress=False)
    return open_store(folder / "shards"), files


def contenders(
    store: ShardStore, files: Sequence[Path], workers: Sequence[int], dtype: torch.dtype | None = None
) -> dict[str, Callable[[], None]]:
    """Name of a contender to one epoch of it."""
    buffer = np.empty((max(store.sizes), *store.feature_shape), store.feature_dtype)
    plan = plan_epoch(
        store.sizes, range(len(store)), seed=0, epoch=0, world_size=1, budget_instances=1, batch_bags=1, shuffle=False
    )

    def copy() -> None:
        for file in files:
            np.copyto(buffer, np.load(file, mmap_mode="r"))

    def epoch(num_workers: int) -> None:
        for _ in stream(store, plan, rank=0, num_workers=num_workers, dtype=dtype):
            pass

    def decode() -> None:
        import webdataset

        urls = [store.url(shard.file) for shard in store.manifest.shards]
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            assert len(sample["x.npy"])

    epochs = {f"stream, {n} workers": (lambda n=n: epoch(n)) for n in workers}
    return {COPY: copy, **epochs, WEBDATASET: decode}


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds of each round of each contender, and the resident bytes after it; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    resident: dict[str, list[int]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(run, "cpu")
            if turn:
                times[name].append(elapsed)
                resident[name].append(resident_bytes() or 0)
    return times, resident


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbag bench loader", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bags", type=positive, default=48)
    parser.add_argument("--instances", type=positive, default=10_000)
    parser.add_argument("--width", type=positive, default=1024)
    parser.add_argument("--workers", type=numbers, default=[0, 1, 2], help="numbers of reading threads")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="of the packs")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--models",
        type=some_of(MODELS),
        default=[],
        help="train these: how long do steps wait?",
    )
    parser.add_argument("--folder", help="where the set is made and removed again; default: the temporary folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bigbag bench loader``; returns an exit status."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store, files = make_set(Path(folder), args.bags, args.instances, args.width)
        runs = contenders(store, files, args.workers, getattr(torch, args.dtype))
        times, resident = measure(runs, args.rounds)
        waits = _waits(args, folder)
    total = 2 * args.bags * args.instances * args.width
    medians = {name: statistics.median(of) for name, of in times.items()}
    print(f"{machine('cpu')}, torch {torch.__version__}; {args.bags} bags of {total / args.bags / 1e6:.1f} MB, float16")
    for name, middle in medians.items():
        memory = [round(n / 2**20) for n in resident[name]]
        rates = sorted(total / t / 1e9 for t in times[name])
        print(
            f"{name:20} {total / middle / 1e9:6.2f} GB/s ({rates[0]:.2f} to {rates[-1]:.2f}), "
            f"{medians[COPY] / middle:5.2f} of the copy, {medians[WEBDATASET] / middle:5.2f} of webdataset; "
            f"resident {min(memory)} to {max(memory)} MiB"
        )
    for line in waits:
        print(line)
    return 0


def _waits(args: argparse.Namespace, folder: str) -> list[str]:
    """For each model and number of reading threads, how much of an epoch steps wait for their packs."""
    from bigbag.bench.training import waiting_share
    from bigbag.config import build_config

    lines = []
    for model in args.models:
        for workers in args.workers:
            data = {"shards": f"{folder}/shards", "num_workers": workers, "dtype": args.dtype}
            settings = {"name": f"{model}{workers}", "out": folder, "data": data, "model": {"name": model}}
            elapsed, share = waiting_share(build_config({**settings, "train": {"batch_bags": 4}}))
            lines.append(f"training {model}, {workers} workers: {elapsed:.2f} s an epoch, {share:.1%} of it waiting")
    return lines
