"""One pass over bags without gradients: every bag exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import BagStore, EpochPlan, capped_sizes, plan_epoch
from bigbag.engine.feed import budget_instances, feed
from bigbag.engine.metrics import bag_metrics, instance_metrics
from bigbag.engine.preemption import Preempted, asked_to_leave
from bigbag.engine.step import to_device
from bigbag.engine.world import World
from bigbag.models import MILModel

_PACKS_PER_QUESTION = 8


@dataclass(frozen=True)
class Predictions:
    """What a model says of some bags.

    Attributes:
        bags: ``(n,)`` numbers of the bags in their store, ascending.
        logits: ``(n, K)`` float32.
        y_inst: instance labels of the bags that have them, end to end.
        scores: instance scores in the same order.
        sizes: ``(n,)`` how many of these instances are of each bag; 0 for a bag without instance labels.
        coords: their ``(c,)`` coordinates; None where some bag has none, or without ``report.instance_scores``.
    """

    bags: np.ndarray
    logits: np.ndarray
    y_inst: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    coords: np.ndarray | None = None


def plan_evaluation(store: BagStore, bags: Sequence[int], config: Config, world: World) -> EpochPlan:
    """The plan of one pass over ``bags``, all of them one step."""
    return plan_epoch(
        capped_sizes(store.sizes, config.data.max_instances),
        bags,
        seed=config.seed,
        epoch=0,
        world_size=world.data_size,
        budget_instances=budget_instances(config, store),
        batch_bags=max(1, len(bags)),
        shuffle=False,
    )


def predict_bags(
    forward: Callable[[PackedBags, str], Any],
    store: BagStore,
    bags: Sequence[int],
    config: Config,
    world: World,
    with_instances: bool = False,
    all_instances: bool = False,
) -> Predictions:
    """Run ``forward`` over ``bags``, shared out over the ranks; the result is the same on every rank.

    Args:
        forward: takes a pack and "logits" or "logits and scores"; must be in eval mode.
        store: where the bags are.
        bags: their numbers.
        config: the run's settings.
        world: the ranks.
        with_instances: also collect the scores of instances whose label is known.
        all_instances: collect scores and coordinates of all instances instead; a label of -1 is unknown.

    Raises:
        Preempted: a rank was asked to leave.
    """
    plan = plan_evaluation(store, bags, config, world)
    mine: list[_OfBag] = []
    with_instances |= all_instances
    want = "logits and scores" if with_instances else "logits"
    with torch.no_grad():
        for number, (_, _, pack, host_bags) in enumerate(feed(store, plan, config, world)):
            # All ranks have the same number of packs. Asking at each of them would make them wait for each other.
            if number % _PACKS_PER_QUESTION == 0 and asked_to_leave(world):
                raise Preempted
            out = forward(to_device(host_bags, world), want)
            if pack.is_filler:
                continue
            logits, scores = out if with_instances else (out, out)
            rows = logits.float().reshape(len(pack.bags), -1).cpu().numpy()
            starts = host_bags.segments.starts
            for i, bag in enumerate(pack.bags):
                inside = slice(starts[i], starts[i + 1])
                mine.append(
                    _of_bag(bag, rows[i], scores[inside] if with_instances else None, host_bags, inside, all_instances)
                )
                if not (config.report.instance_scores or all_instances):
                    mine[-1] = mine[-1]._replace(coords=None)
    gathered = sorted((item for part in world.gather(mine) for item in part), key=lambda item: item.bag)
    # Ranks that share a bag all have its logits, and each its own instances, which stand in order of rank.
    once = gathered[:: world.bag_ranks]
    assert [item.bag for item in once] == sorted(bags), "every bag is evaluated exactly once"
    sizes = np.array([len(item.scores) for item in gathered], dtype=np.int64)
    labelled = [item for item in gathered if len(item.scores)]
    coords = [item.coords for item in labelled if item.coords is not None]
    return Predictions(
        bags=np.array([item.bag for item in once], dtype=np.int64),
        logits=np.stack([item.logits for item in once]) if once else np.empty((0, config.task.num_outputs)),
        y_inst=np.concatenate([item.y_inst for item in labelled] or [np.empty(0, np.int64)]),
        scores=np.concatenate([item.scores for item in labelled] or [np.empty(0, np.float32)]),
        sizes=sizes.reshape(-1, world.bag_ranks).sum(1),
        coords=np.concatenate(coords) if coords and len(coords) == len(labelled) else None,
    )


class _OfBag(NamedTuple):
    """What one rank found out about one bag; empty arrays where its instances have no labels."""

    bag: int
    logits: np.ndarray
    y_inst: np.ndarray
    scores: np.ndarray
    coords: np.ndarray | None


def _of_bag(
    bag: int, logits: np.ndarray, scores: torch.Tensor | None, host_bags: PackedBags, inside: slice, unlabelled: bool
) -> _OfBag:
    known = host_bags.y_inst is not None and bool((host_bags.y_inst[inside] >= 0).any())
    if scores is None or not (known or unlabelled):
        return _OfBag(bag, logits, np.empty(0, np.int64), np.empty(0, np.float32), None)
    coords = None if host_bags.coords is None else host_bags.coords[inside].numpy().copy()
    y_inst = np.full(len(scores), -1) if host_bags.y_inst is None else host_bags.y_inst[inside].numpy().copy()
    return _OfBag(bag, logits, y_inst, scores.float().cpu().numpy(), coords)


def score(
    predictions: Predictions,
    store: BagStore,
    model: MILModel,
    config: Config,
    instance_threshold: float | None = None,
) -> dict[str, Any]:
    """Metrics of predictions: the task's bag metrics, the criterion as "loss", and instance metrics where known.

    Args:
        predictions: of :func:`predict_bags`.
        store: where the labels are.
        model: whose criterion the loss is.
        config: the run's settings.
        instance_threshold: of "instance_f1"; None leaves it out.
    """
    labels = np.array([store.infos[bag].label for bag in predictions.bags])
    logits = predictions.logits[:, 0] if config.task.num_outputs == 1 else predictions.logits
    metrics: dict[str, Any] = {**bag_metrics(labels, logits, config.task.type)}
    metrics["loss"] = model.bag_loss(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    if len(predictions.scores):
        metrics |= instance_metrics(predictions.y_inst, predictions.scores, instance_threshold)
    return metrics
