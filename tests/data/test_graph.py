"""Graphs built while packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bigbag import Bag
from bigbag.config import ConfigError, GraphConfig, build_config
from bigbag.data import Manifest, open_store, pack
from bigbag.data.sources import MemorySource
from bigbag.graphs import build_adjacency


def lattice_bag(key: str, size: int, stride: float = 1.0, width: int = 4) -> Bag:
    rng = np.random.default_rng(size)
    cells = np.sort(rng.permutation(2 * size)[:size])
    coords = (np.stack(np.divmod(cells, 12), 1) * stride).astype(np.int32)
    return Bag(rng.normal(size=(size, width)).astype(np.float32), size % 2, key, coords)


def packed(folder: Path, bags: list[Bag], graph: GraphConfig | None, **options: object) -> Manifest:
    return pack(MemorySource(bags, ["train"] * len(bags)), folder, graph=graph, progress=False, **options)


@pytest.mark.parametrize(
    ("graph", "arguments"),
    [
        (GraphConfig(), {"radius": 1.5, "normalize": "symmetric"}),
        (
            GraphConfig(radius=1, self_loops=True, normalize="row"),
            {"radius": 1, "self_loops": True, "normalize": "row"},
        ),
        (GraphConfig(radius=None, knn=3, normalize="none"), {"knn": 3, "symmetrize": "union"}),
        (GraphConfig(features=True, normalize="none"), {"radius": 1.5, "features": True}),
    ],
)
def test_the_stored_graph_is_that_of_the_coordinates(tmp_path: Path, graph: GraphConfig, arguments: dict) -> None:
    bags = [lattice_bag(f"slide-{size}", size) for size in (1, 40, 77)]
    packed(tmp_path, bags, graph)
    store = open_store(tmp_path)
    assert store.fields == ("adj", "coords") and store.graph == graph.model_dump(mode="json")
    by_name = {bag.key: bag for bag in bags}
    for index, info in enumerate(store.infos):
        bag, found = by_name[info.name], store.read(index).adj
        features = {"features": bag.x} if arguments.get("features") else {}
        expected = build_adjacency(bag.coords, **{**arguments, **features})
        assert found.num_edges == expected.num_edges > 0 or len(bag.x) == 1
        assert found.col.dtype == torch.int32 and found.symmetric == expected.symmetric
        torch.testing.assert_close(found.crow, expected.crow)
        torch.testing.assert_close(found.col, expected.col)
        if expected.weight is None:
            assert found.weight is None
        else:
            assert found.weight.dtype == torch.float32
            torch.testing.assert_close(found.weight, expected.weight)


@pytest.mark.parametrize("stride", [224, "infer"])
def test_level_0_coordinates_are_counted_in_strides(tmp_path: Path, stride: float | str) -> None:
    packed(tmp_path, [lattice_bag("slide", 60, stride=224)], GraphConfig(stride=stride))
    expected = build_adjacency(lattice_bag("slide", 60).coords, radius=1.5, normalize="symmetric")
    torch.testing.assert_close(open_store(tmp_path).read(0).adj.to_coo().to_dense(), expected.to_coo().to_dense())


def test_coordinates_of_another_stride_are_not_a_graph_without_edges(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'slide'.*joins no two of 60 instances.*data\.graph\.stride"):
        packed(tmp_path / "a", [lattice_bag("slide", 60, stride=224)], GraphConfig())
    manifest = packed(tmp_path / "b", [lattice_bag("slide", 20, stride=224)], GraphConfig(self_loops=True))
    assert "joins no two of 20 instances" in manifest.warnings[0]


def test_other_graph_settings_are_another_set(tmp_path: Path) -> None:
    bags = [lattice_bag("slide", 30)]
    manifest = packed(tmp_path, bags, GraphConfig())
    assert packed(tmp_path, bags, GraphConfig()) == manifest == open_store(tmp_path).manifest
    for graph in (None, GraphConfig(radius=1)):
        with pytest.raises(ValueError, match="overwrite"):
            packed(tmp_path, bags, graph)
    packed(tmp_path, bags, GraphConfig(radius=1), overwrite=True)
    assert open_store(tmp_path).graph["radius"] == 1


def test_a_graph_needs_coordinates_and_no_graph_of_the_source(tmp_path: Path) -> None:
    bag = lattice_bag("slide", 30)
    with pytest.raises(ValueError, match="'slide'.*no coords"):
        packed(tmp_path / "a", [Bag(bag.x, 1, "slide")], GraphConfig())
    own = Bag(bag.x, 1, "slide", bag.coords, adj=build_adjacency(bag.coords, radius=1))
    with pytest.raises(ValueError, match="'slide'.*graph of its own"):
        packed(tmp_path / "b", [own], GraphConfig())


def test_fields_are_those_that_every_bag_has(tmp_path: Path) -> None:
    bags = [lattice_bag("a", 10), Bag(lattice_bag("b", 9).x, 1, "b")]
    assert packed(tmp_path, bags, None, shard_bytes=1).fields == ()
    assert open_store(tmp_path).fields == () and open_store(tmp_path).graph is None


def test_settings_that_do_not_go_together() -> None:
    settings = {"name": "x", "data": {"shards": "y", "graph": {"knn": 3}}, "model": {"name": "ABMIL"}}
    with pytest.raises(ConfigError, match="exactly one of radius and knn"):
        build_config(settings)
    settings["data"]["graph"] = {"raduis": 3}
    with pytest.raises(ConfigError, match=r"data\.graph\.raduis"):
        build_config(settings)
