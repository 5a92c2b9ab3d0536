"""From a plan to packs: read by threads, laid end to end in memory that is used again, handed over without a copy.

Threads, not processes: a bag is a view of a mapped file, so that reading is copying (and page faults), which leaves the
interpreter to others. A thread starts in no time, writes straight into the buffer of the pack (page-locked for a GPU),
shares the maps of all files, and needs no shared memory, no pickling, no fork and no guard of a script's entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bigbag.bags import Bag, PackedBags
from bigbag.data.augment import Augmentation
from bigbag.data.buffers import Buffers
from bigbag.data.cap import cap_instances, take_rows
from bigbag.data.patients import PatientStore
from bigbag.data.plan import EpochPlan, PackPlan
from bigbag.data.stores import BagStore
from bigbag.parts import Parts

Item = tuple[int, int, PackPlan, PackedBags]

# Every epoch is a stream of its own; its buffers live as long as its store.
_BUFFERS: WeakKeyDictionary[BagStore, Buffers] = WeakKeyDictionary()


def stream(
    store: BagStore,
    plan: EpochPlan,
    *,
    rank: int,
    start_step: int = 0,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    dtype: torch.dtype | None = None,
    max_instances: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    part: tuple[int, int] = (0, 1),
    augment: Augmentation | None = None,
    budget_bytes: int | None = None,
) -> Iterator[Item]:
    """The packs of one rank, in the order of the plan.

    A pack may be kept for as long as it is needed; its memory is used for another pack only once it is gone. At most
    ``num_workers * prefetch + 2`` packs are in memory, besides those that the caller keeps.

    Args:
        store: the bags.
        plan: the plan of this epoch, made with ``capped_sizes(store.sizes, max_instances)``, changed by
            ``augment.sizes`` where there is one.
        rank: this process, in ``0 .. plan.world_size - 1``.
        start_step: first step, for going on in the middle of an epoch.
        num_workers: reading threads; 0 reads when a pack is asked for.
        prefetch: packs that are prepared ahead for each reading thread.
        pin_memory: lay packs in page-locked memory, for asynchronous copies to a GPU.
        dtype: precision of the features in the packs; None: as they are stored.
        max_instances: random subsample of each larger bag, drawn by (seed, epoch, bag); None: whole bags.
        seed: seed of the subsample and of ``augment``.
        epoch: epoch of both.
        part: ``(r, R)`` reads the r-th of R parts of every bag (:meth:`bigbag.Bag.part`), as ``pack.parts`` says.
        augment: changes to training bags; None: none.
        budget_bytes: the features of a bag by itself that take more stay where they are, in a mapped shard, in the
            precision they have there; None: every pack is copied into memory.

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
    ahead = num_workers * prefetch
    buffers = _BUFFERS.setdefault(store, Buffers())
    buffers.keep(ahead + 2)
    pinned = partial(_new_pinned, device=torch.accelerator.current_device_index()) if pin_memory else None
    allocate = pinned or buffers.lease

    def read(pack_plan: PackPlan) -> PackedBags:
        memory = {"dtype": dtype, "allocate": allocate}
        return _read(store, pack_plan, max_instances, seed, epoch, part, augment, budget_bytes, **memory)

    items = list(plan.of_rank(rank, start_step))
    packs = map(read, (item[2] for item in items)) if not ahead else _read_ahead(read, items, num_workers, ahead)
    return _numbered(items, packs)


def _numbered(items: list[tuple[int, int, PackPlan]], packs: Iterator[PackedBags]) -> Generator[Item, None, None]:
    try:
        for step, micro, pack_plan in items:
            pack = next(packs)
            yield step, micro, pack_plan, pack
            del pack  # so that its buffer is free as soon as the caller has let go of it
    finally:
        if isinstance(packs, Generator):
            packs.close()


