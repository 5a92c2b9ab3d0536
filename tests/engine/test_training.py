"""The training loop: the same run for any backend, ZeRO stage and number of ranks, resumed or not."""

import contextlib
import copy
import csv
import errno
import io
import json
import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigbag import load_model
from bigbag.config import ConfigError, build_config
from bigbag.data import open_store, pack
from bigbag.data.sources import MemorySource
from bigbag.engine import precision
from bigbag.engine.feed import budget_instances
from bigbag.engine.run import evaluate, train
from bigbag.engine.world import World, start_world
from bigbag.testing import free_port, run_ranks

STAGES = (0, 1, 2, 3)


def with_changes(settings: dict, **sections) -> dict:
    settings = copy.deepcopy(settings)
    for section, values in sections.items():
        if isinstance(values, dict):
            settings.setdefault(section, {}).update(values)
        else:
            settings[section] = values
    return settings


def lines(run_dir: Path, kind: str) -> list[dict]:
    everything = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in everything if line["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir, "train")]


def train_alone(settings: dict) -> Path:
    config = build_config(settings)
    train(config, world=World())
    return config.run_dir


@pytest.fixture
def without_dropout(run_settings) -> dict:
    settings = copy.deepcopy(run_settings)
    settings["model"]["feat_ext"]["dropout"] = 0.0
    return settings


def train_every_stage(settings: dict) -> int:
    world = start_world("deepspeed")
    for stage in STAGES:
        changed = with_changes(settings, name=f"stage{stage}", engine={"backend": "deepspeed", "zero_stage": stage})
        train(build_config(changed), world=world)
    return world.size


@pytest.mark.slow
def test_every_zero_stage_on_two_ranks_is_the_single_process_run(without_dropout):
    """7 bags on 2 ranks: uneven packs and fillers, and still the loss curve and the results of one process."""
    assert run_ranks(train_every_stage, 2, without_dropout) == [2, 2]
    alone = train_alone(without_dropout)
    expected = json.loads((alone / "results.json").read_text())
    curve = [line["train_loss"] for line in lines(alone, "epoch")]
    assert len(losses(alone)) == 12 and curve == sorted(curve, reverse=True) and curve[-1] < 0.97 * curve[0]
    for stage in STAGES:
        run_dir = alone.parent / f"stage{stage}"
        assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-4, abs=1e-5)
        results = json.loads((run_dir / "results.json").read_text())
        assert results["best_epoch"] == expected["best_epoch"]
        for split in ("val", "test"):
            assert results[split] == pytest.approx(expected[split], rel=1e-3)
        weights, reference = (load_file(d / "checkpoints/best/model.safetensors") for d in (run_dir, alone))
        for name in reference:
            torch.testing.assert_close(weights[name], reference[name], rtol=1e-3, atol=1e-4)


def test_packing_and_accumulation_do_not_change_the_run(without_dropout):
    """One pack per step, or one per bag: the same losses."""
    large = train_alone(with_changes(without_dropout, name="large", data={"budget_instances": 10_000}))
    small = train_alone(with_changes(without_dropout, name="small", data={"budget_instances": 1}))
    assert losses(small) == pytest.approx(losses(large), rel=1e-4, abs=1e-5)


def test_results_hold_what_they_promise(run_settings):
    run_dir = train_alone(run_settings)
    results = json.loads((run_dir / "results.json").read_text())
    names = {"auroc", "accuracy", "f1", "balanced_accuracy", "loss", "num_bags", "instance_auroc"}
    assert names <= set(results["test"]) and results["test"]["num_bags"] == 9 and results["val"]["num_bags"] == 6
    assert 1 <= results["best_epoch"] <= 4 and results["left_out"] == []
    rows = list(csv.DictReader((run_dir / "predictions.csv").open()))
    assert list(rows[0]) == ["key", "split", "label", "logit", "probability", "num_instances", "patient"]
    assert [row["key"] for row in rows if row["split"] == "test"] == [f"test.{i}" for i in range(9)]
    for row in rows:
        assert float(row["probability"]) == pytest.approx(torch.tensor(float(row["logit"])).sigmoid().item(), abs=1e-6)
    accuracy = sum((float(r["logit"]) > 0) == int(r["label"]) for r in rows if r["split"] == "test") / 9
    assert results["test"]["accuracy"] == pytest.approx(accuracy)
    assert len(list((run_dir / "attention").glob("*.npz"))) == 2
    assert list((run_dir / "tensorboard").iterdir()) and (run_dir / "environment.json").is_file()
    assert build_config(__import__("yaml").safe_load((run_dir / "config.yaml").read_text())) == build_config(
        run_settings
    )


