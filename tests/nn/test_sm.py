"""Sm, SmAttentionPool and ``project``: against torchmil and dense algebra."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bigbag import Adjacency, PackedBags, Segments, ops
from bigbag.graphs import build_adjacency
from bigbag.nn import ApproxSm, ExactSm, Sm, SmAttentionPool
from bigbag.nn.linear import project

WIDTH = 6


def lattice(size: int, normalize: str = "symmetric") -> Adjacency:
    return build_adjacency(np.stack(np.divmod(np.arange(size), 4), 1), radius=1.5, normalize=normalize)


def dense(adj: Adjacency, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return adj.to_coo().to_dense().to(dtype)


def batch(*sizes: int, normalize: str = "symmetric") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X, adj and mask of a padded batch; what is masked is noise, edges included."""
    length = max(sizes)
    X, adj, mask = torch.randn(len(sizes), length, WIDTH), torch.rand(len(sizes), length, length), torch.zeros(0)
    mask = torch.zeros(len(sizes), length, dtype=torch.uint8)
    for bag, size in enumerate(sizes):
        adj[bag, :size] = 0
        adj[bag, :, :size] = 0
        adj[bag, :size, :size] = dense(lattice(size, normalize))
        mask[bag, :size] = 1
    return X, adj, mask


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("alpha", ["trainable", 0.3])
@pytest.mark.parametrize("mode", ["approx", "exact"])
@pytest.mark.parametrize("normalize", ["symmetric", "row"])
def test_sm_equals_torchmil(normalize, mode, alpha, sparse, width):
    theirs_class = pytest.importorskip("torchmil.nn").Sm
    adj = torch.stack([dense(lattice(9, normalize)), dense(lattice(9, normalize)).roll(1, 0)])
    f = torch.randn(2, 9, width, requires_grad=True)
    theirs, ours = theirs_class(alpha, 4, mode), Sm(alpha, 4, mode)
    if alpha == "trainable":
        torch.nn.init.constant_(theirs.sm.coef, 0.7)
    ours.load_state_dict(theirs.state_dict())
    weights = torch.randn(2, 9, width)
    expected, found = theirs(f, adj), ours(f, adj.to_sparse() if sparse else adj)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = [[f, *module.parameters()] for module in (theirs, ours)]
    expected_grads, grads = (torch.autograd.grad((out * weights).sum(), x) for out, x in zip((expected, found), inputs))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [ApproxSm("trainable", 5), ExactSm("trainable")], ids=["approx", "exact"])
@pytest.mark.parametrize("normalize", ["symmetric", "row"])
def test_adjoint_is_the_transpose_of_the_map(module, normalize):
    adj = lattice(10, normalize)
    eye = torch.eye(10)
    forward, adjoint = module.forward_packed(eye, adj), module.forward_packed(eye, adj, adjoint=True)
    torch.testing.assert_close(adjoint, forward.t(), rtol=1e-5, atol=1e-5)
    assert (normalize == "row") == bool((forward - forward.t()).abs().max() > 1e-3)


@pytest.mark.parametrize("adjoint", [False, True])
def test_exact_sm_of_a_symmetric_graph_that_is_not_normalised(adjoint):
    """Eigenvalues of A far above 1, so I + coef (I - A) is indefinite: as by a dense solve, torchmil's way."""
    adj, f = lattice(14, "none"), torch.randn(14, 9, dtype=torch.float64, requires_grad=True)
    A, eye, sm = dense(adj, torch.float64), torch.eye(14, dtype=torch.float64), ExactSm("trainable").double()
    assert torch.linalg.eigvalsh(A).max() > 3
    expected = torch.linalg.solve((1 + sm.coef) * eye - sm.coef * A, f)
    found = sm.forward_packed(f, adj, adjoint)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.sin().sum(), [f, sm.coef]) for out in (found, expected)]
    torch.testing.assert_close(*grads)


