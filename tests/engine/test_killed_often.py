"""kill -9 at random moments, many times: the run ends as the unbroken one does, and every bag was trained as often.

The gate takes four kills; with BIGBAG_TEST_FULL=1 it is twenty.
"""

import json
import multiprocessing.process
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigbag.config import build_config
from bigbag.testing import forkserver


def train_noting_bags(settings: dict) -> None:
    """Train, with the keys of its bags in every step's line of ``metrics.jsonl``."""
    from bigbag.engine import trainer
    from bigbag.engine.log import RunLog
    from bigbag.engine.run import train

    torch.set_num_threads(1)
    accumulate, write, keys = trainer.accumulate, RunLog.write, []

    def noting(packs, *arguments):
        keys.clear()

        def noted():
            for item in packs:
                keys.extend(() if item[2].is_filler else item[3].keys)
                yield item

        return accumulate(noted(), *arguments)

    trainer.accumulate = noting
    RunLog.write = lambda self, kind, step, values: write(  # type: ignore[method-assign]
        self, kind, step, {**values, **({"bags": list(keys)} if kind == "train" else {})}
    )
    train(build_config(settings))


def start(settings: dict) -> multiprocessing.process.BaseProcess:
    process = forkserver().Process(target=train_noting_bags, args=(settings,))
    process.start()
    return process


def finish(settings: dict) -> Path:
    process = start(settings)
    process.join(300)
    assert process.exitcode == 0
    return build_config(settings).run_dir


def kill(settings: dict, moments: random.Random) -> int:
    """kill -9 some steps after the run has gone on, anywhere in a step; returns the number of steps in its log."""
    log = build_config(settings).run_dir / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0

    def wait_until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not reached():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)

    def steps() -> int:
        return log.read_text().count('"train"')

    process = start(settings)
    wait_until(lambda: log.exists() and log.stat().st_mtime_ns != before)  # it is cut back to the checkpoint
    there = steps()
    wanted = there + moments.randrange(8)
    wait_until(lambda: steps() >= wanted)
    time.sleep(moments.uniform(0, 0.03))
    assert process.is_alive(), "the run was over before it could be killed"
    process.kill()
    process.join()
    return steps()


@pytest.mark.slow
def test_no_step_is_lost_or_done_twice(run_settings, in_full):
    kills = 20 if in_full else 4
    run_settings["data"]["num_workers"] = 1
    run_settings["train"] |= {"epochs": 6 * kills, "checkpoint_every_steps": 2}
    run_settings["engine"] = {"threads": 1}
    broken, unbroken = ({**run_settings, "name": name} for name in ("broken", "unbroken"))
    moments = random.Random(0)
    reached = [kill(broken, moments) for _ in range(kills)]
    folders = [finish(settings) for settings in (broken, unbroken)]
    assert len(set(reached)) > kills // 4, "they were killed at few different moments"
    for name in ("checkpoints/best/model.safetensors", "results.json", "predictions.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    states = [max((f / "checkpoints").glob("*-finished")) / "state.pt" for f in folders]
    final, expected = (torch.load(path, weights_only=True)["model"] for path in states)
    assert all(torch.equal(final[name], expected[name]) for name in expected) and len(expected) > 4
    best = load_file(folders[0] / "checkpoints/best/model.safetensors")
    assert best.keys() <= {name.removeprefix("model.") for name in final}
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").open()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(18 * kills))
    for epoch in range(6 * kills):
        trained = [key for line in steps if line["epoch"] == epoch for key in line["bags"]]
        assert sorted(trained) == [f"train.{i}" for i in range(7)]
