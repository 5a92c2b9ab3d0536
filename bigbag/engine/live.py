"""What TensorBoard shows after each epoch beside scalars: precision-recall curves, and attention of validation bags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigbag.bags import PackedBags
from bigbag.config import Config
from bigbag.data import BagStore
from bigbag.engine.evaluate import Predictions, predict_bags
from bigbag.engine.log import RunLog
from bigbag.engine.metrics import probabilities
from bigbag.engine.world import World

_MAX_SIDE = 512
_DARKEST = 55


def write_curves(log: RunLog, predictions: Predictions, store: BagStore, config: Config, step: int) -> None:
    """A precision-recall curve of binary predictions; one for each class or label of multiclass and multilabel ones."""
    task, labels = config.task.type, np.array([store.infos[bag].label for bag in predictions.bags])
    if task not in ("binary", "multiclass", "multilabel"):
        return
    chances = probabilities(predictions.logits, "multilabel" if task == "binary" else task)
    positive = labels[:, None] == np.arange(chances.shape[1]) if task == "multiclass" else labels.reshape(chances.shape)
    for k in range(chances.shape[1]):
        name = "val/precision_recall" if task == "binary" else f"val/precision_recall/{k}"
        log.write_curve(name, positive[:, k], chances[:, k], step)


def write_attention(
    log: RunLog,
    forward: Callable[[PackedBags, str], Any],
    store: BagStore,
    bags: Sequence[int],
    config: Config,
    world: World,
    step: int,
) -> None:
    """Pictures of the attention of ``report.num_slides`` validation bags, positive ones first; all ranks call it."""
    of_first = sorted(bags, key=lambda bag: config.task.type != "binary" or store.infos[bag].label != 1)
    shown = sorted(of_first[: config.report.num_slides])
    if not shown or (store.fields is not None and "coords" not in store.fields):
        return
    found = predict_bags(forward, store, shown, config, world, all_instances=True)
    if found.coords is None or found.coords.shape[1] != 2:
        return
    ends = np.cumsum(found.sizes)
    for bag, end, size in zip(found.bags.tolist(), ends, found.sizes):
        if size:
            own = slice(end - size, end)
            log.write_picture(
                f"val/attention/{store.infos[bag].key}", attention_raster(found.coords[own], found.scores[own]), step
            )


def attention_raster(coords: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The ranks of scores by position, lighter meaning higher, black where there is no instance.

    Args:
        coords: ``(N, 2)`` positions ``(x, y)``, y growing downwards; those of a grid get a pixel each, others that of
            their place, with at most 512 pixels a side. Of several in one pixel the highest is shown.
        scores: ``(N,)``.

    Returns:
        uint8 ``(H, W)``.
    """
    order = np.argsort(scores, kind="stable")
    grey = np.empty(len(scores), np.uint8)
    grey[order] = np.linspace(_DARKEST, 255, len(scores)).round()
    col, row = (_cells(coords[:, axis]) for axis in (0, 1))
    image = np.zeros((int(row.max()) + 1, int(col.max()) + 1), np.uint8)
    np.maximum.at(image, (row, col), grey)
    return image


def _cells(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64) - float(values.min())
    gaps = np.diff(np.unique(values))
    pitch = max(gaps.min(initial=np.inf), values.max() / (_MAX_SIDE - 1)) if len(gaps) else 1.0
    return np.rint(values / pitch).astype(np.int64)
