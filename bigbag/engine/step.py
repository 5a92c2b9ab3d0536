"""The gradient of one global step: over its packs and ranks, whatever their number.

A loss that is a mean over bags is the sum of the packs' shares, so each pack is computed and forgotten. A criterion
with ``spans_step`` (Cox's partial likelihood) compares all bags of the step with each other. For it, all packs go
forward first, and what the criterion was asked about is gathered from all ranks; then each pack is computed again with
the same random numbers, and the criterion is replaced by a stand-in with the value and the gradient that it has over
the whole step. So the result is that of one pack on one rank; the price is a second forward pass, and that the packs of
the step, though not their activations, are held. A step of one pack on one rank needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.config import ConfigError
from bigbag.data import PackPlan, StepPlan
from bigbag.engine.backend import Backend
from bigbag.engine.nonfinite import Skipping
from bigbag.engine.world import World
from bigbag.models import MILModel
from bigbag.nn.encoded import seed_generators
from bigbag.ops.join import join_parts

Packs = Iterable[tuple[int, int, PackPlan, PackedBags]]
Call = tuple[Tensor, Tensor]


@dataclass
class StepSums:
    """What a rank adds up over its packs. The numbers stay on the device, so that the host does not wait for them.

    Attributes:
        losses: name of a loss to its share of the step's mean, before its coefficient.
        packs: bag names and total loss of each pack, to name the culprit of a loss that is not finite.
        skipped: keys of the bags left out because their loss was not finite; after :func:`accumulate` of all ranks.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    packs: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, bags: PackedBags, losses: Mapping[str, Tensor], share: float) -> None:
        for name, value in losses.items():
            weighted = value.detach().double() * share
            self.losses[name] = self.losses[name] + weighted if name in self.losses else weighted
        self.packs.append((bags.keys, torch.stack([value.detach() for value in losses.values()]).sum()))


def accumulate(
    packs: Packs,
    plan: StepPlan,
    model: MILModel,
    backend: Backend,
    world: World,
    coefficients: Mapping[str, float],
    skipping: Skipping | None = None,
) -> StepSums:
    """Run the packs of a global step forward and backward; the gradient is left in the weights.

    Args:
        packs: this rank's packs of the step, as :func:`bigbag.data.stream` gives them.
        plan: the step.
        model: the model that ``backend`` carries.
        backend: what carries the step.
        world: the ranks.
        coefficients: name of a loss to its coefficient; 1 where there is none.
        skipping: leaves out bags whose loss is not finite; None: their gradient is not finite either.

    Returns:
        This rank's sums; :class:`bigbag.engine.losses.PendingLosses` adds up those of all ranks.

    Raises:
        ConfigError: a coefficient for a loss that the model does not have.
    """
    world_is_a_pack = world.data_size * len(plan.micro_steps) == 1
    if getattr(model.criterion, "spans_step", False) and not world_is_a_pack:
        sums = _accumulate_jointly(list(packs), plan, model.criterion, backend, world, coefficients)
    else:
        sums = _accumulate(packs, plan, backend, world, coefficients, skipping=skipping)
    if skipping is not None:
        sums.skipped = [key for keys in world.gather(sums.skipped)[:: world.bag_ranks] for key in keys]
    return sums


def _accumulate(
    packs: Packs,
    plan: StepPlan,
    backend: Backend,
    world: World,
    coefficients: Mapping[str, float],
    prepare: Callable[[int, float], None] | None = None,
    skipping: Skipping | None = None,
) -> StepSums:
    """Pack by pack forward and backward; ``prepare(micro, share)`` is called before each."""
    sums = StepSums()
    for _, micro, pack, host_bags in packs:
        if prepare is not None:
            prepare(micro, _share(pack, plan))
        if skipping is None:
            bags, losses = _forward(pack, host_bags, backend, world)
        else:
            forward = partial(_forward, backend=backend, world=world)
            (pack, bags, losses), left_out = skipping.forward(forward, plan.micro_steps[micro], host_bags)
            sums.skipped += left_out
        # Each of the ranks that share a bag has all of its loss, and the gradients of all ranks are added up.
        share = _share(pack, plan) / world.bag_ranks
        backend.backward(total_loss(losses, coefficients) * share, last=micro == len(plan.micro_steps) - 1)
        sums.add(bags, losses, share)
        del bags, losses  # before the next pack comes to the device
    return sums


