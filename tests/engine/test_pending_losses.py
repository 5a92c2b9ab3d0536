"""Losses stay on the device until they are logged, and what depends on them comes out the same."""

import re

import pytest
import torch
from safetensors.torch import load_file

import bigbag.engine.step as step_module
from bigbag.config import build_config
from bigbag.engine.backend import StepModule, TorchBackend
from bigbag.engine.checkpoint import Progress
from bigbag.engine.run import open_configured_store, train
from bigbag.engine.trainer import Trainer
from bigbag.engine.world import World
from bigbag.models import build_model
from tests.host_reads import watched

from .test_nonfinite import damage
from .test_training import lines, losses, train_alone, with_changes


def trainer_of(settings: dict) -> Trainer:
    config = build_config(settings)
    config.run_dir.mkdir(parents=True)
    store = open_configured_store(config)
    model = build_model(config.model, store.feature_shape, config.task)
    backend = TorchBackend(StepModule(model), config, World())
    trainer = Trainer(config, store, {"train": tuple(range(7))}, model, backend, World())
    trainer.start(Progress())
    return trainer


@pytest.mark.parametrize(("every", "reads"), [(1, 3), (2, 2), (100, 2)])
def test_an_epoch_waits_for_the_device_only_to_log(run_settings, monkeypatch, every, reads):
    """3 steps, of which every ``every``-th is logged from the first on; the end of the epoch looks at the rest."""
    trainer = trainer_of(with_changes(run_settings, train={"log_every_steps": every}))
    with watched([*trainer.model.parameters(), *trainer.model.buffers()]) as device:
        to_device = step_module.to_device

        def noted(*args):
            bags = to_device(*args)
            device.take([value for value in vars(bags).values() if isinstance(value, torch.Tensor)])
            return bags

        monkeypatch.setattr(step_module, "to_device", noted)
        done = Progress()
        trainer.train_epoch(done)
    trainer.log.close()
    assert done.step == 3 and done.num_bags == 7 and done.loss_sum > 0
    assert dict(device.reads) == {"tolist": reads}


def test_how_often_they_are_looked_at_changes_nothing(run_settings):
    often, seldom = (
        train_alone(with_changes(run_settings, name=f"every{n}", train={"log_every_steps": n, "epochs": 2}))
        for n in (1, 5)
    )
    assert losses(seldom) == losses(often)[::5] and len(losses(often)) == 6
    assert [e["train_loss"] for e in lines(seldom, "epoch")] == [e["train_loss"] for e in lines(often, "epoch")]
    weights = [load_file(run / "checkpoints/best/model.safetensors") for run in (often, seldom)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_not_finite_is_named_late_but_before_anything_is_saved(run_settings, monkeypatch):
    """Its step breaks the weights, and with them the losses of later steps; only its own bags are named."""
    from bigbag.data import ShardStore

    monkeypatch.setattr(ShardStore, "read", ShardStore.read)  # put back after the test
    damage()
    messages = []
    for every in (1, 100):
        settings = with_changes(run_settings, name=f"every{every}", train={"log_every_steps": every})
        config = build_config(with_changes(settings, model={"feat_ext": None}))
        with pytest.raises(ValueError, match="the training loss is not finite in epoch 0") as caught:
            train(config, world=World())
        messages.append(str(caught.value))
        assert not any((config.run_dir / "checkpoints").iterdir())
    assert messages[0] == messages[1] and re.search(r"train\.[23]", messages[0])
    assert len(re.findall(r"'train\.\d'", messages[0])) <= 3
