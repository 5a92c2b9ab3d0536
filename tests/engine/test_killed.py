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

from bigbag.testing import free_port

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
def test_same_command_resumes_after_kill_9(run_settings, tmp_path):
    run_settings["train"] |= {"epochs": 60, "checkpoint_every_steps": 2}
    run_settings["engine"] = {"zero_stage": 1}
    configs = {}
    for name in ("unbroken", "broken"):
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump({**run_settings, "name": name}))
    runs = Path(run_settings["out"])

    launcher = start(configs["broken"])
    wait_for_step(launcher, runs / "broken/metrics.jsonl", 16)
    victim = rank_process(launcher, 1)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=300) != 0
    assert not (runs / "broken/results.json").exists()

    finished = {}
    for name, config in configs.items():
        process = start(config)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        finished[name] = (runs / name / "results.json").read_bytes()
    assert finished["broken"] == finished["unbroken"]
    steps = [
        [line["step"] for line in map(json.loads, (runs / name / "metrics.jsonl").open()) if line["kind"] == "train"]
        for name in configs
    ]
    assert steps[0] == steps[1] == list(range(180))
