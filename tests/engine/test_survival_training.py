"""Survival: one risk set over the packs and ranks of a step, and a run from labels to report."""

from __future__ import annotations

import copy
import csv
import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigbag import PackedBags
from bigbag.config import ConfigError, build_config
from bigbag.data import open_store, pack
from bigbag.data.sources.base import SourceEntry
from bigbag.engine.metrics import concordance_index
from bigbag.engine.run import train
from bigbag.engine.world import World, start_world
from bigbag.models import MODELS, build_model
from bigbag.models.abmil import ABMIL
from bigbag.nn.survival import CoxLoss, cox_loss
from bigbag.testing import run_ranks
from bigbag.visualize import write_report

from .conftest import Blobs

SIZES = {
    "train": [50, 31, 120, 1, 44, 67, 29, *range(30, 47)],
    "val": [40, 30, 25, 60, 33, 27],
    "test": [*range(24, 40)],
}


class SurvivalBlobs(Blobs):
    """Bags with shifted instances die early; one bag in four is censored."""

    def entries(self) -> list[SourceEntry]:
        def label(number: int, positive: int) -> list[float]:
            return [1.0 + number % 3 + 20.0 * (1 - positive), float(number % 4 != 3)]

        return [replace(e, label=label(i // 2, i % 2), patient=None) for i, e in enumerate(super().entries())]

    def load(self, entry: SourceEntry):
        return super().load(replace(entry, label=int(entry.label[0] < 20)))


class Twice(ABMIL):
    """Two terms by the criterion, one of them weighted."""

    def compute_loss(self, Y, X, *args, **kwargs):
        Y_pred, named = super().compute_loss(Y, X)
        return Y_pred, {**named, "Flattened": 0.5 * self.bag_loss(Y_pred.tanh(), Y)}


Twice.__signature__ = inspect.signature(ABMIL)


@pytest.fixture(scope="module")
def survival_shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("survival") / "shards"
    pack(SurvivalBlobs(SIZES), folder, progress=False)
    return str(folder)


@pytest.fixture
def settings(run_settings, survival_shards) -> dict:
    run_settings["data"]["shards"] = survival_shards
    run_settings["task"] = {"type": "survival"}
    run_settings["train"] |= {"batch_bags": 5, "epochs": 6}
    return run_settings


def changed(settings: dict, name: str, **sections: dict) -> dict:
    settings = copy.deepcopy(settings) | {"name": name}
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return settings


def train_lines(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def losses(run_dir: Path) -> list[float]:
    return [line["losses"]["CoxLoss"] for line in train_lines(run_dir)]


def check_weights(run_dir: Path, reference: Path) -> None:
    weights, expected = (load_file(d / "checkpoints/best/model.safetensors") for d in (run_dir, reference))
    for name in expected:
        # Cox's loss doesn't change with a constant, so the last bias has rounding for a gradient, which Adam blows up.
        if not (name.startswith("classifier") and name.endswith("bias")):
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-4)


def train_alone(settings: dict) -> Path:
    config = build_config(settings)
    train(config, world=World())
    return config.run_dir


def train_every_stage(settings: dict, stages: tuple[int, ...]) -> None:
    world = start_world("deepspeed")
    for stage in stages:
        engine = {"backend": "deepspeed", "zero_stage": stage}
        train(build_config(changed(settings, f"stage{stage}", engine=engine)), world=world)


def test_one_risk_set_whatever_the_packs(settings):
    """One pack a step (its graph is kept) or one a bag (computed twice): the same losses and weights."""
    settings["model"]["feat_ext"]["dropout"] = 0.0
    whole = train_alone(changed(settings, "whole", data={"budget_instances": 10_000}))
    split = train_alone(changed(settings, "split", data={"budget_instances": 1}))
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4, abs=1e-5)
    assert losses(whole)[-1] < losses(whole)[0]
    check_weights(split, whole)


def test_first_step_is_coxs_loss_of_its_bags(settings):
    settings["train"]["batch_bags"] = 24
    settings["model"]["feat_ext"]["dropout"] = 0.0
    config = build_config(settings)
    logged = losses(train_alone(settings))[0]
    store = open_store(config.data.shards)
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.feature_shape, config.task)
    bags = [store.read(i) for i, info in enumerate(store.infos) if info.split == "train"]
    with torch.no_grad():
        h = model(PackedBags.from_bags(bags))
    labels = torch.tensor([bag.y for bag in bags])
    assert logged == pytest.approx(cox_loss(h, labels[:, 0], labels[:, 1]).item(), abs=1e-5)


def test_dropout_is_the_same_in_both_passes(settings, monkeypatch):
    """The logits that the gradient is taken at are those that it is sent back through."""
    seen: list[torch.Tensor] = []
    stand_in = CoxLoss.forward

    def watched(self, Y_pred, Y):
        if self.stand_in is not None:
            seen.append(Y_pred.detach())
        return stand_in(self, Y_pred, Y)

    monkeypatch.setattr(CoxLoss, "forward", watched)
    settings["train"] |= {"epochs": 1, "batch_bags": 24}
    settings["model"]["feat_ext"]["dropout"] = 0.5
    train_alone(settings)
    num_packs = len(seen) // 2
    assert num_packs > 5 and all(torch.equal(a, b) for a, b in zip(seen[:num_packs], seen[num_packs:], strict=True))


def test_a_model_may_ask_its_criterion_twice(settings, monkeypatch):
    """Each call has its own risk set over the step, as with one pack."""
    monkeypatch.setitem(MODELS, "Twice", Twice)
    settings["model"] = {"name": "Twice", "att_dim": 8}
    whole = train_alone(changed(settings, "whole", data={"budget_instances": 10_000}))
    split = train_alone(changed(settings, "split", data={"budget_instances": 1}))
    for a, b in zip(train_lines(whole), train_lines(split), strict=True):
        assert set(a["losses"]) == {"CoxLoss", "Flattened"} and a["losses"]["CoxLoss"] != a["losses"]["Flattened"]
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-4, abs=1e-5)
    check_weights(split, whole)