def _share(pack: PackPlan, plan: StepPlan) -> float:
    """Share of a pack's mean loss in that of its step."""
    return 0.0 if pack.is_filler else len(pack.bags) / plan.num_bags


def _accumulate_jointly(
    packs: list[tuple[int, int, PackPlan, PackedBags]],
    plan: StepPlan,
    criterion: Any,
    backend: Backend,
    world: World,
    coefficients: Mapping[str, float],
) -> StepSums:
    own: list[list[Call]] = []

    def record(Y_pred: Tensor, Y: Tensor) -> Tensor:
        own[-1].append((Y_pred.detach().cpu(), Y.detach().cpu()))
        return Y_pred.sum() * 0.0

    def prepare(micro: int, share: float) -> None:
        answers = iter(cotangents[micro])

        def answer(Y_pred: Tensor, Y: Tensor) -> Tensor:
            value, cotangent = next(answers, (0.0, None))
            if share == 0.0 or cotangent is None:
                return Y_pred.sum() * 0.0
            through = (Y_pred * cotangent.to(Y_pred)).sum() / share
            return through - through.detach() + value

        criterion.stand_in = answer

    try:
        criterion.stand_in = record
        for _, _, pack, host_bags in packs:
            # The graph is made and dropped, not left out, so that the second pass takes the same way through the model
            # and draws the same random numbers.
            own.append([])
            _forward(pack, host_bags, backend, world)
            if pack.is_filler:
                own[-1].clear()
        cotangents = _over_the_step(criterion, world.gather(own)[:: world.bag_ranks], world.data_rank)
        return _accumulate(packs, plan, backend, world, coefficients, prepare)
    finally:
        criterion.stand_in = None


def _over_the_step(criterion: Any, calls: list[list[list[Call]]], rank: int) -> list[list[tuple[float, Tensor]]]:
    """Value and gradient of the criterion over all bags of the step.

    Args:
        criterion: the criterion.
        calls: ``calls[rank][micro][i]``: logits and labels of its i-th call for a pack; no calls for fillers.
        rank: this rank.

    Returns:
        ``[micro][i]``: value of the i-th call over the step, and its gradient with respect to this rank's logits.

    Raises:
        ConfigError: packs with different numbers of calls, which then do not belong together.
    """
    counts = {len(of_pack) for of_rank in calls for of_pack in of_rank if of_pack}
    if len(counts) > 1:
        raise ConfigError(
            f"the model evaluates {type(criterion).__name__} {' or '.join(map(str, sorted(counts)))} times, depending "
            "on the pack, so it has no value over the step; choose another model or task.type (survival_discrete)"
        )
    found: list[list[tuple[float, Tensor]]] = [[] for _ in calls[rank]]
    criterion.stand_in = None
    for i in range(max(counts, default=0)):
        parts = [of_pack[i] for of_rank in calls for of_pack in of_rank if of_pack]
        logits = torch.cat([Y_pred for Y_pred, _ in parts]).float().requires_grad_()
        value = criterion(logits, torch.cat([Y for _, Y in parts]))
        (gradient,) = torch.autograd.grad(value, logits)
        pieces = iter(gradient.split([len(Y_pred) for Y_pred, _ in parts]))
        for r, of_rank in enumerate(calls):
            for micro, of_pack in enumerate(of_rank):
                if of_pack:
                    piece = next(pieces)
                    if r == rank:
                        found[micro].append((value.item(), piece))
    return found


def _forward(
    pack: PackPlan, host_bags: PackedBags, backend: Backend, world: World
) -> tuple[PackedBags, dict[str, Tensor]]:
    seed_generators(pack.seed + world.bag_rank)
    bags = to_device(host_bags, world)
    return bags, backend(bags, "loss")


def to_device(host_bags: PackedBags, world: World) -> PackedBags:
    """The pack where this rank computes, joined with the parts of the ranks that share its bags."""
    bags = host_bags.to(world.device, non_blocking=True)
    return bags if bags.parts is None else join_parts(bags, world.bag_group)


def total_loss(losses: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """Sum of the losses, each times its coefficient, 1 where there is none.

    Raises:
        ConfigError: a coefficient for a loss that there is not.
    """
    unknown = coefficients.keys() - losses.keys()
    if unknown:
        raise ConfigError(
            f"loss coefficients: the model has no loss {sorted(unknown)[0]!r}; it has {', '.join(sorted(losses))}"
        )
    return torch.stack([value * coefficients.get(name, 1.0) for name, value in losses.items()]).sum()
