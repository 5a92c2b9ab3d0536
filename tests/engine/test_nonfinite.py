"""A loss that is not finite: the run stops and names the bags, or goes on without them, on any number of ranks."""

import copy
import json
import logging

import numpy as np
import pytest
import torch

from bigbag import Bag
from bigbag.config import ConfigError, build_config
from bigbag.data import MemoryStore, split_bags
from bigbag.engine.backend import build_backend
from bigbag.engine.feed import TrainingFeed
from bigbag.engine.run import train
from bigbag.engine.step import accumulate
from bigbag.engine.world import World, start_world
from bigbag.models import build_model
from bigbag.testing import run_ranks

SIZES = {"train": [30, 12, 25, 7, 18, 40], "val": [9, 14, 11, 8]}
BAD = ("train.1", "train.4")


def make_store() -> MemoryStore:
    bags, splits = [], []
    for split, sizes in SIZES.items():
        for i, size in enumerate(sizes):
            rng = np.random.default_rng(len(bags))
            x = rng.normal(size=(size, 6)).astype(np.float32) + i % 2
            if f"{split}.{i}" in BAD:
                x[size // 2, 3] = np.nan
            bags.append(Bag(x, i % 2, f"{split}.{i}"))
            splits.append(split)
    return MemoryStore(bags, splits)


@pytest.fixture
def settings(run_settings) -> dict:
    """Packs of one bag each."""
    changed = copy.deepcopy(run_settings)
    changed["model"]["feat_ext"]["dropout"] = 0.0
    changed["data"].update({"budget_instances": 1, "num_workers": 0})
    changed["train"].update({"epochs": 2, "batch_bags": 3, "nonfinite_loss": "skip"})
    return changed


def test_stopping_names_the_bag(settings):
    settings["train"]["nonfinite_loss"] = "stop"
    with pytest.raises(ValueError, match=r"bags \['train.[14]'.*set train.nonfinite_loss=skip"):
        train(build_config(settings), make_store(), World())


def test_the_gradient_is_that_of_the_other_bags(settings):
    config, store, world = build_config(settings), make_store(), World()
    model = build_model(config.model, store.feature_shape, config.task)
    bags = split_bags(store, config.data.splits)["train"]
    settings["train"]["batch_bags"] = 6
    feed = TrainingFeed(build_config(settings), store, bags, world)
    plan = feed.plan(0)
    backend = build_backend("torch", model, config, world)
    losses, _, sums = accumulate(feed.packs(plan, 0, 0), plan.steps[0], model, backend, world, {}, skip_nonfinite=True)
    assert sorted(sums.skipped) == list(BAD)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = torch.zeros(())
    for bag in (store.read(number) for number in bags):
        if bag.key not in BAD:
            y = torch.tensor([float(bag.y)])
            total = total + model.compute_loss(y, torch.from_numpy(bag.x)[None])[1]["BCEWithLogitsLoss"] / 6
    total.backward()
    assert sum(losses.values()) == pytest.approx(total.item(), rel=1e-5)
    for gradient, p in zip(found, model.parameters()):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)


def train_and_listen(settings: dict, backend: str, ranks: bool) -> tuple[dict, list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bigbag.engine.trainer").addHandler(handler)
    world = start_world(backend) if ranks else World()
    results = train(build_config({**settings, "engine": {"backend": backend}}), make_store(), world)
    return results, said


def test_a_run_goes_on_without_them_and_counts(settings):
    results, said = train_and_listen({**settings, "name": "alone"}, "torch", ranks=False)
    assert results["skipped_nonfinite"] == dict.fromkeys(BAD, 2)
    named = [name for line in said for name in line.split("left out, for a loss that is not finite: ")[1].split(", ")]
    assert sorted(named) == sorted(2 * BAD)
    folder = build_config({**settings, "name": "alone"}).run_dir
    saved = json.loads((folder / "results.json").read_text())
    assert saved["skipped_nonfinite"] == results["skipped_nonfinite"] and np.isfinite(saved["val"]["loss"])
    for backend in ("torch", "deepspeed"):
        (of_first, _), (_, nothing) = run_ranks(train_and_listen, 2, {**settings, "name": backend}, backend, True)
        assert of_first["skipped_nonfinite"] == results["skipped_nonfinite"] and nothing == []
        assert of_first["val"]["loss"] == pytest.approx(results["val"]["loss"], rel=1e-4)


def test_what_cannot_be_left_out(settings):
    settings["task"] = {"type": "survival"}
    store = make_store()
    bags = [Bag(store.read(i).x, (float(i + 1), 1), f"bag{i}") for i in range(len(store))]
    with pytest.raises(ConfigError, match="Cox's loss compares all bags of a step"):
        train(build_config(settings), MemoryStore(bags, [info.split for info in store.infos]), World())
