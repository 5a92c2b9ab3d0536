"""What a run predicts, as files: ``predictions.csv``, one row per evaluated bag, and ``instances.npz``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from bigbag.bags import Label
from bigbag.config import Config, TaskConfig
from bigbag.data import BagStore
from bigbag.engine.evaluate import Predictions
from bigbag.engine.metrics import probabilities
from bigbag.files import write_atomically


class Row(NamedTuple):
    """A line of ``predictions.csv``: ``logits`` and ``probabilities`` are ``(K,)``, ``label`` is None where unknown."""

    key: str
    split: str
    label: Label | None
    logits: np.ndarray
    probabilities: np.ndarray
    num_instances: int
    patient: str


def predictions_table(rows: Iterable[Row], task: TaskConfig) -> str:
    """The text of ``predictions.csv``.

    Its columns are key, split, label, logit, probability (numbered where there are several outputs), num_instances and
    patient. Its numbers are read back as they were.
    """
    num = task.num_outputs
    suffixes = [""] if num == 1 else [f"_{k}" for k in range(num)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{suffix}" for name in ("logit", "probability") for suffix in suffixes]
    writer.writerow(["key", "split", "label", *columns, "num_instances", "patient"])
    for row in rows:
        label = row.label if isinstance(row.label, int | float) else "" if row.label is None else json.dumps(row.label)
        numbers = [repr(float(value)) for value in (*row.logits, *row.probabilities)]
        writer.writerow([row.key, row.split, label, *numbers, row.num_instances, row.patient])
    return text.getvalue()


def write_predictions(config: Config, store: BagStore, predictions: Mapping[str, Predictions]) -> None:
    """Write ``predictions.csv`` and, with ``report.instance_scores``, ``instances.npz`` into the run's folder.

    Args:
        config: the settings of the run.
        store: where the bags are.
        predictions: of each evaluated split.
    """
    rows = []
    for split, part in predictions.items():
        chances = probabilities(part.logits, config.task.type)
        for bag, logits, of_bag in zip(part.bags, part.logits, chances):
            info = store.infos[bag]
            rows.append(Row(info.name, split, info.label, logits, of_bag, info.num_instances, info.patient or ""))
    write_atomically(config.run_dir / "predictions.csv", predictions_table(rows, config.task))
    if config.report.instance_scores:
        _write_instances(config, store, predictions)


def _write_instances(config: Config, store: BagStore, predictions: Mapping[str, Predictions]) -> None:
    """The instances of the bags that have instance labels, end to end: ``key (n,)``, ``split (n,)``, ``sizes (n,)``,
    ``scores (T,)`` float32, ``y_inst (T,)`` int8 and, where every bag has them, ``coords (T, c)``."""
    parts = list(predictions.items())
    arrays = {
        "key": np.array([store.infos[bag].name for _, part in parts for bag in part.bags], dtype=str),
        "split": np.array([split for split, part in parts for _ in part.bags], dtype=str),
        "sizes": np.concatenate([part.sizes for _, part in parts] or [np.empty(0, np.int64)]),
        "scores": np.concatenate([part.scores for _, part in parts] or [np.empty(0, np.float32)]),
        "y_inst": np.concatenate([part.y_inst for _, part in parts] or [np.empty(0, np.int64)]).astype(np.int8),
    }
    coords = [part.coords for _, part in parts if len(part.scores)]
    if coords and all(c is not None for c in coords):
        arrays["coords"] = np.concatenate(coords)  # type: ignore[arg-type]
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(config.run_dir / "instances.npz", content.getvalue())
