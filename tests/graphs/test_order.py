"""Hilbert's curve and renaming of nodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbag.adjacency import Adjacency
from bigbag.graphs import build_adjacency, permute, space_filling_order


@pytest.mark.parametrize(("axes", "side"), [(1, 64), (2, 32), (3, 8)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_curve_visits_every_cell_of_a_cube_by_steps_of_one(axes, side, dtype):
    cells = np.stack(np.meshgrid(*[np.arange(side)] * axes), -1).reshape(-1, axes).astype(dtype) - 5
    cells = cells[np.random.default_rng(0).permutation(len(cells))]
    order = space_filling_order(cells)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(cells)))
    steps = np.abs(np.diff(cells[order.numpy()], axis=0)).sum(1)
    assert (steps == 1).all()


def test_floats_are_ordered_in_steps_of_their_spacing():
    rng = np.random.default_rng(0)
    points = rng.random((20000, 2)) * 1e-3 - 7
    walked = np.linalg.norm(np.diff(points[space_filling_order(points).numpy()], axis=0), axis=1).mean()
    spacing = 1e-3 / np.sqrt(20000)
    assert walked < 1.5 * spacing


def test_bags_stay_in_place_and_duplicates_in_order():
    rng = np.random.default_rng(0)
    coords, sizes = rng.integers(0, 4, (60, 2)), (20, 0, 39, 1)
    order = space_filling_order(coords, sizes).numpy()
    for start, size in zip(np.cumsum([0, *sizes]), sizes):
        alone = space_filling_order(coords[start : start + size], (size,)).numpy()
        here = order[start : start + size]
        assert sorted(here) == list(range(start, start + size)) and sorted(alone) == list(range(size))
    same = space_filling_order(np.zeros((9, 3))).tolist()
    assert same == list(range(9)) and space_filling_order(np.empty((0, 2))).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 30), st.booleans())
def test_permuted_matrix(seed, num_nodes, binary):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_nodes, num_nodes, generator=generator) * (
        torch.rand(num_nodes, num_nodes, generator=generator) < 0.5
    )
    matrix = (matrix > 0).float() if binary else matrix
    row, col = matrix.nonzero(as_tuple=True)
    adj = Adjacency.from_edges(row, col, None if binary else matrix[row, col], num_nodes)
    order = torch.randperm(num_nodes, generator=generator)
    moved = permute(adj, order)
    assert torch.equal(moved.to_coo().to_dense(), matrix[order][:, order])
    back = permute(moved, torch.argsort(order))
    assert torch.equal(back.crow, adj.crow) and torch.equal(back.col, adj.col)
    assert binary or torch.equal(back.weight, adj.weight)


def test_neighbours_come_closer():
    coords = np.stack(np.meshgrid(np.arange(128), np.arange(128)), -1).reshape(-1, 2)
    coords = coords[np.random.default_rng(0).permutation(len(coords))]
    adj = build_adjacency(coords, radius=1)
    near = permute(adj, space_filling_order(coords))

    def median_gap(graph: Adjacency) -> float:
        return float((graph.rows() - graph.col).abs().double().median())

    assert median_gap(near) < 20 < 2000 < median_gap(adj)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_permute_refuses_what_is_no_permutation(order):
    adj = build_adjacency(np.zeros((3, 2)), radius=1)
    with pytest.raises(ValueError, match="each node once"):
        permute(adj, torch.tensor(order))


def test_order_refuses_four_axes():
    with pytest.raises(ValueError, match="1 to 3"):
        space_filling_order(np.zeros((3, 4)))
