"""Every model through the engine: packed with graphs, trained, evaluated, loaded again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbag import PackedBags
from bigbag.bench.training import make_trainer
from bigbag.config import GraphConfig, build_config, load_config
from bigbag.data import open_store, pack
from bigbag.datasets.registry import open_source
from bigbag.engine.checkpoint import Progress
from bigbag.engine.new_bags import bags_of_source
from bigbag.engine.predict import Predictor
from bigbag.engine.run import train
from bigbag.engine.step import total_loss
from bigbag.engine.trainer import Trainer
from bigbag.engine.world import World
from bigbag.evaluation.compare import model_settings
from bigbag.models import MODELS

from .conftest import Blobs
from .test_survival_training import SurvivalBlobs

SIZES = {"train": [20, 31, 9, 24], "val": [20, 30, 15, 25], "test": [20, 12, 25, 40]}
RECIPE = Path(__file__).parents[2] / "configs" / "digits_models.yaml"
COMPARISON = load_config(RECIPE)


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


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """Six small slides of ``configs/digits_models.yaml``, three of them positive, with graphs."""
    pytest.importorskip("sklearn")
    out = str(tmp_path_factory.mktemp("digits") / "shards")
    assert COMPARISON.data.source is not None
    recipe = COMPARISON.data.source.model_dump() | {"num_train": 2, "num_val": 2, "num_test": 2, "max_instances": 700}
    pack(open_source(**recipe), out, progress=False, graph=COMPARISON.data.graph)
    return out


def loss_in_eval(trainer: Trainer) -> float:
    """The mean loss of all bags with the weights as they are; models that draw numbers draw the same ones again."""
    bags = PackedBags.from_bags([trainer.store.read(number) for number in range(len(trainer.store))])
    coefficients = {name: schedule() for name, schedule in trainer.annealing.items()}
    with torch.no_grad():
        losses = trainer.model.eval().compute_loss(bags.y, bags)[1]
    return float(total_loss(losses, coefficients))


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_on_digits_lower_the_loss(name, digits, tmp_path):
    """The recipe of ``bigbag compare --config configs/digits_models.yaml``; a step an epoch, of the same six slides."""
    overrides = (*COMPARISON.compare.overrides.get(name, ()), f"model={json.dumps(model_settings(COMPARISON, name))}")
    settings = (f"out={tmp_path}", f"data.shards={digits}", "train.epochs=20", "train.batch_bags=6")
    trainer = make_trainer(load_config(RECIPE, (*overrides, *settings)), "torch", World())
    assert trainer.steps_per_epoch == 1
    before = loss_in_eval(trainer)
    for epoch in range(20):
        trainer.train_epoch(Progress(epoch))
    trainer.log.close()
    assert loss_in_eval(trainer) < before
