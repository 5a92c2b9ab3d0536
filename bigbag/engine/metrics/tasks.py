"""The metrics of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbag.engine.metrics.calibration import brier, calibration_error
from bigbag.engine.metrics.concordance import concordance, inverse_censoring
from bigbag.engine.metrics.decisions import confusion, divide, f1, kappa, mean_over, recall
from bigbag.engine.metrics.probabilities import check_task, probabilities, risk_of
from bigbag.engine.metrics.ranking import ranking
from bigbag.engine.metrics.undefined import leave_out

_HEADLINE = ("auroc", "accuracy", "f1", "quadratic_kappa", "mae", "r2", "c_index", "loss", "instance_auroc")

Values = dict[str, np.ndarray]


def headline(metrics: Mapping[str, Any], *more: str) -> dict[str, float]:
    """Those metrics that fit on one line, whatever the task, and ``more``."""
    return {name: metrics[name] for name in metrics if name in (*_HEADLINE, *more)}


def bag_metrics(labels: np.ndarray, logits: np.ndarray, task: str) -> dict[str, float]:
    """Metrics over bags, at the threshold 0.5 where one is needed; see :func:`weighted_metrics` for their names.

    ``num_bags`` is always there, and ``num_events`` for survival. A metric is absent where it is undefined: see the log
    for the reason.

    Args:
        labels: ``(B,)``; ``(B, K)`` for multilabel and for regression of K outputs; ``(B, 2)``, time and event, for
            survival. 0 or 1 for binary and multilabel, a class number below K for multiclass.
        logits: ``(B,)`` or ``(B, 1)`` for binary and survival, ``(B, K)`` for multiclass and survival_discrete, the
            shape of ``labels`` otherwise.
        task: one of ``TASKS``.

    Raises:
        ValueError: an unknown task, shapes or labels that do not fit it, or logits that are not finite.
    """
    labels, logits = check_bags(labels, logits, task)
    result: dict[str, float] = {"num_bags": len(labels)}
    if len(labels) == 0:
        leave_out("every bag metric", "there is no bag")
        return result
    if task.startswith("survival"):
        result["num_events"] = int(np.count_nonzero(labels[:, 1]))
    for name, (value,) in weighted_metrics(labels, logits, task).items():
        if np.isnan(value):
            leave_out(name, why_undefined(name, labels, logits, task))
        else:
            result[name] = float(value)
    return result


def weighted_metrics(
    labels: np.ndarray, logits: np.ndarray, task: str, weights: np.ndarray | None = None, per_class: bool = False
) -> Values:
    """Every metric of ``task`` under each of R weightings of the bags; NaN where it is undefined.

    =========== ===================================================================================================
    binary      auroc, average_precision, accuracy, balanced_accuracy, sensitivity, specificity, f1, kappa, brier, ece
    multiclass  auroc, average_precision (one class against the rest), f1: mean over the classes (macro), and weighted
                by their frequency (``_weighted``); accuracy, balanced_accuracy, kappa, quadratic_kappa, brier (sum over
                the classes), ece (of the most probable class). A class that is neither labelled nor decided has no part
                in f1, an absent class none in balanced_accuracy.
    multilabel  auroc, average_precision, f1: mean over the K labels, weighted by their frequency (``_weighted``), and
                over all B * K decisions at once (``_micro``); accuracy (of all decisions), subset_accuracy (all K
                right), brier (mean over the labels), ece (over all decisions)
    regression  mae, rmse (over all outputs), r2 (mean over the outputs)
    survival    c_index (Harrell), c_index_ipcw (Uno), for both survival tasks; see :func:`concordance`
    =========== ===================================================================================================

    Args:
        labels: as for :func:`bag_metrics`, already checked.
        logits: likewise.
        task: one of ``TASKS``.
        weights: ``(R, B)``, 0 or more; None: one weighting, all 1.
        per_class: also ``auroc_<k>``, ``average_precision_<k>`` and ``f1_<k>`` of each class or label, ``mae_<k>`` and
            ``r2_<k>`` of each output.

    Returns:
        name -> ``(R,)`` float64.
    """
    weights = np.ones((1, len(labels))) if weights is None else np.asarray(weights, dtype=np.float64)
    values, each = _BY_TASK[task](labels, logits, weights)
    if per_class:
        for name, columns in each.items():
            values |= {f"{name}_{k}": columns[:, k] for k in range(columns.shape[1]) if columns.shape[1] > 1}
    return values


def _binary(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    chances = probabilities(logits, "binary")
    auroc, average_precision = ranking(labels == 1, logits, weights)
    table = confusion(labels, logits >= 0, 2, weights)  # the sigmoid of 0 is THRESHOLD
    recalls, positives = recall(table), table[:, 1].sum(1)
    values = {
        "auroc": auroc,
        "average_precision": average_precision,
        "accuracy": _accuracy(table),
        "balanced_accuracy": recalls.mean(1),
        "sensitivity": recalls[:, 1],
        "specificity": recalls[:, 0],
        "f1": np.where(positives > 0, f1(table)[:, 1], np.nan),
        "kappa": kappa(table),
        "brier": brier(labels, chances, weights),
        "ece": calibration_error(labels, chances, weights),
    }
    return values, {}


def _multiclass(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    num_classes, decided = logits.shape[1], logits.argmax(1)
    chances, one_hot = probabilities(logits, "multiclass"), labels[:, None] == np.arange(num_classes)
    table = confusion(labels, decided, num_classes, weights)
    frequency, recalls = table.sum(2), recall(table)
    ranked = [ranking(one_hot[:, k], chances[:, k], weights) for k in range(num_classes)]
    each = {"auroc": _columns(r[0] for r in ranked), "average_precision": _columns(r[1] for r in ranked)}
    values = {}
    for name, columns in each.items():
        values[name], values[f"{name}_weighted"] = columns.mean(1), (columns * frequency).sum(1) / frequency.sum(1)
    each["f1"] = f1(table)
    values |= {
        "accuracy": _accuracy(table),
        "balanced_accuracy": np.where((frequency > 0).sum(1) > 1, mean_over(recalls), np.nan),
        "f1": mean_over(each["f1"]),
        "f1_weighted": mean_over(each["f1"], frequency),
        "kappa": kappa(table),
        "quadratic_kappa": kappa(table, quadratic=True),
        "brier": brier(one_hot, chances, weights),
        "ece": calibration_error(decided == labels, chances.max(1), weights),
    }
    return values, each


def _multilabel(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    num_labels, decided, chances = labels.shape[1], logits >= 0, probabilities(logits, "multilabel")
    everything = np.repeat(weights, num_labels, axis=1)
    frequency = weights @ labels
    ranked = [ranking(labels[:, k] == 1, logits[:, k], weights) for k in range(num_labels)]
    each = {"auroc": _columns(r[0] for r in ranked), "average_precision": _columns(r[1] for r in ranked)}
    tables = [confusion(labels[:, k], decided[:, k], 2, weights) for k in range(num_labels)]
    each["f1"] = np.where(frequency > 0, _columns(f1(table)[:, 1] for table in tables), np.nan)
    micro = dict(zip(("auroc", "average_precision"), ranking(labels.ravel() == 1, logits.ravel(), everything)))
    micro["f1"] = f1(sum(tables))[:, 1]  # type: ignore[arg-type]
    values = {}
    for name, columns in each.items():
        values[name] = columns.mean(1)
        values[f"{name}_weighted"] = divide((columns * frequency).sum(1), frequency.sum(1))
        values[f"{name}_micro"] = micro[name]
    values |= {
        "accuracy": _mean(decided == labels, weights),
        "subset_accuracy": divide(weights @ (decided == labels).all(1), weights.sum(1)),
        "brier": brier(labels, chances, weights) / num_labels,
        "ece": calibration_error(labels.ravel(), chances.ravel(), everything),
    }
    return values, each


def _regression(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    labels, predictions = (np.asarray(v, np.float64).reshape(len(labels), -1) for v in (labels, predictions))
    error = predictions - labels
    each = {"mae": divide(weights @ np.abs(error), weights.sum(1, keepdims=True))}
    each["r2"] = _columns(_r2(labels[:, k], error[:, k], weights) for k in range(labels.shape[1]))
    values = {"mae": _mean(np.abs(error), weights), "rmse": np.sqrt(_mean(error**2, weights)), "r2": each["r2"].mean(1)}
    return values, each


def _survival(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[Values, Values]:
    time, event, risk = labels[:, 0], labels[:, 1], risk_of(logits, "survival" if logits.ndim == 1 else _DISCRETE)
    inverse = inverse_censoring(time, event)
    harrell, uno = (concordance(time, event, risk, weights, of_pairs) for of_pairs in (None, inverse))
    return {"c_index": harrell, "c_index_ipcw": uno}, {}


def _r2(labels: np.ndarray, error: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``1 - sum w (error)^2 / sum w (y - mean)^2``; NaN where the weighted labels do not vary."""
    shifted = labels - labels.mean()
    varies = (np.where(weights > 0, labels, -np.inf).max(1) - np.where(weights > 0, labels, np.inf).min(1)) > 0
    spread = weights @ shifted**2 - (weights @ shifted) ** 2 / weights.sum(1)
    return np.where(varies, 1 - divide(weights @ error**2, spread), np.nan)