def test_exact_sm_is_the_limit_of_the_steps():
    """With neighbours weighted by coef / (1 + coef): for coef = 1 and its inverse the two conventions agree."""
    adj, f = lattice(12), torch.randn(12, 3, dtype=torch.float64)
    adj = replace(adj, weight=adj.weight.double())
    torch.testing.assert_close(ApproxSm(0.5, 200).forward_packed(f, adj), ExactSm(0.5).forward_packed(f, adj))
    torch.testing.assert_close(ApproxSm(0.25, 200).forward_packed(f, adj), ExactSm(0.75).forward_packed(f, adj))


def test_symmetry_is_found_where_it_is():
    adj = lattice(30)
    unmarked = replace(adj, symmetric=False)
    assert ops.marked_symmetric(unmarked).symmetric and ops.transpose(adj) is adj
    directed = lattice(30, "row")
    assert not ops.marked_symmetric(directed).symmetric
    torch.testing.assert_close(dense(ops.transpose(directed)), dense(directed).t())
    with ops.use_impl({"spmm": "reference"}):
        torch.testing.assert_close(dense(ops.transpose(directed)), dense(directed).t())
    assert not ops.marked_symmetric(Adjacency.from_edges(torch.tensor([0]), torch.tensor([1]), None, 2)).symmetric


def test_exact_solve_on_a_directed_graph():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(15, 15, generator=generator, dtype=torch.float64)
    adj = Adjacency.from_padded(matrix[None], None, 15)
    gamma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    f = torch.randn(15, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.linalg.solve((1 + gamma) * torch.eye(15, dtype=torch.float64) - gamma * matrix, f)
    found = ops.smooth_exact_directed(adj, f, gamma)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(15, 20, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), [f, gamma]) for out in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0])
    with pytest.raises(ValueError, match="detach it"):
        ops.smooth_exact_directed(replace(adj, weight=adj.weight.requires_grad_()), f, gamma)


@pytest.mark.parametrize(("dtype", "gamma"), [(torch.float32, 1.0), (torch.float64, 1.0), (torch.float64, 10.0)])
def test_exact_solve_where_the_steps_lead_takes_no_conjugate_gradients(monkeypatch, dtype, gamma):
    monkeypatch.setattr("bigbag.ops.smooth_directed._conjugate_gradients", None)
    adj = lattice(200, "row")
    coef = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
    f, weights = torch.randn(2, 200, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    f[:, 3] = 0
    f.requires_grad_()
    matrix = (1 + coef) * torch.eye(200, dtype=torch.float64) - coef * dense(adj).double()
    expected, found = torch.linalg.solve(matrix, f.double()), ops.smooth_exact_directed(adj, f, coef)
    error, rounding = (found - expected).double(), torch.finfo(dtype).eps
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    # The residual is what is promised; rounding the result adds (1 + 2 gamma) roundings of it.
    residual = (matrix @ error).norm(dim=0)
    assert (residual <= tolerance * f.norm(dim=0) + (1 + 2 * gamma) * rounding * expected.norm(dim=0)).all()
    grads = [torch.autograd.grad((out * weights).sum(), [f, coef]) for out in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0], rtol=20 * tolerance, atol=200 * tolerance)


