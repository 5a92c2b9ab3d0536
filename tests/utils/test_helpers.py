"""Helpers for graphs and files against torchmil's."""

from __future__ import annotations

import numpy as np
import pytest

from bigbag import utils


@pytest.fixture
def theirs():
    return pytest.importorskip("torchmil.utils")


def dense(edges: tuple[np.ndarray, np.ndarray], size: int) -> np.ndarray:
    matrix = np.zeros((size, size))
    np.add.at(matrix, tuple(edges[0]), edges[1])
    return matrix


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("with_features", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 1.5, 2.9])
def test_build_adj(theirs, loops, with_features, threshold):
    rng = np.random.default_rng(0)
    coords = np.stack(np.divmod(np.sort(rng.permutation(200)[:120]), 12), 1)
    features = rng.normal(size=(120, 7)).astype(np.float32) if with_features else None
    found = utils.build_adj(coords, features, threshold, loops)
    expected = theirs.build_adj(coords, features, threshold, loops)
    assert found[0].dtype == expected[0].dtype == np.int64 and found[0].shape == expected[0].shape
    np.testing.assert_allclose(dense(found, 120), dense(expected, 120), rtol=1e-6)


def test_build_adj_without_edges(theirs):
    coords = np.array([[0, 0], [9, 9]])
    found, expected = utils.build_adj(coords), theirs.build_adj(coords)
    assert found[0].shape == expected[0].shape == (2, 0) and found[1].shape == expected[1].shape == (0,)


@pytest.mark.parametrize("weighted", [None, "float32", "float64"])
@pytest.mark.parametrize("n_nodes", [None, 30])
def test_edge_lists(theirs, weighted, n_nodes):
    rng = np.random.default_rng(1)
    index = rng.integers(0, 25, (2, 90))
    weight = rng.random(90).astype(weighted) if weighted else None
    np.testing.assert_allclose(utils.degree(index, weight, n_nodes), theirs.degree(index, weight, n_nodes))
    found, expected = utils.normalize_adj(index, weight, n_nodes), theirs.normalize_adj(index, weight, n_nodes)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == expected.dtype
    for a, b in zip(utils.add_self_loops(index, weight, n_nodes), theirs.add_self_loops(index, weight, n_nodes)):
        np.testing.assert_array_equal(a, b)


def test_no_edges_at_all():
    nothing = np.array([[], []])
    assert utils.degree(nothing, n_nodes=3).tolist() == [0, 0, 0]
    assert utils.normalize_adj(nothing, n_nodes=3).shape == (0,)
    index, weight = utils.add_self_loops(nothing, n_nodes=3)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2]] and weight.tolist() == [1, 1, 1]


def test_files(theirs, tmp_path):
    (tmp_path / "t.csv").write_text('name,label\na,1\n"b,c",0\n')
    assert utils.read_csv(tmp_path / "t.csv") == theirs.read_csv(str(tmp_path / "t.csv"))
    for name in ("a.npy", "b.npy", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.npy").mkdir()
    names = ["b", "x", "a", "c", "d"]
    assert utils.keep_only_existing_files(str(tmp_path), names) == ["b", "a"]
    assert theirs.keep_only_existing_files(str(tmp_path), names) == ["b", "a"]