def _accuracy(table: np.ndarray) -> np.ndarray:
    return divide(np.trace(table, axis1=1, axis2=2), table.sum((1, 2)))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the bags of ``(B, K)`` and over K."""
    return divide(weights @ values.mean(1), weights.sum(1))


def _columns(values: object) -> np.ndarray:
    return np.stack(list(values), axis=1)  # type: ignore[call-overload]


_DISCRETE = "survival_discrete"
_BY_TASK: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Values, Values]]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
    "regression": _regression,
    "survival": _survival,
    _DISCRETE: _survival,
}


def metric_range(name: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have."""
    if name in ("mae", "rmse", "loss"):
        return 0.0, math.inf
    if name == "r2":
        return -math.inf, 1.0
    if name.startswith("brier"):  # over classes it is a sum
        return 0.0, 2.0
    return (-1.0 if "kappa" in name else 0.0), 1.0


def why_undefined(name: str, labels: np.ndarray, logits: np.ndarray, task: str) -> str:
    """Why bags with these labels do not define the metric ``name``, as a part of a sentence."""
    if len(labels) == 0:
        return "there is no bag"
    if name.startswith(("kappa", "quadratic_kappa")):
        return "labels and decisions are all of one class"
    if task == "binary":
        return f"no bag is labelled {'positive' if not labels.any() else 'negative'}"
    if task == "regression":
        return "the labels of the bags do not vary"
    if task.startswith("survival"):
        lacking = name == "c_index" or np.isfinite(inverse_censoring(labels[:, 0], labels[:, 1])).all()
        return "no two bags can be compared: too few events" if lacking else "all bags at risk at an event are censored"
    if name == "balanced_accuracy":
        return "every bag has the same label"
    count = np.bincount(labels, minlength=logits.shape[1]) if task == "multiclass" else labels.sum(0)
    if task == "multiclass":
        absent = ", ".join(map(str, np.flatnonzero(count == 0))) or "other than one"
        return f"no bag is labelled with class {absent}"
    one_sided = np.flatnonzero((count == 0) | ((count == len(labels)) & (not name.startswith("f1"))))
    listed = ", ".join(map(str, one_sided))
    return f"no bag has label {listed}" if name.startswith("f1") else f"all bags agree on label {listed}"