def test_saved_model_gives_the_predictions_of_the_run(run_settings, shards):
    from bigbag import PackedBags

    run_dir = train_alone(run_settings)
    model, store = load_model(str(run_dir)), open_store(shards)
    rows = {row["key"]: float(row["logit"]) for row in csv.DictReader((run_dir / "predictions.csv").open())}
    for i, info in enumerate(store.infos):
        if info.name in rows:
            with torch.no_grad():
                assert model(PackedBags.from_bags([store.read(i)])).item() == pytest.approx(rows[info.name], abs=1e-5)


def test_evaluating_again_changes_nothing(run_settings):
    run_dir = train_alone(run_settings)
    before = (run_dir / "results.json").read_bytes(), (run_dir / "predictions.csv").read_bytes()
    evaluate(build_config(run_settings), world=World())
    assert ((run_dir / "results.json").read_bytes(), (run_dir / "predictions.csv").read_bytes()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("results.json", r"results.json:\d+: not JSON .*: `bigbag train` writes it again"),
        ("splits.csv", "splits.csv: has not the splits that the run was trained with: `bigbag train` writes it"),
        ("identity.json", r"identity.json:\d+: not JSON .*: remove it"),
        ("checkpoints/best/model.json", r"model.json:\d+: not JSON .*: copy it"),
        ("checkpoints/best/model.safetensors", "model.safetensors: not a whole file of weights .*: copy it"),
    ],
)
def test_a_damaged_run_is_not_evaluated(run_settings, name, message):
    """Each file cut in the middle, the table of splits after a line; training again mends what a run can write."""
    run_dir = train_alone(run_settings)
    path, before = run_dir / name, (run_dir / "results.json").read_bytes()
    whole = path.read_bytes()
    cut = whole.rindex(b"\n", 0, len(whole) // 2) + 1 if name.endswith("csv") else len(whole) // 2
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=message):
        evaluate(build_config(run_settings), world=World())
    if name.endswith(("splits.csv", "results.json")):
        assert (train_alone(run_settings) / name).read_bytes() == whole
    else:
        path.unlink()
    if name.endswith("safetensors"):
        with pytest.raises(FileNotFoundError, match="model.safetensors is missing: copy it"):
            load_model(run_dir)
    assert (run_dir / "results.json").read_bytes() == before


