"""ZeRO 3, where layers compute parts of themselves again in the backward pass: trained as with whole weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigbag.config import GraphConfig, build_config
from bigbag.data import pack
from bigbag.engine.run import train
from bigbag.engine.world import start_world
from bigbag.testing import run_ranks

from .conftest import Blobs
from .test_training import losses, with_changes

MLP = {"name": "MLP", "linear_sizes": [8], "activations": ["gelu"], "layer_norm": True}
RECOMPUTING = [
    {"name": "ABMIL", "att_dim": 8, "feat_ext": MLP},
    {"name": "SmABMIL", "att_dim": 8},
    {"name": "PatchGCN", "n_gcn_layers": 2, "hidden_dim": 8, "att_dim": 8},
    {"name": "TransMIL", "att_dim": 8, "n_heads": 2, "n_landmarks": 4},
]


def train_both(settings: dict) -> None:
    world = start_world("deepspeed")
    for model in RECOMPUTING:
        for stage in (0, 3):
            engine = {"backend": "deepspeed", "zero_stage": stage}
            changed = with_changes(settings, name=f"{model['name']}{stage}", engine=engine)
            train(build_config({**changed, "model": model}), world=world)


@pytest.mark.slow
def test_recomputing_models_train_as_with_whole_weights(run_settings, tmp_path):
    """Two ranks, several packs a step. Losses of every step and weights: sums of two ranks in another order, fp32."""
    run_settings["data"]["shards"] = str(tmp_path / "shards")
    run_settings["train"] |= {"epochs": 2, "activation_checkpointing": True, "monitor": "loss"}
    sizes = {"train": [50, 31, 120, 1, 44, 67, 2], "val": [40, 30], "test": [20, 30]}
    pack(Blobs(sizes), run_settings["data"]["shards"], progress=False, graph=GraphConfig())
    run_ranks(train_both, 2, run_settings, timeout_s=300)
    for model in RECOMPUTING:
        whole, shared = (Path(run_settings["out"]) / f"{model['name']}{stage}" for stage in (0, 3))
        assert losses(shared) == pytest.approx(losses(whole), rel=2e-4, abs=1e-5)
        weights, reference = (load_file(run / "checkpoints/best/model.safetensors") for run in (shared, whole))
        for name in reference:
            torch.testing.assert_close(weights[name], reference[name], rtol=1e-3, atol=1e-4)
