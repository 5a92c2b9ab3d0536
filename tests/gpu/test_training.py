"""Whole runs on one device, through the launcher of DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml

from bigbag import Bag
from bigbag.config import GraphConfig
from bigbag.data import pack
from bigbag.data.sources.base import SourceEntry
from bigbag.testing import free_port
from tests.engine.conftest import Blobs
from tests.gpu.device import DEVICE

ROOT = Path(__file__).parents[2]
LONG_BAG, LONG_WIDTH = (100_000, 512) if DEVICE == "cuda" else (3000, 16)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


class LongBags:
    """Bags of one size whose positive ones have a thousandth of their instances shifted."""

    patch_shape = None
    splits: ClassVar = {"train": 8, "val": 4, "test": 4}

    def entries(self) -> list[SourceEntry]:
        return [SourceEntry(f"{s}.{i}", s, label=i % 2) for s, count in self.splits.items() for i in range(count)]

    def load(self, entry: SourceEntry) -> Bag:
        rng = np.random.default_rng(sum(map(ord, entry.name)))
        x = rng.standard_normal((LONG_BAG, LONG_WIDTH), dtype=np.float32)
        x[: LONG_BAG // 1000, :8] += 6.0 * entry.label
        coords = np.stack(np.divmod(np.arange(LONG_BAG), 300), 1)
        return Bag(x.astype(np.float16), entry.label, entry.name, coords.astype(np.int32))

    def description(self) -> dict[str, Any]:
        return {"splits": self.splits, "size": LONG_BAG, "width": LONG_WIDTH}


def launch(settings: dict[str, Any], folder: Path, environment: dict[str, str], *overrides: str) -> Path:
    """``deepspeed launch/train.py`` on one device; the run's folder."""
    path = folder / f"{settings['name']}.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    command += [str(ROOT / "launch/train.py"), "--config", str(path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return Path(settings["out"]) / settings["name"]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def check_device(run: Path) -> None:
    devices = json.loads((run / "environment.json").read_text())["devices"]
    assert devices["device"] == (torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")


@needs_deepspeed
def test_every_zero_stage_trains_alike_in_bfloat16(tmp_path: Path, launcher_environment: dict[str, str]) -> None:
    shards = str(tmp_path / "shards")
    pack(Blobs({"train": [500, 310, 1200, 10], "val": [400, 300], "test": [200, 300]}), shards, progress=False)
    settings = {
        "out": str(tmp_path / "runs"),
        "data": {"shards": shards, "budget_instances": 1000, "num_workers": 1},
        "model": {"name": "ABMIL", "gated": True, "att_dim": 16},
        "optim": {"lr": 0.02},
        "train": {"epochs": 3, "batch_bags": 2, "precision": "bf16", "log_every_steps": 1},
    }
    runs = [
        launch(settings | {"name": f"zero{stage}", "engine": {"zero_stage": stage}}, tmp_path, launcher_environment)
        for stage in range(4)
    ]
    curve = losses(runs[0])
    assert len(curve) == 6 and curve[-1] < curve[0]
    for stage, run in enumerate(runs):
        check_device(run)
        assert f"ZeRO {stage}" in json.loads((run / "environment.json").read_text())["devices"]["backend"]
        # Weights are float32 in all stages; products are rounded to bfloat16, of which 1 % are two or three steps.
        assert losses(run) == pytest.approx(curve, rel=1e-2)


@pytest.fixture(scope="module")
def long_bags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("long")
    pack(LongBags(), folder / "shards", progress=False, graph=GraphConfig())  # type: ignore[arg-type]
    yield folder


@needs_deepspeed
@pytest.mark.parametrize("model", ["ABMIL", "SmABMIL", "TransMIL"])
def test_long_bags_are_trained_on_and_take_the_memory_told(
    model: str, long_bags: Path, launcher_environment: dict[str, str]
) -> None:
    settings = {
        "name": model,
        "out": str(long_bags / "runs"),
        "data": {"shards": str(long_bags / "shards"), "budget_instances": LONG_BAG, "num_workers": 2},
        "model": {"name": model},
        "optim": {"lr": 1e-3},
        "train": {"epochs": 2, "batch_bags": 2, "precision": "bf16", "log_every_steps": 1, "monitor": "loss"},
        "report": {"num_slides": 0},
    }
    run = launch(settings, long_bags, launcher_environment)
    check_device(run)
    assert len(losses(run)) == 8 and np.isfinite(losses(run)).all()
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["num_bags"] == 4 and results["left_out"] == []
    memory = json.loads((run / "environment.json").read_text())["memory"]
    if DEVICE == "cuda":
        assert memory["peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.3)


@needs_deepspeed
def test_the_main_job_learns_digits(tmp_path: Path, launcher_environment: dict[str, str]) -> None:
    """``make train`` itself, fewer slides and epochs on CPU."""
    settings = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    settings["data"]["shards"], settings["out"] = str(tmp_path / "shards"), str(tmp_path / "runs")
    if DEVICE == "cpu":
        settings["data"]["source"] |= {"num_train": 4, "num_val": 2, "num_test": 4}
        settings["train"]["epochs"] = 1
    path = tmp_path / "pack.yaml"
    path.write_text(yaml.safe_dump(settings))
    packing = [sys.executable, "-m", "bigbag.cli", "pack", "--config", str(path)]
    done = subprocess.run(packing, capture_output=True, text=True, env=launcher_environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = launch(settings, tmp_path, launcher_environment)
    check_device(run)
    results = json.loads((run / "results.json").read_text())
    assert (run / "report.html").is_file()
    if DEVICE == "cuda":
        assert results["test"]["auroc"] > 0.99 and results["test"]["num_bags"] == 150
