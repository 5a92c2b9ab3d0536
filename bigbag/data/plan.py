"""The plan of an epoch: which bags every rank computes in every micro-step. Pure functions, no communication.

Every rank computes the same plan from (sizes, seed, epoch, world size), so ranks cannot drift apart: all of them run
the same number of packs, resuming is a matter of a step's number, and every bag is visited exactly once.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class PackPlan:
    """What one rank computes in one micro-step.

    Attributes:
        bags: indices of the bags laid end to end.
        num_instances: instances of all of them.
        is_filler: True for a bag computed with weight 0, only to keep this rank in step with the others.
        seed: seed for dropout and the like, different for every pack of every epoch.
        draws: how often each of the bags comes before in this epoch; 0 unless bags are drawn with replacement.
    """

    bags: tuple[int, ...]
    num_instances: int
    is_filler: bool
    seed: int
    draws: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: ``micro_steps[m][rank]`` is what ``rank`` computes; ``num_bags`` counts no fillers."""

    micro_steps: tuple[tuple[PackPlan, ...], ...]
    num_bags: int

    @property
    def num_instances(self) -> int:
        """Over all ranks, without fillers."""
        return sum(pack.num_instances for packs in self.micro_steps for pack in packs if not pack.is_filler)


@dataclass(frozen=True)
class EpochPlan:
    """All steps of one epoch, for all ranks."""

    steps: tuple[StepPlan, ...]
    world_size: int

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def num_bags(self) -> int:
        return sum(step.num_bags for step in self.steps)

    @property
    def num_packs(self) -> int:
        """Packs that each rank computes."""
        return sum(len(step.micro_steps) for step in self.steps)

    def of_rank(self, rank: int, start_step: int = 0) -> Iterator[tuple[int, int, PackPlan]]:
        """``(step, micro_step, pack)`` of one rank, in order."""
        for step in range(start_step, len(self.steps)):
            for micro, packs in enumerate(self.steps[step].micro_steps):
                yield step, micro, packs[rank]


def plan_epoch(
    sizes: Sequence[int],
    bags: Sequence[int],
    *,
    seed: int,
    epoch: int,
    world_size: int,
    budget_instances: int,
    batch_bags: int,
    shuffle: bool = True,
    repeated: bool = False,
) -> EpochPlan:
    """Plan one epoch over ``bags``.

    Bags are ordered by a permutation of (seed, epoch); every ``batch_bags`` of them form a step (the last may be
    smaller), whatever the world size. The bags of a step are spread over packs of at most ``budget_instances``: their
    least number is estimated by first-fit decreasing, rounded up to a multiple of ``world_size``, and the instances are
    balanced by longest-processing-time scheduling. A larger bag is a pack of its own. Where a step has fewer bags than
    packs, the smallest of all bags serves as filler.

    Args:
        sizes: instances of every bag of the set.
        bags: indices into ``sizes`` of the bags to visit.
        seed: seed of the run.
        epoch: number of the epoch.
        world_size: number of ranks.
        budget_instances: most instances in a pack.
        batch_bags: bags in a step, over all ranks.
        shuffle: False keeps the order of ``bags``.
        repeated: allow a bag to be visited several times, as :func:`bigbag.data.draw_bags` gives them.

    Returns:
        The plan, the same on every rank.

    Raises:
        ValueError: an argument out of range, or a bag twice.
    """
    for name, value in (("world_size", world_size), ("budget_instances", budget_instances), ("batch_bags", batch_bags)):
        if value < 1:
            raise ValueError(f"plan_epoch: {name} is {value}, expected at least 1")
    if not repeated and len(set(bags)) != len(bags):
        raise ValueError("plan_epoch: a bag is listed twice in bags; every bag is visited once unless repeated=True")
    if bags and not (min(bags) >= 0 and max(bags) < len(sizes)):
        raise ValueError(f"plan_epoch: bags go from {min(bags)} to {max(bags)}, but there are {len(sizes)} bags")
    order = [int(bag) for bag in bags]
    if shuffle:
        generator = np.random.default_rng(derive_seed(seed, epoch))
        order = [order[i] for i in generator.permutation(len(order))]
    filler = min(order, key=lambda bag: (sizes[bag], bag), default=0)
    totals = [0] * world_size
    drawn: Counter[int] = Counter()
    steps = []
    for step, start in enumerate(range(0, len(order), batch_bags)):
        group = order[start : start + batch_bags]
        packs = _packs_of_step(group, sizes, budget_instances, world_size)
        steps.append(StepPlan(_deal(packs, sizes, filler, totals, drawn, (seed, epoch, step)), len(group)))
    return EpochPlan(tuple(steps), world_size)


