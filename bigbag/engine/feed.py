"""The packs of a run, as its settings say."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import BagStore, EpochPlan, PackPlan, stream
from bigbag.engine.world import World


def feed(
    store: BagStore, plan: EpochPlan, config: Config, world: World, *, start_step: int = 0, epoch: int = 0
) -> Iterator[tuple[int, int, PackPlan, PackedBags]]:
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
    )
