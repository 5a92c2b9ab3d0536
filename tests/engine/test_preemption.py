"""A run that is asked to leave saves at once, ends with status 85, and goes on to the results of an unbroken run."""

import os
import signal

import pytest

from bigbag.config import Config
from bigbag.engine import preemption, trainer
from bigbag.engine.run import train
from bigbag.engine.world import World, launched


@pytest.fixture
def watching(monkeypatch):
    """SIGTERM and SIGUSR1 are listened to, and afterwards do what they did before."""
    monkeypatch.setattr(preemption, "_watching", False)
    monkeypatch.setattr(preemption, "_received", None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    preemption.watch()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_disturbed(settings: dict, monkeypatch, module, name: str, call: int, number: int) -> bytes:
    """Train, with a signal at the ``call``-th call of ``module.name``, and go on; returns ``results.json``."""
    config = Config.model_validate(settings | {"name": "disturbed"})
    original, calls = getattr(module, name), []

    def disturbed(*arguments, **keywords):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, disturbed)
    with pytest.raises(preemption.Preempted):
        train(config)
    assert not (config.run_dir / "results.json").exists()
    monkeypatch.setattr(preemption, "_received", None)
    train(config)
    return (config.run_dir / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("module", "name", "call", "number"),
    [
        pytest.param(trainer, "accumulate", 5, signal.SIGTERM, id="in a step"),
        pytest.param(trainer, "accumulate", 5, signal.SIGUSR1, id="in a step, SIGUSR1"),
        pytest.param(trainer, "accumulate", 6, signal.SIGTERM, id="in the last step of an epoch"),
        pytest.param(trainer, "predict_bags", 2, signal.SIGTERM, id="in validation"),
        pytest.param(trainer, "save_checkpoint", 2, signal.SIGTERM, id="while a checkpoint is written"),
    ],
)
def test_the_results_are_those_of_an_unbroken_run(run_settings, monkeypatch, watching, module, name, call, number):
    run_settings["train"]["epochs"] = 2
    unbroken = Config.model_validate(run_settings | {"name": "unbroken"})
    train(unbroken)
    results = run_disturbed(run_settings, monkeypatch, module, name, call, number)
    assert results == (unbroken.run_dir / "results.json").read_bytes()
    logs = [
        [line for line in (unbroken.run_dir.parent / run / "metrics.jsonl").read_text().splitlines() if '"val"' in line]
        for run in ("unbroken", "disturbed")
    ]
    assert logs[0] == logs[1]


def test_nobody_is_asked_without_listening(monkeypatch):
    monkeypatch.setattr(preemption, "_watching", False)
    monkeypatch.setattr(preemption, "_received", signal.SIGTERM)
    assert not preemption.asked_to_leave(World())


@pytest.mark.parametrize(
    ("tasks", "local_size"), [("2", "2"), ("4(x3)", "4"), ("2,1", "2")], ids=["one node", "equal nodes", "other nodes"]
)
def test_a_task_of_srun_is_a_rank(monkeypatch, tmp_path, tasks, local_size):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-9]" ] && printf "node7\\nnode8\\nnode9\\n"\n')
    scontrol.chmod(0o755)
    os.environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert not launched()
    os.environ["SLURM_NTASKS"] = "12"
    assert not launched(), "a batch script is not a task"
    slurm = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "12", "STEP_TASKS_PER_NODE": tasks, "STEP_ID": "0"}
    slurm |= {"STEP_NODELIST": "node[7-9]", "JOB_ID": "41"}
    os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
    assert launched()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        "5",
        "12",
        "1",
        "node7",
        "20410",
    ]
    assert os.environ["LOCAL_WORLD_SIZE"] == local_size
