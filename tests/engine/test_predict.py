"""Predictions of new slides: those of the run itself on the same bags, whatever they are read from."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag
from bigbag.cli import main
from bigbag.config import ModelConfig, TaskConfig, build_config
from bigbag.data import open_store, pack
from bigbag.data.sources import MemorySource
from bigbag.engine import predict as engine_predict
from bigbag.engine.new_bags import bags_of_store
from bigbag.engine.run import train
from bigbag.models import build_model, load_model, save_model
from bigbag.testing import free_port

ROOT = Path(__file__).parents[2]


def settings_of(run_settings, **changes):
    return build_config({**run_settings, "train": {"epochs": 1, "batch_bags": 3}, **changes})


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A finished run of a model that pools."""
    data = {"shards": shards, "budget_instances": 100, "num_workers": 0}
    settings = {"name": "run", "out": str(tmp_path_factory.mktemp("runs")), "data": data}
    config = settings_of({**settings, "model": {"name": "ABMIL", "gated": True, "att_dim": 8}})
    train(config)
    return config


def folder_of(store, path, names=None, **without):
    """The bags of a store as one file each, without labels."""
    path.mkdir(exist_ok=True)
    for i, info in enumerate(store.infos):
        if names is None or info.name in names:
            bag = store.read(i)
            arrays = {"features": np.asarray(bag.x, np.float32), "coords": bag.coords}
            arrays = {name: value for name, value in arrays.items() if name not in without}
            np.savez(path / f"{info.name}.npz", **arrays)
    return path


def predict(checkpoint, root, out, *options):
    return main(
        ["predict", "--checkpoint", str(checkpoint), "--from", str(root), "--out", str(out), *map(str, options)]
    )


def rows(path):
    with open(path, newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def assert_same_as_run(config, out):
    """Every test and validation bag of the run, predicted alone, has the logit it had in the run."""
    expected, found = rows(config.run_dir / "predictions.csv"), rows(out / "predictions.csv")
    assert next(iter(expected.values())).keys() == next(iter(found.values())).keys()
    assert set(expected) <= set(found) and len(expected) > 10
    for key, row in expected.items():
        for column in (name for name in row if name.startswith(("logit", "probability"))):
            assert float(found[key][column]) == pytest.approx(float(row[column]), abs=1e-5), (key, column)
        assert found[key]["num_instances"] == row["num_instances"]


def test_predictions_are_those_of_the_run(run, shards, tmp_path):
    store = open_store(shards)
    assert predict(run.run_dir, folder_of(store, tmp_path / "new"), tmp_path / "out") == 0
    assert_same_as_run(run, tmp_path / "out")
    found = rows(tmp_path / "out" / "predictions.csv")
    assert len(found) == len(store) and {row["label"] for row in found.values()} == {""}
    assert predict(run.run_dir / "checkpoints" / "best" / "model.safetensors", shards, tmp_path / "packed") == 0
    assert_same_as_run(run, tmp_path / "packed")
    packed = rows(tmp_path / "packed" / "predictions.csv")
    assert {name: row["label"] for name, row in packed.items()} == {i.name: str(i.label) for i in store.infos}
    # Instance scores: the model's own on the bag alone, in the order of its instances.
    bag = store.read(3)
    scores = engine_predict.read_scores(tmp_path / "out" / "scores" / f"{bag.key}.npz")
    model = load_model(run.run_dir)
    logit, attention = model.predict(torch.from_numpy(np.array(bag.x, np.float32))[None])
    assert np.allclose(scores.scores, attention[0].detach(), atol=1e-5) and np.array_equal(scores.coords, bag.coords)
    assert scores.logits[0] == pytest.approx(logit.item(), abs=1e-5) and scores.key == bag.key


def test_a_packed_bag_stays_in_its_shard(run, shards):
    """So that a model trained out of core predicts out of core; another precision is a copy."""
    predictor, store = engine_predict.Predictor(run.run_dir), open_store(shards)
    (bag, _), stored = bags_of_store(store, predictor.settings, ())[2].read(), store.read(2)
    assert np.shares_memory(predictor.pack(bag).x.numpy(), stored.x)
    assert predictor.pack(replace(bag, x=np.asarray(bag.x, np.float64))).x.dtype == torch.float64
    predictor.settings = replace(predictor.settings, dtype="float32")
    assert predictor.pack(bag).x.dtype == torch.float32


def test_labels_and_one_file(run, shards, tmp_path):
    new = folder_of(open_store(shards), tmp_path / "new")
    (tmp_path / "labels.csv").write_text("slide,label\ntest.0,0\ntest.1,1\n")
    assert predict(run.run_dir, new / "test.1.npz", tmp_path / "one", "--labels", tmp_path / "labels.csv") == 0
    found = rows(tmp_path / "one" / "predictions.csv")
    assert list(found) == ["test.1"] and found["test.1"]["label"] == "1"
    assert predict(run.run_dir, new, tmp_path / "all", "--labels", tmp_path / "labels.csv") == 0
    found = rows(tmp_path / "all" / "predictions.csv")
    assert len(found) == 22 and {k for k, row in found.items() if row["label"]} == {"test.0", "test.1"}
    assert main(["evaluate", "--predictions", str(tmp_path / "all" / "predictions.csv"), "--resamples", "20"]) == 0
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())


