"""``train.nonfinite: skip``: steps go on without the bags whose loss is not finite, the same on any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag
from bigbag.config import ConfigError, build_config
from bigbag.data import ShardStore
from bigbag.engine.backend import StepModule, TorchBackend
from bigbag.engine.feed import TrainingFeed
from bigbag.engine.losses import PendingLosses
from bigbag.engine.nonfinite import Skipping
from bigbag.engine.run import evaluate, open_configured_store, train
from bigbag.engine.step import accumulate
from bigbag.engine.world import World, start_world
from bigbag.models import build_model
from bigbag.testing import run_ranks

from .test_training import lines, losses, with_changes

BAD = ("train.2", "train.3")


def damage() -> None:
    """From now on two training bags are read as NaN, the smallest, which serves as filler, among them."""
    read = ShardStore.read

    def damaged(self: ShardStore, index: int) -> Bag:
        bag = read(self, index)
        return replace(bag, x=np.full_like(bag.x, np.nan)) if bag.key in BAD else bag

    ShardStore.read = damaged  # type: ignore[method-assign]


@pytest.fixture
def settings(run_settings, monkeypatch) -> dict:
    monkeypatch.setattr(ShardStore, "read", ShardStore.read)  # put back after the test
    damage()
    return with_changes(run_settings, train={"nonfinite": "skip", "epochs": 2}, model={"feat_ext": None})


def train_on_two_ranks(settings: dict) -> None:
    damage()
    world = start_world("deepspeed")
    for stage in (0, 3):
        changed = with_changes(settings, name=f"stage{stage}", engine={"backend": "deepspeed", "zero_stage": stage})
        train(build_config(changed), world=world)


@pytest.fixture
def alone(settings) -> Path:
    config = build_config(settings)
    train(config, world=World())
    return config.run_dir


def test_they_are_counted_named_and_logged(settings, alone):
    results = json.loads((alone / "results.json").read_text())
    assert results["skipped_bags"] == {"train.2": 2, "train.3": 2}
    logged = lines(alone, "skipped")
    assert sorted(key for line in logged for key in line["bags"]) == sorted(2 * BAD)
    assert losses(alone) and all(0 < loss < 10 for loss in losses(alone))
    curve = [line["train_loss"] for line in lines(alone, "epoch")]
    assert 0.1 < curve[1] < curve[0] < 1
    assert evaluate(build_config(settings))["skipped_bags"] == results["skipped_bags"]


def test_two_ranks_leave_out_the_same_bags(settings, alone):
    run_ranks(train_on_two_ranks, 2, settings)
    for stage in (0, 3):
        run_dir = alone.parent / f"stage{stage}"
        assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-4, abs=1e-5)
        skipped = [json.loads((folder / "results.json").read_text())["skipped_bags"] for folder in (run_dir, alone)]
        assert skipped[0] == skipped[1]


def test_the_gradient_is_that_of_the_other_bags(settings):
    """By hand, one good bag after the other: the sum of their gradients, divided by the number of all bags."""
    config = build_config(with_changes(settings, train={"batch_bags": 7}))
    store = open_configured_store(config)
    model = build_model(config.model, store.feature_shape, config.task)
    backend = TorchBackend(StepModule(model), config, World())
    feed = TrainingFeed(config, store, range(7), World())
    plan = feed.plan(0)
    skipping = Skipping(feed, 0, model, World())
    own = accumulate(feed.packs(plan, 0, 0), plan.steps[0], model, backend, World(), {}, skipping)
    pending = PendingLosses(World())
    pending.add(0, plan.steps[0], own, {})
    (found,) = pending.read()
    assert sorted(own.skipped) == sorted(BAD)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    good = [bag for bag in map(store.read, range(7)) if bag.key not in BAD]
    by_hand = []
    for bag in good:
        _, named = model.compute_loss(torch.tensor([bag.y]), torch.tensor(bag.x)[None])
        by_hand.append(sum(named.values()))
    (sum(by_hand) / 7).backward()
    for gradient, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
    assert found.num_bags == 5 and found.num_instances == plan.steps[0].num_instances
    assert found.total == pytest.approx(float(sum(by_hand).detach()) / 5, rel=1e-5)


def test_broken_weights_stop_the_run(settings, monkeypatch):
    def breaking_step(self, lr):
        with torch.no_grad():
            next(self.module.parameters()).fill_(float("nan"))

    monkeypatch.setattr(TorchBackend, "step", breaking_step)
    with pytest.raises(ValueError, match="the weights are to blame"):
        train(build_config(settings), world=World())


def test_by_default_the_run_stops_with_their_keys(settings):
    config = build_config(with_changes(settings, train={"nonfinite": "stop"}))
    with pytest.raises(ValueError, match=r"not finite in epoch 0.*train\.[23]"):
        train(config, world=World())


def test_a_loss_over_all_bags_can_not_skip_one(settings):
    from bigbag.engine.trainer import Trainer
    from bigbag.nn.survival import CoxLoss

    config = build_config(settings)
    store = open_configured_store(config)
    model = build_model(config.model, store.feature_shape, config.task)
    model.criterion = CoxLoss()
    with pytest.raises(ConfigError, match="train.nonfinite is skip, but CoxLoss"):
        Trainer(config, store, {"train": range(7)}, model, TorchBackend(StepModule(model), config, World()), World())
