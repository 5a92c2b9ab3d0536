"""``bigbag evaluate`` on what is saved."""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import asdict
from pathlib import Path

import yaml

from bigbag.config import Config
from bigbag.evaluation.bootstrap import Bootstrap
from bigbag.evaluation.predictions import check_task_fits, read_predictions
from bigbag.evaluation.summary import compare_models, markdown, summarise
from bigbag.files import write_atomically


def evaluate_predictions(options: argparse.Namespace) -> None:
    """Write and print the metrics of ``--predictions``, and of its difference from ``--against``."""
    path: Path = options.predictions
    table = read_predictions(path)
    if not table.keys:
        raise ValueError(f"{path}: has no rows, expected one for each bag")
    task = options.task or _task_beside(path) or table.likely_task()
    check_task_fits(task, table, path)
    how = Bootstrap(options.resamples, method=options.interval, stratified=options.stratified)
    beside = path.with_name("instances.npz")
    instances = options.instances or (beside if beside.is_file() else None)
    summary = summarise(table, task, instances, how, options.patient_rule, options.min_diameter)
    folder = options.folder or path.parent
    summary.write(folder)
    print(markdown(summary.rows) + f"task: {task}\nmetrics: {folder / 'metrics.csv'}")
    if options.against is None:
        return
    other = read_predictions(options.against)
    check_task_fits(task, other, options.against)
    differences = compare_models(table, other, task, options.split, how)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["metric", "value", "low", "high", "p_value"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"metric": name, **asdict(difference)} for name, difference in differences.items())
    write_atomically(folder / "difference.csv", text.getvalue())
    for name, found in differences.items():
        print(f"{name:<26} {found.value:+.4f}  {found.low:+.4f} to {found.high:+.4f}  p = {found.p_value:.4f}")
    print(f"differences: {folder / 'difference.csv'}")


def evaluate_run(config: Config) -> None:
    """Write ``metrics.csv`` and ``metrics.json`` of a run from the predictions in its folder."""
    instances = config.run_dir / "instances.npz"
    saved = instances if config.report.instance_scores else None
    summarise(read_predictions(config.run_dir / "predictions.csv"), config.task.type, saved).write(config.run_dir)


def _task_beside(path: Path) -> str | None:
    config = path.with_name("config.yaml")
    if not config.is_file():
        return None
    try:
        return yaml.safe_load(config.read_text())["task"]["type"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{config}: is not the config of a run, which says its task: give --task") from None
