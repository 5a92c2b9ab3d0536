"""Numbers that say how good a model is: per bag, and per instance where instance labels are known.

A metric that the data do not define (the AUROC of bags of one class, say) is left out of the result and the reason is
logged once. No metric is ever NaN, and none is replaced by a conventional value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

logger = logging.getLogger(__name__)

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
    _check_task(task)
    values = np.asarray(logits, dtype=np.float64)
    if task in ("regression", "survival"):
        return values
    if task == "survival_discrete":
        return np.cumprod(0.5 * (1.0 - np.tanh(0.5 * values)), axis=-1)
    if task == "multiclass":
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
    return 0.5 * (1.0 + np.tanh(0.5 * values))  # a sigmoid that cannot overflow


def bag_metrics(labels: np.ndarray, logits: np.ndarray, task: str) -> dict[str, float]:
    """Metrics over bags, at the threshold 0.5 where one is needed.

    ========== ====================================================================================================
    binary     auroc, average_precision, accuracy, balanced_accuracy, f1
    multiclass auroc (mean of one class against the rest), accuracy, balanced_accuracy, f1 (mean over the classes)
    multilabel auroc, average_precision, f1 (means over the K labels), accuracy (over all B * K decisions)
    regression mae, rmse, r2 (over all outputs; r2 is the mean over the outputs)
    survival   c_index, num_events (both survival tasks): see :func:`concordance_index`; the risk is the logit, or minus
               the sum over the bins of the probability of surviving them
    ========== ====================================================================================================

    ``num_bags`` is always there. A metric is absent where it is undefined: see the log for the reason.

    Args:
        labels: ``(B,)``; ``(B, K)`` for multilabel and for regression of K outputs; ``(B, 2)``, time and event, for
            survival. 0 or 1 for binary and multilabel, a class number below K for multiclass.
        logits: ``(B,)`` or ``(B, 1)`` for binary and survival, ``(B, K)`` for multiclass and survival_discrete, the
            shape of ``labels`` otherwise.
        task: one of ``TASKS``.

    Raises:
        ValueError: an unknown task, shapes or labels that do not fit it, or logits that are not finite.
    """
    _check_task(task)
    labels, logits = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    single = logits.ndim == 2 and logits.shape[1] == 1
    if single and (task == "survival" or (task != "multiclass" and labels.ndim == 1)):
        logits = logits[:, 0]
    _check_bags(labels, logits, task)
    result: dict[str, float] = {"num_bags": len(labels)}
    if len(labels) == 0:
        _left_out("every bag metric", "there is no bag")
        return result
    return result | _BY_TASK[task](labels, logits)


def instance_metrics(y_inst: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """AUROC and average precision of instance scores against instance labels.

    Both are exact, ties included, and equal scikit-learn's; the work is one in-place float32 sort, so tens of
    millions of instances need about 5 bytes each. With positives ``p`` and negatives ``n``::

        AUROC = mean over pairs of  [score(p) > score(n)] + [score(p) = score(n)] / 2
        AP    = mean over p of  #{positives scored >= score(p)} / #{instances scored >= score(p)}

    Args:
        y_inst: ``(T,)`` integers: 1 positive, 0 negative, -1 unknown. Unknown instances do not count. With any other
            value there is no telling what is positive, and the result is empty.
        scores: ``(T,)``, larger meaning more positive: attention (before or after a softmax) or a prediction. Compared
            as float32.

    Returns:
        ``instance_auroc``, ``instance_average_precision`` (absent where one class only is known) and
        ``num_instances``, the number of known ones.

    Raises:
        ValueError: shapes differ, or a score is NaN.
    """
    y_inst, scores = np.asarray(y_inst).reshape(-1), np.asarray(scores).reshape(-1)
    if y_inst.shape != scores.shape:
        raise ValueError(f"y_inst has {len(y_inst)} instances, scores has {len(scores)}: expected one score each")
    names = "instance_auroc, instance_average_precision"
    if len(y_inst) and (y_inst.min() < -1 or y_inst.max() > 1):
        _left_out(names, f"instance labels are -1, 0 or 1; these go from {y_inst.min()} to {y_inst.max()}")
        return {}
    positive = np.sort(scores[y_inst == 1].astype(np.float32, copy=False))
    negative = scores[y_inst == 0].astype(np.float32, copy=False)
    negative.sort()
    for part in (positive, negative):
        if len(part) and np.isnan(part[-1]):  # NaN sorts last
            raise ValueError("scores: NaN among the instance scores; the model or its input is not finite")
    result: dict[str, float] = {"num_instances": len(positive) + len(negative)}
    if len(positive) == 0 or len(negative) == 0:
        missing = "positive" if len(positive) == 0 else "negative"
        _left_out(names, f"no instance is labelled {missing}")
        return result
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    pairs = len(positive) * len(negative)
    result["instance_auroc"] = float((below.sum(dtype=np.float64) + not_above.sum(dtype=np.float64)) / 2 / pairs)
    true = len(positive) - np.searchsorted(positive, positive, side="left")
    result["instance_average_precision"] = float(np.mean(true / (true + len(negative) - below)))
    return result


def _binary(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    decided = logits >= 0  # the sigmoid of 0 is THRESHOLD
    result = {"accuracy": float(np.mean(decided == labels))}
    if len(np.unique(labels)) < 2:
        missing = "positive" if labels[0] == 0 else "negative"
        _left_out("auroc, average_precision, balanced_accuracy", f"no bag is labelled {missing}")
    else:
        result["auroc"] = float(metrics.roc_auc_score(labels, logits))
        result["average_precision"] = float(metrics.average_precision_score(labels, logits))
        result["balanced_accuracy"] = float(metrics.balanced_accuracy_score(labels, decided))
    if labels.any():
        result["f1"] = float(metrics.f1_score(labels, decided))
    else:
        _left_out("f1", "no bag is labelled positive")
    return result


def _multiclass(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    decided, num_classes = logits.argmax(1), logits.shape[1]
    result = {"accuracy": float(np.mean(decided == labels))}
    present = np.unique(labels)
    result["f1"] = float(metrics.f1_score(labels, decided, average="macro", zero_division=0.0))
    if len(present) == num_classes:
        scores = probabilities(logits, "multiclass")
        each = [metrics.roc_auc_score(labels == k, scores[:, k]) for k in range(num_classes)]
        result["auroc"] = float(np.mean(each))
    else:
        absent = sorted(set(range(num_classes)) - set(present.tolist()))
        _left_out("auroc", f"no bag is labelled with class {', '.join(map(str, absent))}")
    if len(present) > 1:
        result["balanced_accuracy"] = float(np.mean([np.mean(decided[labels == k] == k) for k in present]))
    else:
        _left_out("balanced_accuracy", "every bag has the same label")
    return result


def _multilabel(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    decided = logits >= 0
    result = {"accuracy": float(np.mean(decided == labels))}
    positives = labels.sum(0)
    if np.all((positives > 0) & (positives < len(labels))):
        columns = range(labels.shape[1])
        result["auroc"] = float(np.mean([metrics.roc_auc_score(labels[:, k], logits[:, k]) for k in columns]))
        precisions = [metrics.average_precision_score(labels[:, k], logits[:, k]) for k in columns]
        result["average_precision"] = float(np.mean(precisions))
    else:
        one_sided = np.flatnonzero((positives == 0) | (positives == len(labels))).tolist()
        _left_out("auroc, average_precision", f"all bags agree on label {', '.join(map(str, one_sided))}")
    if np.all(positives > 0):
        result["f1"] = float(metrics.f1_score(labels, decided, average="macro", zero_division=0.0))
    else:
        absent = np.flatnonzero(positives == 0).tolist()
        _left_out("f1", f"no bag has label {', '.join(map(str, absent))}")
    return result


def _regression(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn import metrics

    labels = labels.astype(np.float64)
    error = predictions - labels
    result = {"mae": float(np.mean(np.abs(error))), "rmse": float(np.sqrt(np.mean(error**2)))}
    if np.all(np.ptp(labels, axis=0) > 0):
        result["r2"] = float(metrics.r2_score(labels, predictions))
    else:
        _left_out("r2", "the labels of the bags do not vary")
    return result


def _survival(labels: np.ndarray, risk: np.ndarray) -> dict[str, float]:
    result: dict[str, float] = {"num_events": int(np.count_nonzero(labels[:, 1]))}
    c_index = concordance_index(labels[:, 0], labels[:, 1], risk)
    if c_index is None:
        _left_out("c_index", "no two bags can be compared: too few events")
    else:
        result["c_index"] = c_index
    return result


def _survival_discrete(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    return _survival(labels, -probabilities(logits, "survival_discrete").sum(1))


def concordance_index(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float | None:
    """Harrell's c-index: the share of comparable pairs in which the bag with the earlier event has the higher risk.

    The pair (i, j) is comparable where i has an event and j is known to have lived longer: ``t_i < t_j``, or
    ``t_i == t_j`` and j is censored. Two events at one time are not comparable. Equal risks count as half. 0.5 is
    chance, 1 perfect. O(B) memory, O(B E) time for E events.

    Returns:
        The index, or None where no pair is comparable.

    Harrell et al., JAMA 1982.
    """
    observed = np.asarray(event) != 0
    concordant = pairs = 0.0
    for i in np.flatnonzero(observed):
        others = risk[(time > time[i]) | ((time == time[i]) & ~observed)]
        concordant += np.count_nonzero(risk[i] > others) + 0.5 * np.count_nonzero(risk[i] == others)
        pairs += len(others)
    return float(concordant / pairs) if pairs else None


_BY_TASK: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "regression": _regression,
    "survival": _survival,
    "survival_discrete": _survival_discrete,
}


@cache
def _left_out(names: str, reason: str) -> None:
    """Log why metrics are absent; once, since a run asks again every epoch."""
    logger.warning("left out of the metrics: %s (%s)", names, reason)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")


def _check_bags(labels: np.ndarray, logits: np.ndarray, task: str) -> None:
    per_class = task in ("multiclass", "survival_discrete")
    expected = (
        (len(labels), logits.shape[-1]) if per_class else labels.shape[:1] if task == "survival" else labels.shape
    )
    label_rank = {"multilabel": (2,), "regression": (1, 2), "survival": (2,), "survival_discrete": (2,)}.get(task, (1,))
    fit = labels.ndim in label_rank and logits.shape == expected and (not per_class or logits.ndim == 2)
    if not fit or (task.startswith("survival") and labels.shape[1] != 2):
        raise ValueError(
            f"{task}: labels {labels.shape} and logits {logits.shape} do not go together; expected "
            f"{_SHAPES[task]} for B bags"
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits.reshape(len(labels), -1)).all(1)).sum())
        raise ValueError(f"{bad} of {len(labels)} bags have logits that are not finite; lower lr or clip the gradient")
    if task == "regression" or task.startswith("survival"):
        if not np.isfinite(labels.astype(np.float64)).all():
            raise ValueError(f"{task}: a label is not finite; leave bags without a label out")
        labels = labels[:, 1] if task != "regression" else np.zeros(0)
    top = logits.shape[1] - 1 if task == "multiclass" else 1
    if not np.isin(labels, np.arange(top + 1)).all():
        what = "events" if task.startswith("survival") else "labels"
        raise ValueError(f"{task}: expected {what} 0 to {top}, got {np.unique(labels)[:8].tolist()}")


_SHAPES = {
    "binary": "labels (B,) and logits (B,) or (B, 1)",
    "multiclass": "labels (B,) and logits (B, K)",
    "multilabel": "labels (B, K) and logits (B, K)",
    "regression": "labels (B,) or (B, K) and logits of the same shape",
    "survival": "labels (B, 2), time and event, and logits (B,) or (B, 1)",
    "survival_discrete": "labels (B, 2), time and event, and logits (B, K)",
}
