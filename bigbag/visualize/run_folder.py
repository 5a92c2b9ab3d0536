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

SPLITS = ("test", "val", "train")


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
        path = self.path / "metrics.json"
        rows = _read_json(path).get("metrics", []) if path.is_file() else []
        whole = [row for row in rows if row["unit"] == "bag" and None not in (row["low"], row["high"])]
        return {(row["split"], row["metric"]): (row["low"], row["high"]) for row in whole}

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
            "let it finish, or run the evaluation on its checkpoint"
        )
    text = (path / "config.yaml").read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path / 'config.yaml'}: not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'}: expected settings by name, got {type(config).__name__}")
    environment = _read_json(path / "environment.json") if (path / "environment.json").is_file() else {}
    predictions = read_predictions(path / "predictions.csv")
    log = tuple(_read_log(path / "metrics.jsonl")) if (path / "metrics.jsonl").is_file() else ()
    task = _task_of(config) or predictions.likely_task()
    check_task_fits(task, predictions, path / "predictions.csv")
    results = _read_json(path / "results.json")
    return RunFolder(path, task, config, text, environment, results, predictions, log)


def read_attention(path: Path) -> BagAttention:
    """Read one file of ``attention/``.

    Raises:
        ValueError: ``key`` or ``scores`` is missing, or an array does not have one row per score.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    absent = [name for name in ("key", "scores") if name not in arrays]
    if absent:
        raise ValueError(f"{path}: expected the arrays key and scores, {' and '.join(absent)} missing")
    scores = arrays["scores"].reshape(-1)
    optional = {name: arrays.get(name) for name in ("coords", "y_inst", "patches", "rgb")}
    for name, value in optional.items():
        if value is not None and (value.ndim == 0 or len(value) != len(scores)):
            raise ValueError(f"{path}: {name} has shape {value.shape}, expected {len(scores)} rows, one per score")
    return BagAttention(key=str(arrays["key"]), scores=scores, **optional)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log. A last line that breaks off is what a killed run leaves, and is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from error
        if not isinstance(event, dict) or "kind" not in event:
            raise ValueError(f"{path}:{number}: expected an object with a kind, got {line[:80]!r}")
        yield event


def _task_of(config: dict[str, Any]) -> str | None:
    task = config.get("task")
    name = task.get("type") if isinstance(task, dict) else task
    return name if name in TASKS else None
