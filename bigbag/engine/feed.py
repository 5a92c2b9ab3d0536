"""The packs of a run, as its settings say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import (
    Augmentation,
    BagStore,
    EpochPlan,
    PackPlan,
    bag_weights,
    capped_sizes,
    draw_bags,
    plan_epoch,
    stream,
)
from bigbag.engine.world import World

Item = tuple[int, int, PackPlan, PackedBags]


class TrainingFeed:
    """The packs of every training epoch.

    Args:
        config: the settings of the run.
        store: the bags.
        bags: numbers of the training bags.
        world: the ranks.

    Attributes:
        steps_per_epoch: optimiser steps of an epoch.
        augmentation: what is done to the bags.
    """

    def __init__(self, config: Config, store: BagStore, bags: Sequence[int], world: World) -> None:
        self.config, self.store, self.bags, self.world = config, store, tuple(bags), world
        self.augmentation = configured_augmentation(config, bags)
        self.sizes = self.augmentation.sizes(capped_sizes(store.sizes, config.data.max_instances))
        sampling = config.data.sampling
        self.num_bags = len(bags) if sampling is None or sampling.num_bags is None else sampling.num_bags
        self.steps_per_epoch = math.ceil(self.num_bags / config.train.batch_bags)
        self._weights = None if sampling is None else bag_weights([store.infos[b] for b in bags], sampling.weights)

    def bags_of(self, epoch: int) -> tuple[int, ...]:
        """The bags that an epoch visits: all of them, or those that were drawn for it."""
        if self._weights is None:
            return self.bags
        return draw_bags(self.bags, self._weights, self.num_bags, seed=self.config.seed, epoch=epoch)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch."""
        drawn = self._weights is not None
        return plan_epoch(
            self.sizes,
            self.bags_of(epoch),
            seed=self.config.seed,
            epoch=epoch,
            world_size=self.world.data_size,
            budget_instances=budget_instances(self.config, self.store),
            batch_bags=self.config.train.batch_bags,
            shuffle=not drawn,
            repeated=drawn,
        )

    def packs(self, plan: EpochPlan, epoch: int, start_step: int) -> Iterator[Item]:
        """This rank's packs of an epoch, from a step on."""
        return feed(
            self.store, plan, self.config, self.world, start_step=start_step, epoch=epoch, augment=self.augmentation
        )


def budget_instances(config: Config, store: BagStore) -> int:
    """Most instances in a pack of several bags: ``data.budget_instances``, or what ``data.budget_bytes`` allows."""
    data = config.data
    if data.budget_bytes is None:
        return data.budget_instances
    return max(1, min(data.budget_instances, data.budget_bytes // max(1, row_bytes(config, store))))


def row_bytes(config: Config, store: BagStore) -> int:
    """Bytes of an instance's features, where they are stored or in a pack, whichever is more: what a budget counts."""
    stored, dtype = np.dtype(store.feature_dtype).itemsize, config.data.dtype
    return math.prod(store.feature_shape) * max(stored, 0 if dtype is None else getattr(torch, dtype).itemsize)


def stays_in_place(config: Config, store: BagStore, num_instances: int) -> bool:
    """Whether the features of so many instances of a bag are over ``data.budget_bytes``, and so stay in their file."""
    budget = config.data.budget_bytes
    return budget is not None and num_instances * row_bytes(config, store) > budget


def configured_augmentation(config: Config, bags: Sequence[int]) -> Augmentation:
    """``data.augment`` for the training bags ``bags``."""
    return Augmentation(**config.data.augment.model_dump(), partners=tuple(bags))


def feed(
    store: BagStore,
    plan: EpochPlan,
    config: Config,
    world: World,
    *,
    start_step: int = 0,
    epoch: int = 0,
    augment: Augmentation | None = None,
) -> Iterator[Item]:
    """This rank's (parts of) packs of ``plan``, read as ``config.data`` says: see :func:`bigbag.data.stream`."""
    data = config.data
    return stream(
        store,
        plan,
        rank=world.data_rank,
        start_step=start_step,
        num_workers=data.num_workers,
        prefetch=data.prefetch_packs,
        pin_memory=world.device.type == "cuda",
        dtype=None if data.dtype is None else getattr(torch, data.dtype),
        max_instances=data.max_instances,
        seed=config.seed,
        epoch=epoch,
        part=(world.bag_rank, world.bag_ranks),
        augment=augment,
        budget_bytes=data.budget_bytes,
    )
