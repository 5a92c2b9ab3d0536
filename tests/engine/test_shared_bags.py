"""Runs in which several ranks share every bag: two groups of two ranks train and evaluate like one process."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from bigbag.config import ConfigError, build_config
from bigbag.engine.run import train
from bigbag.engine.world import World, start_world
from bigbag.testing import run_ranks
from tests.engine.test_training import losses, train_alone, with_changes

BACKENDS = ("torch", "deepspeed")


def train_in_parts(settings: dict) -> list[tuple[int, int]]:
    found = []
    for backend in BACKENDS:
        world = start_world(backend).sharing_bags(2)
        changed = with_changes(
            settings, name=backend, engine={"backend": backend, "zero_stage": int(backend != "torch")}
        )
        train(build_config(with_changes(changed, name=backend, parallel={"bag": 2})), world=world)
        found.append((world.data_rank, world.bag_rank))
    return found


def predictions(run_dir: Path) -> np.ndarray:
    with open(run_dir / "predictions.csv", newline="") as file:
        return np.array([float(row["logit"]) for row in csv.DictReader(file)])


@pytest.mark.slow
def test_two_groups_of_two_ranks_train_like_one_process(run_settings):
    """ABMIL behind a trained extractor in chunks, uneven packs, fillers, bags of one instance; torch and DeepSpeed."""
    run_settings["model"]["feat_ext"]["dropout"] = 0.0
    run_settings["train"] |= {"epochs": 2, "chunk_instances": 16}
    alone = train_alone(run_settings)
    places = run_ranks(train_in_parts, 4, run_settings, timeout_s=300)
    assert places == [[place] * 2 for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    expected = json.loads((alone / "results.json").read_text())
    for backend in BACKENDS:
        run_dir = alone.parent / backend
        assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-4, abs=1e-5)
        np.testing.assert_allclose(predictions(run_dir), predictions(alone), rtol=1e-3, atol=1e-5)
        results = json.loads((run_dir / "results.json").read_text())
        for split in ("val", "test"):
            assert results[split] == pytest.approx(expected[split], rel=1e-3)


def test_a_model_of_whole_bags_is_refused(run_settings):
    run_settings |= {"model": {"name": "IIBMIL", "att_dim": 4, "n_heads": 2}, "parallel": {"bag": 2}}
    with pytest.raises(ConfigError, match="parallel.bag is 2, but model IIBMIL computes on whole bags.*ABMIL"):
        train(build_config(run_settings), world=World(size=2, bag_ranks=2))
