"""Benchmarks of the training loop: what the plan allows, that ranks share the work, and what steps wait for."""

import re
import time

import pytest

from bigbag.bench.ranks import best_gain, make_set
from bigbag.bench.training import waiting_share
from bigbag.cli import main
from bigbag.config import build_config
from bigbag.data import plan_epoch


def test_the_gain_that_the_plan_allows():
    """Two steps: 60 beside 50 + 10, and 30 beside 20; the slowest ranks have 60 + 30 of 170."""
    plan = plan_epoch(
        [60, 50, 10, 30, 20], range(5), seed=0, epoch=0, world_size=2, budget_instances=100, batch_bags=3, shuffle=False
    )
    assert best_gain(plan) == pytest.approx(170 / 90)
    alone = plan_epoch([5, 5], range(2), seed=0, epoch=0, world_size=1, budget_instances=100, batch_bags=2)
    assert best_gain(alone) == 1


@pytest.mark.slow
def test_two_ranks_have_half_the_work_each(capsys):
    """In instances, as their steps see them: the times of so short epochs depend on what else the machine does."""
    settings = {"bags": 12, "smallest": 100, "largest": 400, "width": 8, "batch": 6, "rounds": 2}
    assert main(["bench", "ranks", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    number = r"(\d+\.\d+)"
    pattern = re.compile(rf"(.*?) +{number} bags/s, .* at most {number} of the instances and {number} of")
    rows = [pattern.match(row) for row in table]
    assert [row[1] for row in rows] == ["torch, 1 rank", "torch, 2 ranks", "deepspeed, 2 ranks"]
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
    alone, *shared = (float(row[3]) for row in rows)
    assert alone == 1 and all(0.5 <= share < 0.6 for share in shared)


def test_the_time_that_steps_wait_for_their_packs(tmp_path, monkeypatch):
    """Each of 4 bags, a pack of its own, takes 50 ms more to read."""
    from bigbag.data import ShardStore

    make_set(tmp_path / "shards", 4, 10, 20, 8)
    data = {"shards": str(tmp_path / "shards"), "num_workers": 0, "budget_instances": 1}
    config = build_config({"name": "run", "out": str(tmp_path), "data": data, "model": {"name": "MeanMIL"}})
    read = ShardStore.read
    monkeypatch.setattr(ShardStore, "read", lambda self, index: (time.sleep(0.05), read(self, index))[1])
    elapsed, share = waiting_share(config, epochs=2)
    assert 0.2 <= elapsed * share < elapsed
