"""How much memory there is, how much is taken, and how much a piece of work takes at most."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_SECONDS_BETWEEN_LOOKS = 0.02
_M_ARENA_MAX = -8  # of glibc's malloc.h


def peak_bytes(step: Callable[[], object], device: str = "cpu", warm_up: bool = True) -> int:
    """Most bytes of tensors alive at once during ``step``, beyond those alive before it.

    Args:
        step: the work.
        device: "cpu" or "cuda".
        warm_up: run ``step`` once before and collect garbage, so that neither what is made once and kept counts, nor
            what goes; False: the caller has.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it, newer versions say on every start that they started
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


def resident_bytes(*fields: str) -> int | None:
    """Memory of this process; None where the system does not say.

    Args:
        fields: lines of ``/proc/self/status`` to add up, such as VmHWM; none: private and shared memory, without maps
            of files, which the kernel drops at will.
    """
    names = fields or ("RssAnon", "RssShmem")
    try:
        status = _fields("/proc/self/status")
    except OSError:
        return None
    return sum(status[name] for name in names)


def _fields(path: str) -> dict[str, int]:
    """The lines of a file of ``/proc`` that count KiB, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: torch's on a GPU and on CPU, or Python's."""
    of_torch_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or of_torch_cpu


def return_freed() -> None:
    """Collect garbage, and give what is free back to the system or the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give freed memory, which the C library keeps for later, back to the system, where the library knows how."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def use_one_heap() -> None:
    """Let all threads take memory from one heap of the C library, where the library has several (glibc's arenas).

    With a heap for each thread, what a loader's thread freed stays out of reach of the step, and the other way round.
    For a program to call at its start; ``MALLOC_ARENA_MAX`` in the environment goes before it.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 1)


def _of_c_library(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken: of a GPU's memory, or the machine's within the limit of its control group.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = _fields("/proc/meminfo")["MemAvailable"]
    except OSError:
        return None
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
        elif resident_bytes() is not None:
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
            self.num_bytes = max(self.num_bytes or 0, resident_bytes() or 0)
            if self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
                return