def _read(
    store: BagStore,
    plan: PackPlan,
    max_instances: int | None,
    seed: int,
    epoch: int,
    part: tuple[int, int],
    augment: Augmentation | None,
    budget_bytes: int | None,
    **memory: Any,
) -> PackedBags:
    def read(index: int, draw: int) -> Bag:
        bag = store.read(index)
        rows = cap_instances(bag.num_instances, max_instances, seed=seed, epoch=epoch, bag=index, draw=draw)
        return bag if rows is None else take_rows(bag, rows)

    keys = [(seed, epoch, index, draw) for index, draw in zip(plan.bags, plan.draws or (0,) * len(plan.bags))]
    bags = [read(*key[2:]) for key in keys]
    if augment is not None:
        bags = [augment.change(bag, key, partial(read, draw=key[3])) for bag, key in zip(bags, keys)]
    num_instances = sum(bag.num_instances for bag in bags)
    if num_instances != plan.num_instances:
        raise ValueError(
            f"stream: the plan expects {plan.num_instances} instances in bags {plan.bags}, got {num_instances}: "
            f"make the plan with capped_sizes(store.sizes, max_instances={max_instances}), and augment.sizes of them"
        )
    rank, num_ranks = part
    mine = bags if num_ranks == 1 else [bag.part(rank, num_ranks) for bag in bags]
    if budget_bytes is not None and sum(_bytes_of(bag, memory["dtype"]) for bag in mine) > budget_bytes:
        capped = max_instances is not None and any(store.sizes[index] > max_instances for index in plan.bags)
        joined = isinstance(store, PatientStore) and any(len(store.slides[index]) > 1 for index in plan.bags)
        _check_in_place(mine, capped, joined, augment, budget_bytes)
        memory["share_x"] = True
    pack = PackedBags.from_bags(mine, **memory)
    if num_ranks > 1:
        pack = replace(pack, parts=Parts.even([bag.num_instances for bag in bags], num_ranks, rank))
    if augment is not None:
        augment.add_noise(pack, keys)
    return pack


def _bytes_of(bag: Bag, dtype: torch.dtype | None) -> int:
    """Bytes of the features, where they are stored or in a pack of ``dtype``, whichever is more."""
    return bag.x.size * max(bag.x.itemsize, 0 if dtype is None else dtype.itemsize)


def _check_in_place(
    bags: list[Bag], capped: bool, joined: bool, augment: Augmentation | None, budget_bytes: int
) -> None:
    """Refuse a pack over the budget whose features can't stay where they are."""
    reason = None
    if len(bags) > 1:
        reason = "several bags in a pack are copied: plan with fewer budget_instances"
    elif capped:
        reason = "data.max_instances copies a part of them: set a lower one"
    elif joined:
        reason = "data.bag: patient joins its slides in a copy: take every slide as a bag"
    elif augment is not None and (augment.feature_noise or augment.instance_dropout or augment.mixup):
        reason = "data.augment changes them in a copy: switch it off"
    if reason is not None:
        names, needed = ", ".join(repr(bag.key) for bag in bags), sum(bag.x.nbytes for bag in bags)
        raise ValueError(
            f"bag {names}: {needed:,} bytes of features are over data.budget_bytes = {budget_bytes:,}, and {reason}, "
            "or raise the budget"
        )


def _read_ahead(
    read: Callable[[PackPlan], PackedBags], items: list[tuple[int, int, PackPlan]], num_workers: int, ahead: int
) -> Generator[PackedBags, None, None]:
    """Packs in order, ``ahead`` of them being read or ready."""
    with ThreadPoolExecutor(num_workers, "bigbag-read") as pool:
        waiting: deque[Future[PackedBags]] = deque()
        try:
            for _, _, pack_plan in items:
                waiting.append(pool.submit(read, pack_plan))
                if len(waiting) == ahead + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _new_pinned(num_bytes: int, device: int) -> Tensor:
    torch.accelerator.set_device_index(device)  # which for a new thread is the first one, whatever the rank
    # torch's allocator hands a pinned block out again only after the copies from it have ended.
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