def test_exact_solve_says_where_it_does_not_get_there():
    with pytest.raises(ValueError, match="after 5 steps"):
        ops.smooth_exact_directed(lattice(30, "row"), torch.randn(30, 2), 50.0, max_steps=5)


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("mode", ["approx", "exact"])
@pytest.mark.parametrize("where", ["early", "mid", "late", "none"])
@pytest.mark.parametrize("normalize", ["symmetric", "row"])
def test_pool_equals_torchmil(normalize, where, mode, spectral_norm):
    """Bag by bag, since torchmil's padded places take part in Sm; values, and gradients to everything."""
    theirs_class = pytest.importorskip("torchmil.nn").SmAttentionPool
    act = {"early": "tanh", "mid": "gelu", "late": "relu", "none": "gelu"}[where]
    settings = {"att_dim": 4, "act": act, "sm_mode": mode, "sm_where": where, "spectral_norm": spectral_norm}
    theirs, ours = theirs_class(WIDTH, **settings), SmAttentionPool(WIDTH, **settings)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter) if "coef" not in name else torch.nn.init.constant_(parameter, 0.6)
    ours.load_state_dict(theirs.state_dict())
    X, adj, mask = batch(7, 12, 1, normalize=normalize)
    z, f = ours.eval()(X, adj.to_sparse(), mask, return_att=True)
    theirs.eval()
    for bag, size in enumerate((7, 12, 1)):
        one = X[bag : bag + 1, :size].clone().requires_grad_()
        inputs = [[one, *module.parameters()] for module in (theirs, ours)]
        A = adj[bag : bag + 1, :size, :size]
        results = [module(one, A, return_att=True) for module in (theirs, ours)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(z[bag : bag + 1], results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(f[bag, :size], results[0][1][0], rtol=1e-4, atol=1e-5)
        weights = torch.randn(WIDTH), torch.randn(size)
        losses = [(z_ * weights[0]).sum() + (f_ * weights[1]).sum() for z_, f_ in results]
        grads = [torch.autograd.grad(loss, x) for loss, x in zip(losses, inputs)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_spectral_norm_iterates_once_per_training_step():
    """As torchmil's: the buffers after a step are the same."""
    theirs_class = pytest.importorskip("torchmil.nn").SmAttentionPool
    theirs, ours = (cls(WIDTH, spectral_norm=True) for cls in (theirs_class, SmAttentionPool))
    ours.load_state_dict(theirs.state_dict())
    X, adj, _ = batch(7)
    for module in (theirs, ours):
        module(X, adj)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_pool_refuses_what_it_does_not_know():
    for settings, message in (
        ({"act": "swish"}, "act must be"),
        ({"sm_where": "nowhere"}, "sm_where must be"),
        ({"sm_mode": "dense"}, "mode must be"),
        ({"sm_alpha": 1.5}, "alpha must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SmAttentionPool(WIDTH, **settings)
    assert isinstance(SmAttentionPool(WIDTH, sm_alpha=0.0).sm, torch.nn.Identity)
    with pytest.raises(ValueError, match="needs adj"):
        SmAttentionPool(WIDTH)(torch.randn(1, 3, WIDTH))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_project_is_linear_in_the_dtype_of_the_computation(stored, autocast):
    x = torch.randn(20_000, 5).to(stored).requires_grad_()
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = project(x, weight, bias)
    expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert y.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (dtype, stored) else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(y, expected, **tolerance)
    grad = torch.randn(20_000, 3).to(dtype) / 100
    inputs = [x, weight, bias]
    grads, expected_grads = (torch.autograd.grad(out, inputs, grad) for out in (y, expected))
    assert [g.dtype for g in grads] == [stored, torch.float32, torch.float32]
    torch.testing.assert_close(grads, expected_grads, **tolerance)


def test_sm_at_the_door_of_a_pack():
    """The graph of a pack never joins two bags: each comes out as alone."""
    sizes = (5, 0, 8)
    adj = Adjacency.block_diagonal([lattice(size) for size in sizes])
    f, segments = torch.randn(13, WIDTH), Segments.from_sizes(sizes)
    pool = SmAttentionPool(WIDTH, att_dim=4)
    z, _ = pool.pool(f, segments, adj)
    assert z.shape == (3, WIDTH) and bool((z[1] == 0).all())
    alone, _ = pool.pool(f[5:], Segments.from_sizes((8,)), lattice(8))
    torch.testing.assert_close(z[2:], alone)
    assert PackedBags.from_padded(torch.zeros(1, 2, 3)).adj is None
