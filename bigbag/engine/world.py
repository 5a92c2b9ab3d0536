"""The ranks of a run, and the few things they say to each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: number of processes on this machine.
        device: where this process computes.
        bag_ranks: ranks that share each bag; a group of them has consecutive numbers.
        bag_group: the process group of this rank's such group; None where ``bag_ranks`` is 1.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bag_ranks: int = 1
    bag_group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def bag_rank(self) -> int:
        """Number of this rank among those that share its bags."""
        return self.rank % self.bag_ranks

    @property
    def data_rank(self) -> int:
        """Number of this rank's group among those that have different bags."""
        return self.rank // self.bag_ranks

    @property
    def data_size(self) -> int:
        """Number of groups that have different bags."""
        return self.size // self.bag_ranks

    def sharing_bags(self, bag_ranks: int) -> World:
        """The same ranks, every ``bag_ranks`` of which share their bags; all ranks call it.

        Raises:
            ValueError: the number of ranks is no multiple of it.
        """
        if bag_ranks == self.bag_ranks:
            return self
        if self.size % bag_ranks:
            raise ValueError(
                f"parallel.bag is {bag_ranks}, but there are {self.size} ranks: start a multiple of {bag_ranks}, or "
                "set another parallel.bag"
            )
        groups = [dist.new_group(range(first, first + bag_ranks)) for first in range(0, self.size, bag_ranks)]
        return replace(self, bag_ranks=bag_ranks, bag_group=groups[self.rank // bag_ranks])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over the ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank, known to every rank, without waiting for the device."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, group=_host_group())
        return bool(flags.item())

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@cache
def _host_group() -> dist.ProcessGroup | None:
    """The group for messages from host to host: gloo, where the default one carries tensors of the device."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def launched() -> bool:
    """Whether a launcher started this process as a rank: ``deepspeed``, ``torchrun`` or ``srun``.

    ``srun`` sets variables of its own, which are translated here to those of the others. Those of the batch script
    around it (SLURM_NTASKS) don't count: a process that is not a task of a step is one process.
    """
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        _adopt_slurm_step()
    return "WORLD_SIZE" in os.environ


def _adopt_slurm_step() -> None:
    step = os.environ
    tasks = re.match(r"\d+", step["SLURM_STEP_TASKS_PER_NODE"])  # "2", "2(x3)" or "2,1": tasks of the first node
    assert tasks is not None
    os.environ.update(
        RANK=step["SLURM_PROCID"],
        WORLD_SIZE=step["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=step["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks[0],
    )
    if "MASTER_ADDR" not in step:
        command = ["scontrol", "show", "hostnames", step["SLURM_STEP_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[
            0
        ]
    # Any job of the cluster may have a rendezvous on the first node; job and step make the port its own.
    number = int(step["SLURM_JOB_ID"]) * 10 + int(step["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 10000))


def start_world(backend: str, threads: int | None = None, timeout_s: int = 1800) -> World:
    """Join the run that the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK) describes, or start alone.

    Args:
        backend: "torch" or "deepspeed".
        threads: CPU threads of this rank; None shares the cores of the machine among its ranks.
        timeout_s: seconds after which a rank that waits for others raises.
    """
    launched()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    _set_threads(threads or (max(1, _cores() // local_size) if device.type == "cpu" else None))
    if backend == "deepspeed":
        _start_deepspeed(device, timedelta(seconds=timeout_s))
    elif size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    return World(int(os.environ.get("RANK", "0")), size, local_size, device)


@contextmanager
def joined_world(backend: str, threads: int | None = None, timeout_s: int = 1800) -> Iterator[World]:
    """:func:`start_world`, and the end of it: each of several ranks ends its process here, with status 0.

    A rank that ends with an error leaves the groups to the launcher: to wait for the others there could be for ever.
    """
    world = start_world(backend, threads, timeout_s)
    yield world
    if world.size > 1:
        leave(0)
    if dist.is_initialized():
        _host_group.cache_clear()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process at once: all that is to be kept must be written.

    On the usual way out threads of gloo that are still at work can abort the process as the interpreter goes
    ("terminate called without an active exception"), and ``srun --kill-on-bad-exit`` sends SIGTERM to the ranks that
    are slower. Either would make it another status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    torch.set_num_threads(threads)
    # Read by the operators' Numba kernels, which are imported at their first use; forcing the import here would cost
    # every CUDA run half a second.
    os.environ["NUMBA_NUM_THREADS"] = str(threads)


def import_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for a device, without what it would say or compile for others."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls names that torch 2.13 deprecates, hundreds of times a run; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(reduce_scatter|all_gather).*")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # DeepSpeed would otherwise compile its shared-memory collectives first (most of a minute), and hang for ever
        # on the lock of a compilation that was killed. Gloo carries the collectives of a CPU run anyway.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _start_deepspeed(device: torch.device, timeout: timedelta) -> None:
    import_deepspeed(device)
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
