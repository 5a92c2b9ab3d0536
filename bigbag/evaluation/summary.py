"""Every metric of saved predictions, with intervals, per bag, patient, instance and lesion; and two models compared.

Nothing is computed by a model here: ``predictions.csv``, and ``instances.npz`` where there is one, say it all.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigbag.engine.metrics import (
    check_bags,
    instance_metrics,
    probabilities,
    reliability_curve,
    weighted_metrics,
    why_undefined,
)
from bigbag.evaluation.bootstrap import Bootstrap, Scale, Statistic, groups_of, intervals, strata_of
from bigbag.evaluation.froc import find, froc_under
from bigbag.evaluation.predictions import PredictionTable, check_task_fits
from bigbag.evaluation.significance import Difference, delong_test, paired_bootstrap
from bigbag.files import read_npz, write_atomically, write_json

_NO_INTERVAL = ("ece",)
PatientRule = Literal["mean", "max"]


@dataclass(frozen=True)
class Row:
    """One metric.

    Attributes:
        split: of the bags.
        unit: what is counted: "bag", "patient", "instance" or "lesion".
        metric: its name.
        value: NaN where it is undefined.
        low: lower end of the confidence interval; NaN where there is none.
        high: upper end.
        count: number of units.
        reason: why the value is undefined, or "".
    """

    split: str
    unit: str
    metric: str
    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """All metrics, and the reliability curves (binary tasks) as ``split -> {probability, observed, count}``."""

    task: str
    rows: tuple[Row, ...]
    reliability: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``metrics.csv`` and ``metrics.json`` (null where undefined) into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_atomically(folder / "metrics.csv", text.getvalue())
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.rows]
        write_json(folder / "metrics.json", {"task": self.task, "metrics": rows, "reliability": self.reliability})


def summarise(
    table: PredictionTable,
    task: str,
    instances: Path | None = None,
    options: Bootstrap | None = None,
    patient_rule: PatientRule = "mean",
    min_diameter: float = 0.0,
) -> Summary:
    """All metrics of the labelled bags of every split.

    - Bags: the metrics of the task; intervals by patient, a bag without a patient being one of its own. The calibration
      error has none: binning biases it upwards, by more in a resample, and no such interval would cover it.
    - Patients, where some have several bags: the same metrics of :func:`by_patient`.
    - Instances: AUROC, average precision, F1; no intervals. A split "val" gives the threshold of F1 in "test".
    - Lesions, where instances have coordinates: FROC, see :mod:`bigbag.evaluation.froc`; intervals by slide.

    Args:
        table: the predictions.
        task: one of ``bigbag.engine.metrics.TASKS``.
        instances: an ``instances.npz``; None: no metrics of instances and lesions.
        options: how intervals are made.
        patient_rule: how the logits of a patient's bags become one.
        min_diameter: lesions smaller than it, in patches, are left out of FROC.

    Raises:
        ValueError: predictions that do not fit the task.
    """
    check_task_fits(task, table, "predictions")
    options = options or Bootstrap()
    rows: list[Row] = []
    reliability = {}
    for split in dict.fromkeys(table.splits):
        bags = table.labelled(split)
        if not len(bags.keys):
            rows.append(Row(split, "bag", "all", math.nan, reason="no bag has a label"))
            continue
        rows += _bag_rows(split, "bag", bags, task, options)
        if len(set(bags.patients) - {""}) < sum(map(bool, bags.patients)):
            rows += _patient_rows(split, bags, task, options, patient_rule)
        if task == "binary":
            curve = reliability_curve(bags.labels, probabilities(bags.logits, task))
            mean, observed, count = ([None if v != v else v for v in part.tolist()] for part in curve)
            reliability[split] = {"probability": mean, "observed": observed, "count": count}
    if instances is not None:
        rows += _instance_rows(instances, options, min_diameter)
    return Summary(task, tuple(rows), reliability)


def by_patient(bags: PredictionTable, task: str, rule: PatientRule = "mean") -> PredictionTable:
    """One row per patient; bags without a patient are left as they are.

    The logits of a patient are the mean of the logits of its bags ("mean"), or, for binary and multilabel, the largest
    ("max": one positive slide makes a patient positive). The label is the largest of its bags' (binary, multilabel: a
    patient is positive where a slide is; multiclass: the highest class); otherwise all its bags must have the same.

    Raises:
        ValueError: bags of one patient with different times, events or values, or "max" for another task.
    """
    yes_or_no = task in ("binary", "multilabel")
    if rule == "max" and not yes_or_no:
        raise ValueError(f"patient rule max goes with binary and multilabel tasks, not with {task}: expected mean")
    groups = groups_of(bags.patients)
    members = [np.flatnonzero(groups == group) for group in range(groups.max(initial=-1) + 1)]
    first = bags.take(np.array([own[0] for own in members], dtype=np.int64))
    if not yes_or_no and task != "multiclass":
        for own in members:
            if not (bags.labels[own] == bags.labels[own[0]]).all():
                raise ValueError(f"patient {bags.patients[own[0]]!r} has bags with different labels")
    combine = np.max if rule == "max" else np.mean
    logits = np.stack([combine(bags.logits[own], axis=0) for own in members])
    return PredictionTable(
        keys=tuple(patient or key for patient, key in zip(first.patients, first.keys)),
        splits=first.splits,
        labels=np.stack([bags.labels[own].max(0) for own in members]),
        logits=logits,
        probabilities=probabilities(logits, task),
        sizes=np.array([bags.sizes[own].sum() for own in members]),
        patients=first.patients,
    )


def compare_models(
    first: PredictionTable, second: PredictionTable, task: str, split: str = "test", options: Bootstrap | None = None
) -> dict[str, Difference]:
    """Every metric of one model minus that of another on the bags of one split, by paired bootstrap of patients.

    For a binary task ``auroc_delong`` is DeLong's test of the AUROC, which takes bags for independent.

    Raises:
        ValueError: a table does not name its bags, or the two do not have the same bags with the same labels.
    """
    if not (first.named and second.named):
        raise ValueError(
            f"the {'first' if not first.named else 'second'} table of predictions has no column key: expected the name "
            "of each bag, by which the rows of two models are paired"
        )
    one, other = first.labelled(split), second.labelled(split)
    place = {key: i for i, key in enumerate(other.keys)}
    if not one.keys:
        raise ValueError(f"no bag of the split {split!r} has a label: expected a split of {_names(first.splits)}")
    alone = sorted(set(place) ^ set(one.keys))
    if alone or len(place) != len(one.keys):
        raise ValueError(
            f"the two models were not evaluated on the same {split} bags: nothing can be paired; labelled in one "
            f"table only: {_names(alone)}"
        )
    other = other.take(np.array([place[key] for key in one.keys], dtype=np.int64))
    if not np.array_equal(one.labels, other.labels):
        raise ValueError(f"the labels of the {split} bags differ between the two tables of predictions")
    groups = groups_of(one.patients)
    pair = [_statistic(bags, task)[0] for bags in (one, other)]
    found = paired_bootstrap(pair[0], pair[1], groups, strata_of(_strata_labels(one, task), groups), options)
    if task == "binary" and min(np.bincount(one.labels.astype(int), minlength=2)) > 1:
        level = (options or Bootstrap()).level
        found["auroc_delong"] = delong_test(one.labels, one.logits, other.logits, level)
    return found


def _names(names: Sequence[str]) -> str:
    """The first of some names, each once."""
    named = list(dict.fromkeys(names))
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| Split | Of | Metric | Value | Interval | Count |\n| --- | --- | --- | ---: | ---: | ---: |\n"]
    for row in rows:
        value = f"undefined: {row.reason}" if row.reason else f"{row.value:.4f}"
        interval = f"{row.low:.4f} to {row.high:.4f}" if row.low == row.low else ""
        lines.append(f"| {row.split} | {row.unit} | {row.metric} | {value} | {interval} | {row.count} |\n")
    return "".join(lines)


def _statistic(bags: PredictionTable, task: str) -> tuple[Statistic, np.ndarray, np.ndarray]:
    """All metrics of some bags as a function of their weights, and the checked labels and logits."""
    labels, logits = check_bags(bags.labels, bags.logits, task)
    return (lambda weights: weighted_metrics(labels, logits, task, weights, per_class=True)), labels, logits


def scales_of(task: str, labels: np.ndarray, groups: np.ndarray) -> dict[str, Scale]:
    """How the intervals of metrics are made for which the bootstrap's would not do, by name.

    Args:
        task: one of ``bigbag.engine.metrics.TASKS``.
        labels: of B bags, as :func:`bigbag.engine.metrics.check_bags` gives them.
        groups: ``(B,)`` the group (patient) of each bag.
    """
    num_groups = int(groups.max(initial=-1)) + 1
    if task == "regression":
        of_each = ["", *(f"_{k}" for k in range(labels.reshape(len(labels), -1).shape[1]))]
        explained = {f"r2{k}": Scale("complement", num_groups, perfect=False) for k in of_each}
        errors = {f"mae{k}": Scale("mean", num_groups, perfect=False) for k in of_each}
        return explained | errors | {"rmse": Scale("root", num_groups, perfect=False)}
    if task not in ("binary", "multiclass", "multilabel"):
        return {}
    classes = np.unique(labels) if task == "multiclass" else np.ones(1)
    positive = (labels[:, None] if task == "multiclass" else labels.reshape(len(labels), -1)) == classes
    numbers = classes.astype(int).tolist() if task == "multiclass" else list(range(positive.shape[1]))
    of_class = [len(np.unique(groups[column])) for column in positive.T]
    of_rest = [len(np.unique(groups[~column])) for column in positive.T]
    of_smaller = [min(pair) for pair in zip(of_class, of_rest)]
    any_class = len(np.unique(groups[positive.any(1)]))
    scales = {"brier": Scale("mean", num_groups, perfect=False)}
    for name, counts in (("auroc", of_smaller), ("average_precision", of_class), ("f1", of_class)):
        each = {f"{name}_{k}": count for k, count in zip(numbers, counts)}
        whole = {name: min(counts), f"{name}_weighted": min(counts), f"{name}_micro": any_class}
        for key, count in (each | whole).items():
            scales[key] = Scale(None if name == "f1" else "logit", count, worst=name == "auroc")
    smallest = min(of_smaller) if task == "binary" else min(of_class)
    scales["balanced_accuracy"] = Scale("logit", smallest, worst=True, num_in_error=num_groups)
    share = {"accuracy": num_groups, "subset_accuracy": num_groups}
    share |= {"sensitivity": of_class[0], "specificity": of_rest[0]} if task == "binary" else {}
    scales |= {name: Scale(None, count, worst=True) for name, count in share.items()}
    return scales | {name: Scale(None, smallest) for name in ("kappa", "quadratic_kappa")}


def _strata_labels(bags: PredictionTable, task: str) -> np.ndarray:
    """What strata are made of: labels that are classes, the event; measurements are one stratum."""
    if task == "regression":
        return np.zeros(len(bags.keys))
    return bags.labels[:, 1] if task.startswith("survival") else bags.labels


def _bag_rows(split: str, unit: str, bags: PredictionTable, task: str, options: Bootstrap) -> Iterator[Row]:
    statistic, labels, logits = _statistic(bags, task)
    groups = groups_of(bags.patients)
    strata = strata_of(_strata_labels(bags, task), groups)
    ends = intervals(statistic, groups, strata, options, scales_of(task, labels, groups))
    for name, (value,) in statistic(np.ones((1, len(labels)))).items():
        reason = why_undefined(name, labels, logits, task) if np.isnan(value) else ""
        low, high = (math.nan, math.nan) if name in _NO_INTERVAL else ends[name]
        yield Row(split, unit, name, float(value), low, high, count=len(labels), reason=reason)


def _patient_rows(split: str, bags: PredictionTable, task: str, options: Bootstrap, rule: PatientRule) -> Iterator[Row]:
    try:
        patients = by_patient(bags, task, rule)
    except ValueError as error:
        yield Row(split, "patient", "all", math.nan, reason=str(error))
        return
    yield from _bag_rows(split, "patient", patients, task, options)


def _instance_rows(path: Path, options: Bootstrap, min_diameter: float) -> Iterator[Row]:
    data = read_npz(path)
    absent = {"split", "sizes", "scores", "y_inst"} - set(data)
    if absent:
        raise ValueError(f"{path}: expected the arrays split, sizes, scores and y_inst, {', '.join(absent)} missing")
    ends = np.cumsum(data["sizes"])
    threshold = None
    for split in sorted(dict.fromkeys(data["split"].tolist()), key=lambda name: name != "val"):
        own = np.flatnonzero((data["split"] == split) & (data["sizes"] > 0))
        if not len(own):
            continue
        slides = [slice(ends[i] - data["sizes"][i], ends[i]) for i in own]
        y_inst, scores = (np.concatenate([data[name][part] for part in slides]) for name in ("y_inst", "scores"))
        found = instance_metrics(y_inst, scores, threshold)
        threshold = found.get("instance_best_threshold") if split == "val" else threshold
        count = int(found.pop("num_instances", 0))
        for name, value in found.items():
            yield Row(split, "instance", name.removeprefix("instance_"), value, count=count)
        if "coords" in data:
            yield from _lesion_rows(split, data, slides, options, min_diameter)


def _lesion_rows(
    split: str, data: dict[str, np.ndarray], slides: Sequence[slice], options: Bootstrap, min_diameter: float
) -> Iterator[Row]:
    findings = [
        find(data["coords"][part], data["scores"][part], data["y_inst"][part], min_diameter=min_diameter)
        for part in slides
    ]
    num_lesions = sum(len(found.lesions) for found in findings)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return froc_under(findings, weights)

    ends = intervals(statistic, np.arange(len(slides)), None, options)
    reason = "" if num_lesions else "no slide has a lesion"
    for name, (value,) in statistic(np.ones((1, len(slides)))).items():
        yield Row(split, "lesion", name, float(value), *ends[name], count=num_lesions, reason=reason)
