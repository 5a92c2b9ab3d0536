"""Read what a run leaves in its folder: settings, results, predictions, the log and the attention of some bags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.engine.metrics import TASKS
from bigbag.evaluation.predictions import PredictionTable, check_task_fits, read_predictions
from bigbag.files import read_json, read_npz, read_text

SPLITS = ("test", "val", "train")
_TRAIN = "`bigbag train` writes it again, and does not train a finished run again"
_REMOVE = "remove it, since the report does without, or write it again"
_STEPS = {"train": ("step",), "epoch": ("step", "epoch")}
"""Kinds of lines of a log that are drawn, and their whole numbers."""


@dataclass(frozen=True)
class BagAttention:
    """One file of ``attention/``: see :func:`bigbag.visualize.report.write_report` for what it holds."""

    key: str
    scores: np.ndarray
    coords: np.ndarray | None
    y_inst: np.ndarray | None
    patches: np.ndarray | None
    rgb: np.ndarray | None


@dataclass(frozen=True)
class RunFolder:
    """What a run wrote. ``log`` holds one dict per line of ``metrics.jsonl``; empty where there is no such file."""

    path: Path
    task: str
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    results: dict[str, Any]
    predictions: PredictionTable
    log: tuple[dict[str, Any], ...]

    def metrics(self, split: str) -> dict[str, Any]:
        """The metrics of ``split`` in the results; empty where there are none."""
        found = self.results.get(split)
        return found if isinstance(found, dict) else {}

    @cached_property
    def intervals(self) -> dict[tuple[str, str], tuple[float, float]]:
        """95 % intervals of (split, metric) over bags, from ``metrics.json``; empty where the run has none."""
        path, found = self.path / "metrics.json", {}
        for row in _read_object(path, _REMOVE, metrics=list).get("metrics", []) if path.is_file() else []:
            try:
                unit, metric, ends = row["unit"], (row["split"], row["metric"]), (row["low"], row["high"])
            except (KeyError, TypeError):
                raise ValueError(f"{path}: a metric without unit, split, name or interval: {_REMOVE}") from None
            if unit == "bag" and None not in ends:
                found[metric] = ends
        return found

    def attention_files(self) -> list[Path]:
        return sorted((self.path / "attention").glob("*.npz"))


def read_run(run_dir: str | Path) -> RunFolder:
    """Read a run folder.

    Raises:
        FileNotFoundError: ``config.yaml``, ``results.json`` or ``predictions.csv`` is not there.
        ValueError: a file does not have the form that a run gives it; file and line are named.
    """
    import yaml

    path = Path(run_dir)
    missing = [name for name in ("config.yaml", "results.json", "predictions.csv") if not (path / name).is_file()]
    if missing:
        state = "has no" if path.is_dir() else "does not exist, so there is no"
        raise FileNotFoundError(
            f"run folder {path} {state} {', '.join(missing)}; a run writes them when its evaluation ends: "
            "let it finish, or start it again: it goes on from its checkpoint"
        )
    text = read_text(path / "config.yaml", _TRAIN)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: not YAML: {error}; {_TRAIN}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'}: expected settings by name, got {type(config).__name__}: {_TRAIN}")
    environment = {}
    if (path / "environment.json").is_file():
        environment = _read_object(path / "environment.json", _REMOVE, data=dict)
    predictions = read_predictions(path / "predictions.csv")
    log = tuple(_read_log(path / "metrics.jsonl")) if (path / "metrics.jsonl").is_file() else ()
    task = _task_of(config) or predictions.likely_task()
    check_task_fits(task, predictions, path / "predictions.csv")
    results = _read_object(path / "results.json", _TRAIN, left_out=list, capped=dict, best_epoch=int)
    return RunFolder(path, task, config, text, environment, results, predictions, log)


def read_attention(path: Path) -> BagAttention:
    """Read one file of ``attention/``.

    Raises:
        ValueError: the file is damaged, ``key`` or ``scores`` is missing, an array does not have one row per score, or
            holds no numbers.
    """
    arrays = read_npz(path)
    absent = [name for name in ("key", "scores") if name not in arrays]
    if absent:
        raise ValueError(f"{path}: expected the arrays key and scores, {' and '.join(absent)} missing")
    scores = arrays["scores"].reshape(-1)
    optional = {name: arrays.get(name) for name in ("coords", "y_inst", "patches", "rgb")}
    for name, value in (("scores", scores), *optional.items()):
        if value is not None and value.dtype.kind not in "fiub":
            raise ValueError(f"{path}: {name}: expected numbers, got {value.dtype}: {_REMOVE}")
    for name, value in optional.items():
        if value is not None and (value.ndim == 0 or len(value) != len(scores)):
            raise ValueError(f"{path}: {name} has shape {value.shape}, expected {len(scores)} rows, one per score")
    if (coords := optional["coords"]) is not None and not np.isfinite(coords).all():
        raise ValueError(f"{path}: coords: expected finite positions: {_REMOVE}")
    return BagAttention(key=str(arrays["key"]), scores=scores, **optional)


def _read_object(path: Path, remedy: str, **types: type) -> dict[str, Any]:
    """A JSON object, some of whose values are of a type or null where they are there."""
    value = read_json(path, remedy)
    for name, expected in types.items():
        if not isinstance(value.get(name), expected | None):
            got = f"{expected.__name__}, got {type(value[name]).__name__}"
            raise ValueError(f"{path}: {name}: expected {got}: {remedy}")
    return value


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. A last line that breaks off is what a killed run leaves, and is passed over."""
    lines = read_text(path, _REMOVE).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}): remove the line") from error
        if not isinstance(event, dict) or "kind" not in event:
            raise ValueError(f"{path}:{number}: expected an object with a kind, got {line[:80]!r}: remove the line")
        for name in _STEPS.get(event["kind"], ()):
            if not isinstance(event.get(name), int):
                raise ValueError(f"{path}:{number}: {name}: got {event.get(name)!r}, not a number: remove the line")
        yield event


def _task_of(config: dict[str, Any]) -> str | None:
    task = config.get("task")
    name = task.get("type") if isinstance(task, dict) else task
    return name if name in TASKS else None
