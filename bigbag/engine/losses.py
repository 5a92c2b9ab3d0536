"""The losses of training steps, which stay on the device until somebody looks at them.

To read a number from a GPU is to wait for all that was asked of it before. So what the steps leave (:class:`StepSums`)
is kept as it is and read for many steps at once, by one message between the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bigbag.data import StepPlan
from bigbag.engine.step import StepSums
from bigbag.engine.world import World


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step over all ranks, known to every rank.

    Attributes:
        step: number of the step in its epoch.
        losses: each loss by name, the mean over ``num_bags`` bags, before its coefficient.
        coefficients: name of a loss to its coefficient; 1 where there is none.
        num_bags: bags of the step whose loss was finite.
        num_instances: instances of the step.
        sums: what this rank added up.
    """

    step: int
    losses: dict[str, float]
    coefficients: Mapping[str, float]
    num_bags: int
    num_instances: int
    sums: StepSums

    @property
    def total(self) -> float:
        """What the step minimised."""
        return sum(value * self.coefficients.get(name, 1.0) for name, value in self.losses.items())

    def bags_not_finite(self) -> list[str]:
        """Keys of the bags in this rank's packs with a loss that is NaN or infinite."""
        return [key for keys, loss in self.sums.packs if not math.isfinite(loss.item()) for key in keys]


class PendingLosses:
    """The losses of the steps that have not been looked at.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: list[tuple[int, StepPlan, StepSums, dict[str, float]]] = []

    def add(self, step: int, plan: StepPlan, sums: StepSums, coefficients: Mapping[str, float]) -> None:
        """Keep what a step left, without looking at it."""
        self._pending.append((step, plan, sums, dict(coefficients)))

    def read(self) -> list[StepLoss]:
        """The losses of all steps added since the last time, in order; waits for the device. Called by all ranks."""
        if not self._pending:
            return []
        values = torch.stack([sums.losses[name] for _, _, sums, _ in self._pending for name in sorted(sums.losses)])
        numbers = iter(self.world.sum(values).tolist())
        found = []
        for step, plan, sums, coefficients in self._pending:
            num_bags = plan.num_bags - len(sums.skipped)
            scale = plan.num_bags / max(1, num_bags)  # the shares are those of the mean over all bags
            losses = {name: next(numbers) * scale for name in sorted(sums.losses)}
            found.append(StepLoss(step, losses, coefficients, num_bags, plan.num_instances, sums))
        self._pending.clear()
        return found
