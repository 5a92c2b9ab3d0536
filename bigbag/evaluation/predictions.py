"""Tables of predictions, as runs write them (``predictions.csv``) or as others do."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_FIELDS = ("label", "logit", "probability")


@dataclass(frozen=True)
class PredictionTable:
    """The rows of ``predictions.csv``, B bags.

    Attributes:
        keys: names of the bags.
        splits: the split of each bag.
        labels: float64 ``(B,)`` or ``(B, K)``, NaN = unknown.
        logits: float64 ``(B,)`` or ``(B, K)``.
        probabilities: as ``logits``.
        sizes: int64 ``(B,)``, instances per bag; 0 where the file does not say.
        patients: the patient of each bag, "" where unknown.
        named: False where the file does not name its bags, and ``keys`` are numbers of rows.
    """

    keys: tuple[str, ...]
    splits: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    sizes: np.ndarray
    patients: tuple[str, ...]
    named: bool = True

    def take(self, index: np.ndarray) -> PredictionTable:
        """The rows ``index`` (integers)."""
        chosen = [int(i) for i in index]
        texts = (tuple(column[i] for i in chosen) for column in (self.keys, self.splits, self.patients))
        keys, splits, patients = texts
        labels, logits, chances, sizes = (
            values[chosen] for values in (self.labels, self.logits, self.probabilities, self.sizes)
        )
        return PredictionTable(keys, splits, labels, logits, chances, sizes, patients, self.named)

    def labelled(self, split: str) -> PredictionTable:
        """The bags of ``split`` whose labels are known."""
        unknown = np.isnan(self.labels)
        known = ~(unknown.any(1) if unknown.ndim == 2 else unknown)
        return self.take(np.flatnonzero(known & (np.array(self.splits) == split)))

    def likely_task(self) -> str:
        """The task that the table looks like, for want of a config that says it. Survival cannot be told."""
        if self.labels.ndim == 2:
            chances = self.logits.shape == self.labels.shape and not np.array_equal(self.logits, self.probabilities)
            return "multilabel" if chances else "regression"
        if self.logits.ndim == 2:
            return "multiclass"
        known = self.labels[~np.isnan(self.labels)]
        return "binary" if np.isin(known, [0, 1]).all() else "regression"


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The lines of a CSV file, and its columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error}): save it as one") from None
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            more_or_fewer = "more" if None in row else "fewer"
            raise ValueError(f"{path}:{number}: {more_or_fewer} cells than the {len(columns)} columns; write it again")
    return rows, columns


def _numbers(rows: list[dict[str, str]], names: list[str], path: Path) -> np.ndarray:
    """Columns of a table as float64 ``(B,)``, or ``(B, K)`` where they are numbered or their cells are JSON lists."""
    values: list[list[float]] = []
    for number, row in enumerate(rows, 2):
        cells: list[Any] = [row[name] for name in names]
        try:
            if len(cells) == 1 and cells[0].startswith("["):
                cells = json.loads(cells[0])
            values.append([float("nan" if cell in ("", None, "None") else cell) for cell in cells])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {names[0]}: expected a number, got {row[names[0]]!r}") from error
    width = max((len(row) for row in values), default=1)
    array = np.full((len(rows), width), np.nan)
    for i, row_values in enumerate(values):
        # An empty cell is an unknown label of any width.
        if len(row_values) != width and not (len(row_values) == 1 and np.isnan(row_values[0])):
            raise ValueError(
                f"{path}:{i + 2}: {names[0]}: expected {width} numbers, as in other rows, got {row_values}"
            )
        array[i, : len(row_values)] = row_values
    return array[:, 0] if width == 1 and names[0] in (*_FIELDS, "num_instances") else array


def _refuse(path: Path, bad: np.ndarray, text: str) -> None:
    """Raise with the first line of a file that is bad."""
    if bad.any():
        raise ValueError(f"{path}:{int(np.flatnonzero(bad.reshape(len(bad), -1).any(1))[0]) + 2}: {text}")


def read_predictions(path: str | Path) -> PredictionTable:
    """Read a table of predictions: columns key, label and logit or probability; split, num_instances and patient where
    there are such.

    Without a split all rows are "test". Columns of several outputs or labels are numbered (``logit_0``, ``logit_1``,
    ...); a label may also be a JSON list. Where only probabilities are given, their log-odds, or their logarithms for
    the classes of one label, serve as logits.

    Without a column key, bags are known by their row, and no other table can be compared with this one.

    Raises:
        ValueError: no such file, a column is missing, a cell is no number, a score is missing or not finite, a bag has
            no key or is there twice; file and line are named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such table; expected predictions.csv of a run, or a CSV file like it")
    rows, columns = _rows(path)
    fields = {name: _numbered(name, columns, path) for name in _FIELDS}
    absent = [] if fields["label"] else ["label"]
    absent += [] if fields["logit"] or fields["probability"] else ["logit or probability"]
    if absent:
        expected, got = " and ".join(absent), ", ".join(columns) or "an empty file"
        raise ValueError(
            f"{path}: expected a column {expected}, or numbered ones, got {got}; rename the "
            "columns, and separate them by commas"
        )
    named_bags = "key" in columns
    keys = tuple(row["key"] if named_bags else str(i) for i, row in enumerate(rows))
    empty = np.array([not key for key in keys], dtype=bool)
    _refuse(path, empty, "key is empty: name the bag, or leave the column out")
    splits = tuple(row.get("split") or "test" for row in rows)
    named = dict[tuple[str, str], int]()
    for number, bag in enumerate(zip(splits, keys), 2):
        if named.setdefault(bag, number) != number:
            raise ValueError(
                f"{path}:{number}: bag {bag[1]!r} of split {bag[0]} is in line {named[bag]} already, and would count "
                "twice: leave one of them out"
            )
    labels = _numbers(rows, fields["label"], path)
    logits = _numbers(rows, fields["logit"], path) if fields["logit"] else None
    probabilities = logits if logits is not None else labels
    if fields["probability"]:
        probabilities = _numbers(rows, fields["probability"], path)
    sizes = _numbers(rows, ["num_instances"], path) if "num_instances" in columns else np.zeros(len(rows))
    _refuse(path, ~((sizes >= 0) & np.isfinite(sizes)), "num_instances is missing or below 0")
    if logits is None:
        text = "probability: expected 0 to 1; scores on another scale are to be called logit"
        _refuse(path, (probabilities < 0) | (probabilities > 1), text)
        logits = _logits_of(probabilities, labels)
    _refuse(
        path, ~np.isfinite(logits), "the score of the bag is missing or not finite: predict it again, or leave it out"
    )
    return PredictionTable(
        keys=keys,
        splits=splits,
        labels=labels,
        logits=logits,
        probabilities=probabilities,
        sizes=sizes.astype(np.int64),
        patients=tuple(row.get("patient") or "" for row in rows),
        named=named_bags,
    )