def check_bags(labels: np.ndarray, logits: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits in float64, in the shapes of :func:`bag_metrics`; a single column of logits is taken out.

    Raises:
        ValueError: an unknown task, shapes or labels that do not fit it, or values that are not finite.
    """
    check_task(task)
    labels, logits = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    single = logits.ndim == 2 and logits.shape[1] == 1
    if single and (task == "survival" or (task not in ("multiclass", _DISCRETE) and labels.ndim == 1)):
        logits = logits[:, 0]
    _check_shapes(labels, logits, task)
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits.reshape(len(labels), -1)).all(1)).sum())
        raise ValueError(f"{bad} of {len(labels)} bags have logits that are not finite; lower lr or clip the gradient")
    if task in ("binary", "multilabel", "multiclass"):
        top, classes = (logits.shape[1] - 1 if task == "multiclass" else 1), labels
    else:
        if not np.isfinite(labels.astype(np.float64)).all():
            raise ValueError(f"{task}: a label is not finite; leave bags without a label out")
        top, classes = 1, np.zeros(0) if task == "regression" else labels[:, 1]
    if not np.isin(classes, np.arange(top + 1)).all():
        what = "events" if task.startswith("survival") else "labels"
        raise ValueError(f"{task}: expected {what} 0 to {top}, got {np.unique(classes)[:8].tolist()}")
    return (labels.astype(np.int64) if task in ("binary", "multilabel", "multiclass") else labels), logits


def _check_shapes(labels: np.ndarray, logits: np.ndarray, task: str) -> None:
    per_class = task in ("multiclass", _DISCRETE)
    expected = (
        (len(labels), logits.shape[-1]) if per_class else labels.shape[:1] if task == "survival" else labels.shape
    )
    label_rank = {"multilabel": (2,), "regression": (1, 2), "survival": (2,), _DISCRETE: (2,)}.get(task, (1,))
    fit = labels.ndim in label_rank and logits.shape == expected and (not per_class or logits.ndim == 2)
    if not fit or (task.startswith("survival") and labels.shape[1] != 2):
        raise ValueError(
            f"{task}: labels {labels.shape} and logits {logits.shape} do not go together; expected "
            f"{_SHAPES[task]} for B bags"
        )


_SHAPES = {
    "binary": "labels (B,) and logits (B,) or (B, 1)",
    "multiclass": "labels (B,) and logits (B, K)",
    "multilabel": "labels (B, K) and logits (B, K)",
    "regression": "labels (B,) or (B, K) and logits of the same shape",
    "survival": "labels (B, 2), time and event, and logits (B,) or (B, 1)",
    "survival_discrete": "labels (B, 2), time and event, and logits (B, K)",
}
