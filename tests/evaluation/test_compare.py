"""Studies: one process a run, resumable, in folds and nested, one by one or all at once, honest about failures."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn import metrics as sk

from bigbag.cli import main
from bigbag.config import ConfigError, build_config, load_config
from bigbag.evaluation import study as module
from bigbag.evaluation.cap_curve import plan_cap_curve, summarise_cap_curve
from bigbag.evaluation.compare import (
    Line,
    Spread,
    markdown,
    model_settings,
    plan_comparison,
    spread,
    summarise_comparison,
    table_cells,
)
from bigbag.evaluation.predictions import read_predictions
from bigbag.evaluation.slurm import array_ranges
from bigbag.evaluation.study import Outcome, Study, parse_grid

CONFIG = """
name: small
out: {folder}/runs
data:
  shards: {folder}/shards
  source: {{name: digits, num_train: 6, num_val: 4, num_test: 6, min_instances: 100, max_instances: 150}}
  num_workers: 0
model: {{name: ABMIL}}
train: {{epochs: 1, batch_bags: 3}}
engine: {{backend: torch}}
compare:
  common: {{att_dim: 8, feat_ext: {{name: MLP, linear_sizes: [8], activations: [relu]}}}}
  models: {{CLAM_SB: {{k_sample: 3, att_dim: 4}}}}
  overrides: {{CLAM_SB: ["train.batch_bags=2"]}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    (folder / "small.yaml").write_text(CONFIG.format(folder=folder))
    assert main(["pack", "--config", str(folder / "small.yaml")]) == 0
    return folder / "shards"


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(folder=tmp_path).replace(f"shards: {tmp_path}/shards", f"shards: {shards}"))
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Training replaced by writing what a run writes: numbers that follow from its settings. The runs, as settings."""
    runs: list[list[str]] = []

    def train(path: Path, settings: list[str], output: Path, attempts: module._Attempts) -> int:
        from bigbag.data import split_bags
        from bigbag.engine.run import open_configured_store, run_identity

        runs.append(list(settings))
        config = load_config(path, settings)
        output.write_text("starting\nout of luck\n")
        attempts.note(1 << 20)
        if config.model.name == "MaxMIL":
            return 1
        store = open_configured_store(config)
        splits = split_bags(store, config.data.splits)
        quality = {"MeanMIL": 0.2, "CLAM_SB": 2.0}.get(config.model.name, 1.0) - abs(config.optim.lr - 1e-3)
        rng = np.random.default_rng([config.seed, config.data.splits.fold, len(config.model.name)])
        rows = ["key,split,label,logit,probability,num_instances,patient"]
        for bag in splits["test"]:
            info = store.infos[bag]
            logit = quality * (2 * float(info.label) - 1) + rng.normal()
            rows.append(f"{info.name},test,{info.label},{logit:.9g},0.5,{info.num_instances},")
        (config.run_dir / "predictions.csv").write_text("\n".join(rows) + "\n")
        rows = [f"test,bag,{name},{quality},0.1,0.9,6," for name in ("auroc", "accuracy", "f1")]
        (config.run_dir / "metrics.csv").write_text("split,unit,metric,value,low,high,count,reason\n" + "\n".join(rows))
        test = {"auroc": min(quality, 1.0), "accuracy": 0.5 + 0.01 * config.seed, "f1": 0.25, "num_bags": 6}
        results = {"test": test, "val": {"auroc": quality}, "best_epoch": 3 + config.data.splits.val_fold}
        (config.run_dir / "results.json").write_text(json.dumps(results))
        (config.run_dir / "identity.json").write_text(json.dumps(run_identity(config, store, splits)))
        return 0

    monkeypatch.setattr(module, "_train", train)
    return runs


def test_a_model_gets_what_it_takes() -> None:
    config = build_config(yaml.safe_load(CONFIG.format(folder="x")))
    feat_ext = {"name": "MLP", "linear_sizes": [8], "activations": ["relu"]}
    assert model_settings(config, "MeanMIL") == {"name": "MeanMIL", "feat_ext": feat_ext}
    expected = {"name": "CLAM_SB", "att_dim": 4, "feat_ext": feat_ext, "k_sample": 3}
    assert model_settings(config, "CLAM_SB") == expected


def test_intervals_over_runs_are_students() -> None:
    found = spread([0.5, 0.7, 0.6, 0.6], "auroc")
    half = 3.182446305 * np.std([0.5, 0.7, 0.6, 0.6], ddof=1) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert spread([0.5], "auroc").mean == 0.5 and np.isnan(spread([0.5], "auroc").low)
    wide, free = spread([0.9, 1.0], "auroc"), spread([0.9, 1.0], "mae")
    assert (wide.low, wide.high) == (pytest.approx(0.95 - 12.7062047 * 0.05), 1.0) and free.high > 1.5


def test_the_table_has_intervals_differences_and_failures() -> None:
    best = Line("B", {"auroc": Spread(0.9)}, 10.0, 1 << 20, num_runs=1, num_failed=0)
    other = Line("A", {"auroc": Spread(0.6, 0.5, 0.7)}, 20.4, 2 << 20, 2, 1, Spread(-0.3, -0.4, -0.2), 0.0123)
    lines = markdown(table_cells([best, other], ["auroc", "f1"])).splitlines()
    assert lines[0] == "| Model | AUROC | AUROC less the best's | p | Seconds | Peak RSS, MiB |"
    assert lines[2] == "| B | 0.900 |  |  | 10 | 1 |"
    assert lines[3] == "| A (1 failed) | 0.600 [0.500, 0.700] | -0.300 [-0.400, -0.200] | 0.012 | 20 | 2 |"


def test_models_seeds_and_folds(config: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--config", str(config), "--models", "MeanMIL,CLAM_SB,MaxMIL", "--seeds", "2", "--folds", "3"]
    assert main([*command, "--list"]) == 0 and not trained
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 18 and listed[7].split() == ["7", "CLAM_SB-seed0-fold1", "not", "finished"]
    assert main([*command, "--collect"]) == 2 and not (config.parent / "runs").exists()
    capsys.readouterr()
    assert main([*command, "--index", "7"]) == 0 and len(trained) == 1
    assert "data.splits.folds=3" in trained[0] and "data.splits.fold=1" in trained[0]
    assert main([*command, "--collect"]) == 2 and len(trained) == 1
    assert "17 of 18 runs have no result" in capsys.readouterr().err
    assert main(command) == 2 and len(trained) == 18
    assert "6 of 18 runs have no result; the first, MaxMIL-seed0-fold0: out of luck" in capsys.readouterr().err
    folder = config.parent / "runs" / "small"
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [row["run"] for row in rows[:3]] == ["MeanMIL-seed0-fold0", "MeanMIL-seed0-fold1", "MeanMIL-seed0-fold2"]
    assert [row["error"] for row in rows].count("out of luck") == 6
    table = {row["model"]: row for row in csv.DictReader((folder / "table.csv").open())}
    assert list(table) == ["CLAM_SB", "MeanMIL", "MaxMIL"]
    assert float(table["MeanMIL"]["accuracy"]) == pytest.approx(0.505) and table["MeanMIL"]["num_runs"] == "6"
    assert float(table["CLAM_SB"]["mean"]) == pytest.approx((1 + 0.505 + 0.25) / 3)
    assert float(table["MeanMIL"]["difference"]) < 0 < float(table["MeanMIL"]["p_value"]) < 1
    assert table["CLAM_SB"]["difference"] == "" and table["MaxMIL"]["num_failed"] == "6"
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (folder / "figure.svg").read_text()
    page = (folder / "report.html").read_text()
    assert "CLAM_SB has the best test AUROC, 1.000 [1.000, 1.000]. On the same bags " in page
    assert "6 of 18 runs have no result: see Runs." in page and page.count("out of luck") == 6
    assert page.count("<figure>") == 6 and "AUROC: CLAM_SB 1.000 [1.000, 1.000]; MeanMIL " in page
    assert "<td>1.000 <small>[1.000, 1.000]</small></td>" in page
    (cells,) = re.findall('<tr><th scope="row">MeanMIL</th>(.*?)</tr>', page)
    assert [float(cell.split()[0]) for cell in re.findall("<td>(.*?)</td>", cells)[:2]] == [
        pytest.approx(float(table["MeanMIL"][name]), abs=5e-4) for name in ("auroc", "accuracy")
    ]
    assert not re.search('(?:src|href)="(?!data:|#)', page) and "<script" not in page
    assert main(command) == 2 and len(trained) == 24  # the failed ones are tried again


def test_every_bag_tests_once_and_pools(config: Path, trained: list[list[str]]) -> None:
    study = plan_comparison(config, [], ["MeanMIL", "CLAM_SB"], [0], folds=4)
    outcomes = study.run(lambda _: None)
    keys = [
        line.split(",")[0]
        for outcome in outcomes[:4]
        for line in (study.folder / outcome.planned.name / "predictions.csv").read_text().splitlines()[1:]
    ]
    assert len(keys) == len(set(keys)) == 16
    best, other = summarise_comparison(study, outcomes)
    assert (best.model, other.model) == ("CLAM_SB", "MeanMIL") and other.difference is not None
    assert other.difference.low < other.difference.mean < other.difference.high


def test_one_run_has_the_interval_of_its_bags(config: Path, trained: list[list[str]]) -> None:
    study = plan_comparison(config, [], ["MeanMIL"], [0])
    (line,) = summarise_comparison(study, study.run(lambda _: None))
    assert (line.metrics["auroc"].low, line.metrics["auroc"].high) == (0.1, 0.9)
    bags = read_predictions(study.folder / "MeanMIL-seed0" / "predictions.csv")
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        drawn = rng.integers(0, len(bags.keys), len(bags.keys))
        labels, logits = bags.labels[drawn], bags.logits[drawn]
        if 0 < labels.sum() < len(labels):
            right = ((logits >= 0) == labels).mean()
            means.append(np.mean([sk.roc_auc_score(labels, logits), right, sk.f1_score(labels, logits >= 0)]))
    low, high = np.quantile(means, [0.025, 0.975])  # BCa's ends are shifted, by less than a fifth here
    assert line.metrics["mean"].low == pytest.approx(low, abs=0.2 * (high - low))
    assert line.metrics["mean"].high == pytest.approx(high, abs=0.2 * (high - low))


def test_inner_folds_choose(config: Path, trained: list[list[str]]) -> None:
    grid = {"optim.lr": ["1e-2", "1e-3"], "train.batch_bags": ["2", "3"]}
    study = plan_comparison(config, [], ["MeanMIL"], [0], folds=2, inner=3, grid=grid)
    assert len(study.runs) == 2 * (4 * 3 + 1) and [bool(run.after) for run in study.runs] == [False] * 24 + [True] * 2
    last = study.runs[-1]
    early = study.run_one(last)
    assert early.waiting and "waits for 12 of 12 runs" in early.error and not trained
    outcomes = study.run(lambda _: None)
    assert not any(outcome.error for outcome in outcomes)
    chosen = trained[-1]
    assert "optim.lr=1e-3" in chosen and "train.epochs=4" in chosen  # best epochs 3, 4, 5
    splits = load_config(config, chosen).data.splits
    assert (splits.folds, splits.fold, splits.val_folds, splits.val_fraction) == (2, 1, None, None)
    inner = load_config(config, trained[5]).data.splits
    assert (inner.fold, inner.val_folds, inner.val_fold) == (0, 3, 2)
    assert len(summarise_comparison(study, outcomes)[0:1]) == 1
    with pytest.raises(ConfigError, match="expected both"):
        plan_comparison(config, [], ["MeanMIL"], [0], grid=grid)


def test_cap_curve(config: Path, trained: list[list[str]], caplog: pytest.LogCaptureFixture) -> None:
    command = ["cap-curve", "--config", str(config), "seed=0", "--caps", "64,120", "--seeds", "2", "name=caps"]
    assert main(command) == 0
    study = plan_cap_curve(config, ["seed=0", "name=caps"], [120, 64], [0, 1])
    names = ["cap64-seed0", "cap64-seed1", "cap120-seed0", "cap120-seed1", "whole-seed0", "whole-seed1"]
    assert [run.name for run in study.runs] == names and len(trained) == 6
    small, large, whole = summarise_cap_curve(study, study.collect())
    sizes = study.store.sizes
    assert small.instances_left_out == pytest.approx(1 - 64 * 16 / sum(sizes)) and whole.instances_left_out == 0
    assert (large.cap, whole.cap, whole.num_runs) == (120, None, 2)
    folder = config.parent / "runs" / "caps"
    assert (folder / "figure.png").is_file()
    page = (folder / "report.html").read_text()
    assert "with a random 64 instances of each bag" in page and "<h2>What a cap costs</h2>" in page
    assert [row["cap"] for row in csv.DictReader((folder / "table.csv").open())] == ["64", "120", "whole"]
    with caplog.at_level(logging.INFO, "bigbag"):
        uncut = plan_cap_curve(config, ["name=caps"], [10**6, max(sizes), 64], [0])
    assert [run.name for run in uncut.runs] == ["cap64-seed0", "whole-seed0"]
    assert f"caps of {max(sizes)}, 1000000 leave every bag whole, the largest of {max(sizes)} inst" in caplog.text
    with pytest.raises(ConfigError, match="data.max_instances is set"):
        plan_cap_curve(config, ["data.max_instances=5"], [64], [0])


def test_a_failure_with_other_settings_is_none_of_these(
    config: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--config", str(config), "--models", "MaxMIL"]
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.split(maxsplit=2)[2] == "failed: out of luck\n"
    assert main([*command, "--list", "optim.lr=0.1"]) == 0
    assert capsys.readouterr().out.split(maxsplit=2)[2] == "not finished\n"


def test_the_folder_of_a_run_is_not_a_study_s(
    config: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "runs" / "small").mkdir(parents=True)
    (config.parent / "runs" / "small" / "identity.json").write_text("{}")
    for command in (["compare", "--models", "MeanMIL"], ["cap-curve"]):
        assert main([*command, "--config", str(config)]) == 2 and not trained
        assert "runs/small holds a run, whose report.html would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize("submit", [False, True])
def test_slurm(config: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, submit: bool) -> None:
    """Scripts that bash accepts; submitted in order, each after the one before, to a stand-in of sbatch."""
    folder = config.parent / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\necho "$@" >> {folder}/log\nwc -l < {folder}/log\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    command = ["compare", "--config", str(config), "--models", "MeanMIL", "--folds", "2", "--inner", "2"]
    assert main([*command, "--index", "1"]) == 0
    slurm = ["--slurm", "submit" if submit else "write", "--sbatch=--partition=gpu", "--limit", "8"]
    assert main([*command, *slurm]) == 0
    scripts = config.parent / "runs" / "small" / "slurm"
    first = (scripts / "runs0.sbatch").read_text()
    assert "#SBATCH --array=0,2-3%8\n" in first and "#SBATCH --partition=gpu\n" in first
    assert "#SBATCH --array=4-5%8\n" in (scripts / "runs1.sbatch").read_text()
    assert "--collect" in (scripts / "collect.sbatch").read_text()
    for script in scripts.glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "--slurm" not in script.read_text() and "--limit" not in script.read_text()
    log = (folder / "log").read_text().split("\n")[:3] if submit else []
    assert (
        log
        == [
            f"--parsable {scripts}/runs0.sbatch",
            f"--parsable --dependency=afterany:1 {scripts}/runs1.sbatch",
            f"--parsable --dependency=afterany:2 {scripts}/collect.sbatch",
        ][: 3 * submit]
    )


def test_a_task_that_is_asked_to_leave_is_queued_again(config: Path, trained: list[list[str]], tmp_path: Path) -> None:
    """The script of the array, with stand-ins for Python (which leaves with status 85 on SIGTERM) and scontrol."""
    assert main(["compare", "--config", str(config), "--models", "MeanMIL", "--slurm", "write"]) == 0
    text = (config.parent / "runs" / "small" / "slurm" / "runs0.sbatch").read_text()
    (tmp_path / "python").write_text("#!/bin/bash\ntrap 'exit 85' TERM\ntouch started\nwhile :; do sleep 0.05; done\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\nexit 1\n')
    for name in ("python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "task.sh"
    script.write_text(text.replace(sys.executable, str(tmp_path / "python")).replace(f"cd {os.getcwd()}", "cd ."))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    task = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    task.send_signal(signal.SIGUSR1)
    assert task.wait(20) == 85 and (tmp_path / "requeued").read_text() == "requeue 7_0\n"


def test_signals_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text(
        "#!/bin/bash\ntrap 'exit 85' USR1\nkill -USR1 $PPID\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    before = signal.getsignal(signal.SIGUSR1)
    assert module._train("c.yaml", [], tmp_path / "output.txt", module._Attempts(tmp_path)) == 85
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seeds", "0"], "argument --seeds: expected a whole number from 1 on, got '0'"),
        (["--folds", "1"], "--folds 1: expected at least 2"),
        (["--folds", "17"], "folds asks for 17 parts, but the 16 bags"),
        (["--inner", "7"], "val_folds asks for 7 parts"),
        (["--models", "MeanMIL,"], "compare: unknown model ''; known models: ABMIL"),
        (["--index", "1"], "--index 1: expected 0 to 0"),
        (["compare.common={att_dmi: 3}"], "compare.common: unknown setting 'att_dmi'; did you mean 'att_dim'?"),
        (["--inner", "2", "--grid", "seed=1", "--grid", "seed=2"], "--grid seed=2: seed is there twice"),
        (["data.shards=nowhere"], "nowhere: no such folder; pack the set first"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    config: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    try:
        status: Any = main(["compare", "--config", str(config), "--models", "MeanMIL", *options])
    except SystemExit as leaving:  # argparse's way
        status = leaving.code
    assert status == 2 and expected in capsys.readouterr().err and not trained


def test_a_model_named_twice_is_one(config: Path) -> None:
    assert [run.name for run in plan_comparison(config, [], ["ABMIL", "ABMIL"], [0]).runs] == ["ABMIL-seed0"]


def test_a_value_named_twice_is_tried_once() -> None:
    assert parse_grid(["optim.lr=1e-3,1e-4,1e-3"]) == {"optim.lr": ["1e-3", "1e-4"]}


def test_ranges() -> None:
    assert array_ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8" and array_ranges([3]) == "3"


@pytest.mark.slow
def test_from_the_command_line_once_and_again(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--config", str(config), "--models", "MeanMIL,CLAM_SB", "--seeds", "1"]
    assert main(command) == 0
    folder = config.parent / "runs" / "small"
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(row["model"], row["seed"], row["error"]) for row in rows] == [("MeanMIL", "0", ""), ("CLAM_SB", "0", "")]
    for row in rows:
        results = json.loads((folder / f"{row['model']}-seed0" / "results.json").read_text())
        assert float(row["auroc"]) == pytest.approx(results["test"]["auroc"])
        settings = load_config(folder / f"{row['model']}-seed0" / "config.yaml")
        assert settings.train.batch_bags == (2 if row["model"] == "CLAM_SB" else 3)
        assert float(row["seconds"]) > 0.5 and int(row["peak_rss_bytes"]) > 100 << 20
    page = (folder / "report.html").read_text()
    for name in ("MeanMIL-seed0", "CLAM_SB-seed0"):
        assert f'<a href="{name}/report.html">{name}</a>' in page and (folder / name / "report.html").is_file()
    table = (folder / "table.md").read_text()
    assert "| CLAM_SB |" in table and table in capsys.readouterr().out
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    before = (folder / "table.csv").read_bytes()
    assert main(command) == 0 and (folder / "table.csv").read_bytes() == before
    monkeypatch.undo()
    assert main([*command, "train.epochs=2"]) == 2
    assert "holds a run with other settings (train.epochs: 1 -> 2)" in capsys.readouterr().err
    assert "other settings" in (folder / "runs.csv").read_text()
    with pytest.raises(ConfigError, match="unknown model 'Nothing'"):
        plan_comparison(config, [], ["Nothing"], [0])


def test_an_interrupted_run_goes_on_and_all_attempts_count(config: Path, trained: list[list[str]]) -> None:
    study: Study = plan_comparison(config, [], ["MeanMIL"], [0])
    train: Callable = module._train
    outcomes: list[Outcome] = []

    def interrupted(*arguments: Any) -> int:
        train(*arguments)
        arguments[-1]._started -= 100.0
        arguments[-1].note(3 << 20)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.run(outcomes.append)
    assert not outcomes and study.collect()[0].waiting
    (outcome,) = study.run(outcomes.append)
    assert len(trained) == 2 and not outcome.error
    assert 100 < outcome.seconds < 130 and outcome.peak_rss_bytes == 3 << 20


def test_damaged_files_of_a_run_are_made_again(config: Path, trained: list[list[str]]) -> None:
    study = plan_comparison(config, [], ["MeanMIL"], [0])
    (whole,) = study.run(lambda _: None)
    for name in ("cost.json", "results.json", "attempts.json"):
        (study.folder / "MeanMIL-seed0" / name).write_text('{"seconds": 1')
    assert study.collect()[0].waiting
    (again,) = study.run(lambda _: None)
    assert again.results == whole.results and len(trained) == 2


def test_a_killed_study_leaves_no_run_behind_and_two_share_the_work(config: Path, tmp_path: Path) -> None:
    """The run is a stand-in for Python that writes its process id and waits."""
    (tmp_path / "python").write_text('#!/bin/bash\necho $$ > "$PWD/pid"\nwhile :; do sleep 0.05; done\n')
    (tmp_path / "python").chmod(0o755)
    script = f"""
import sys
from bigbag.evaluation.compare import plan_comparison
sys.executable = {str(tmp_path / "python")!r}
study = plan_comparison({str(config)!r}, [], ["MeanMIL"], [0])
study.run(print)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert first.poll() is None
        time.sleep(0.02)
    (outcome,) = plan_comparison(config, [], ["MeanMIL"], [0]).run(lambda _: None)
    assert outcome.waiting and "another process is at it" in outcome.error
    first.kill()
    first.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid.read_text().strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_intervals_stay_within_what_a_metric_can_be() -> None:
    assert spread([-0.9, 0.9], "kappa").low == -1.0 and spread([0.1, 0.9], "auroc").low == 0.0
    assert spread([1.0, 9.0], "rmse").low == 0.0 and spread([0.9, 1.0], "r2").high == 1.0
