"""From a plan to packs: read in worker processes, laid end to end in shared memory, handed over without a copy."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.data.buffers import Layout, LocalBuffers, SharedBuffers
from bigbag.data.cap import cap_instances, take_rows
from bigbag.data.plan import EpochPlan, PackPlan
from bigbag.data.stores import BagStore

Item = tuple[int, int, PackPlan, PackedBags]
Packs = Generator[PackedBags, None, None]

_SHM = "/dev/shm"
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def stream(
    store: BagStore,
    plan: EpochPlan,
    *,
    rank: int,
    start_step: int = 0,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    max_instances: int | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Item]:
    """The packs of one rank, in the order of the plan.

    A pack may be kept for as long as it is needed; its memory is used for another pack only once it is gone. At most
    ``num_workers * prefetch + 2`` packs are in memory, besides those that the caller keeps.

    Worker processes come from a fork server: forking the trainer itself is unsafe, as its gloo, NCCL, CUDA and OpenMP
    threads do not survive a fork, and spawning would import torch anew in every worker of every epoch. As with every
    start method but fork, a script must guard its entry by ``if __name__ == "__main__"``.

    Args:
        store: the bags.
        plan: the plan of this epoch, made with ``capped_sizes(store.sizes, max_instances)``.
        rank: this process, in ``0 .. plan.world_size - 1``.
        start_step: first step, for going on in the middle of an epoch.
        num_workers: reading processes; 0 reads in this one.
        prefetch: packs that each worker prepares ahead.
        pin_memory: copy each pack to page-locked memory, for asynchronous copies to a GPU.
        max_instances: random subsample of each larger bag, drawn by (seed, epoch, bag); None: whole bags.
        seed: seed of the subsample.
        epoch: epoch of the subsample.

    Yields:
        ``(step, micro_step, pack plan, pack)``.

    Raises:
        ValueError: arguments out of range, a bag that cannot be read, or a plan made for other sizes.
    """
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"stream: rank is {rank}, the plan is for {plan.world_size} ranks")
    if num_workers < 0 or prefetch < 1:
        raise ValueError(f"stream: num_workers is {num_workers}, prefetch {prefetch}; expected at least 0 and 1")
    if pin_memory and not torch.accelerator.is_available():
        raise ValueError("stream: pin_memory is for copies to an accelerator, but there is none: leave it False")
    items = list(plan.of_rank(rank, start_step))
    reader = _Reader(store, tuple(item[2] for item in items), max_instances, seed, epoch)
    packs = _read_here(reader) if num_workers == 0 else _read_in_workers(reader, num_workers, prefetch)
    return _numbered(items, packs, pin_memory)


def _numbered(items: list[tuple[int, int, PackPlan]], packs: Packs, pin_memory: bool) -> Iterator[Item]:
    try:
        for step, micro, pack_plan in items:
            pack = next(packs)
            if pin_memory:
                pack = pack.pin_memory()
            yield step, micro, pack_plan, pack
            del pack  # so that its buffer is free as soon as the caller has let go of it
    finally:
        packs.close()


class _Reader(torch.utils.data.Dataset):
    """Reads the packs of a plan; in worker processes, into the slots given to it."""

    def __init__(
        self, store: BagStore, plans: tuple[PackPlan, ...], max_instances: int | None, seed: int, epoch: int
    ) -> None:
        self.store = store
        self.plans = plans
        self.max_instances, self.seed, self.epoch = max_instances, seed, epoch
        self.slots: list[Tensor] = []

    def read(self, index: int, **memory: Any) -> PackedBags:
        plan = self.plans[index]
        bags = []
        for bag_index in plan.bags:
            bag = self.store.read(bag_index)
            rows = cap_instances(bag.num_instances, self.max_instances, seed=self.seed, epoch=self.epoch, bag=bag_index)
            bags.append(bag if rows is None else take_rows(bag, rows))
        num_instances = sum(bag.num_instances for bag in bags)
        if num_instances != plan.num_instances:
            raise ValueError(
                f"stream: the plan expects {plan.num_instances} instances in bags {plan.bags}, got {num_instances}: "
                f"make the plan with capped_sizes(store.sizes, max_instances={self.max_instances})"
            )
        return PackedBags.from_bags(bags, **memory)

    def __getitem__(self, task: tuple[int, int | None]) -> _Message:
        index, slot = task
        own: list[Tensor] = []

        def allocate(num_bytes: int) -> Tensor:
            if slot is not None and num_bytes <= self.slots[slot].numel():
                return self.slots[slot]
            own.append(torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes)))
            return own[0]

        try:
            pack = self.read(index, allocate=allocate)
        except (ValueError, OSError) as error:
            return _Message(slot, error=error)
        return _Message(slot, Layout.of(pack), own[0] if own else None)


@dataclass(frozen=True)
class _Message:
    """What a worker hands over: a pack in a slot, or in a buffer of its own, or an error."""

    slot: int | None
    layout: Layout | None = None
    buffer: Tensor | None = None
    error: Exception | None = None


def _read_here(reader: _Reader) -> Packs:
    buffers = LocalBuffers()
    for index in range(len(reader.plans)):
        yield reader.read(index, allocate=buffers.lease)


def _read_in_workers(reader: _Reader, num_workers: int, prefetch: int) -> Packs:
    if not reader.plans:
        return
    # The packs being read, the one just handed over, and the one before it that the caller's loop still names.
    num_slots = num_workers * prefetch + 2
    buffers = SharedBuffers(num_slots, _slot_bytes(reader, num_slots))
    reader.slots = buffers.slots
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    loader = torch.utils.data.DataLoader(
        reader,
        batch_size=None,
        sampler=_Tasks(len(reader.plans), buffers),
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        multiprocessing_context=context,
    )
    with _blocked_signals():
        messages: Any = iter(loader)
    try:
        for message in messages:
            if message.error is not None:
                raise message.error
            assert message.layout is not None
            if message.buffer is not None:
                if message.slot is not None:
                    buffers.release(message.slot)
                yield message.layout.pack(message.buffer)
            else:
                yield message.layout.pack(buffers.lease(message.slot, message.layout.num_bytes))
            del message
    finally:
        messages._shutdown_workers()


class _Tasks:
    """The order of the packs, each with the slot it goes to; the loader asks for the next one as a worker gets free."""

    def __init__(self, num_packs: int, buffers: SharedBuffers) -> None:
        self.num_packs, self.buffers = num_packs, buffers

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        for index in range(self.num_packs):
            yield index, self.buffers.acquire()

    def __len__(self) -> int:
        return self.num_packs


def _slot_bytes(reader: _Reader, num_slots: int) -> int:
    """Bytes of the largest pack, estimated from the first one; a pack that does not fit gets a buffer of its own."""
    first = reader.read(0)
    per_instance = first.x.untyped_storage().nbytes() / max(1, first.num_instances)
    largest = max(plan.num_instances for plan in reader.plans)
    wanted = int(1.1 * per_instance * largest) + (1 << 20)
    free = shutil.disk_usage(_SHM).free
    if 2 * wanted > free:
        raise ValueError(
            f"stream: two packs of {largest} instances take {2 * wanted} bytes, but {_SHM} has {free} bytes free: "
            "give it more, or read in the training process (data.num_workers: 0)"
        )
    return min(wanted, int(0.8 * free) // num_slots)


def _identity(message: Any) -> Any:
    return message


def _ignore_signals(worker: int) -> None:
    """A cluster signals every process of a job, but only the trainer can end in good order, with its workers alive."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start workers and their fork server with the same signals blocked, for the time until they ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
