"""All models on one data set, by one command: train each of them with several seeds and folds, and make a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from bigbag.config import Config, ConfigError, check_arguments, load_config
from bigbag.engine.metrics import check_bags, metric_range, probabilities, weighted_metrics
from bigbag.evaluation.bootstrap import Bootstrap, groups_of, intervals
from bigbag.evaluation.predictions import PredictionTable, read_predictions
from bigbag.evaluation.study import Outcome, Planned, Study, fold_settings, nested
from bigbag.evaluation.summary import compare_models, scales_of
from bigbag.files import write_atomically
from bigbag.models import MODELS
from bigbag.models.build import arguments_of

_SHOWN = {
    "regression": ("mae", "rmse", "r2"),
    "survival": ("c_index", "c_index_ipcw"),
    "survival_discrete": ("c_index", "c_index_ipcw"),
}
_CLASSES = ("auroc", "accuracy", "f1", "mean")
NAMES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "f1": "F1",
    "mean": "Mean",
    "instance_auroc": "Instance AUROC",
    "c_index": "c-index",
    "c_index_ipcw": "c-index (IPCW)",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
}


@dataclass(frozen=True)
class Spread:
    """Mean of a metric over runs and its 95 % interval: that of Student's t over the runs, or, of a single run, the
    bootstrap interval over its test bags. NaN where there is none."""

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Line:
    """One model of the comparison.

    Attributes:
        model: its name.
        metrics: of the test bags, by name.
        seconds: mean wall time of its runs, of all attempts at each; NaN where none finished.
        peak_rss_bytes: largest of its runs.
        num_runs: runs that finished.
        num_failed: runs that failed.
        difference: the main metric less that of the best model, both from the predictions of all its runs; None for
            the best model, and where these are not of the same bags.
        p_value: two-sided, of that difference.
    """

    model: str
    metrics: Mapping[str, Spread]
    seconds: float
    peak_rss_bytes: int
    num_runs: int
    num_failed: int
    difference: Spread | None = None
    p_value: float = math.nan


def plan_comparison(
    path: str | Path,
    overrides: Sequence[str],
    models: Sequence[str],
    seeds: Sequence[int],
    folds: int | None = None,
    inner: int | None = None,
    grid: Mapping[str, Sequence[str]] | None = None,
) -> Study:
    """The runs of models x seeds x folds.

    Run k of model M lies in ``out/name/M-seed<k>`` or ``out/name/M-seed<k>-fold<i>``. A model gets those arguments of
    ``compare.common`` that it takes, and over them ``compare.models[M]``; its runs have the settings of the config, and
    over them ``compare.overrides[M]``.

    Args:
        path: the config file.
        overrides: ``key.sub=value`` settings over it.
        models: names of models.
        seeds: seeds of each model.
        folds: parts of all bags, by patient and balanced by label, of which each tests once (``data.splits``); None:
            the splits of the config.
        inner: nested cross-validation: so many inner folds choose the epoch and the values of ``grid``, see
            :func:`bigbag.evaluation.study.nested`; None: the validation bags choose the epoch.
        grid: setting -> values to choose from.

    Raises:
        ConfigError: a model that there is not, or an argument in ``compare.common`` that no model takes.
    """
    config = load_config(path, overrides)
    named = (*models, *config.compare.models, *config.compare.overrides)
    unknown = [name for name in named if name not in MODELS]
    if unknown:
        raise ConfigError(f"compare: unknown model {unknown[0]!r}; known models: {', '.join(MODELS)}")
    check_arguments(
        "compare.common", config.compare.common, sorted({key for name in MODELS for key in arguments_of(name)})
    )
    if grid and inner is None:
        raise ConfigError(
            "compare: --grid gives values to choose from, and --inner the folds that choose: expected both"
        )
    runs: list[Planned] = []
    for model in dict.fromkeys(models):
        for seed in seeds:
            for labels, settings in fold_settings(config, folds):
                name = f"{model}-seed{seed}" + (f"-fold{labels['fold']}" if labels else "")
                own = (f"seed={seed}", f"model={json.dumps(model_settings(config, model))}", *settings)
                own = (*config.compare.overrides.get(model, ()), *own)
                planned = Planned(name, {"model": model, "seed": seed, **labels}, own)
                runs += [planned] if inner is None else nested(config, planned, grid or {}, inner)
    return Study(path, overrides, sorted(runs, key=lambda run: bool(run.after)))


def model_settings(config: Config, name: str) -> dict[str, Any]:
    """The model section of the run of model ``name``."""
    known = arguments_of(name)
    common = {key: value for key, value in config.compare.common.items() if key in known}
    return {"name": name, **common, **config.compare.models.get(name, {})}


def shown_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a comparison, the main one first."""
    return _SHOWN.get(task, _CLASSES)