class Killed(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("steps_until_death", [1, 2, 3, 5, 8, 11])
def test_resumed_run_equals_the_unbroken_one(run_settings, monkeypatch, steps_until_death):
    """Dropout included: bitwise the same weights, log and results, whenever the run died."""
    from bigbag.engine.backend import TorchBackend

    run_settings["train"]["checkpoint_every_steps"] = 2
    unbroken = train_alone(run_settings)
    broken = with_changes(run_settings, name="broken")
    step, calls = TorchBackend.step, []

    def dying_step(self, lr):
        calls.append(lr)
        if len(calls) == steps_until_death:
            raise Killed
        step(self, lr)

    monkeypatch.setattr(TorchBackend, "step", dying_step)
    with pytest.raises(Killed):
        train_alone(broken)
    monkeypatch.setattr(TorchBackend, "step", step)
    run_dir = train_alone(broken)
    assert (run_dir / "results.json").read_bytes() == (unbroken / "results.json").read_bytes()
    assert (run_dir / "predictions.csv").read_bytes() == (unbroken / "predictions.csv").read_bytes()
    assert losses(run_dir) == losses(unbroken)
    weights, expected = (load_file(d / "checkpoints/best/model.safetensors") for d in (run_dir, unbroken))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def broken_run(settings, monkeypatch) -> Path:
    """The folder of a run that died in its sixth step, with checkpoints of its second and fourth."""
    from bigbag.engine.backend import TorchBackend

    step, calls = TorchBackend.step, []

    def dying_step(self, lr):
        calls.append(lr)
        if len(calls) == 6:
            raise Killed
        step(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "step", dying_step)
        with pytest.raises(Killed):
            train_alone(settings)
    return build_config(settings).run_dir / "checkpoints"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda tag: flip(tag / "state.pt"), "state.pt has another SHA-256"),
        (
            lambda tag: (tag / "state.pt").write_bytes((tag / "state.pt").read_bytes()[:-1]),
            "state.pt has .* bytes, exp",
        ),
        (lambda tag: (tag / "progress.json").unlink(), "No such file .*progress.json"),
        (lambda tag: (tag / "files.json").write_text("{"), "Expecting property name"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_aloud(run_settings, monkeypatch, caplog, damage, message):
    run_settings["train"]["checkpoint_every_steps"] = 2
    unbroken = train_alone(run_settings)
    broken = with_changes(run_settings, name="broken")
    checkpoints = broken_run(broken, monkeypatch)
    newest, before = json.loads((checkpoints / "latest.json").read_text())["tags"]
    damage(checkpoints / newest)
    run_dir = train_alone(broken)
    assert re.search(rf"{newest} is damaged \(.*{message}.*going on from the checkpoint before it", caplog.text)
    assert losses(run_dir) == losses(unbroken)
    assert (run_dir / "results.json").read_bytes() == (unbroken / "results.json").read_bytes()


def test_without_a_whole_checkpoint_nothing_is_trained(run_settings, monkeypatch):
    run_settings["train"]["checkpoint_every_steps"] = 2
    for state in broken_run(run_settings, monkeypatch).glob("epoch*/state.pt"):
        flip(state)
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(state.pt has another SHA-256.*--restart"):
        train_alone(run_settings)


def test_a_full_disk_leaves_the_checkpoint_before(run_settings, monkeypatch):
    run_settings["train"]["checkpoint_every_steps"] = 2
    unbroken = train_alone(run_settings)
    broken = with_changes(run_settings, name="broken")
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="could not be written .*No space left on device; .* MiB are free"):
            train_alone(broken)
    checkpoints = build_config(broken).run_dir / "checkpoints"
    (kept,) = json.loads((checkpoints / "latest.json").read_text())["tags"]
    assert [path.name for path in checkpoints.glob("epoch*")] == [kept] and calls[1].parent.name != kept
    assert losses(train_alone(broken)) == losses(unbroken)


def stuck_in_the_second_step(settings: dict, port: int) -> tuple[str, float]:
    """What a rank says, and after how many seconds, where rank 1 does not come back."""
    from bigbag.engine.backend import TorchBackend

    heard = io.StringIO()
    logging.getLogger("bigbag").addHandler(logging.StreamHandler(heard))
    torch.distributed.destroy_process_group()  # it has another time limit
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world, step, calls = start_world("torch", timeout_s=4), TorchBackend.step, []

    def sleeping_step(self, lr):
        calls.append(lr)
        if len(calls) == 2:
            time.sleep(15)
        step(self, lr)

    if world.rank == 1:
        TorchBackend.step = sleeping_step  # type: ignore[method-assign]
    started = time.monotonic()
    with contextlib.suppress(RuntimeError):
        train(build_config(settings), world=world)
    return heard.getvalue(), time.monotonic() - started


def test_a_rank_that_is_stuck_is_not_waited_for(run_settings):
    run_settings["engine"] = {"backend": "torch"}
    (text, seconds), _ = run_ranks(stuck_in_the_second_step, 2, run_settings, free_port())
    assert re.search(r"rank 0 of 2 failed in epoch 1, step [23]: .*[Tt]imed? ?out", text) and seconds < 14


def test_finished_run_is_not_trained_again(run_settings, monkeypatch):
    from bigbag.engine.trainer import Trainer

    run_dir = train_alone(run_settings)
    before = losses(run_dir)
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert losses(train_alone(run_settings)) == before


def test_other_settings_in_the_same_folder_are_refused(run_settings):
    train_alone(run_settings)
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.02 -> 0\.5.*--restart"):
        train_alone(with_changes(run_settings, optim={"lr": 0.5}))


def test_settings_that_no_model_takes_claim_no_folder(run_settings):
    wrong = with_changes(run_settings, model={"no_such_argument": 1})
    with pytest.raises(ConfigError, match="no_such_argument"):
        train_alone(wrong)
    assert not build_config(wrong).run_dir.exists()


def test_patience_stops_and_best_epoch_is_kept(run_settings):
    run_dir = train_alone(with_changes(run_settings, train={"patience": 1, "epochs": 50}, optim={"lr": 0.1}))
    epochs = lines(run_dir, "epoch")
    best = max(epochs, key=lambda line: (line["val"]["auroc"], -line["val"]["loss"]))["epoch"]
    assert len(epochs) < 50
    assert json.loads((run_dir / "results.json").read_text())["best_epoch"] == best + 1


def test_monitored_metric_must_exist(run_settings):
    """Known before the first step: what hours of training depend on is not looked up after them."""
    for monitor in ("aurok", "instance_auroc", "c_index"):
        with pytest.raises(
            ValueError, match=rf"monitor is '{monitor}', which is no metric of .*binary.*: auroc, .*, loss"
        ):
            train_alone(with_changes(run_settings, train={"monitor": monitor}))
    assert not Path(run_settings["out"]).exists()


def test_an_operator_to_force_must_exist(run_settings):
    with pytest.raises(
        ValueError, match=r"engine\.impl: unknown setting 'atention_pool'; did you mean 'attention_pool'"
    ):
        train_alone(with_changes(run_settings, engine={"impl": {"atention_pool": "reference"}}))


def test_cap_is_counted(run_settings):
    run_dir = train_alone(with_changes(run_settings, data={"max_instances": 30}))
    capped = json.loads((run_dir / "results.json").read_text())["capped"]
    sizes = [50, 31, 120, 1, 44, 67, 29, 40, 30, 25, 60, 33, 21, 20, 30, 25, 41, 9, 33, 5, 8, 64]
    assert capped["num_bags"] == sum(n > 30 for n in sizes)
    assert capped["instances_left_out"] == sum(max(0, n - 30) for n in sizes)


@pytest.mark.parametrize("instructions", [True, False])
def test_bf16_follows_fp32(without_dropout, monkeypatch, instructions):
    """And is fp32 on a processor that would only be slower in bf16, which the banner says."""
    fp32 = train_alone(with_changes(without_dropout, name="fp32"))
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device_type: instructions)
    bf16 = train_alone(with_changes(without_dropout, name="bf16", train={"precision": "bf16"}))
    assert (losses(bf16) == losses(fp32)) != instructions
    assert losses(bf16) == pytest.approx(losses(fp32), rel=0.1, abs=0.02)
    said = json.loads((bf16 / "environment.json").read_text())["devices"]["precision"]
    assert said == ("bf16" if instructions else "bf16 (products in fp32, for which this processor has instructions)")


