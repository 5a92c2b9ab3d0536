"""Models that mix instances, on two groups of two ranks that share every bag: trained like one process trains them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from bigbag.config import GraphConfig, build_config
from bigbag.data import pack
from bigbag.engine.run import train
from bigbag.engine.world import start_world
from bigbag.testing import free_port, run_ranks
from tests.engine.test_shared_bags import predictions
from tests.engine.test_training import losses, train_alone, with_changes

from .conftest import Blobs

ROOT = Path(__file__).parents[2]
MODELS = [
    {"name": "SmABMIL", "att_dim": 8},
    {"name": "PatchGCN", "n_gcn_layers": 2, "hidden_dim": 8, "att_dim": 8},
    {"name": "TransformerABMIL", "transf_att_dim": 6, "transf_n_heads": 2, "pool_att_dim": 8},
    {"name": "TransMIL", "att_dim": 8, "n_heads": 2, "n_landmarks": 4},
]


@pytest.fixture
def graph_settings(run_settings, tmp_path) -> dict:
    run_settings["data"]["shards"] = str(tmp_path / "shards")
    run_settings["train"] |= {"epochs": 1}
    sizes = {"train": [50, 31, 120, 1, 44, 67, 2], "val": [40, 30, 25, 60], "test": [20, 30, 1, 41]}
    pack(Blobs(sizes), run_settings["data"]["shards"], progress=False, graph=GraphConfig())
    return run_settings


def settings_of(settings: dict, model: dict, kind: str) -> dict:
    return {**with_changes(settings, name=f"{model['name']}-{kind}"), "model": model}


def train_in_parts(settings: dict) -> None:
    world = start_world("deepspeed").sharing_bags(2)
    for model in MODELS[:-1]:
        changed = with_changes(settings_of(settings, model, "shared"), engine={"backend": "deepspeed"})
        train(build_config(with_changes(changed, engine={"zero_stage": 1}, parallel={"bag": 2})), world=world)


@pytest.mark.slow
def test_two_groups_of_two_ranks_train_like_one_process(graph_settings, tmp_path):
    """Three models in one process group, and TransMIL by the command itself, under torchrun."""
    alone = [train_alone(settings_of(graph_settings, model, "alone")) for model in MODELS]
    run_ranks(train_in_parts, 4, graph_settings, timeout_s=300)
    config = tmp_path / "shared.yaml"
    config.write_text(yaml.safe_dump(settings_of(graph_settings, MODELS[-1], "shared")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "launch/train.py"), "--config", str(config)]
    done = subprocess.run(
        [*command, "parallel.bag=2", "engine.zero_stage=1"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for run_dir in alone:
        shared = run_dir.parent / run_dir.name.replace("alone", "shared")
        assert losses(shared) == pytest.approx(losses(run_dir), rel=2e-4, abs=1e-5)
        np.testing.assert_allclose(predictions(shared), predictions(run_dir), rtol=1e-3, atol=1e-5)
        expected = json.loads((run_dir / "results.json").read_text())["test"]
        assert json.loads((shared / "results.json").read_text())["test"] == pytest.approx(expected, rel=1e-3)
