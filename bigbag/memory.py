"""How much memory there is, how much is taken, and how much a piece of work takes at most."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_SECONDS_BETWEEN_LOOKS = 0.02


def peak_bytes(step: Callable[[], object], device: str = "cpu", warm_up: bool = True) -> int:
    """Most bytes of tensors alive at once during ``step``, beyond those alive before it.

    Args:
        step: the work.
        device: "cpu" or "cuda".
        warm_up: run ``step`` once before, so that what is made once and kept does not count.
    """
    if warm_up:
        step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees the allocations of the thread that started it alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        torch.set_num_threads(threads)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def resident_bytes() -> int:
    """Private and shared memory of this process; maps of files, which the kernel drops at will, not counted.

    Raises:
        OSError: a system without ``/proc``.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken: of a GPU's memory, or the machine's within the limit of its control group.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_of_control_group()])


def _left_of_control_group() -> list[int]:
    """Bytes below the memory limit of this process's control group (v2), if it has one."""
    try:
        name = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / name.strip().lstrip("/")
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
        reclaimable = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["file"]
    except (OSError, StopIteration, KeyError, ValueError):
        return []
    return [] if limit == "max" else [int(limit) - int(used) + int(reclaimable)]


class PeakMemory:
    """The most memory that this process takes from ``start`` to ``stop``, all of it: what :func:`resident_bytes` counts
    on CPU, looked up every 20 ms; what torch has allocated on a GPU.

    Args:
        device: where the tensors are.

    Attributes:
        num_bytes: the peak so far; None where the system does not say.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes: int | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.path.exists("/proc/self/status"):
            self._thread = threading.Thread(target=self._watch, name="bigbag-peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        elif self.device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device)

    def _watch(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes or 0, resident_bytes())
            if self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
                return
