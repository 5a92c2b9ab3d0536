"""Predictions of a run: each bag once, the same for any packing and number of ranks, and all that FROC needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bigbag.bags import Bag, PackedBags
from bigbag.config import build_config
from bigbag.data.stores import MemoryStore
from bigbag.engine.evaluate import Predictions, predict_bags
from bigbag.engine.predictions import write_predictions
from bigbag.engine.world import World
from bigbag.evaluation.predictions import read_predictions

SIZES = (30, 50, 12, 7, 40, 25)


def make_bag(number: int) -> Bag:
    rng = np.random.default_rng(number)
    size = SIZES[number]
    y_inst = None if number in (2, 4) else rng.integers(-1, 2, size)
    coords = np.stack(np.divmod(np.arange(size), 6), 1)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return Bag(x, float(number % 2), f"slide.{number}", coords, y_inst)


def forward(bags: PackedBags, want: str) -> object:
    scores = bags.x.float() @ torch.tensor([1.0, -2.0, 0.5])
    logits = torch.stack([scores[i:j].max() for i, j in zip(bags.offsets, bags.offsets[1:])])
    return (logits, scores) if want == "logits and scores" else logits


def settings(tmp_path: object, budget: int) -> object:
    data = {"shards": "x", "budget_instances": budget, "num_workers": 0}
    report = {"instance_scores": True}
    return build_config(
        {"name": "r", "out": str(tmp_path), "data": data, "model": {"name": "MeanMIL"}, "report": report}
    )


def predict(config: object) -> Predictions:
    store = MemoryStore([make_bag(i) for i in range(len(SIZES))])
    return predict_bags(forward, store, list(range(len(SIZES))), config, World(), with_instances=True)


def test_packing_changes_nothing_though_some_bags_have_no_instance_labels(tmp_path) -> None:
    alone, together = (predict(settings(tmp_path, budget)) for budget in (1, 10_000))
    for name in ("bags", "logits", "y_inst", "scores", "sizes", "coords"):
        np.testing.assert_allclose(getattr(alone, name), getattr(together, name), rtol=1e-6)
    assert together.sizes.tolist() == [30, 50, 0, 7, 0, 25] and len(together.scores) == 112
    labelled = [make_bag(i) for i in (0, 1, 3, 5)]
    np.testing.assert_array_equal(together.y_inst, np.concatenate([bag.y_inst for bag in labelled]))
    np.testing.assert_array_equal(together.coords, np.concatenate([bag.coords for bag in labelled]))


def test_files_hold_the_predictions_as_they_are(tmp_path) -> None:
    config = settings(tmp_path, 100)
    config.run_dir.mkdir(parents=True)
    store = MemoryStore([make_bag(i) for i in range(len(SIZES))])
    found = predict(config)
    write_predictions(config, store, {"test": found})
    table = read_predictions(config.run_dir / "predictions.csv")
    assert table.keys == tuple(f"slide.{i}" for i in range(6)) and set(table.splits) == {"test"}
    np.testing.assert_array_equal(table.logits, found.logits[:, 0])
    np.testing.assert_allclose(table.probabilities, 1 / (1 + np.exp(-table.logits)), rtol=1e-14)
    with np.load(config.run_dir / "instances.npz") as saved:
        assert saved["key"].tolist() == list(table.keys) and saved["sizes"].tolist() == found.sizes.tolist()
        np.testing.assert_array_equal(saved["scores"], found.scores)
        np.testing.assert_array_equal(saved["coords"], found.coords)


@pytest.mark.parametrize("without", ["y_inst", "coords"])
def test_what_is_not_there_is_not_made_up(tmp_path, without: str) -> None:
    bags = [replace(make_bag(i), **{without: None}) for i in (0, 1)]
    found = predict_bags(forward, MemoryStore(bags), [0, 1], settings(tmp_path, 100), World(), with_instances=True)
    assert found.coords is None and len(found.logits) == 2
    assert found.sizes.tolist() == ([0, 0] if without == "y_inst" else [30, 50])