def test_what_is_there_is_not_computed_again(run, shards, tmp_path, monkeypatch, capsys):
    new, out = folder_of(open_store(shards), tmp_path / "new", {"test.0", "test.1", "test.2"}), tmp_path / "out"
    computed, original = [], engine_predict.Predictor.predict
    monkeypatch.setattr(
        engine_predict.Predictor, "predict", lambda self, pack: computed.append(pack.keys[0]) or original(self, pack)
    )

    def stop(self, pack):
        if computed:
            raise KeyboardInterrupt
        computed.append(pack.keys[0])
        return original(self, pack)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(engine_predict.Predictor, "predict", stop)
        assert predict(run.run_dir, new, out) == 130, "128 and the number of SIGINT"
    assert computed == ["test.0"] and not (out / "predictions.csv").exists(), "an unfinished table is none"
    computed.clear()
    assert predict(run.run_dir, new, out) == 0
    assert computed == ["test.1", "test.2"]
    first = (out / "predictions.csv").read_bytes()
    computed.clear()
    assert predict(run.run_dir, new, out) == 0
    assert computed == [] and (out / "predictions.csv").read_bytes() == first
    # Another file, a damaged result, another model: each is computed again.
    np.savez(new / "test.1.npz", features=np.zeros((3, 6), np.float32), coords=np.zeros((3, 2)))
    (out / "scores" / "test.2.npz").write_bytes(b"damaged")
    assert predict(run.run_dir, new, out) == 0
    assert computed == ["test.1", "test.2"]
    for part in (slice(0, 0), slice(0, 500)):
        path = out / "scores" / "test.2.npz"
        path.write_bytes(path.read_bytes()[part])
        computed.clear()
        assert predict(run.run_dir, new, out) == 0
        assert computed == ["test.2"]
    other = Path(shutil.copytree(run.run_dir / "checkpoints" / "best", tmp_path / "other"))
    (other / "model.json").write_text((other / "model.json").read_text() + "\n")
    computed.clear()
    assert predict(other, new, out) == 0
    assert len(computed) == 3


def test_a_damaged_file_is_named_and_the_others_are_done(run, shards, tmp_path):
    """Also where it is the first by name, from which the layout would be told."""
    h5py = pytest.importorskip("h5py")
    store = open_store(shards)
    new = tmp_path / "new"
    new.mkdir()
    for i in range(3):
        with h5py.File(new / f"s{i}.h5", "w") as file:
            file["features"] = np.asarray(store.read(i).x, np.float32)
    (new / "a.h5").write_bytes(b"damaged" * 100)
    (new / "s1.h5").write_bytes((new / "s1.h5").read_bytes()[:1000])
    assert predict(run.run_dir, new, tmp_path / "out") == 2
    assert list(rows(tmp_path / "out" / "predictions.csv")) == ["s0", "s2"]
    failed = json.loads((tmp_path / "out" / "prediction.json").read_text())["failed"]
    assert [item["name"] for item in failed] == ["a", "s1"]
    assert all("not a readable HDF5 file" in item["reason"] for item in failed)


