"""The benchmark of ranks: what the plan allows, and that ranks share the work."""

import statistics

import pytest

from bigbag.bench.ranks import Contender, best_gain, make_set, measure
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
