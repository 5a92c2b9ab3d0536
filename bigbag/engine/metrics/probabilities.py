"""What the logits of a task mean."""

from __future__ import annotations

import numpy as np

TASKS = ("binary", "multiclass", "multilabel", "regression", "survival", "survival_discrete")
THRESHOLD = 0.5


def probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """What the logits of ``task`` mean.

    The sigmoid (binary, multilabel), the softmax over classes, themselves (regression; survival, where they are log
    hazard ratios), or the probability of surviving each time bin (survival_discrete), prod_{j <= k} (1 - sigmoid_j).

    Args:
        logits: ``(B,)`` or ``(B, K)``.
        task: one of ``TASKS``.

    Returns:
        float64, of the shape of ``logits``.

    Raises:
        ValueError: an unknown task.
    """
    check_task(task)
    values = np.asarray(logits, dtype=np.float64)
    if task in ("regression", "survival"):
        return values
    if task == "survival_discrete":
        return np.cumprod(0.5 * (1.0 - np.tanh(0.5 * values)), axis=-1)
    if task == "multiclass":
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
    return 0.5 * (1.0 + np.tanh(0.5 * values))  # a sigmoid that cannot overflow


def risk_of(logits: np.ndarray, task: str) -> np.ndarray:
    """``(B,)``: the logit (survival), or minus the sum over the bins of the probability of surviving them."""
    values = np.asarray(logits, dtype=np.float64)
    return values.reshape(-1) if task == "survival" else -probabilities(values, task).sum(1)


def check_task(task: str) -> None:
    """Raise ValueError for a task that there is not."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