def test_graphs_are_built_as_in_training(run_settings, tmp_path):
    """A set packed with a graph of its own settings, and the same bags from files without one."""
    rng = np.random.default_rng(0)
    bags = []
    for i in range(24):
        cells = rng.permutation(100)[: rng.integers(20, 60)]
        coords = np.stack(np.divmod(cells, 10), 1) * 512 + 300
        bags.append(
            Bag(rng.normal(size=(len(cells), 6)).astype(np.float32) + i % 2, i % 2, f"s{i}", coords, stride=512)
        )
    graph = {"radius": 2.0, "features": True, "self_loops": True, "normalize": "row"}
    splits = ["train"] * 8 + ["val"] * 8 + ["test"] * 8
    data = {**run_settings["data"], "shards": str(tmp_path / "shards"), "graph": graph}
    config = settings_of(run_settings, data=data, model={"name": "SmABMIL", "att_dim": 8, "sm_alpha": 0.5})
    pack(MemorySource(bags, splits=splits), tmp_path / "shards", graph=config.data.graph, progress=False)
    train(config)
    new = tmp_path / "new"
    new.mkdir()
    for bag in bags:
        np.savez(new / f"{bag.key}.npz", features=bag.x, coords=bag.coords)
    assert predict(config.run_dir, new, tmp_path / "out") == 0
    assert_same_as_run(config, tmp_path / "out")
    scores = engine_predict.read_scores(tmp_path / "out" / "scores" / "s3.npz")
    assert np.array_equal(scores.coords, bags[3].coords) and scores.stride == 512, "positions are the source's own"
    # A set that was packed without a graph gets one; one with another graph is refused.
    pack(MemorySource(bags), tmp_path / "bare", progress=False)
    assert predict(config.run_dir, tmp_path / "bare", tmp_path / "from_bare") == 0
    assert_same_as_run(config, tmp_path / "from_bare")
    other = settings_of(run_settings, data={**data, "graph": {}}).data.graph
    pack(MemorySource(bags), tmp_path / "other", graph=other, progress=False)
    assert predict(config.run_dir, tmp_path / "other", tmp_path / "from_other") == 2
    # Without coordinates there is no graph.
    np.savez(new / "s0.npz", features=bags[0].x)
    assert predict(config.run_dir, new, tmp_path / "out") == 2
    failed = json.loads((tmp_path / "out" / "prediction.json").read_text())["failed"]
    assert [item["name"] for item in failed] == ["s0"] and "no coords" in failed[0]["reason"]


def test_slides_of_a_patient_are_one_bag(run_settings, shards, tmp_path):
    store = open_store(shards)
    bags = [store.read(i) for i in range(len(store))]
    patients = [f"p{i // 4}-{bag.y}-{info.split}" for i, (bag, info) in enumerate(zip(bags, store.infos))]
    splits = [info.split for info in store.infos]
    pack(MemorySource(bags, splits=splits, patients=patients), tmp_path / "shards", progress=False)
    data = {**run_settings["data"], "shards": str(tmp_path / "shards"), "bag": "patient"}
    config = settings_of(run_settings, data=data)
    train(config)
    new = folder_of(store, tmp_path / "new")
    lines = [f"{info.name},{patient}" for info, patient in zip(store.infos, patients)]
    (tmp_path / "patients.csv").write_text("\n".join(["slide,patient", *lines]) + "\n")
    assert predict(config.run_dir, new, tmp_path / "out", "--patients", tmp_path / "patients.csv") == 0
    expected, found = rows(config.run_dir / "predictions.csv"), rows(tmp_path / "out" / "predictions.csv")
    assert len(found) == len(set(patients)) and set(expected) <= set(found)
    for key, row in expected.items():
        assert float(found[key]["logit"]) == pytest.approx(float(row["logit"]), abs=1e-5)
        assert found[key]["num_instances"] == row["num_instances"]
    # Scores are by slide, with the slide's own coordinates.
    sizes = {}
    for i, info in enumerate(store.infos):
        scores = engine_predict.read_scores(tmp_path / "out" / "scores" / f"{info.name}.npz")
        assert scores.key == patients[i] and np.array_equal(scores.coords, bags[i].coords)
        sizes[patients[i]] = sizes.get(patients[i], 0) + len(scores.scores)
    assert {key: int(row["num_instances"]) for key, row in found.items()} == sizes
    assert predict(config.run_dir, tmp_path / "shards", tmp_path / "packed") == 0
    packed = rows(tmp_path / "packed" / "predictions.csv")
    assert {k: row["logit"] for k, row in packed.items()}.keys() == found.keys()


def test_other_tasks(run_settings, shards, tmp_path):
    task = {"type": "multiclass", "num_outputs": 3}
    config = settings_of(run_settings, task=task, train={"epochs": 1, "batch_bags": 3, "monitor": "loss"})
    train(config)
    assert predict(config.run_dir, shards, tmp_path / "out") == 0
    assert_same_as_run(config, tmp_path / "out")
    for row in rows(tmp_path / "out" / "predictions.csv").values():
        assert sum(float(row[f"probability_{k}"]) for k in range(3)) == pytest.approx(1)


