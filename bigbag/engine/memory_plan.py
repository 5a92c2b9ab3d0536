"""What a run takes of a device's memory at most, told before it starts, and the settings that make it fit.

The peak is what the process has already, the optimiser's states, the packs in memory, and the working memory of a step,
which is measured (:mod:`bigbag.engine.memory_cost`). Where it is over the limit, activations are recomputed, and the
chunks of a feature extractor halved until it fits: the same gradients in more time. What would change the numbers of a
run, or its ranks, is left to the user, as a remedy with the peak that it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import BagStore, EpochPlan, PackPlan, capped_sizes
from bigbag.engine.evaluate import plan_evaluation
from bigbag.engine.feed import TrainingFeed, budget_instances, stays_in_place
from bigbag.engine.memory_cost import Recomputation, StepProbe, first_rows, most_held, num_probed
from bigbag.engine.precision import multiplies_bfloat16
from bigbag.engine.world import World
from bigbag.memory import available_bytes, resident_bytes, return_freed
from bigbag.models import MILModel
from bigbag.nn.rows import chunk_rows

_SIMULATED_EPOCHS = 3
_SMALLEST_CHUNK = 16
_WORTH_IT = 0.99  # a way that saves less is not worth its time
# Freed blocks below 32 MiB stay with the allocator of the C library, and gaps among them: in runs of ten models, and of
# many bags of all sizes, up to four fifths of a step, as long as that has no more than some five blocks of this size.
_KEPT_SHARE, _KEPT_BYTES = 0.8, 128 * 2**20
_CHECKPOINT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted peak of one rank on its device, in bytes.

    Attributes:
        process_bytes: what the process has before the run: the interpreter, libraries, weights.
        states_bytes: what the optimiser keeps and the ranks exchange.
        packs_bytes: packs that are read, ready or computed at once, and their buffers; on a GPU, one pack.
        step_bytes: activations and gradients of the most expensive pack.
        limit_bytes: what the device has for this rank; None: unknown.
        recomputation: the settings that this holds for.
        largest_pack_instances: of one rank, where ranks share a bag.
        largest_pack_bytes: the same in bytes.
        largest_pack_in_place: its features stay in a mapped file.
        remedies: settings and the peak that each of them alone would lead to.
    """

    process_bytes: int
    states_bytes: int
    packs_bytes: int
    step_bytes: int
    limit_bytes: int | None
    recomputation: Recomputation
    largest_pack_instances: int
    largest_pack_bytes: int
    largest_pack_in_place: bool
    remedies: tuple[tuple[str, int], ...] = ()

    @property
    def peak_bytes(self) -> int:
        return self.process_bytes + self.states_bytes + self.packs_bytes + self.step_bytes

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.peak_bytes <= self.limit_bytes

    @property
    def most_between_steps(self) -> int | None:
        """What may be held between steps, so that the next one fits too; None: any number."""
        return None if self.limit_bytes is None else self.limit_bytes - self.step_bytes

    def to_json(self) -> dict[str, Any]:
        """For ``environment.json``."""
        return {**asdict(self), "remedies": dict(self.remedies), "peak_bytes": self.peak_bytes, "fits": self.fits}


def plan_memory(
    config: Config, store: BagStore, splits: Mapping[str, Sequence[int]], model: MILModel, world: World
) -> MemoryPlan:
    """Predict the peak of a run and choose how much it recomputes.

    Args:
        config: the settings of the run.
        store: the bags.
        splits: split name to bag numbers.
        model: the model, before it goes to its device; it stays as it is.
        world: the ranks.

    Returns:
        The plan: as ``train.activation_checkpointing`` and ``train.chunk_instances`` say where that fits. If it does
        not, what they leave open changes: activations are recomputed, then chunks halved.
    """
    run = _Run(config, store, splits, model, world)
    plans: list[MemoryPlan] = []
    for recomputation in _choices(run):
        plan = run.plan(recomputation)
        if plan.fits:
            return plan
        if plans and plan.peak_bytes > _WORTH_IT * plans[-1].peak_bytes:
            break
        plans.append(plan)
    plan = plans[-1]
    return replace(plan, remedies=tuple((name, peak) for name, peak in _remedies(run, plan) if peak < plan.peak_bytes))


