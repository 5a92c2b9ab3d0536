"""Models on graphs, from packing to results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigbag import load_model
from bigbag.bags import PackedBags
from bigbag.config import ConfigError, GraphConfig, build_config
from bigbag.data import MemoryStore, open_store, pack
from bigbag.engine.run import train
from bigbag.engine.world import World
from bigbag.models import MODELS
from bigbag.models.base import GraphMILModel, squeeze_single_output
from bigbag.ops import segment_max, spmm

from .conftest import WIDTH, Blobs


class TinyGraph(GraphMILModel):
    """Mean of the neighbours, a layer, the maximum over the bag."""

    def __init__(self, in_shape: tuple[int, ...], criterion: torch.nn.Module | None = None, out_dim: int = 1) -> None:
        super().__init__()
        self.criterion = criterion or torch.nn.BCEWithLogitsLoss()
        self.layer = torch.nn.Linear(2 * in_shape[0], 8)
        self.classifier = torch.nn.Linear(8, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):
        x = bags.x.float()
        h = self.layer(torch.cat([x, spmm(bags.adj, x)], 1)).relu()
        Y_pred = squeeze_single_output(self.classifier(segment_max(h, bags.segments)))
        return (Y_pred, h.sum(1)) if return_att else Y_pred


@pytest.fixture
def graph_settings(run_settings, tmp_path, monkeypatch) -> dict:
    monkeypatch.setitem(MODELS, "TinyGraph", TinyGraph)
    run_settings["data"]["shards"] = str(tmp_path / "shards")
    run_settings["model"] = {"name": "TinyGraph"}
    sizes = {"train": [50, 31, 120, 1, 44, 67, 29], "val": [40, 30, 25, 60], "test": [20, 30, 25, 41]}
    pack(Blobs(sizes), run_settings["data"]["shards"], progress=False, graph=GraphConfig())
    return run_settings


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_graph_model_trains_and_predicts(graph_settings, num_workers):
    graph_settings["data"]["num_workers"] = num_workers
    config = build_config(graph_settings)
    results = train(config, world=World())
    log = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [line["train_loss"] for line in log if line["kind"] == "epoch"]
    assert curve[-1] < curve[0] and results["test"]["num_bags"] == 4 and "instance_auroc" in results["test"]
    store, model = open_store(config.data.shards), load_model(config.run_dir)
    bag = store.read(len(store.infos) - 1)
    with torch.no_grad():
        logit = model(PackedBags.from_bags([bag])).item()
        x = torch.from_numpy(bag.x.astype("float32"))
        dense = model(x[None], bag.adj.to_coo().to_dense()[None]).item()
    rows = (config.run_dir / "predictions.csv").read_text().splitlines()
    (row,) = (row.split(",") for row in rows if row.startswith(f"{bag.key},"))
    assert logit == pytest.approx(dense, abs=1e-5) and float(row[3]) == pytest.approx(logit, abs=1e-5)
    assert model.layer.in_features == 2 * WIDTH


def test_a_set_without_graph_is_refused_before_training(graph_settings, shards):
    graph_settings["data"]["shards"] = shards
    with pytest.raises(ConfigError, match=r"model TinyGraph needs adj.*data\.graph.*pack again"):
        train(build_config(graph_settings), world=World())
    assert not Path(graph_settings["out"]).exists()


def test_a_graph_of_other_settings_is_refused(graph_settings):
    graph_settings["data"]["graph"] = {"radius": 1}
    with pytest.raises(ConfigError, match=r"packed with .*'radius': 1\.5.*--overwrite"):
        train(build_config(graph_settings), world=World())


def test_bags_without_coordinates_are_refused_before_training(run_settings, monkeypatch):
    class NeedsPlaces(TinyGraph):
        needs = ("coords",)

    monkeypatch.setitem(MODELS, "NeedsPlaces", NeedsPlaces)
    run_settings["model"] = {"name": "NeedsPlaces"}
    source = Blobs({"train": [9, 8], "val": [7, 6], "test": [5, 4]})
    entries = source.entries()
    bags = [replace(source.load(entry), coords=None, key=entry.name) for entry in entries]
    store = MemoryStore(bags, [entry.split for entry in entries])
    with pytest.raises(ConfigError, match=r"model NeedsPlaces needs coords.*give the bags of the source coordinates"):
        train(build_config(run_settings), store, World())
