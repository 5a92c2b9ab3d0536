"""kill -9 of a rank under the DeepSpeed launcher: the same command resumes and ends with the same results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from bigbag.config import build_config
from bigbag.engine.run import train
from bigbag.engine.world import start_world
from bigbag.testing import free_port, run_ranks

ROOT = Path(__file__).parents[2]
EPOCHS = 20


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / "launch/train.py"), "--config", str(config)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process | None:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if any("train.py" in part for part in child.cmdline()) and child.environ().get("RANK") == str(rank):
            return child
    return None


def wait_for_step(launcher: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and launcher.poll() is None:
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was never reached:\n{launcher.communicate()[0]}")


def train_unbroken(settings: dict) -> None:
    train(build_config(settings), world=start_world("deepspeed"))


@pytest.mark.slow
def test_same_command_resumes_after_kill_9(run_settings, tmp_path):
    run_settings["train"] |= {"epochs": EPOCHS, "checkpoint_every_steps": 2}
    run_settings["engine"] = {"zero_stage": 1, "threads": 1}
    unbroken, broken = ({**run_settings, "name": name} for name in ("unbroken", "broken"))
    config = tmp_path / "broken.yaml"
    config.write_text(yaml.safe_dump(broken))
    runs = Path(run_settings["out"])

    launcher = start(config)
    wait_for_step(launcher, runs / "broken/metrics.jsonl", 16)
    victim = rank_process(launcher, 1)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=300) != 0
    assert not (runs / "broken/results.json").exists()

    launcher = start(config)
    output, _ = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, output
    run_ranks(train_unbroken, 2, unbroken, timeout_s=300)
    for name in ("unbroken", "broken"):
        lines = map(json.loads, (runs / name / "metrics.jsonl").open())
        assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(3 * EPOCHS)), name
    assert (runs / "broken/results.json").read_bytes() == (runs / "unbroken/results.json").read_bytes()
