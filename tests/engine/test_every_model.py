"""Every model through the engine: packed with graphs, trained, evaluated, loaded again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bigbag.config import GraphConfig, build_config, load_config
from bigbag.data import open_store, pack
from bigbag.engine.new_bags import bags_of_source
from bigbag.engine.predict import Predictor
from bigbag.engine.run import train
from bigbag.engine.world import World
from bigbag.evaluation.compare import model_settings
from bigbag.models import MODELS

from .conftest import Blobs
from .test_survival_training import SurvivalBlobs

SIZES = {"train": [20, 31, 9, 24], "val": [20, 30, 15, 25], "test": [20, 12, 25, 40]}
COMPARISON = load_config(Path(__file__).parents[2] / "configs" / "digits_models.yaml")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, str]:
    """A set with graphs for each task."""
    folder = tmp_path_factory.mktemp("every-model")
    sources = {"binary": Blobs(SIZES), "survival": SurvivalBlobs(SIZES)}
    for task, source in sources.items():
        pack(source, folder / task, progress=False, graph=GraphConfig())
    return {task: str(folder / task) for task in sources}


def small_settings(name: str) -> dict[str, Any]:
    """The arguments of ``bigbag compare``, with smaller widths."""
    settings = model_settings(COMPARISON, name)
    widths = {"att_dim", "pool_att_dim", "hidden_dim", "transf_att_dim", "nystrom_att_dim", "n_landmarks"}
    settings |= dict.fromkeys(widths & settings.keys(), 8)
    if settings.get("feat_ext", {}).get("name") == "MLP":
        settings["feat_ext"] = settings["feat_ext"] | {"linear_sizes": [8]}
    return settings


@pytest.mark.parametrize("task", ["binary", "survival"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_from_a_config(name, task, packed, tmp_path):
    config = build_config(
        {
            "name": name,
            "out": str(tmp_path),
            "data": {"shards": packed[task], "budget_instances": 50, "num_workers": 0},
            "model": small_settings(name),
            "task": {"type": task},
            "train": {"epochs": 1, "batch_bags": 4, "monitor": "loss"},
            "report": {"num_slides": 1},
        }
    )
    results = train(config, world=World())
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(sum(first["losses"].values())) and first["loss"] != 0
    assert any(("BCE" if task == "binary" else "Cox") in loss for loss in first["losses"])
    assert ("auroc" if task == "binary" else "c_index") in results["test"] and "instance_auroc" in results["test"]
    predictor = Predictor(config.run_dir)
    source = Blobs(SIZES) if task == "binary" else SurvivalBlobs(SIZES)
    new = {b.entry.name: b for b in bags_of_source(source, source.entries(), predictor.settings, predictor.model.needs)}
    logits = {row["key"]: float(row["logit"]) for row in csv.DictReader((config.run_dir / "predictions.csv").open())}
    for info in open_store(config.data.shards).infos:
        if info.split == "test":
            # From the source again: the saved model makes its bags, graphs and all, as they were packed.
            alone, scores = predictor.predict(predictor.pack(new[info.name].read()[0]))
            assert alone.item() == pytest.approx(logits[info.name], abs=1e-4)
            assert scores.shape == (info.num_instances,)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_lower_the_loss(name, packed, tmp_path):
    config = build_config(
        {
            "name": name,
            "out": str(tmp_path),
            "data": {"shards": packed["binary"], "budget_instances": 200, "num_workers": 0},
            "model": small_settings(name),
            "task": {"type": "binary"},
            "optim": {"lr": 0.005, "warmup_epochs": 0, "schedule": "constant"},
            "train": {"epochs": 20, "batch_bags": 4, "monitor": "loss"},
        }
    )
    train(config, world=World())
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20  # one step an epoch, of all four bags
    # Where a model draws random numbers, losses go up and down: the mean of the last five.
    assert sum(losses[-5:]) / 5 < losses[0]