def _logits_of(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-odds; logarithms for the K classes of one label."""
    inside = np.clip(probabilities, 1e-300, None)
    if probabilities.ndim == 2 and labels.ndim == 1:
        return np.log(inside)
    return np.log(inside) - np.log1p(-np.clip(probabilities, None, 1 - 2.0**-53))


def _numbered(name: str, columns: list[str], path: Path) -> list[str]:
    """``[name]`` if there is such a column, else ``name_0, name_1, ...`` in order of their numbers."""
    if name in columns:
        return [name]
    found = [c for c in columns if re.fullmatch(rf"{name}_\d+", c)]
    expected = [f"{name}_{k}" for k in range(len(found))]
    if set(found) != set(expected):
        raise ValueError(f"{path}: expected the columns {', '.join(expected)}, got {', '.join(found)}")
    return expected


def check_task_fits(task: str, predictions: PredictionTable, path: str | Path) -> None:
    """Refuse a task that the labels and logits cannot be of (ValueError)."""
    labels, logits = predictions.labels, predictions.logits
    top = {"binary": 1, "multilabel": 1, "multiclass": logits.shape[-1] - 1}.get(task)
    if (task == "multiclass") != (logits.ndim == 2 and labels.ndim == 1) or (task == "binary" and labels.ndim == 2):
        raise ValueError(f"{path}: task {task} does not go with labels {labels.shape} and logits {logits.shape}")
    if task.startswith("survival") and len(labels):
        bins = logits.shape[1] if logits.ndim == 2 else 0
        if labels.shape[1:] != (2,) or (bins == 0 if task == "survival_discrete" else bins > 1):
            raise ValueError(
                f"{path}: task {task} does not go with labels {labels.shape} and logits {logits.shape}: expected time "
                "and event as label, and the logits of the time bins, or one risk without bins"
            )
    known = labels[~np.isnan(labels)]
    if top is not None and not np.isin(known, np.arange(top + 1)).all():
        raise ValueError(f"{path}: task {task}: expected labels 0 to {top}, got {np.unique(known)[:8].tolist()}")
