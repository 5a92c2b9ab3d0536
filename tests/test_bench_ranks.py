"""Benchmarks of the training loop: what the plan allows, that ranks share the work, and what steps wait for."""

import statistics
import time

import pytest

from bigbag.bench.ranks import Contender, best_gain, make_set, measure
from bigbag.bench.training import waiting_share
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
def test_two_ranks_have_half_the_work_each(tmp_path):
    """In CPU time, which a busy machine changes little: half of one rank's by the plan, and at most half as much again
    for what every rank does (messages, optimiser, Python) and for caches that others use."""
    make_set(tmp_path / "shards", 8, 3000, 9000, 256)
    settings = {"out": str(tmp_path), "data": {"shards": str(tmp_path / "shards")}, "model": {"name": "ABMIL"}}
    alone, shared = measure([Contender("torch", 1), Contender("deepspeed", 2)], settings, rounds=5)
    assert len(alone) == len(shared) == 5 and all(cpu > 0 for _, cpu in (*alone, *shared))
    cpu_alone, cpu_shared = (statistics.median(cpu for _, cpu in of) for of in (alone, shared))
    assert cpu_shared < 0.75 * cpu_alone


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
