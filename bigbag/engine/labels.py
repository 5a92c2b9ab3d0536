"""Whether the labels of a data set fit the task, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bigbag.config import TaskConfig
from bigbag.data import BagStore, check_binary_labels

_USED = ("train", "val", "test")


def check_labels(store: BagStore, splits: Mapping[str, Sequence[int]], task: TaskConfig) -> None:
    """Check that every bag of the training, validation and test splits has a label that the task understands.

    Raises:
        ValueError: a missing or unfit label (the bag is named), or one class only in training.
    """
    for split in (name for name in _USED if splits.get(name)):
        for bag in splits[split]:
            info = store.infos[bag]
            problem = _problem(info.label, task)
            if problem:
                raise ValueError(f"bag {info.name!r} ({split}): {problem}; correct the label and pack again")
    if task.type == "binary":
        check_binary_labels(store, splits["train"])
    if task.is_survival and not any(store.infos[bag].label[1] for bag in splits["train"]):  # type: ignore[index]
        raise ValueError("no training bag has an observed event: nothing can be learned from censored times alone")


def _problem(label: object, task: TaskConfig) -> str | None:
    """What is wrong with a label, or None."""
    values: list[Any] = list(label) if isinstance(label, list | tuple) else [label]
    if label is None:
        return "label is missing"
    expected = 1 if task.type == "multiclass" else 2 if task.is_survival else task.num_outputs
    if len(values) != expected:
        return f"label {label!r} has {len(values)} values, expected {expected} for task.type {task.type}"
    allowed = {"binary": range(2), "multilabel": range(2), "multiclass": range(task.num_outputs)}.get(task.type)
    if allowed is not None and any(value not in allowed for value in values):
        return f"label {label!r}, expected {allowed.start} to {allowed.stop - 1} for task.type {task.type}"
    if task.is_survival and (values[0] < 0 or values[1] not in (0, 1)):
        return f"label {label!r}, expected [time, event] with a time of 0 or more and an event of 0 (censored) or 1"
    return None
