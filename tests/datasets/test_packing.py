"""Data sets as sources: what they pack is what they give, and a config trains from them."""

import csv

import numpy as np
import pytest
import yaml

import bigbag.datasets as ours
from bigbag.cli import main
from bigbag.data import Source, open_store, pack
from bigbag.datasets import open_source


def test_packs_what_it_gives(slides_root, tmp_path):
    dataset = ours.CAMELYON16MILDataset(slides_root)
    assert isinstance(dataset, Source)
    manifest = pack(dataset, tmp_path / "shards", dtype="float32", progress=False)
    assert [(bag.name, bag.split, bag.label, bag.stride) for bag in manifest.bags] == [
        ("b", "train", 0, 512.0), ("slide.with.dots", "train", 1, 512.0)
    ]  # fmt: skip
    store = open_store(tmp_path / "shards")
    for index, expected in enumerate(dataset):
        bag = store.read(index)
        np.testing.assert_array_equal(bag.x, expected["X"])
        np.testing.assert_array_equal(bag.coords, expected["coords"])
        np.testing.assert_array_equal(bag.y_inst, expected["y_inst"])
        np.testing.assert_array_equal(bag.adj.to_coo().to_dense(), expected["adj"].to_dense())
        assert bag.adj.symmetric and (bag.positions - bag.coords * 512 == bag.positions.min(0)).all()


@pytest.mark.parametrize("name", ["CTScanDataset", "VideoClassificationDataset", "BinaryClassificationDataset"])
def test_all_kinds_pack(name, folders, tmp_path):
    paths = {"features_path": folders["features"], "labels_path": folders["labels"]}
    dataset = getattr(ours, name)(**paths, bag_keys=["X", "Y"])
    manifest = pack(dataset.subset([1, 3]), tmp_path / "shards", progress=False)
    assert [(bag.name, bag.label, bag.num_instances) for bag in manifest.bags] == [
        ("c", 1, 23),
        ("slide.with.dots", 1, 30),
    ]


def test_description_follows_the_data(slides_root):
    def describe(**kwargs):
        return ours.CAMELYON16MILDataset(slides_root, **kwargs).description()

    assert describe() == describe() != describe(partition="test")
    assert describe() != describe(adj_with_dist=True)
    before = describe()
    np.save(slides_root / "patches_512/labels/b.npy", np.array([1]))
    assert describe() != before


def test_opened_for_packing(slides_root):
    source = open_source("CAMELYON16MILDataset", root=str(slides_root))
    assert {(entry.name, entry.split, entry.label) for entry in source.entries()} == {
        ("slide.with.dots", "train", 1), ("b", "train", 0), ("c", "test", 1), ("d", "test", 0)
    }  # fmt: skip
    bag = source.load(source.entries()[1])
    assert bag.adj is None and bag.coords is not None and not source.loaded_bags
    asked = open_source("CAMELYON16MILDataset", root=str(slides_root), partition="test", bag_keys=["X", "Y", "adj"])
    assert len(asked) == 2 and asked.load(asked.entries()[0]).adj is not None
    with pytest.raises(ValueError, match="takes no 'partitoin', did you mean 'partition'"):
        open_source("CAMELYON16MILDataset", root=str(slides_root), partitoin="test")


def test_a_config_trains_from_it(slides_root, tmp_path):
    config = {
        "name": "c16",
        "out": str(tmp_path / "runs"),
        "data": {
            "shards": str(tmp_path / "shards"),
            "source": {"name": "CAMELYON16MILDataset", "root": str(slides_root)},
            "graph": {"radius": 1.5},
            "num_workers": 0,
        },
        "model": {"name": "SmABMIL", "att_dim": 4},
        "task": {"type": "binary"},
        "optim": {"lr": 0.05, "warmup_epochs": 0},
        "train": {"epochs": 2, "batch_bags": 2, "monitor": "loss"},
        "engine": {"backend": "torch"},
    }
    path = tmp_path / "c16.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["pack", "--config", str(path)]) == 0
    assert main(["train", "--config", str(path)]) == 0
    with open(tmp_path / "runs/c16/predictions.csv") as file:
        assert {row["key"]: (row["split"], row["label"]) for row in csv.DictReader(file)} == {
            "c": ("test", "1"), "d": ("test", "0")
        }  # fmt: skip
