"""Self loops and normalisation, against dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbag.adjacency import Adjacency
from bigbag.graphs import add_self_loops, normalize_adjacency


def random_graph(seed: int, num_nodes: int, binary: bool, symmetric: bool) -> tuple[Adjacency, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_nodes, num_nodes, generator=generator) * (
        torch.rand(num_nodes, num_nodes, generator=generator) < 0.3
    )
    if binary:
        matrix = (matrix > 0).float()
    if symmetric:
        matrix = torch.maximum(matrix, matrix.T)
    row, col = matrix.nonzero(as_tuple=True)
    weight = None if binary else matrix[row, col]
    return Adjacency.from_edges(row, col, weight, num_nodes, symmetric), matrix


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.booleans(), st.booleans())
def test_self_loops_fill_the_diagonal_where_it_is_empty(seed, num_nodes, binary, symmetric):
    adj, matrix = random_graph(seed, num_nodes, binary, symmetric)
    diagonal = torch.where(matrix.diagonal() == 0, 1.0, matrix.diagonal())
    expected = matrix - torch.diag(matrix.diagonal()) + torch.diag(diagonal)
    looped = add_self_loops(adj)
    assert torch.equal(looped.to_coo().to_dense(), expected)
    assert looped.symmetric == symmetric and (looped.weight is None) == binary
    inside = torch.ones(looped.num_edges, dtype=torch.bool)
    inside[looped.crow[1:-1][looped.crow[1:-1] < looped.num_edges]] = False
    assert (looped.col.diff()[inside[1:]] > 0).all()
    again = add_self_loops(looped)
    assert torch.equal(again.col, looped.col) and torch.equal(again.crow, looped.crow)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.booleans(), st.booleans(), st.sampled_from(["symmetric", "row"]))
def test_normalisation_equals_the_formula(seed, num_nodes, binary, symmetric, mode):
    adj, matrix = random_graph(seed, num_nodes, binary, symmetric)
    degree = matrix.double().sum(1)
    inverse = torch.where(degree > 0, 1 / degree, 0.0)
    left, right = (inverse.sqrt(), inverse.sqrt()) if mode == "symmetric" else (inverse, torch.ones_like(inverse))
    normalized = normalize_adjacency(adj, mode)
    dense = normalized.to_coo().to_dense()
    torch.testing.assert_close(dense, (left[:, None] * matrix * right[None]).float(), rtol=1e-6, atol=1e-7)
    assert normalized.symmetric == (symmetric and mode == "symmetric")
    if normalized.symmetric:
        assert torch.equal(dense, dense.T)  # to the last bit


def test_none_changes_nothing():
    adj, _ = random_graph(0, 5, False, True)
    assert normalize_adjacency(adj, "none") is adj


def test_float64_weights_stay():
    adj = Adjacency(torch.tensor([0, 2]), torch.tensor([0, 0], dtype=torch.int32), torch.tensor([1.0, 3.0]).double())
    weight = normalize_adjacency(adj, "row").weight
    assert weight.dtype == torch.float64 and weight.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("mode", "weight", "message"), [("sym", 1.0, "mode is 'sym'"), ("row", -1.0, "0 or more")])
def test_refusals(mode, weight, message):
    adj = Adjacency(torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.tensor([weight]))
    with pytest.raises(ValueError, match=message):
        normalize_adjacency(adj, mode)


def test_normalised_regular_graph_has_rows_of_one():
    from bigbag.graphs import build_adjacency

    coords = np.arange(100)[:, None]
    adj = build_adjacency(coords, radius=3, self_loops=True, normalize="row")
    torch.testing.assert_close(adj.to_coo().to_dense().sum(1), torch.ones(100))
