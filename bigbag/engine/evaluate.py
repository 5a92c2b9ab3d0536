"""One pass over bags without gradients: every bag exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import BagStore, capped_sizes, plan_epoch
from bigbag.engine.feed import feed
from bigbag.engine.metrics import bag_metrics, instance_metrics
from bigbag.engine.world import World
from bigbag.models import MILModel


@dataclass(frozen=True)
class Predictions:
    """What a model says of some bags.

    Attributes:
        bags: ``(n,)`` numbers of the bags in their store, ascending.
        logits: ``(n, K)`` float32.
        y_inst: instance labels of the bags that have them, end to end.
        scores: instance scores in the same order.
    """

    bags: np.ndarray
    logits: np.ndarray
    y_inst: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


def predict_bags(
    forward: Callable[[PackedBags, str], Any],
    store: BagStore,
    bags: Sequence[int],
    config: Config,
    world: World,
    with_instances: bool = False,
) -> Predictions:
    """Run ``forward`` over ``bags``, shared out over the ranks; the result is the same on every rank.

    Args:
        forward: takes a pack and "logits" or "logits and scores"; must be in eval mode.
        store: where the bags are.
        bags: their numbers.
        config: the run's settings.
        world: the ranks.
        with_instances: also collect the scores of instances whose label is known.
    """
    data = config.data
    plan = plan_epoch(
        capped_sizes(store.sizes, data.max_instances),
        bags,
        seed=config.seed,
        epoch=0,
        world_size=world.size,
        budget_instances=data.budget_instances,
        batch_bags=max(1, len(bags)),
        shuffle=False,
    )
    mine: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    want = "logits and scores" if with_instances else "logits"
    with torch.no_grad():
        for _, _, pack, host_bags in feed(store, plan, config, world):
            out = forward(host_bags.to(world.device, non_blocking=True), want)
            if pack.is_filler:
                continue
            logits, scores = out if with_instances else (out, out)
            rows = logits.float().reshape(len(pack.bags), -1).cpu().numpy()
            starts = host_bags.segments.starts
            for i, bag in enumerate(pack.bags):
                known = with_instances and host_bags.y_inst is not None
                inside = slice(starts[i], starts[i + 1])
                y_inst = host_bags.y_inst[inside].numpy() if known else np.empty(0, np.int64)  # type: ignore[index]
                of_bag = scores[inside].float().cpu().numpy() if known else np.empty(0, np.float32)
                mine.append((bag, rows[i], y_inst.copy(), of_bag))
    gathered = sorted((item for part in world.gather(mine) for item in part), key=lambda item: item[0])
    assert [item[0] for item in gathered] == sorted(bags), "every bag is evaluated exactly once"
    return Predictions(
        bags=np.array([item[0] for item in gathered], dtype=np.int64),
        logits=np.stack([item[1] for item in gathered]) if gathered else np.empty((0, config.task.num_outputs)),
        y_inst=np.concatenate([item[2] for item in gathered] or [np.empty(0, np.int64)]),
        scores=np.concatenate([item[3] for item in gathered] or [np.empty(0, np.float32)]),
    )


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
