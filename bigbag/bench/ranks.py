"""Benchmark of ranks: training steps of several ranks with one thread each, beside one rank with one thread.

    python launch/bench.py ranks --ranks 2 --bags 48 --smallest 1000 --largest 20000 --width 512

The processes of all contenders stay alive and take turns, so that a busy machine hurts them alike: in a round each
contender trains an epoch by the engine's own loop (reading, forward, backward, messages, optimiser, log), while the
others wait. The first round warms up. The gain is bags per second over those of one rank, of medians. Beside it stands
what the plan allows: all instances, over those of the rank with most of them in each step. Ranks on cores that other
processes use as well measure those: let it run alone, or on Linux as root by ``chrt -r 10``, before others.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbag.bags import Bag
from bigbag.bench.measure import machine
from bigbag.config import build_config
from bigbag.config.option_types import positive, some_of
from bigbag.data import EpochPlan, ShardStore, open_store, pack, plan_epoch
from bigbag.data.sources import MemorySource
from bigbag.memory import use_one_heap
from bigbag.models import MODELS
from bigbag.testing import free_port

_BACKENDS = ["torch", "deepspeed"]


@dataclass(frozen=True)
class Contender:
    """``ranks`` processes that train together by ``backend`` ("torch" or "deepspeed")."""

    backend: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.backend}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


class Epoch(NamedTuple):
    """What an epoch took its slowest rank: seconds on the clock and of CPU; and the most instances of a rank."""

    clock: float
    cpu: float
    instances: int


def make_set(folder: Path, num_bags: int, smallest: int, largest: int, width: int) -> ShardStore:
    """A packed set of random float16 bags, whose sizes are uniform from ``smallest`` to ``largest``."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(smallest, largest + 1, num_bags)
    x = (rng.standard_normal((n, width), np.float32).astype(np.float16) for n in sizes)
    bags = [Bag(values, i % 2, f"bag{i}") for i, values in enumerate(x)]
    pack(MemorySource(bags, ["train"] * num_bags), folder, progress=False)
    return open_store(folder)


def best_gain(plan: EpochPlan) -> float:
    """Instances of an epoch over those that the rank with most has, step by step: the gain where only they count."""
    slowest = 0
    for step in plan.steps:
        slowest += max(sum(pack.num_instances for pack in of_rank) for of_rank in zip(*step.micro_steps))
    return sum(step.num_instances for step in plan.steps) / slowest


def _train(rank: int, contender: Contender, settings: dict[str, Any], port: int, orders: Connection) -> None:
    """One process: answers each order with its :class:`Epoch`; ends at the order False."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(contender.ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(contender.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from bigbag.bench.training import make_trainer
    from bigbag.engine import preemption
    from bigbag.engine.checkpoint import Progress
    from bigbag.engine.world import start_world

    config = build_config(settings | {"name": f"{contender.backend}{contender.ranks}"})
    world = start_world(contender.backend, threads=1)
    use_one_heap()
    preemption.watch()  # as the commands do: ranks tell each other about signals
    trainer = make_trainer(config, contender.backend, world)
    carrier: Any = getattr(trainer.backend, "engine", trainer.backend)
    sizes: list[int] = []
    carrier.module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].num_instances))
    orders.send(None)
    while orders.recv():
        world.barrier()
        sizes.clear()
        clock, cpu = time.perf_counter(), time.process_time()
        trainer.train_epoch(Progress())
        orders.send(Epoch(time.perf_counter() - clock, time.process_time() - cpu, sum(sizes)))
    trainer.log.close()


@contextmanager
def _running(contenders: Sequence[Contender], settings: dict[str, Any]) -> Iterator[list[list[Connection]]]:
    """The processes of each contender, ready; by the connections to them."""
    context = torch.multiprocessing.get_context("spawn")
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    processes, groups = [], []
    for contender in contenders:
        pairs, port = [context.Pipe() for _ in range(contender.ranks)], free_port()
        for rank, (_, theirs) in enumerate(pairs):
            processes.append(context.Process(target=_train, args=(rank, contender, settings, port, theirs)))
            processes[-1].start()
            theirs.close()
        groups.append([ours for ours, _ in pairs])
    try:
        for group in groups:
            _ = [connection.recv() for connection in group]
        yield groups
        for connection in (connection for group in groups for connection in group):
            connection.send(False)
        for process in processes:
            process.join(10)
    except EOFError:
        raise ValueError("a rank has ended before its time: what it said stands above") from None
    finally:
        for process in processes:
            process.kill()


def measure(contenders: Sequence[Contender], settings: dict[str, Any], rounds: int) -> list[list[Epoch]]:
    """An epoch of each contender in each round."""
    epochs: list[list[Epoch]] = [[] for _ in contenders]
    with _running(contenders, settings) as groups:
        for turn in range(rounds + 1):
            for group, measured in zip(groups, epochs):
                for connection in group:
                    connection.send(True)
                answers = [connection.recv() for connection in group]
                if turn:
                    measured.append(Epoch(*(max(of_ranks) for of_ranks in zip(*answers))))
    return epochs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bigbag bench ranks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--backends", type=some_of(_BACKENDS), default=_BACKENDS, help="of the ranks; one rank: torch")
    parser.add_argument("--model", choices=MODELS, default="ABMIL")
    parser.add_argument("--bags", type=positive, default=48)
    parser.add_argument("--smallest", type=positive, default=1000, help="instances of the smallest bag")
    parser.add_argument("--largest", type=positive, default=20_000)
    parser.add_argument("--width", type=positive, default=512)
    parser.add_argument("--batch", type=positive, default=8, help="bags of a step")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--folder", help="where the set is made and removed again; default: the temporary folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bigbag bench ranks``; returns an exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.smallest > args.largest:
        parser.error(f"--smallest {args.smallest} is above --largest {args.largest}")
    contenders = [Contender("torch", 1), *(Contender(backend, args.ranks) for backend in args.backends)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store = make_set(Path(folder) / "shards", args.bags, args.smallest, args.largest, args.width)
        settings = {"name": "ranks", "out": folder, "data": {"shards": str(Path(folder) / "shards")}}
        settings |= {"model": {"name": args.model}, "train": {"batch_bags": args.batch}}
        config = build_config(settings)
        epochs = measure(contenders, settings, args.rounds)
    plan = plan_epoch(
        store.sizes, range(len(store)), seed=config.seed, epoch=0, world_size=args.ranks, batch_bags=args.batch,
        budget_instances=config.data.budget_instances,
    )  # fmt: skip
    alone, cpu_alone, instances = (statistics.median(of) for of in zip(*epochs[0]))
    print(f"{machine('cpu').split(' x ')[0]}, a thread a rank, torch {torch.__version__}")
    bags = f"{args.bags} bags of {args.smallest} to {args.largest} x {args.width}, {args.batch} a step"
    print(f"{args.model}, {bags}; the plan allows {best_gain(plan):.2f} times one rank")
    for contender, of in zip(contenders, epochs):
        middle, cpu, most = (statistics.median(each) for each in zip(*of))
        slowest, fastest = max(of).clock, min(of).clock
        print(
            f"{contender!s:20} {args.bags / middle:6.1f} bags/s, {alone / middle:.2f} ({alone / slowest:.2f} to "
            f"{alone / fastest:.2f}) times one rank; a rank has at most {most / instances:.2f} of the instances and "
            f"{cpu / cpu_alone:.2f} of the CPU time of one rank"
        )
    return 0