def summarise_comparison(study: Study, outcomes: Sequence[Outcome]) -> list[Line]:
    """One line per model, the best first by the main metric; the others compared with it on the same bags."""
    task = study.config.task.type
    main, *_ = names = shown_metrics(task)
    final = [outcome for outcome in outcomes if "inner" not in outcome.planned.labels]
    models = dict.fromkeys(str(outcome.planned.labels["model"]) for outcome in final)
    of = {model: [o for o in final if o.planned.labels["model"] == model] for model in models}
    lines = {model: _line(study, model, of[model], (*names, "instance_auroc")) for model in models}
    sign = -1 if main in ("mae", "rmse") else 1
    nothing = Spread(-sign * math.inf)
    ranked = sorted(lines.values(), key=lambda line: -sign * line.metrics.get(main, nothing).mean)
    tables = {model: _pooled(study, of[model]) for model in models}
    best = tables[ranked[0].model] if ranked else None
    return [line if i == 0 else _compared(line, tables[line.model], best, task, main) for i, line in enumerate(ranked)]


def with_mean(test: Mapping[str, Any]) -> dict[str, Any]:
    """Test metrics with the mean of AUROC, accuracy and F1, where all three are defined."""
    parts = [test[name] for name in _CLASSES[:3] if name in test]
    return {**test, "mean": mean(parts)} if len(parts) == 3 else dict(test)


def _line(study: Study, model: str, outcomes: Sequence[Outcome], names: Sequence[str]) -> Line:
    done = [outcome for outcome in outcomes if not outcome.error]
    values = {name: [with_mean(o.test)[name] for o in done if name in with_mean(o.test)] for name in names}
    spreads = {name: spread(found, name) for name, found in values.items() if found}
    if len(done) == 1:
        spreads |= _intervals_of_run(study.folder / done[0].planned.name, spreads, study.config.task.type)
    return Line(
        model,
        spreads,
        mean(outcome.seconds for outcome in done) if done else math.nan,
        max((outcome.peak_rss_bytes for outcome in done), default=0),
        num_runs=len(done),
        num_failed=sum(bool(outcome.error) and not outcome.waiting for outcome in outcomes),
    )


def spread(values: Sequence[float], name: str) -> Spread:
    """Mean of a metric and Student's 95 % interval of it, ``t_{0.975, n-1} s / sqrt(n)``, cut to values it can have."""
    if len(values) < 2:
        return Spread(values[0])
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    lowest, highest = metric_range(name)
    return Spread(mean(values), max(lowest, mean(values) - half), min(highest, mean(values) + half))


def _intervals_of_run(folder: Path, spreads: Mapping[str, Spread], task: str) -> dict[str, Spread]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["unit"]) == ("test", "bag")]
    ends = {row["metric"]: (float(row["low"]), float(row["high"])) for row in rows}
    if "mean" in spreads:
        ends["mean"] = _interval_of_mean(read_predictions(folder / "predictions.csv").labelled("test"), task)
    return {name: Spread(own.mean, *ends[name]) for name, own in spreads.items() if name in ends}


def _interval_of_mean(bags: PredictionTable, task: str) -> tuple[float, float]:
    """Bootstrap interval, by patient, of the mean of AUROC, accuracy and F1."""
    labels, logits = check_bags(bags.labels, bags.logits, task)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = weighted_metrics(labels, logits, task, weights)
        return {"mean": np.mean([found[name] for name in _CLASSES[:3]], axis=0)}

    groups = groups_of(bags.patients)
    scales = {"mean": scales_of(task, labels, groups)["kappa"]}  # as perfect, and of as many groups
    return intervals(statistic, groups, scales=scales)["mean"]


def _pooled(study: Study, outcomes: Sequence[Outcome]) -> PredictionTable | None:
    """Test predictions of all runs of a model: each bag once, its logits the mean over the runs that test it."""
    tables = [
        read_predictions(study.folder / o.planned.name / "predictions.csv").labelled("test")
        for o in outcomes
        if not o.error
    ]
    if not tables or any(outcome.error for outcome in outcomes):
        return None
    rows: dict[str, list[tuple[PredictionTable, int]]] = {}
    for table in tables:
        for i, key in enumerate(table.keys):
            rows.setdefault(key, []).append((table, i))
    firsts = [found[0] for found in rows.values()]
    logits = np.stack([np.mean([table.logits[i] for table, i in found], axis=0) for found in rows.values()])
    return PredictionTable(
        keys=tuple(rows),
        splits=("test",) * len(rows),
        labels=np.stack([table.labels[i] for table, i in firsts]),
        logits=logits,
        probabilities=probabilities(logits, study.config.task.type),
        sizes=np.array([table.sizes[i] for table, i in firsts]),
        patients=tuple(table.patients[i] for table, i in firsts),
    )


