"""Sampling, augmentation and patients in training: counted, and repeated exactly by a run that resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigbag import Bag
from bigbag.config import ConfigError, build_config
from bigbag.data import open_store, pack
from bigbag.data.sources import MemorySource
from bigbag.engine.backend import DeepSpeedBackend, TorchBackend
from bigbag.engine.feed import TrainingFeed
from bigbag.engine.run import train
from bigbag.engine.world import World, start_world
from bigbag.testing import run_ranks

SAMPLING = {"weights": "class_balanced", "num_bags": 8}
AUGMENT = {"mixup": 0.5, "instance_dropout": 0.2, "feature_noise": 0.05}


@pytest.fixture
def changed_settings(run_settings: dict) -> dict:
    run_settings["data"] |= {"sampling": SAMPLING, "augment": AUGMENT}
    run_settings["train"]["checkpoint_every_steps"] = 1
    return run_settings


def with_data(settings: dict, name: str, **data: object) -> dict:
    settings = copy.deepcopy(settings)
    settings["name"] = name
    settings["data"] |= data
    return settings


def lines(run_dir: Path, kind: str) -> list[dict]:
    everything = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in everything if line["kind"] == kind]


def train_alone(settings: dict) -> Path:
    config = build_config(settings)
    train(config, world=World())
    return config.run_dir


class Killed(Exception):
    """Stands for a process that dies."""


def dying(step: object, after: int) -> object:
    calls: list[float] = []

    def dying_step(self: object, lr: float) -> None:
        calls.append(lr)
        if len(calls) == after:
            raise Killed
        step(self, lr)  # type: ignore[operator]

    return dying_step


@pytest.mark.parametrize(("steps_until_death", "num_workers"), [(2, 2), (5, 0), (9, 1)])
def test_a_resumed_run_repeats_draws_and_augmentation(
    changed_settings: dict, monkeypatch: pytest.MonkeyPatch, steps_until_death: int, num_workers: int
) -> None:
    """Bitwise, also with another number of reading threads."""
    unbroken = train_alone(changed_settings)
    broken = with_data(changed_settings, "broken", num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "step", dying(TorchBackend.step, steps_until_death))
        with pytest.raises(Killed):
            train_alone(broken)
    run_dir = train_alone(with_data(broken, "broken", num_workers=num_workers))
    for file in ("results.json", "predictions.csv"):
        assert (run_dir / file).read_bytes() == (unbroken / file).read_bytes()
    assert [line["loss"] for line in lines(run_dir, "train")] == [line["loss"] for line in lines(unbroken, "train")]
    weights, expected = (load_file(d / "checkpoints/best/model.safetensors") for d in (run_dir, unbroken))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_is_drawn_and_changed_is_counted(changed_settings: dict) -> None:
    run_dir = train_alone(changed_settings)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["sampling"] == {"weights": "class_balanced", "training_bags": 7, "draws_per_epoch": 8}
    sizes = [50, 31, 120, 1, 44, 67, 29]
    left_out = sum(size - max(1, size - round(0.2 * size)) for size in sizes)
    assert results["augmentation_per_epoch"] == {
        "mixup": {"alpha": 0.5, "mixed_bags": 7},
        "instance_dropout": {"share": 0.2, "instances_left_out": left_out},
        "feature_noise": {"std": 0.05, "instances": sum(sizes) - left_out},
    }
    for line in lines(run_dir, "epoch"):
        assert line["sampling"]["draws"] == 8 and 1 <= line["sampling"]["distinct"] <= 7
    plain = train_alone(with_data(changed_settings, "plain", sampling=None, augment={}))
    assert not {"sampling", "augmentation_per_epoch"} & json.loads((plain / "results.json").read_text()).keys()


def test_labels_that_cannot_be_mixed(changed_settings: dict) -> None:
    settings = copy.deepcopy(changed_settings)
    settings["task"] = {"type": "multiclass", "num_outputs": 2}
    with pytest.raises(ConfigError, match="multiclass do not allow"):
        build_config(settings)
    settings = copy.deepcopy(changed_settings)
    settings["model"] = {"name": "CLAM_SB"}
    with pytest.raises(ConfigError, match="CLAM_SB takes them for classes"):
        train_alone(settings)


def test_patients_are_trained_and_predicted(tmp_path: Path, run_settings: dict) -> None:
    rng = np.random.default_rng(0)
    bags, splits, patients = [], [], []
    for i in range(24):
        y = (i // 2) % 2
        bags.append(Bag(rng.normal(y, 1, (20 + i, 6)).astype(np.float32), y=y, key=f"slide{i}"))
        splits.append(("train", "val", "test")[(i // 4) % 3])
        patients.append(f"patient{i // 2}")
    pack(MemorySource(bags, splits, patients), tmp_path / "set", progress=False)
    settings = with_data(run_settings, "patients", shards=str(tmp_path / "set"), bag="patient")
    settings["report"] = {"num_slides": 0}
    run_dir = train_alone(settings)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["test"]["num_bags"] == 4 and results["test"]["auroc"] == 1.0
    rows = (run_dir / "predictions.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[0] for row in rows if ",test," in row) == [
        "patient10",
        "patient11",
        "patient4",
        "patient5",
    ]


def steps_of(settings: dict, world_size: int) -> list[list[tuple[int, int]]]:
    config = build_config(settings)
    store = open_store(config.data.shards)
    bags = [i for i, info in enumerate(store.infos) if info.split == "train"]
    plan = TrainingFeed(config, store, bags, World(size=world_size)).plan(2)
    return [
        sorted(pair for m in step.micro_steps for p in m if not p.is_filler for pair in zip(p.bags, p.draws))
        for step in plan.steps
    ]


@pytest.mark.parametrize("sampling", [None, SAMPLING])
def test_another_number_of_ranks_has_the_same_bags_in_every_step(run_settings: dict, sampling: dict | None) -> None:
    settings = with_data(run_settings, "run", sampling=sampling, augment=AUGMENT)
    assert steps_of(settings, 1) == steps_of(settings, 2) == steps_of(settings, 5)


def train_ranks(settings: dict, die_after: int | None) -> Sequence[float]:
    world = start_world("deepspeed")
    config = build_config(settings)
    step = DeepSpeedBackend.step
    if die_after is not None:
        DeepSpeedBackend.step = dying(step, die_after)  # type: ignore[method-assign, assignment]
        with pytest.raises(Killed):
            train(config, world=world)
        return []
    train(config, world=world)
    return [line["loss"] for line in lines(config.run_dir, "train")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_resumes_in_mid_epoch_on_another_number_of_ranks(changed_settings: dict, stage: int) -> None:
    """Two ranks, then one (then three): the losses of one rank, to the rounding of sums in another order."""
    changed_settings["model"]["feat_ext"]["dropout"] = 0.0
    changed_settings["engine"] = {"backend": "deepspeed", "zero_stage": stage}
    broken = with_data(changed_settings, "broken")
    run_ranks(train_ranks, 2, broken, 4)  # dies in its fourth step: three an epoch
    if stage == 0:
        run_ranks(train_ranks, 1, broken, 3)
    found = run_ranks(train_ranks, 3 if stage in (0, 3) else 1, broken, None)[0]
    changed_settings["engine"] = {"backend": "torch"}
    expected = [line["loss"] for line in lines(train_alone(changed_settings), "train")]
    assert len(found) == len(expected) == 12 and found == pytest.approx(expected, rel=2e-4, abs=1e-5)
