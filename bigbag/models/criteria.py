"""The criterion of a task, and what of it has to be taken from the training labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bigbag.config import ConfigError, TaskConfig
from bigbag.nn.survival import CoxLoss, DiscreteSurvivalLoss


def build_criterion(task: TaskConfig) -> torch.nn.Module:
    """The loss that a task trains with; its weights and time bins must be numbers by now (:func:`fit_task`)."""
    if task.type in ("binary", "multilabel"):
        weight = None if task.pos_weight is None else torch.tensor(task.pos_weight, dtype=torch.float32)
        return torch.nn.BCEWithLogitsLoss(pos_weight=weight)
    if task.type == "multiclass":
        return torch.nn.CrossEntropyLoss(None if task.class_weights is None else torch.tensor(task.class_weights))
    if task.type == "survival":
        return CoxLoss()
    if task.type == "survival_discrete":
        assert task.time_bins is not None
        return DiscreteSurvivalLoss(task.time_bins, task.alpha)
    return torch.nn.MSELoss()


def fit_task(task: TaskConfig, labels: Sequence[Any]) -> TaskConfig:
    """The task with numbers in place of what it leaves to the training labels.

        class_weights "balanced":   w_k = n / (K n_k)
        pos_weight "balanced":      number of negatives / number of positives, for each label
        time_bins None:             quantiles of the observed times, so that each bin holds as many events

    Args:
        task: as configured.
        labels: the labels of the training bags.

    Raises:
        ConfigError: a class that no bag has, or fewer distinct event times than bins.
    """
    values = np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
    changes: dict[str, Any] = {}
    if task.class_weights == "balanced":
        counts = np.bincount(values[:, 0].astype(np.int64), minlength=task.num_outputs)
        _refuse_absent("class_weights", counts)
        changes["class_weights"] = (len(values) / (len(counts) * counts)).tolist()
    if task.pos_weight == "balanced":
        positives = values.sum(0)
        _refuse_absent("pos_weight", positives)
        weights = ((len(values) - positives) / positives).tolist()
        changes["pos_weight"] = weights[0] if task.type == "binary" else weights
    if task.type == "survival_discrete" and task.time_bins is None:
        observed = values[values[:, 1] != 0, 0]
        edges = np.quantile(observed, np.arange(1, task.num_outputs) / task.num_outputs) if len(observed) else [0.0]
        if len(np.unique(edges)) < task.num_outputs - 1:
            raise ConfigError(
                f"task.time_bins: {len(observed)} observed training times do not make {task.num_outputs} bins of as "
                "many events; set task.time_bins, or a smaller task.num_outputs"
            )
        changes["time_bins"] = edges.tolist()  # type: ignore[union-attr]
    return task.model_copy(update=changes)


def _refuse_absent(setting: str, counts: np.ndarray) -> None:
    if (counts == 0).any():
        absent = ", ".join(map(str, np.flatnonzero(counts == 0)))
        raise ConfigError(f"task.{setting} is balanced, but no training bag has label {absent}; state the weights")
