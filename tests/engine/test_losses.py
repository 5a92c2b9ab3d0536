"""Named losses, their coefficients, and the hook after each step."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from bigbag.config import ConfigError, build_config
from bigbag.engine.annealing import CyclicalAnnealingScheduler, LinearAnnealingScheduler, build_schedulers
from bigbag.engine.run import train
from bigbag.engine.world import World, start_world
from bigbag.models import MODELS, load_model
from bigbag.models.abmil import ABMIL
from bigbag.testing import run_ranks


class TwoLosses(ABMIL):
    """ABMIL with a second loss, and a count of its steps."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def compute_loss(self, Y, X, *args, **kwargs):
        Y_pred, losses = super().compute_loss(Y, X)
        return Y_pred, {**losses, "Penalty": (Y_pred**2).mean() + 1.0}

    def after_step(self) -> None:
        assert not torch.is_grad_enabled()
        self.num_steps += 1


TwoLosses.__signature__ = __import__("inspect").signature(ABMIL)


@pytest.fixture
def settings(run_settings, monkeypatch) -> dict:
    monkeypatch.setitem(MODELS, "TwoLosses", TwoLosses)
    run_settings["model"] = {"name": "TwoLosses", "att_dim": 8}
    return run_settings


def steps(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def train_alone(settings: dict, name: str, **train_section: object) -> Path:
    settings = copy.deepcopy(settings) | {"name": name}
    settings["train"] |= train_section
    config = build_config(settings)
    train(config, world=World())
    return config.run_dir


def test_every_loss_is_logged_and_weighted(settings):
    plain = steps(train_alone(settings, "plain"))
    assert len(plain) == 12
    for line in plain:
        assert set(line["losses"]) == {"BCEWithLogitsLoss", "Penalty"} and line["losses"]["Penalty"] >= 1
        assert line["loss"] == pytest.approx(sum(line["losses"].values())) and "coefficients" not in line
    schedule = {"schedule": "linear", "coef_init": 0.5, "coef_end": 2.0, "n_steps": 6}
    annealed = steps(train_alone(settings, "annealed", loss_coefficients={"Penalty": schedule}))
    coefficients = [line["coefficients"]["Penalty"] for line in annealed]
    assert coefficients == pytest.approx([0.5, 0.75, 1.0, 1.25, 1.5, 1.75] + [2.0] * 6)
    for line, coefficient in zip(annealed, coefficients):
        named = line["losses"]
        assert line["loss"] == pytest.approx(named["BCEWithLogitsLoss"] + coefficient * named["Penalty"])
    assert annealed[0]["losses"] == plain[0]["losses"] and annealed[-1]["losses"] != plain[-1]["losses"]


def test_a_coefficient_of_zero_takes_the_loss_out_of_the_gradient(settings):
    off = steps(train_alone(settings, "off", loss_coefficients={"Penalty": {"schedule": "constant", "coef": 0.0}}))
    settings["model"]["name"] = "ABMIL"
    without = steps(train_alone(settings, "without"))
    assert [line["losses"]["BCEWithLogitsLoss"] for line in off] == [line["loss"] for line in without]


def test_annealing_goes_on_after_a_resume(settings, monkeypatch):
    from bigbag.engine.backend import TorchBackend

    schedule = {"schedule": "cyclical", "cycle_len": 4, "max_coef": 3.0, "warmup_steps": 1}
    whole = train_alone(settings, "whole", loss_coefficients={"Penalty": schedule})
    step, calls = TorchBackend.step, []

    def dying_step(self, lr):
        calls.append(lr)
        if len(calls) == 8:
            raise KeyboardInterrupt
        step(self, lr)

    monkeypatch.setattr(TorchBackend, "step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        train_alone(settings, "broken", loss_coefficients={"Penalty": schedule})
    monkeypatch.setattr(TorchBackend, "step", step)
    broken = train_alone(settings, "broken", loss_coefficients={"Penalty": schedule})
    assert [line["coefficients"] for line in steps(broken)] == [line["coefficients"] for line in steps(whole)]
    assert [line["loss"] for line in steps(broken)] == [line["loss"] for line in steps(whole)]


def test_an_unknown_loss_is_refused(settings):
    with pytest.raises(ConfigError, match=r"no loss 'KLDiv'; it has BCEWithLogitsLoss, Penalty"):
        train_alone(settings, "x", loss_coefficients={"KLDiv": {"schedule": "constant"}})
    with pytest.raises(ConfigError, match="loss_coefficients"):
        train_alone(settings, "x", loss_coefficients={"KLDiv": {"schedule": "linear", "steps": 3}})


def train_two_losses(settings: dict) -> None:
    MODELS["TwoLosses"] = TwoLosses
    world = start_world("deepspeed")
    for stage in (0, 3):
        changed = settings | {"name": f"stage{stage}", "engine": {"backend": "deepspeed", "zero_stage": stage}}
        train(build_config(changed), world=world)


def test_the_hook_runs_once_a_step(settings):
    run_dir = train_alone(settings, "alone", monitor="loss", epochs=1)
    assert load_model(run_dir).num_steps == 3


@pytest.mark.slow
def test_the_hook_runs_once_a_step_under_deepspeed(settings):
    settings["train"]["epochs"] = 1
    run_ranks(train_two_losses, 2, settings)
    alone = steps(train_alone(settings, "alone"))
    for stage in (0, 3):
        run_dir = Path(settings["out"]) / f"stage{stage}"
        assert load_model(run_dir).num_steps == 3
        for line, expected in zip(steps(run_dir), alone, strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=2e-4)


def test_schedulers_are_torchmils():
    torchmil = pytest.importorskip("torchmil.utils")
    cases = [
        ("LinearAnnealingScheduler", LinearAnnealingScheduler, {"coef_init": 0.2, "coef_end": 1.5, "n_steps": 7}),
        ("CyclicalAnnealingScheduler", CyclicalAnnealingScheduler, {"cycle_len": 5, "min_coef": 0.1, "max_coef": 2.0}),
        (
            "CyclicalAnnealingScheduler",
            CyclicalAnnealingScheduler,
            {"cycle_len": 6, "cycle_prop": 0.9, "warmup_steps": 3},
        ),
    ]
    for name, cls, arguments in cases:
        own, theirs = cls(**arguments), getattr(torchmil, name)(**arguments)
        for _ in range(20):
            assert own() == pytest.approx(theirs())
            own.step()
            theirs.step()
    assert build_schedulers({}, 5) == {}
