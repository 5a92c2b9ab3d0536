"""Whether the validation bags have the metric that is to pick the best epoch, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bigbag.config import Config, ConfigError
from bigbag.config.arguments import suggest
from bigbag.data import BagStore
from bigbag.engine.metrics import weighted_metrics


def check_monitor(config: Config, store: BagStore, splits: Mapping[str, Sequence[int]]) -> None:
    """Check ``train.monitor`` where there are validation bags; their labels have been checked.

    Raises:
        ConfigError: no metric of the task, or one that these bags do not define.
    """
    labels = [store.infos[bag].label for bag in splits.get("val", ())]
    if not labels:
        return
    monitor, task = config.monitor, config.task
    shape = (len(labels),) if task.num_outputs == 1 else (len(labels), task.num_outputs)
    known = [*weighted_metrics(np.array(labels), np.zeros(shape), task.type), "loss"]
    if monitor not in known:
        raise ConfigError(
            f"train.monitor is {monitor!r}, which is no metric of bags for task.type {task.type}"
            f"{suggest(monitor, known)}; there are: {', '.join(known)}"
        )
    defined, lacking = True, ""
    if monitor == "auroc" and task.type == "binary":
        defined, lacking = len(set(map(str, labels))) > 1, "all validation bags have the same label"
    elif monitor == "c_index":
        defined, lacking = any(label[1] for label in labels), "no validation bag has an observed event"  # type: ignore
    if not defined:
        raise ConfigError(
            f"train.monitor is {monitor}, but {lacking}; set train.monitor=loss or use a larger validation split"
        )