def _compared(line: Line, own: PredictionTable | None, best: PredictionTable | None, task: str, main: str) -> Line:
    if own is None or best is None or set(own.keys) != set(best.keys):
        return line
    found = compare_models(own, best, task, options=Bootstrap(1000))
    # DeLong's test takes bags for independent, which those of one patient are not.
    several = len(set(own.patients) - {""}) < sum(map(bool, own.patients))
    difference = found[main] if several or "auroc_delong" not in found else found["auroc_delong"]
    spread_of = Spread(difference.value, difference.low, difference.high)
    return Line(**{**line.__dict__, "difference": spread_of, "p_value": difference.p_value})


def write_comparison(study: Study, outcomes: Sequence[Outcome]) -> list[Line]:
    """Write ``runs.csv``, one row a run, and ``table.csv`` and ``table.md``, one row a model."""
    lines = summarise_comparison(study, outcomes)
    names = [*shown_metrics(study.config.task.type), "instance_auroc"]
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(study.folder / "runs.csv", runs_csv(outcomes, names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    comparison = ["difference", "difference_low", "difference_high", "p_value"]
    writer.writerow(["model", *columns, *comparison, "seconds", "peak_rss_bytes", "num_runs", "num_failed"])
    for line in lines:
        spreads = [line.metrics.get(name, Spread(math.nan)) for name in names]
        spreads.append(line.difference or Spread(math.nan))
        numbers = [_csv(value) for own in spreads for value in (own.mean, own.low, own.high)]
        cost = [_csv(round(line.seconds, 1)), line.peak_rss_bytes, line.num_runs, line.num_failed]
        writer.writerow([line.model, *numbers, _csv(line.p_value), *cost])
    write_atomically(study.folder / "table.csv", text.getvalue())
    write_atomically(study.folder / "table.md", markdown(table_cells(lines, names)))
    return lines


def runs_csv(outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """One row per run: what it is, its test metrics, its cost, why it has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = list(dict.fromkeys(key for outcome in outcomes for key in outcome.planned.labels))
    writer.writerow(["run", *labels, *names, "best_epoch", "seconds", "peak_rss_bytes", "error"])
    for outcome in outcomes:
        test = with_mean(outcome.test)
        cells = [outcome.planned.name, *(outcome.planned.labels.get(key, "") for key in labels)]
        cells += [_csv(test.get(name, math.nan)) for name in names]
        cells += [outcome.results.get("best_epoch", ""), _csv(round(outcome.seconds, 1)), outcome.peak_rss_bytes or ""]
        writer.writerow([*cells, outcome.error])
    return text.getvalue()


def table_cells(lines: Sequence[Line], names: Sequence[str]) -> list[list[str]]:
    """Columns, then one row per model, the best first; mean, and 95 % interval where there is one."""
    names = [name for name in names if any(name in line.metrics for line in lines)]
    compared = [f"{NAMES[names[0]]} less the best's", "p"] if any(line.difference for line in lines) else []
    columns = ["Model", *(NAMES[name] for name in names), *compared, "Seconds", "Peak RSS, MiB"]
    rows = []
    for line in lines:
        cells = [spread_text(line.metrics[name]) if name in line.metrics else "" for name in names]
        if compared and line.difference is not None:
            cells += [spread_text(line.difference, "+"), f"{line.p_value:.3f}"]
        elif compared:
            cells += ["", ""]
        cells += [f"{line.seconds:.0f}", f"{line.peak_rss_bytes / 2**20:.0f}"] if line.num_runs else ["", ""]
        rows.append([f"{line.model} ({line.num_failed} failed)" if line.num_failed else line.model, *cells])
    return [columns, *rows]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table, columns first, in Markdown."""
    columns, *rows = cells
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def spread_text(own: Spread, sign: str = "") -> str:
    """0.912 [0.874, 0.950]"""
    ends = "" if math.isnan(own.low) else f" [{own.low:{sign}.3f}, {own.high:{sign}.3f}]"
    return f"{own.mean:{sign}.3f}{ends}"


def _csv(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"