@pytest.mark.slow
def test_one_risk_set_whatever_the_ranks(settings):
    settings["model"]["feat_ext"]["dropout"] = 0.0
    settings["train"]["epochs"] = 3
    run_ranks(train_every_stage, 2, settings, (0, 1, 2, 3))
    alone = train_alone(settings)
    for stage in (0, 1, 2, 3):
        run_dir = alone.parent / f"stage{stage}"
        assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-4, abs=1e-5)
        check_weights(run_dir, alone)


@pytest.mark.parametrize("task", [{"type": "survival"}, {"type": "survival_discrete", "num_outputs": 3, "alpha": 0.2}])
def test_results_predictions_and_report(settings, task):
    settings["task"] = task
    settings["train"] |= {"epochs": 20, "batch_bags": 8, "monitor": "loss"}
    settings["optim"]["lr"] = 0.05
    run_dir = train_alone(settings)
    results = json.loads((run_dir / "results.json").read_text())
    rows = [row for row in csv.DictReader((run_dir / "predictions.csv").open()) if row["split"] == "test"]
    labels = np.array([json.loads(row["label"]) for row in rows])
    if task["type"] == "survival":
        risk = np.array([float(row["logit"]) for row in rows])
    else:
        risk = -np.array([[float(row[f"probability_{k}"]) for k in range(3)] for row in rows]).sum(1)
        hazards = 1 / (1 + np.exp(-np.array([[float(row[f"logit_{k}"]) for k in range(3)] for row in rows])))
        np.testing.assert_allclose(-risk, np.cumprod(1 - hazards, 1).sum(1), rtol=1e-5)
    c_index = concordance_index(labels[:, 0], labels[:, 1], risk)
    assert results["test"]["c_index"] == pytest.approx(c_index) and c_index > 0.7
    assert results["test"]["num_events"] == labels[:, 1].sum() and results["test"]["num_bags"] == 16
    page = write_report(run_dir).read_text()
    assert "oncordance index" in page and f"{c_index:.3f}" in page


def test_labels_are_checked(settings, shards, survival_shards, tmp_path):
    with pytest.raises(ValueError, match=r"label 0 has 1 values, expected 2 for task.type survival"):
        train_alone(changed(settings, "a", data={"shards": shards}))
    source = SurvivalBlobs(SIZES)
    entries = source.entries()
    source.entries = lambda: [replace(e, label=[e.label[0], 0.0]) for e in entries]  # type: ignore[method-assign]
    pack(source, tmp_path / "censored", progress=False)
    with pytest.raises(ValueError, match="no training bag has an observed event"):
        train_alone(changed(settings, "b", data={"shards": str(tmp_path / "censored")}))
    source.entries = lambda: [  # type: ignore[method-assign]
        replace(e, label=[e.label[0], float(e.split != "val")]) for e in entries
    ]
    pack(source, tmp_path / "val", progress=False)
    with pytest.raises(ConfigError, match=r"monitor is c_index, but no validation bag has an observed event"):
        train_alone(changed(settings, "c", data={"shards": str(tmp_path / "val")}))


def test_concordance_index_by_pairs():
    rng = np.random.default_rng(0)
    time, event, risk = rng.integers(1, 9, 60), rng.integers(0, 2, 60), rng.integers(0, 6, 60)
    right = pairs = 0.0
    for i in range(60):
        for j in range(60):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    assert concordance_index(time, event, risk) == pytest.approx(right / pairs)
    assert concordance_index(time, np.zeros(60), risk) is None
    assert concordance_index(np.array([1, 2, 3]), np.array([1, 1, 1]), np.array([3, 2, 1])) == 1.0
