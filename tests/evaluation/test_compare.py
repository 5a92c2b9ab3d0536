"""The table of all models: one process a run, resumable, honest about failures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bigbag.cli import main
from bigbag.config import ConfigError, build_config
from bigbag.evaluation import compare as module
from bigbag.evaluation.compare import Run, _markdown, compare, model_settings

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
"""


def test_a_model_gets_what_it_takes():
    config = build_config(__import__("yaml").safe_load(CONFIG.format(folder="x")))
    feat_ext = {"name": "MLP", "linear_sizes": [8], "activations": ["relu"]}
    assert model_settings(config, "MeanMIL") == {"name": "MeanMIL", "feat_ext": feat_ext}
    expected = {"name": "CLAM_SB", "att_dim": 4, "feat_ext": feat_ext, "k_sample": 3}
    assert model_settings(config, "CLAM_SB") == expected


def test_the_table_has_means_spreads_and_failures():
    def run(model: str, seed: int, auroc: float, **changes: object) -> Run:
        test = {"auroc": auroc, "accuracy": 0.5, "instance_auroc": 0.25}
        return Run(model, seed, test, **{"seconds": 10.0 * (seed + 1), "peak_rss_bytes": (seed + 1) << 20, **changes})

    runs = [run("A", 0, 0.5), run("A", 1, 0.7), run("B", 0, 0.9), Run("C", 0, {}, error="out of luck")]
    lines = _markdown(runs).splitlines()
    assert lines[0] == "| Model | Test AUROC | Accuracy | F1 | Instance AUROC | Seconds | Peak RSS, MiB |"
    assert lines[2] == "| B | 0.900 | 0.500 |  | 0.250 | 10 | 1 |"
    assert lines[3] == "| A | 0.600 ± 0.141 | 0.500 ± 0.000 |  | 0.250 ± 0.000 | 15 | 2 |"
    assert lines[4] == "| C (1 failed) |  |  |  |  |  |  |"


@pytest.mark.slow
def test_from_the_command_line_once_and_again(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    assert main(["pack", "--config", str(path)]) == 0
    command = ["compare", "--config", str(path), "--models", "MeanMIL,CLAM_SB", "--seeds", "1"]
    assert main(command) == 0
    folder = tmp_path / "runs" / "small"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["model"], row["seed"], row["error"]) for row in rows] == [("MeanMIL", "0", ""), ("CLAM_SB", "0", "")]
    for row in rows:
        results = json.loads((folder / f"{row['model']}-seed0" / "results.json").read_text())
        assert float(row["auroc"]) == pytest.approx(results["test"]["auroc"])
        assert float(row["seconds"]) > 0.5 and int(row["peak_rss_bytes"]) > 100 << 20
    table = (folder / "table.md").read_text()
    assert "| CLAM_SB |" in table and table in capsys.readouterr().out
    monkeypatch.setattr(module.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    before = (folder / "table.csv").read_bytes()
    assert main(command) == 0 and (folder / "table.csv").read_bytes() == before
    monkeypatch.undo()
    assert main([*command, "train.epochs=2"]) == 2
    assert "holds a run with other settings (train.epochs: 1 -> 2)" in capsys.readouterr().err
    assert "other settings" in (folder / "table.csv").read_text()
    with pytest.raises(ConfigError, match="unknown model 'Nothing'"):
        compare(path, [], ["Nothing"], [0])
