"""Which bags an epoch visits where they are drawn by weight, with replacement. Pure, so the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.data.manifest import BagInfo
from bigbag.data.plan import derive_seed
from bigbag.data.table import read_table

_KIND = 0x5A3B


def draw_bags(
    bags: Sequence[int], weights: Sequence[float], num_draws: int, *, seed: int, epoch: int
) -> tuple[int, ...]:
    """``num_draws`` of ``bags``, independently, each with a chance proportional to its weight.

    Args:
        bags: numbers of the bags.
        weights: weight of each, 0 or more.
        num_draws: draws of an epoch.
        seed: seed of the run.
        epoch: number of the epoch.

    Raises:
        ValueError: weights that are negative, not finite, or all 0.
    """
    chances = np.asarray(weights, dtype=np.float64)
    if len(chances) != len(bags) or not (np.isfinite(chances) & (chances >= 0)).all() or not chances.sum() > 0:
        raise ValueError(f"draw_bags: expected {len(bags)} finite weights of 0 or more, not all 0, got {weights}")
    generator = np.random.default_rng(derive_seed(seed, epoch, _KIND, 0))
    return tuple(bags[i] for i in generator.choice(len(bags), num_draws, p=chances / chances.sum()).tolist())


def bag_weights(infos: Sequence[BagInfo], weights: str | Mapping[int, float]) -> list[float]:
    """The weight of each bag.

    Args:
        infos: the bags.
        weights: "class_balanced" gives every label the same total weight; a mapping the weight of a bag by its label;
            anything else names a CSV with the columns ``bag`` and ``weight``.

    Raises:
        ValueError: labels that are no classes, or a bag or label without a weight.
    """
    if isinstance(weights, str) and weights != "class_balanced":
        table = _read_weights(Path(weights))
        return [_look_up(table, info.name, f"{weights}: bag {info.name!r}") for info in infos]
    for info in infos:
        if not isinstance(info.label, int | float) or info.label != int(info.label):
            raise ValueError(f"data.sampling: bag {info.name!r} has the label {info.label!r}, expected that of a class")
    labels = [int(info.label) for info in infos]  # type: ignore[arg-type]
    if isinstance(weights, str):
        counts = Counter(labels)
        return [1 / (len(counts) * counts[label]) for label in labels]
    return [_look_up(weights, label, f"data.sampling.weights: label {label}") for label in labels]


def count_draws(order: Sequence[int]) -> dict[str, int]:
    """``draws``, ``distinct`` bags among them, and how often the commonest one comes (``most``), for the log."""
    counts = Counter(order)
    return {"draws": len(order), "distinct": len(counts), "most": max(counts.values(), default=0)}


def _look_up(table: Mapping[Any, float], key: object, what: str) -> float:
    if key not in table:
        raise ValueError(f"{what} has no weight; give every training bag one")
    return float(table[key])


def _read_weights(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"data.sampling.weights: {path} is no file, and neither class_balanced nor label: weight")
    table, weights = read_table(path), dict[str, float]()
    bag, weight = (table.need(name, "data.sampling.weights") for name in ("bag", "weight"))
    for line, row in table:
        try:
            value = float(row[weight])
        except ValueError:
            raise ValueError(f"{path}, line {line}: weight is {row[weight]!r}, expected a number") from None
        if weights.setdefault(row[bag], value) != value:
            raise ValueError(f"{path}, line {line}: bag {row[bag]!r} has the weight {weights[row[bag]]} already")
    return weights
