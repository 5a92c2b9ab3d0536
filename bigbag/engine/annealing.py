"""Coefficients of losses over the steps of a training, with torchmil's names and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigbag.config.sections import ConstantSchedule, LinearSchedule, Schedule


class AnnealingScheduler:
    """A coefficient that changes from step to step: call it for the present one.

    Attributes:
        coef: the present coefficient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.coef = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        """The present coefficient."""
        return self.coef

    def step(self) -> None:
        """Go on to the next step."""
        raise NotImplementedError(f"{type(self).__name__} must define step()")


class ConstantAnnealingScheduler(AnnealingScheduler):
    """Always ``coef``."""

    def __init__(self, coef: float = 1.0, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.coef = coef

    def step(self) -> None:
        pass


class LinearAnnealingScheduler(AnnealingScheduler):
    """``coef_init + t (coef_end - coef_init) / n_steps`` in step t.

    Args:
        coef_init: coefficient of step 0.
        coef_end: coefficient of step ``n_steps``.
        n_steps: number of steps.
        clamp: stay at ``coef_end`` from there on. torchmil goes on along the line, which is the default.
    """

    def __init__(
        self,
        coef_init: float = 0.0,
        coef_end: float = 1.0,
        n_steps: int = 100,
        *args: Any,
        clamp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.coef_init, self.coef_end, self.n_steps, self.clamp = coef_init, coef_end, n_steps, clamp
        self.coef = coef_init
        self.step_count = 0

    def step(self) -> None:
        self.step_count += 1
        t = min(self.step_count, self.n_steps) if self.clamp else self.step_count
        self.coef = self.coef_init + t * (self.coef_end - self.coef_init) / self.n_steps


class CyclicalAnnealingScheduler(AnnealingScheduler):
    """Cycles that rise linearly from ``min_coef``, then stay at ``max_coef`` (Fu et al., NAACL 2019, arXiv 1903.10145).

    Args:
        cycle_len: steps of a cycle.
        min_coef: coefficient at the start of a cycle.
        max_coef: coefficient at its top.
        cycle_prop: share of the cycle in which the coefficient rises.
        warmup_steps: steps before the first cycle.
        verbose: print the coefficient at every step.
    """

    def __init__(
        self,
        cycle_len: int,
        min_coef: float = 0.0,
        max_coef: float = 1.0,
        cycle_prop: float = 0.5,
        warmup_steps: int = 0,
        verbose: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.cycle_len, self.min_coef, self.max_coef = cycle_len, min_coef, max_coef
        self.cycle_prop, self.warmup_steps, self.verbose = cycle_prop, warmup_steps, verbose
        self.cut_step = int(cycle_len * cycle_prop)
        self.coef = min_coef
        self.warmup_step_count = 0
        self.step_count = 0

    def step(self) -> None:
        if self.warmup_step_count < self.warmup_steps:
            self.warmup_step_count += 1
        else:
            place = self.step_count % self.cycle_len
            rising = place < self.cut_step
            share = place * (self.max_coef - self.min_coef) / self.cut_step if rising else 0.0
            self.coef = self.min_coef + share if rising else self.max_coef
            self.step_count += 1
        if self.verbose:
            print(f"[AnnealingScheduler] coef: {self.coef}")


def build_schedulers(settings: Mapping[str, Schedule], steps_done: int) -> dict[str, AnnealingScheduler]:
    """The schedulers of a run, by name of the loss, brought to the step that it resumes from."""
    schedulers: dict[str, AnnealingScheduler] = {}
    for name, schedule in settings.items():
        arguments = schedule.model_dump(exclude={"schedule"})
        if isinstance(schedule, ConstantSchedule):
            schedulers[name] = ConstantAnnealingScheduler(**arguments)
        elif isinstance(schedule, LinearSchedule):
            schedulers[name] = LinearAnnealingScheduler(**arguments, clamp=True)
        else:
            schedulers[name] = CyclicalAnnealingScheduler(**arguments)
        for _ in range(steps_done):
            schedulers[name].step()
    return schedulers
