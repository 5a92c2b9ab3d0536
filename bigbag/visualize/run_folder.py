"""Read what a run leaves in its folder: settings, results, predictions, the log and the attention of some bags."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.engine.metrics import TASKS

SPLITS = ("test", "val", "train")
_COLUMNS = ("label", "logit", "probability", "num_instances")


@dataclass(frozen=True)
class PredictionTable:
    """The rows of ``predictions.csv``, B bags.

    Attributes:
        keys: names of the bags.
        splits: the split of each bag.
        labels: float64 ``(B,)`` or ``(B, K)``, NaN = unknown.
        logits: float64 ``(B,)`` or ``(B, K)``.
        probabilities: as ``logits``.
        sizes: int64 ``(B,)``, instances per bag.
    """

    keys: tuple[str, ...]
    splits: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    sizes: np.ndarray

    def take(self, index: np.ndarray) -> PredictionTable:
        """The rows ``index`` (integers)."""
        chosen = [int(i) for i in index]
        keys, splits = tuple(self.keys[i] for i in chosen), tuple(self.splits[i] for i in chosen)
        rest = (values[chosen] for values in (self.labels, self.logits, self.probabilities, self.sizes))
        return PredictionTable(keys, splits, *rest)

    def labelled(self, split: str) -> PredictionTable:
        """The bags of ``split`` whose labels are known."""
        unknown = np.isnan(self.labels)
        known = ~(unknown.any(1) if unknown.ndim == 2 else unknown)
        return self.take(np.flatnonzero(known & (np.array(self.splits) == split)))


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
    predictions, columns = _read_predictions(path / "predictions.csv")
    log = tuple(_read_log(path / "metrics.jsonl")) if (path / "metrics.jsonl").is_file() else ()
    task = _task_of(config) or _task_of_columns(columns, predictions)
    _check_task_fits(task, predictions, path / "predictions.csv")
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


def _numbers(rows: list[dict[str, str]], names: list[str], path: Path) -> np.ndarray:
    """Columns of a table as float64 ``(B,)``, or ``(B, K)`` where they are numbered or their cells are JSON lists."""
    values: list[list[float]] = []
    for number, row in enumerate(rows, 2):
        cells: list[Any] = [row[name] for name in names]
        try:
            if len(cells) == 1 and cells[0] and cells[0].startswith("["):
                cells = json.loads(cells[0])
            values.append([float("nan" if cell in ("", None, "None") else cell) for cell in cells])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {names[0]}: expected a number, got {row[names[0]]!r}") from error
    width = max((len(row) for row in values), default=1)
    array = np.full((len(rows), width), np.nan)
    for i, row_values in enumerate(values):
        array[i, : len(row_values)] = row_values
    return array[:, 0] if width == 1 and names[0] in _COLUMNS else array


def _read_predictions(path: Path) -> tuple[PredictionTable, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), list(reader.fieldnames or ())
    absent = [name for name in ("key", "split", "num_instances") if name not in columns]
    fields = {name: _numbered(name, columns) for name in _COLUMNS[:3]}
    absent += [name for name, found in fields.items() if not found and name != "probability"]
    if absent:
        raise ValueError(
            f"{path}: expected the columns {', '.join(absent)}, got {', '.join(columns) or 'an empty file'}"
        )

    labels, logits = _numbers(rows, fields["label"], path), _numbers(rows, fields["logit"], path)
    probabilities = _numbers(rows, fields["probability"], path) if fields["probability"] else logits
    keys, splits = tuple(row["key"] for row in rows), tuple(row["split"] for row in rows)
    sizes = _numbers(rows, ["num_instances"], path)
    if not np.isfinite(sizes).all():
        raise ValueError(f"{path}:{int(np.flatnonzero(~np.isfinite(sizes))[0]) + 2}: num_instances is missing")
    return PredictionTable(keys, splits, labels, logits, probabilities, sizes.astype(np.int64)), columns


def _numbered(name: str, columns: list[str]) -> list[str]:
    """``[name]`` if there is such a column, else ``name_0, name_1, ...`` in order of their numbers."""
    if name in columns:
        return [name]
    return sorted((c for c in columns if re.fullmatch(rf"{name}_\d+", c)), key=lambda c: int(c.rsplit("_", 1)[1]))


def _task_of(config: dict[str, Any]) -> str | None:
    task = config.get("task")
    name = task.get("type") if isinstance(task, dict) else task
    return name if name in TASKS else None


def _task_of_columns(columns: list[str], predictions: PredictionTable) -> str:
    """What the predictions look like, for a config that does not say."""
    if predictions.labels.ndim == 2:
        return "multilabel" if "probability_0" in columns else "regression"
    if "logit_0" in columns:
        return "multiclass"
    known = predictions.labels[~np.isnan(predictions.labels)]
    return "binary" if np.isin(known, [0, 1]).all() else "regression"


def _check_task_fits(task: str, predictions: PredictionTable, path: Path) -> None:
    labels, logits = predictions.labels, predictions.logits
    top = {"binary": 1, "multilabel": 1, "multiclass": logits.shape[-1] - 1}.get(task)
    if (task == "multiclass") != (logits.ndim == 2 and labels.ndim == 1) or (task == "binary" and labels.ndim == 2):
        raise ValueError(f"{path}: task {task} does not go with labels {labels.shape} and logits {logits.shape}")
    known = labels[~np.isnan(labels)]
    if top is not None and not np.isin(known, np.arange(top + 1)).all():
        raise ValueError(f"{path}: task {task}: expected labels 0 to {top}, got {np.unique(known)[:8].tolist()}")
