"""The gradient of one global step: over its packs and ranks, whatever their number.

A loss that is a mean over bags is the sum of the packs' shares, so each pack is computed and forgotten. A criterion
with ``spans_step`` (Cox's partial likelihood) compares all bags of the step with each other. For it, the logits of all
packs come first; every rank then has all of them, and with them the criterion's gradient with respect to each logit;
then each pack is computed again with the same random numbers, and this gradient is sent back through it. The result is
that of one pack on one rank; the price is a second forward pass where a rank has several packs, and that the packs of
the step, though not their activations, are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.config import ConfigError
from bigbag.data import PackPlan, StepPlan
from bigbag.engine.backend import Backend
from bigbag.engine.world import World
from bigbag.models import MILModel

Packs = Iterable[tuple[int, int, PackPlan, PackedBags]]


@dataclass
class StepSums:
    """What a rank adds up over its packs.

    Attributes:
        losses: name of a loss to its share of the step's mean, before its coefficient.
        instances: number of instances.
        packs: bag names and total loss of each pack, to name the culprit of a loss that is not finite.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    instances: int = 0
    packs: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)

    def add(self, pack: PackPlan, bags: PackedBags, losses: Mapping[str, Tensor], share: float) -> None:
        for name, value in losses.items():
            weighted = value.detach().double() * share
            self.losses[name] = self.losses[name] + weighted if name in self.losses else weighted
        self.instances += 0 if pack.is_filler else bags.num_instances
        self.packs.append((bags.keys, torch.stack([value.detach() for value in losses.values()]).sum()))


def accumulate(
    packs: Packs, plan: StepPlan, model: MILModel, backend: Backend, world: World, coefficients: Mapping[str, float]
) -> tuple[dict[str, float], int, StepSums]:
    """Run the packs of a global step forward and backward; the gradient is left in the weights.

    Args:
        packs: this rank's packs of the step, as :func:`bigbag.data.stream` gives them.
        plan: the step.
        model: the model that ``backend`` carries.
        backend: what carries the step.
        world: the ranks.
        coefficients: name of a loss to its coefficient; 1 where there is none.

    Returns:
        Each loss by name, the mean over the bags of the step, before its coefficient; the number of instances; both
        over all ranks. And this rank's own sums.

    Raises:
        ConfigError: a coefficient for a loss that the model does not have.
    """
    spans_step = getattr(model.criterion, "spans_step", False)
    sums = (_accumulate_jointly if spans_step else _accumulate)(packs, plan, model, backend, world, coefficients)
    names = sorted(sums.losses)
    numbers = torch.stack(
        [*(sums.losses[name] for name in names), torch.tensor(float(sums.instances)).to(world.device)]
    )
    *values, instances = world.sum(numbers.double()).tolist()
    return dict(zip(names, values)), int(instances), sums


def _accumulate(
    packs: Packs, plan: StepPlan, model: MILModel, backend: Backend, world: World, coefficients: Mapping[str, float]
) -> StepSums:
    sums = StepSums()
    for _, micro, pack, host_bags in packs:
        bags, _, losses = _forward(pack, host_bags, backend, world)
        share = 0.0 if pack.is_filler else len(pack.bags) / plan.num_bags
        backend.backward(_total(losses, coefficients) * share, last=micro == len(plan.micro_steps) - 1)
        sums.add(pack, bags, losses, share)
    return sums


def _accumulate_jointly(
    packs: Packs, plan: StepPlan, model: MILModel, backend: Backend, world: World, coefficients: Mapping[str, float]
) -> StepSums:
    sums, held, name = StepSums(), list(packs), type(model.criterion).__name__
    rows = _rows_of_packs(plan, world.rank)
    known: Tensor | None = None
    forwards: list[tuple[PackedBags, Tensor, dict[str, Tensor]]] = []
    for _, micro, pack, host_bags in held:
        # The graph is kept where it is the only one of the step. Otherwise it is made and dropped, not left out, so
        # that the second pass takes the same way through the model and draws the same random numbers.
        bags, Y_pred, losses = _forward(pack, host_bags, backend, world)
        if name not in losses:
            raise ConfigError(f"{type(model).__name__} computes no loss called {name}, so this task can't train it")
        if len(held) == 1:
            forwards.append((bags, Y_pred, losses))
        assert bags.y is not None
        own = torch.cat([Y_pred.detach().double().reshape(bags.num_bags, -1), bags.y.double()], 1)
        known = own.new_zeros(plan.num_bags, own.shape[1]) if known is None else known
        if not pack.is_filler:
            known[rows[micro]] = own
    assert known is not None
    known = world.sum(known)
    logits = known[:, :-2].float().requires_grad_()
    joint = model.bag_loss(logits.squeeze(1) if logits.shape[1] == 1 else logits, known[:, -2:].float())
    (cotangent,) = torch.autograd.grad(joint, logits)
    for place, (_, micro, pack, host_bags) in enumerate(held):
        bags, Y_pred, losses = forwards[place] if forwards else _forward(pack, host_bags, backend, world)
        share = 0.0 if pack.is_filler else len(pack.bags) / plan.num_bags
        of_bags = cotangent.new_zeros(bags.num_bags, cotangent.shape[1]) if pack.is_filler else cotangent[rows[micro]]
        others = {key: value for key, value in losses.items() if key != name}
        through_logits = (Y_pred.reshape(of_bags.shape) * of_bags).sum() * coefficients.get(name, 1.0)
        total = through_logits + (_total(others, coefficients) * share if others else 0.0)
        backend.backward(total, last=micro == len(plan.micro_steps) - 1)
        sums.add(pack, bags, {**others, name: Y_pred.detach().sum()}, share)
    sums.losses[name] = joint.detach().double() / world.size
    return sums


def _forward(
    pack: PackPlan, host_bags: PackedBags, backend: Backend, world: World
) -> tuple[PackedBags, Tensor, dict[str, Tensor]]:
    torch.manual_seed(pack.seed)
    bags = host_bags.to(world.device, non_blocking=True)
    Y_pred, losses = backend(bags, "loss")
    return bags, Y_pred, losses


def _total(losses: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    unknown = coefficients.keys() - losses.keys()
    if unknown:
        raise ConfigError(
            f"train.loss_coefficients: the model has no loss {sorted(unknown)[0]!r}; it has {', '.join(sorted(losses))}"
        )
    return torch.stack([value * coefficients.get(name, 1.0) for name, value in losses.items()]).sum()


def _rows_of_packs(plan: StepPlan, rank: int) -> list[slice]:
    """Where the bags of each of a rank's packs are among all bags of the step."""
    rows, end = [], 0
    for packs in plan.micro_steps:
        for r, pack in enumerate(packs):
            size = 0 if pack.is_filler else len(pack.bags)
            if r == rank:
                rows.append(slice(end, end + size))
            end += size
    return rows
