"""Bags whose loss is not finite, left out of a step (``train.nonfinite: skip``).

All ranks ask each other after every forward pass whether a loss was not finite, and if one was, all of them look for
the culprits together, by as many forward passes everywhere: with ZeRO 3 a forward pass is one of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.data import EpochPlan, PackPlan, StepPlan
from bigbag.engine.feed import TrainingFeed
from bigbag.engine.world import World
from bigbag.models import MILModel

Forward = Callable[[PackPlan, PackedBags], tuple[PackedBags, dict[str, Tensor]]]
Computed = tuple[PackPlan, PackedBags, dict[str, Tensor]]


@dataclass
class Skipping:
    """Finds what is left of a pack without the bags whose loss is not finite.

    Attributes:
        feed: where bags are read by themselves.
        epoch: the epoch under way.
        model: its buffers (running statistics) do not keep what a bag that is left out has done to them.
        world: the ranks.
    """

    feed: TrainingFeed
    epoch: int
    model: MILModel
    world: World

    def forward(
        self, forward: Forward, plans: tuple[PackPlan, ...], host_bags: PackedBags
    ) -> tuple[Computed, list[str]]:
        """The forward pass of this rank's pack without its bags of no finite loss; called by all ranks.

        Args:
            forward: computes a pack.
            plans: the pack of every rank in this micro-step.
            host_bags: this rank's.

        Returns:
            The pack that was computed, on its device, with its losses; and the keys of the bags that it lacks. If none
            is left, the pack is a filler: its features are 0.

        Raises:
            ValueError: not even what is left has a finite loss; on all ranks.
        """
        pack = plans[self.world.data_rank]
        before = [buffer.clone() for buffer in self.model.buffers()]
        bags, losses = forward(pack, host_bags)
        if not self.world.any(not _finite(losses)):
            return (pack, bags, losses), []
        self._restore(before)
        sound = []
        for i in range(max(len(plan.bags) for plan in plans)):
            alone = self._only(pack, [min(i, len(pack.bags) - 1)])
            with torch.no_grad():
                finite = _finite(forward(alone, self._read(alone))[1])
            self._restore(before)
            if finite and i < len(pack.bags):
                sound.append(i)
        left_out = [] if pack.is_filler else [key for i, key in enumerate(host_bags.keys) if i not in sound]
        if sound:
            pack = self._only(pack, sound)
            host_bags = self._read(pack)
        else:
            pack = replace(pack, is_filler=True)
            host_bags = host_bags.with_x(torch.zeros_like(host_bags.x))
        bags, losses = forward(pack, host_bags)
        if self.world.any(not _finite(losses)):
            raise ValueError(
                f"the training loss in epoch {self.epoch} stays not finite without the bags of no finite loss (on this "
                f"rank: {left_out}), so that the weights are to blame: lower optim.lr; the last checkpoint is untouched"
            )
        return (pack, bags, losses), left_out

    def _restore(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before):
                buffer.copy_(value)

    def _only(self, pack: PackPlan, which: list[int]) -> PackPlan:
        """The pack with its bags number ``which`` alone."""
        bags = tuple(pack.bags[i] for i in which)
        draws = tuple(pack.draws[i] for i in which) if pack.draws else ()
        return replace(pack, bags=bags, draws=draws, num_instances=sum(int(self.feed.sizes[bag]) for bag in bags))

    def _read(self, pack: PackPlan) -> PackedBags:
        size = self.world.data_size
        plan = EpochPlan((StepPlan(((pack,) * size,), len(pack.bags)),), size)
        return next(self.feed.packs(plan, self.epoch, start_step=0))[3]


def _finite(losses: dict[str, Tensor]) -> bool:
    return bool(torch.stack([value.detach() for value in losses.values()]).isfinite().all())