def strictest(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Of the plans of all ranks that which takes least memory, for all: ranks that share a bag recompute in step."""

    def saved(plan: MemoryPlan) -> tuple[bool, float, int]:
        way = plan.recomputation
        return way.active, -(way.chunk_instances or math.inf), plan.peak_bytes

    return max(plans, key=saved)


def wants_recomputation(config: Config, store: BagStore, bags: Sequence[int]) -> bool:
    """Whether activations are recomputed before memory is looked at: as set or, for "auto", with a chunk size, or a
    pack that is large in fp32 or over ``data.budget_bytes``."""
    setting = config.train.activation_checkpointing
    if setting != "auto":
        return setting
    if config.train.chunk_instances is not None:
        return True
    sizes = capped_sizes([store.sizes[bag] for bag in bags], config.data.max_instances)
    largest = max(max(sizes, default=0), min(budget_instances(config, store), sum(sizes)))
    of_rank = -(-largest // config.parallel.bag)
    return stays_in_place(config, store, of_rank) or of_rank * math.prod(store.feature_shape) * 4 > _CHECKPOINT_BYTES


def cheaper(now: Recomputation, model: MILModel, in_shape: Sequence[int], device: torch.device) -> Recomputation | None:
    """The next way that takes less memory: recompute, then halve the chunk of a feature extractor; None: there is none.

    Args:
        now: the way that takes too much.
        model: the model.
        in_shape: shape of an instance.
        device: where it computes.
    """
    if not now.active:
        return replace(now, active=True)
    if isinstance(getattr(model, "feat_ext", None), torch.nn.Identity | None):
        return None
    chunk = chunk_rows(torch.empty(1, *in_shape, device=device), now.chunk_instances) // 2
    return replace(now, chunk_instances=chunk) if chunk >= _SMALLEST_CHUNK else None


def _choices(run: _Run) -> Iterator[Recomputation]:
    """The ways that the settings leave open, in the order of their price."""
    train = run.config.train
    choice: Recomputation | None = Recomputation(
        wants_recomputation(run.config, run.store, run.splits["train"]), train.chunk_instances
    )
    while choice is not None:
        yield choice
        following = cheaper(choice, run.model, run.store.feature_shape, run.world.device)
        fixed = train.chunk_instances is not None if choice.active else train.activation_checkpointing is False
        choice = None if fixed else following


def _remedies(run: _Run, plan: MemoryPlan) -> Iterator[tuple[str, int]]:
    """Settings that are the user's to change, with the peak of each alone."""
    config, way = run.config, plan.recomputation

    def peak(config: Config, world: World) -> int:
        return _Run(config, run.store, run.splits, run.model, world, like=run).plan(way).peak_bytes

    if not way.active:
        yield "train.activation_checkpointing=true", run.plan(replace(way, active=True)).peak_bytes
    sections: list[tuple[str, dict[str, Any]]] = []
    if config.data.num_workers > 0:
        sections.append(("data", {"num_workers": 0}))
    if config.train.precision == "fp32" and multiplies_bfloat16(run.world.device.type):
        sections.append(("train", {"precision": "bf16"}))
    if not (plan.largest_pack_in_place or config.parallel.bag > 1 or config.data.dtype or run.model.needs):
        sections.append(("data", {"budget_bytes": max(1, plan.largest_pack_bytes // 2)}))
    if run.world.size > 1 and config.engine.zero_stage == 0:
        sections.append(("engine", {"zero_stage": 2}))
    for name, change in sections:
        changed = config.model_copy(update={name: getattr(config, name).model_copy(update=change)})
        setting = ", ".join(f"{name}.{key}={value}" for key, value in change.items())
        yield setting, peak(changed, run.world)
    if run.model.in_parts:
        ranks = 2 * run.world.bag_ranks
        world = replace(run.world, size=max(ranks, run.world.size), bag_ranks=ranks)
        name = f"parallel.bag={ranks} with {world.size} ranks, each on a device of its own"
        yield name, peak(config, world)


class _Run:
    """The packs of a run, and what they take."""

    def __init__(
        self,
        config: Config,
        store: BagStore,
        splits: Mapping[str, Sequence[int]],
        model: MILModel,
        world: World,
        like: _Run | None = None,
    ) -> None:
        self.config, self.store, self.splits, self.model, self.world = config, store, splits, model, world
        self.dtype = None if config.data.dtype is None else getattr(torch, config.data.dtype)
        feed = TrainingFeed(config, store, splits["train"], world)
        self.training = [feed.plan(epoch) for epoch in range(min(config.train.epochs, _SIMULATED_EPOCHS))]
        self.evaluation = [
            plan_evaluation(store, splits[name], config, world) for name in ("val", "test") if splits.get(name)
        ]
        if like is not None:  # but for its settings; what was measured holds
            self.probe: StepProbe = like.probe
            self.process_and_limit = like.process_and_limit
            return
        bag = store.read(max(splits["train"], key=lambda bag: store.sizes[bag]))
        enough = num_probed(store.feature_shape, world.device)
        sample = first_rows(bag, min(bag.num_instances, enough))
        self.probe = StepProbe(model, sample, world.device, self.dtype)

    def plan(self, recomputation: Recomputation) -> MemoryPlan:
        step = self._step_bytes(recomputation, self.training, training=True)
        if self.evaluation:
            step = max(step, self._step_bytes(recomputation, self.evaluation, training=False))
        largest = max(self._rows(pack) for plan in (*self.training, *self.evaluation) for pack in _packs(plan))
        process, limit = self.process_and_limit
        return MemoryPlan(
            process_bytes=process,
            states_bytes=self._states_bytes(),
            packs_bytes=self._packs_bytes(),
            step_bytes=step,
            limit_bytes=limit,
            recomputation=recomputation,
            largest_pack_instances=largest,
            largest_pack_bytes=self._pack_bytes(largest),
            largest_pack_in_place=stays_in_place(self.config, self.store, largest),
        )

    def _rows(self, pack: PackPlan) -> int:
        """Instances of a pack that one rank has."""
        return -(-pack.num_instances // self.world.bag_ranks)

    def _step_bytes(self, recomputation: Recomputation, plans: Sequence[EpochPlan], training: bool) -> int:
        packs = [(self._rows(pack), len(pack.bags)) for plan in plans for pack in _packs(plan)]
        passes = -(-self.config.train.epochs // len(plans)) if training else 1
        cost = self.probe.cost(recomputation, self.config.train.precision, training, packs, passes)
        most = int(max(cost(*pack) for pack in packs))
        return most if self.world.device.type == "cuda" else most + int(min(_KEPT_SHARE * most, _KEPT_BYTES))

    @cached_property
    def process_and_limit(self) -> tuple[int, int | None]:
        """What the process takes by itself, libraries that a step loads among it, and what the device has for it."""
        device, limit = self.world.device, self.config.engine.memory_bytes
        return_freed()  # of the measurement, which the run will take again
        # The probe's weights are among it: on a GPU those of the model to come, else those of the best one at the end.
        taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
        free, ranks = available_bytes(device), self.world.local_size if device.type == "cpu" else 1
        process = sum(p.nbytes for p in self.model.parameters()) if taken is None else taken
        if limit is None and free is not None:
            limit = process + free // ranks
        return process, limit

    def _states_bytes(self) -> int:
        """AdamW's two moments, of which ZeRO gives each rank its share, beside that of a copy of the weights; and what
        is summed over the ranks."""
        weights = sum(p.numel() * 4 for p in self.model.parameters() if p.requires_grad)
        ranks = self.world.size
        return (3 * weights // ranks if self.config.engine.zero_stage else 2 * weights) + (weights if ranks > 1 else 0)

    def _packs_bytes(self) -> int:
        plans = [part for plan in self.training for part in (plan, *self.evaluation[:1])] + self.evaluation
        if self.world.device.type == "cuda":
            return max(self._pack_bytes(self._rows(pack)) for plan in plans for pack in _packs(plan))
        count = self.config.data.num_workers * self.config.data.prefetch_packs + 2

        def of_rank(rank: int) -> list[int]:
            return [self._pack_bytes(self._rows(pack)) for plan in plans for _, _, pack in plan.of_rank(rank)]

        return max(most_held(of_rank(rank), count) for rank in range(self.world.data_size))

    def _pack_bytes(self, num_instances: int) -> int:
        """Bytes that a pack takes in memory: without its features, where these stay in their file."""
        row_bytes, other_bytes = self._bytes_per_instance
        in_place = stays_in_place(self.config, self.store, num_instances)
        return int(num_instances * (other_bytes + (0 if in_place else row_bytes)))

    @cached_property
    def _bytes_per_instance(self) -> tuple[float, float]:
        """Of features, and of all else, in a pack."""
        sample = first_rows(self.probe.sample, min(1024, self.probe.sample.num_instances))
        pack = PackedBags.from_bags([sample], dtype=self.dtype)
        num_bytes = pack.x.untyped_storage().nbytes() / sample.num_instances  # all tensors of a pack are in one buffer
        x_bytes = pack.x[:1].nbytes
        return x_bytes, max(0.0, num_bytes - x_bytes)


def _packs(plan: EpochPlan) -> Iterator[PackPlan]:
    return (pack for step in plan.steps for micro in step.micro_steps for pack in micro)