def derive_seed(*numbers: int) -> int:
    """A seed below ``2**63`` that depends on all ``numbers``, the same on every machine."""
    content = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _packs_of_step(group: list[int], sizes: Sequence[int], budget: int, world_size: int) -> list[list[int]]:
    """The bags of one step in a multiple of ``world_size`` packs, some of which may be empty."""
    large_first = sorted(group, key=lambda bag: (-sizes[bag], bag))
    alone = [[bag] for bag in large_first if sizes[bag] > budget]
    rest = large_first[len(alone) :]
    least = len(alone) + _first_fit([sizes[bag] for bag in rest], budget)
    num_packs = -(-least // world_size) * world_size
    while True:
        packs = _balance(rest, sizes, num_packs - len(alone))
        if all(sum(sizes[bag] for bag in pack) <= budget for pack in packs):
            return alone + packs
        num_packs += world_size


def _first_fit(sizes: list[int], budget: int) -> int:
    """Number of packs that first-fit takes for ``sizes``, which are in decreasing order."""
    room: list[int] = []
    for size in sizes:
        for i, free in enumerate(room):
            if size <= free:
                room[i] -= size
                break
        else:
            room.append(budget - size)
    return len(room)


def _balance(bags: list[int], sizes: Sequence[int], num_packs: int) -> list[list[int]]:
    """Each bag, the largest first, into the pack that has the fewest instances so far."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0, 0, i) for i in range(num_packs)]
    for bag in bags:
        load, count, i = heapq.heappop(heap)
        packs[i].append(bag)
        heapq.heappush(heap, (load + sizes[bag], count + 1, i))
    return packs


def _deal(
    packs: list[list[int]],
    sizes: Sequence[int],
    filler: int,
    totals: list[int],
    drawn: Counter[int],
    where: tuple[int, int, int],
) -> tuple[tuple[PackPlan, ...], ...]:
    """Deal packs to ranks: packs of similar size together, the heaviest to the rank with the least work so far.

    ``totals``, the instances of each rank in this epoch, and ``drawn``, the visits of each bag, are brought up to date.
    """
    plans = [_plan_pack(pack or [filler], sizes, is_filler=not pack) for pack in packs]
    plans.sort(key=lambda plan: (-plan.num_instances, plan.is_filler, plan.bags))
    micro_steps = []
    for micro, start in enumerate(range(0, len(plans), len(totals))):
        lightest_first = sorted(range(len(totals)), key=lambda rank: (totals[rank], rank))
        of_rank = dict(zip(lightest_first, plans[start : start + len(totals)]))
        for rank, plan in of_rank.items():
            totals[rank] += plan.num_instances
            of_rank[rank] = replace(plan, seed=derive_seed(*where, micro, rank))
        micro_steps.append(tuple(_with_draws(of_rank[rank], drawn) for rank in range(len(totals))))
    return tuple(micro_steps)


def _with_draws(plan: PackPlan, drawn: Counter[int]) -> PackPlan:
    if plan.is_filler:
        return replace(plan, draws=(0,))
    draws = []
    for bag in plan.bags:
        draws.append(drawn[bag])
        drawn[bag] += 1
    return replace(plan, draws=tuple(draws))


def _plan_pack(bags: list[int], sizes: Sequence[int], is_filler: bool) -> PackPlan:
    return PackPlan(tuple(bags), sum(int(sizes[bag]) for bag in bags), is_filler, seed=0)
