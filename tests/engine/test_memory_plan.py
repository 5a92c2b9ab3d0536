"""What a run will take is told before it starts, chosen so that it fits, and lowered where that was not enough."""

import copy
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigbag import Bag
from bigbag.cli import main
from bigbag.config import build_config
from bigbag.config.sections import ModelConfig, TaskConfig
from bigbag.data import MemoryStore
from bigbag.engine import trainer
from bigbag.engine.memory_cost import Recomputation, StepProbe, most_held
from bigbag.engine.memory_plan import cheaper, plan_memory
from bigbag.engine.run import train
from bigbag.engine.trainer import Trainer
from bigbag.engine.world import World, start_world
from bigbag.models import build_model
from bigbag.nn import encoded
from bigbag.testing import run_ranks

ROOT, PAGE = Path(__file__).parents[2], 64 * 1024
EXTRACTOR = {"name": "MLP", "linear_sizes": [64, 32], "activations": ["relu", "relu"]}
CPU = torch.device("cpu")


def make_bags(sizes, width: int, seed: int = 0) -> list[Bag]:
    rng = np.random.default_rng(seed)
    return [
        Bag(rng.standard_normal((size, width), dtype=np.float32), i % 2, f"bag{i}", coords=np.stack(
            np.divmod(np.arange(size), 64), 1)) for i, size in enumerate(sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["ABMIL", "TransMIL", "CLAM_SB"])
def test_a_few_instances_tell_the_cost_of_many(name, recompute):
    """Predicted from at most a third of the instances; measured on all of them."""
    arguments = {"feat_ext": EXTRACTOR} if name != "TransMIL" else {"n_landmarks": 32, "att_dim": 64}
    model = build_model(ModelConfig(name=name, **arguments), (40,), TaskConfig())
    (bag,) = make_bags([36_000], 40)
    probe = StepProbe(model, bag, CPU, None)
    way = Recomputation(recompute, 700)
    cost = probe.cost(way, "fp32", True, [(12_000, 1)], 1)
    whole = probe.cost(way, "fp32", True, [(36_000, 1)], 10**9)
    assert cost(36_000, 1) == pytest.approx(whole(36_000, 1), rel=0.1)
    assert (cost(36_000, 1) > 2 * cost(12_000, 1)) or (recompute and name != "TransMIL")


def test_bags_have_a_cost_of_their_own():
    """Nystrom attention keeps landmarks for every bag."""
    model = build_model(ModelConfig(name="TransMIL", n_landmarks=64, att_dim=32), (8,), TaskConfig())
    probe = StepProbe(model, make_bags([4000], 8)[0], CPU, None)
    cost = probe.cost(Recomputation(False, None), "fp32", True, [(4000, 1), (4000, 40)], 1)
    assert cost(4000, 40) - cost(4000, 1) > 39 * 64 * 32 * 4
    measured = probe._peak(_training(probe), 4000, 40)
    assert cost(4000, 40) == pytest.approx(measured, rel=0.2)


def _training(probe: StepProbe):
    from bigbag.engine.backend import StepModule

    return StepModule(probe.model, "fp32").train(True)


def test_buffers_of_packs():
    assert most_held([100 * PAGE], 4) == 100 * PAGE
    assert most_held([size * PAGE for size in (100, 90, 80, 70, 60)], 2) == 190 * PAGE
    # The large one keeps its buffer; the small ones take turns in two others.
    assert most_held([size * PAGE for size in (1000, *[50] * 10, 1000, 50)], 3) == 1100 * PAGE
    assert most_held([2**46, 2**46], 2) == 2**47  # more than there is


def test_the_ways_to_take_less():
    model = build_model(ModelConfig(name="ABMIL", feat_ext=EXTRACTOR), (40,), TaskConfig())
    assert cheaper(Recomputation(False, None), model, (40,), CPU) == Recomputation(True, None)
    assert cheaper(Recomputation(True, None), model, (40,), CPU) == Recomputation(True, 1024)
    assert cheaper(Recomputation(True, 100), model, (40,), CPU) == Recomputation(True, 50)
    assert cheaper(Recomputation(True, 30), model, (40,), CPU) is None
    bare = build_model(ModelConfig(name="ABMIL"), (40,), TaskConfig())
    assert cheaper(Recomputation(True, None), bare, (40,), CPU) is None


def settings(folder, **sections) -> dict:
    data = {"shards": "nowhere", "num_workers": 0}
    base = {"name": "run", "out": str(folder), "data": data, "model": {"name": "ABMIL", "feat_ext": EXTRACTOR}}
    base["train"] = {"epochs": 1, "batch_bags": 1, "monitor": "loss"}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def planned(folder, bags, **sections):
    config = build_config(settings(folder, **sections))
    store = MemoryStore(bags, [""] * len(bags))
    model = build_model(config.model, store.feature_shape, config.task)
    splits = {"train": range(len(bags) - 1), "val": [len(bags) - 1]}
    return plan_memory(config, store, splits, model, World())


def test_what_is_left_open_is_chosen_so_that_it_fits(tmp_path):
    bags = make_bags([20_000, 300, 200], 40)
    kept = planned(tmp_path, bags)
    assert not kept.recomputation.active and kept.fits and kept.remedies == ()
    limit = kept.peak_bytes - kept.step_bytes // 2
    recomputed = planned(tmp_path, bags, engine={"memory_bytes": limit})
    assert recomputed.recomputation.active and recomputed.fits
    assert recomputed.step_bytes < kept.step_bytes / 3
    chunked = planned(tmp_path, bags, engine={"memory_bytes": 1}, train={"precision": "fp32"})
    assert chunked.recomputation.active and not chunked.fits
    assert chunked.step_bytes <= recomputed.step_bytes
    names = " ".join(name for name, _ in chunked.remedies)
    assert "parallel.bag=2" in names and "data.budget_bytes" in names
    assert all(peak < chunked.peak_bytes for _, peak in chunked.remedies)


def test_settings_of_the_user_stay(tmp_path):
    bags = make_bags([20_000, 300, 200], 40)
    plan = planned(tmp_path, bags, engine={"memory_bytes": 1}, train={"activation_checkpointing": False})
    assert not plan.recomputation.active and not plan.fits
    assert dict(plan.remedies)["train.activation_checkpointing=true"] < plan.peak_bytes - plan.step_bytes / 2
    plan = planned(tmp_path, bags, engine={"memory_bytes": 1}, train={"chunk_instances": 3000})
    assert plan.recomputation == Recomputation(True, 3000)


def test_the_command_tells_and_the_run_is_as_told(run_settings, tmp_path, capsys):
    run_settings["data"]["num_workers"] = 0
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_settings))
    assert main(["plan", "--config", str(path)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"peak [\d,]+ MiB of [\d,]+ MiB expected on each device: process [\d,]+ MiB", told)
    assert "largest pack 131 instances" in told or "largest pack 120 instances" in told
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*/environment.json"))
    assert main(["plan", "--config", str(path), "engine.memory_bytes=1000"]) == 1
    assert "that does not fit; what lowers it:" in capsys.readouterr().out
    assert main(["plan", "--config", str(path), "--ranks", "3", "parallel.bag=2"]) == 2
    assert "expected a multiple of parallel.bag = 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "model, largest",  # so large that activations are recomputed
    [
        ({"name": "ABMIL", "feat_ext": {"name": "MLP", "linear_sizes": [256], "activations": ["relu"]}}, 150_000),
        ({"name": "TransMIL", "n_landmarks": 64, "att_dim": 128}, 140_000),
    ],
    ids=["ABMIL", "TransMIL"],
)
def test_the_prediction_is_within_a_fifth_of_the_measured_peak(tmp_path, model, largest):
    sizes = f"{largest},6000,20000,10000"
    command = [sys.executable, "-m", "tests.engine.measure_memory_plan", str(tmp_path), json.dumps(model), sizes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stdout.splitlines()[-1])
    memory = json.loads((tmp_path / "run" / "environment.json").read_text())["memory"]
    assert memory["peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.2)


def test_free_memory_goes_back_where_it_is_short(run_settings, monkeypatch):
    """After each of 3 steps in each of 4 epochs, or never."""
    trimmed = []
    monkeypatch.setattr(trainer, "trim_heap", lambda: trimmed.append(1))
    for name, limit, expected in (("plenty", None, 0), ("short", 1, 12)):
        changed = copy.deepcopy(run_settings) | {"name": name, "engine": {"memory_bytes": limit}}
        train(build_config(changed), world=World())
        assert len(trimmed) == expected


def refuse_large_chunks(monkeypatch, limit: int) -> None:
    """In training, make every chunk of more than ``limit`` instances one for which memory does not suffice."""
    compute, fit = encoded._encode, Trainer.fit

    def limited(module, rows, *places):
        if len(rows) > limit:
            raise torch.OutOfMemoryError(f"tried to allocate {len(rows)} rows")
        return compute(module, rows, *places)

    def fit_in_little(trainer):
        monkeypatch.setattr(encoded, "_encode", limited)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", fit_in_little)


def without_dropout(run_settings: dict, name: str, **train_settings) -> dict:
    changed = copy.deepcopy(run_settings)
    changed["name"] = name
    changed["model"]["feat_ext"]["dropout"] = 0.0
    changed["train"].update(train_settings)
    return changed


def weights_of(settings: dict) -> dict[str, torch.Tensor]:
    config = build_config(settings)
    return load_file(config.run_dir / "checkpoints" / "best" / "model.safetensors")


def test_out_of_memory_halves_the_chunk_and_goes_on(run_settings, monkeypatch, caplog):
    """The first pack fails until its chunk is small enough; from then on the run is one with that chunk."""
    as_set = without_dropout(run_settings, "as_set", chunk_instances=25)
    train(build_config(as_set), world=World())
    refuse_large_chunks(monkeypatch, 30)
    larger = without_dropout(run_settings, "larger", chunk_instances=100)
    with caplog.at_level(logging.WARNING):
        train(build_config(larger), world=World())
    said = [record.getMessage() for record in caplog.records if "again with" in record.getMessage()]
    assert [re.search(r"chunks of (\d+) instances", line)[1] for line in said] == ["50", "25"]
    assert "tried to allocate" in said[0] and "epoch 1, step 1" in said[0]
    found, expected = weights_of(larger), weights_of(as_set)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_that_never_suffices_ends_the_run_with_the_remedies(run_settings, monkeypatch, tmp_path, capsys):
    refuse_large_chunks(monkeypatch, 1)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(without_dropout(run_settings, "hopeless", chunk_instances=40)))
    assert main(["train", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert "error: rank 0 is out of memory: tried to allocate" in said
    assert "train.chunk_instances (now 20)" in said and "bigbag plan tells what each takes" in said


def train_where_one_rank_has_little(settings: dict, backend: str) -> list[str]:
    world = start_world(backend)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bigbag.engine.trainer").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            refuse_large_chunks(patch, 30)
        train(build_config({**settings, "engine": {"backend": backend}}), world=world)
    return [line for line in said if "again with" in line]


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_one_rank_takes_less_and_the_others_wait_for_it(run_settings, backend):
    alone = without_dropout(run_settings, "alone")
    train(build_config(alone), world=World())
    shared = without_dropout(run_settings, backend, chunk_instances=100)
    of_first, of_second = run_ranks(train_where_one_rank_has_little, 2, shared, backend)
    assert of_first == [] and len(of_second) == 2 and "rank 1" in of_second[0]
    found, expected = weights_of(shared), weights_of(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