def test_what_cannot_be_predicted_is_named_and_the_rest_is_done(run, shards, tmp_path, capsys):
    new = folder_of(open_store(shards), tmp_path / "new", {"test.0", "test.1", "test.2", "test.3"})
    np.savez(new / "test.0.npz", features=np.zeros((4, 5), np.float32))
    np.savez(new / "test.1.npz", features=np.full((4, 6), np.nan, np.float32))
    np.savez(new / "test.2.npz", features=np.zeros((0, 6), np.float32))
    assert predict(run.run_dir, new, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "3 of 4 bags" in error and "shape (5,)" in error and "trained on (6,)" in error
    failed = {
        item["name"]: item["reason"] for item in json.loads((tmp_path / "out/prediction.json").read_text())["failed"]
    }
    assert "extractor" in failed["test.0"] and "NaN" in failed["test.1"] and "no instances" in failed["test.2"]
    assert list(rows(tmp_path / "out" / "predictions.csv")) == ["test.3"]
    for name in ("test.0", "test.1"):
        (new / f"{name}.npz").unlink()
    assert predict(run.run_dir, new, tmp_path / "out", "--empty", "leave_out") == 0
    about = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert (about["failed"], about["left_out"]) == ([], [{"name": "test.2", "reason": "no instances"}])


WRONG = {
    "no model.json": ["--checkpoint", "nowhere"],
    "nowhere: no such file or folder": ["--from", "nowhere"],
    "top_k is -1": ["--top-k", "-1"],
    "threshold is 3": ["--threshold", "3"],
    "scale linear": ["--limits", "0", "1"],
    "colour_map is 'nocolour'": ["--colour-map", "nocolour"],
    "nowhere: no such folder of slides": ["--slides", "nowhere", "--heatmaps"],
    "predict takes no settings": ["data.graph={}"],
}


def test_wrong_options(run, shards, tmp_path, capsys):
    for message, change in WRONG.items():
        assert predict(run.run_dir, shards, tmp_path / "out", *change) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_several_ranks(run, shards, tmp_path):
    assert predict(run.run_dir, shards, tmp_path / "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    arguments = ["--checkpoint", str(run.run_dir), "--from", shards, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "predict.py"), *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (rows(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert list(one) == list(two)
    for key, row in one.items():
        assert float(two[key]["logit"]) == pytest.approx(float(row["logit"]), abs=1e-5)


def test_slides_that_a_source_joined_keep_their_names_and_places(tmp_path):
    """STAMP's bags are patients: each slide, also the only one of its patient, has its own scores and coordinates."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    places = {}
    for i, name in enumerate(("a", "b", "c")):
        cells = np.stack(np.divmod(rng.permutation(30)[: 9 + i], 6), 1)
        places[name] = (cells * 256.0).astype(np.float32)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["feats"] = rng.normal(size=(len(cells), 6)).astype(np.float16)
            file["coords"] = places[name]
            file.attrs.update(unit="um", tile_size_um=256.0, tile_size_px=224, feat_type="tile", stamp_version="2.3.0")
    (tmp_path / "slides.csv").write_text("PATIENT,FILENAME\np1,a.h5\np2,b.h5\np1,c.h5\n")
    settings = ModelConfig(name="ABMIL", att_dim=4), (6,), TaskConfig()
    torch.manual_seed(0)
    save_model(tmp_path / "model", build_model(*settings).state_dict(), *settings, {"source_bags": "patient"})
    options = ["--patients", tmp_path / "slides.csv", "--heatmaps"]
    assert predict(tmp_path / "model", tmp_path, tmp_path / "out", *options) == 0
    found = rows(tmp_path / "out" / "predictions.csv")
    assert {key: row["num_instances"] for key, row in found.items()} == {"p1": "20", "p2": "10"}
    for name, coords in places.items():
        scores = engine_predict.read_scores(tmp_path / "out" / "scores" / f"{name}.npz")
        assert scores.key == ("p2" if name == "b" else "p1") and scores.slide == name and scores.stride == 256
        assert np.array_equal(scores.coords, coords) and scores.attributes["unit"] == "um"
        assert (tmp_path / "out" / "heatmaps" / f"{name}.png").is_file()
    assert predict(tmp_path / "model", tmp_path, tmp_path / "out", *options, "--geojson") == 2
    assert predict(tmp_path / "model", tmp_path, tmp_path / "out", *options, "--geojson", "--mpp", 0.5) == 0
    (first, *_) = json.loads((tmp_path / "out" / "geojson" / "b.instances.geojson").read_text())["features"]
    assert first["geometry"]["coordinates"][0][0] == (places["b"][0] * 2).tolist()