def test_worker_processes_change_nothing(run_settings):
    inline = train_alone(with_changes(run_settings, name="inline"))
    workers = train_alone(with_changes(run_settings, name="workers", data={"num_workers": 2}))
    assert losses(workers) == losses(inline)


@pytest.mark.parametrize("setting, expected", [("auto", True), (True, True), (False, False)])
def test_large_packs_recompute_their_activations(run_settings, shards, monkeypatch, setting, expected):
    from bigbag.engine import memory_plan

    monkeypatch.setattr(memory_plan, "_CHECKPOINT_BYTES", 119 * 6 * 4)
    config = build_config(with_changes(run_settings, train={"activation_checkpointing": setting}))
    store = open_store(shards)
    assert memory_plan.wants_recomputation(config, store, range(len(store.sizes))) is expected


@pytest.mark.parametrize("stored, packed", [("float32", "float16"), ("float16", "float32")])
def test_packs_keep_the_budget_in_both_precisions(run_settings, tmp_path, stored, packed):
    store = open_store(run_settings["data"]["shards"])
    pack(MemorySource([store.read(i) for i in range(len(store))]), tmp_path / "set", dtype=stored, progress=False)
    changed = with_changes(run_settings, data={"dtype": packed, "budget_bytes": 60 * 6 * 4})
    assert budget_instances(build_config(changed), open_store(tmp_path / "set")) == 60


def test_a_budget_of_bytes_changes_no_result(run_settings):
    """Every bag over the budget, and so by itself in its shard; and a budget that some packs keep."""
    run_settings["model"]["feat_ext"]["dropout"] = 0.0
    usual = train_alone(run_settings)
    for budget in (1, 50 * 6 * 2):
        lean = train_alone(with_changes(run_settings, name=f"lean{budget}", data={"budget_bytes": budget}))
        assert losses(lean) == pytest.approx(losses(usual), rel=2e-4, abs=1e-5)
        expected, results = (json.loads((run / "results.json").read_text()) for run in (usual, lean))
        assert results["test"] == pytest.approx(expected["test"], rel=1e-3)
        assert sorted(path.name for path in (lean / "attention").iterdir())
