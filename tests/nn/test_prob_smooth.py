"""ProbSmoothAttentionPool against torchmil, the KL term against dense algebra."""

import numpy as np
import pytest
import torch

from bigbag import Adjacency
from bigbag.graphs import add_self_loops, build_adjacency, normalize_adjacency
from bigbag.nn import ProbSmoothAttentionPool

WIDTH = 5


def graph(size: int, self_loops: bool = False) -> Adjacency:
    adj = build_adjacency(np.stack(np.divmod(np.arange(size), 4), 1), radius=1.5)
    return normalize_adjacency(add_self_loops(adj) if self_loops else adj, "symmetric")


def dense(size: int, self_loops: bool = False) -> torch.Tensor:
    return graph(size, self_loops).to_coo().to_dense()[None]


def pair(covar_mode: str, **settings):
    theirs_class = pytest.importorskip("torchmil.nn").ProbSmoothAttentionPool
    theirs, ours = (cls(WIDTH, 4, covar_mode, **settings) for cls in (theirs_class, ProbSmoothAttentionPool))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("covar_mode", ["diag", "zero"])
def test_distribution_and_kl_term_equal_torchmils(covar_mode, sparse, self_loops):
    theirs, ours = pair(covar_mode)
    X = torch.randn(1, 11, WIDTH, requires_grad=True)
    adj = dense(11, self_loops)
    A = adj.to_sparse() if sparse else adj
    expected, found = (m(X, A, return_att_dist=True, return_kl_div=True, n_samples=3)[1:] for m in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(out[2], [X, *module.parameters()]) for module, out in ((theirs, expected), (ours, found))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_kl_term_is_the_mean_over_the_bags_of_what_each_has_alone():
    ours = ProbSmoothAttentionPool(WIDTH, 4)
    X, mask, adj = torch.randn(2, 9, WIDTH), torch.ones(2, 9), torch.rand(2, 9, 9)
    mask[1, 4:] = 0
    adj[0], adj[1, :4, :4] = dense(9)[0], dense(4)[0]
    both = ours(X, adj, mask, return_kl_div=True, n_samples=1)[1]
    first = ours(X[:1], adj[:1], return_kl_div=True, n_samples=1)[1]
    second = ours(X[1:, :4], adj[1:, :4, :4], return_kl_div=True, n_samples=1)[1]
    torch.testing.assert_close(both, (first + second) / 2)


def test_without_variance_pooling_equals_torchmils():
    theirs, ours = pair("zero")
    X, mask = torch.randn(2, 8, WIDTH), torch.ones(2, 8)
    mask[1, 5:] = 0
    expected, found = (module(X, mask=mask, return_att_samples=True, return_att_dist=True) for module in (theirs, ours))
    assert [t is None for t in found] == [t is None for t in expected] == [False, False, False, True]
    torch.testing.assert_close(found[0], expected[0])
    for ours_, theirs_ in zip(found[1:3], expected[1:3]):
        torch.testing.assert_close(ours_[mask == 1], theirs_[mask == 1])


def test_draws_have_torchmils_distribution():
    """The mean of z over draws: both estimates within 5 standard errors, over 5 x 4,000 samples each."""
    theirs, ours = pair("diag")
    X = torch.randn(1, 7, WIDTH)
    torch.manual_seed(0)
    (expected, expected_f), (found, f) = (m(X, return_att_samples=True, n_samples=4000) for m in (theirs, ours))
    assert found.shape == expected.shape == (1, WIDTH, 4000) and f.shape == (1, 7, 4000)
    error = (expected.var(2) / 4000 + found.var(2) / 4000).sqrt()
    assert bool(((found.mean(2) - expected.mean(2)).abs() < 5 * error).all())
    torch.testing.assert_close(f.std(2), expected_f.std(2), rtol=0.1, atol=0)
    torch.testing.assert_close(torch.einsum("bns,bnd->bds", f.softmax(1), X), found, rtol=1e-4, atol=1e-5)


def test_number_of_draws():
    pool = ProbSmoothAttentionPool(att_dim=2, n_samples_train=3, n_samples_test=6)
    X = torch.randn(2, 4, WIDTH)
    assert pool(X).shape == (2, WIDTH, 3) and pool.eval()(X).shape == (2, WIDTH, 6)
    assert pool(X, n_samples=2).shape == (2, WIDTH, 2)


def test_errors():
    with pytest.raises(ValueError, match="covar_mode must be"):
        ProbSmoothAttentionPool(WIDTH, covar_mode="full")
    with pytest.raises(ValueError, match="needs adj"):
        ProbSmoothAttentionPool(WIDTH)(torch.randn(1, 3, WIDTH), return_kl_div=True)


def test_diagonal_of_an_adjacency():
    edges = [0, 0, 2, 2], [0, 1, 2, 2]
    adj = Adjacency.from_edges(*(torch.tensor(ends) for ends in edges), torch.tensor([0.5, 3.0, 1.0, 2.0]), 4)
    assert adj.diagonal().tolist() == [0.5, 0, 3, 0]
    assert Adjacency(adj.crow, adj.col).diagonal().tolist() == [1, 0, 2, 0]
