"""Chebyshev convolution against the dense formula in double precision, and against torchmil's."""

import pytest
import torch

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.nn import ChebConv
from bigbag.samples.graphs import pattern

SIZES = (6, 1, 0, 9)


def graph(symmetric: bool, sizes=SIZES) -> Adjacency:
    """A lattice with weights of its distances from 0, or directed edges with weights of both signs."""
    adj = pattern("lattice" if symmetric else "random", sizes)
    if symmetric:
        u = torch.rand(adj.num_nodes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return Adjacency(adj.crow, adj.col, u[adj.rows()] * u[adj.col.long()], True)
    weight = torch.randn(adj.num_edges, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Adjacency(adj.crow, adj.col, weight)


def dense_convolution(adj, x, weight, scale):
    """The formula: scale (T,) is the lambda_max of each instance's bag."""
    a = adj.to_coo().to_dense()
    laplacian = 2 / (scale[:, None] + 1e-6) * (torch.diag(a.sum(0)) - a) - torch.eye(len(a), dtype=a.dtype)
    terms = [torch.eye(len(a), dtype=a.dtype), laplacian]
    while len(terms) * x.shape[1] < weight.shape[1]:
        terms.append(2 * laplacian @ terms[-1] - terms[-2])
    blocks = weight.split(x.shape[1], 1)
    return sum(term @ x @ block.T for term, block in zip(terms, blocks))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width, out, terms", [(4, 3, 5), (3, 5, 4), (3, 3, 1), (2, 4, 1), (4, 2, 2), (2, 4, 2)])
@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_convolution_and_its_gradients_equal_the_formula(symmetric, width, out, terms, impl, by_columns):
    generator = torch.Generator().manual_seed(0)

    def instances(columns):
        shape = (columns, 16) if by_columns else (16, columns)
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.t() if by_columns else made

    x = instances(width).requires_grad_()
    weight = torch.randn(out, terms * width, generator=generator, dtype=torch.float64).requires_grad_()
    adj, segments = graph(symmetric), Segments.from_sizes(SIZES)
    scale = torch.tensor([2.0, 1.5, 1.0, 3.0], dtype=torch.float64)
    found = ops.chebyshev_conv(adj, x, weight, scale, segments, impl=impl)
    expected = dense_convolution(adj, x, weight, scale[segments.bag_of_instance])
    torch.testing.assert_close(found, expected)
    upstream = instances(out)
    gradients = [torch.autograd.grad(y, [x, weight], upstream) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_degrees_are_as_precise_as_the_convolution(impl):
    """In float64 also where the graph has weights of float32, whose sums take more digits."""
    adj, generator = graph(False), torch.Generator().manual_seed(0)
    adj = Adjacency(adj.crow, adj.col, adj.weight.float())
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((16, 3), (4, 9)))
    wide = Adjacency(adj.crow, adj.col, adj.weight.double())
    expected = dense_convolution(wide, x, weight, torch.full((16,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(ops.chebyshev_conv(adj, x, weight, impl=impl), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width, out", [(6, 4), (4, 6)])
def test_stored_narrow_and_under_autocast(width, out):
    x, weight = torch.randn(16, width).half(), torch.randn(out, 3 * width)
    adj = graph(True)
    exact = ops.chebyshev_conv(adj, x.double(), weight.double())
    wide = ops.chebyshev_conv(adj, x, weight)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.chebyshev_conv(adj, x, weight)
    assert low.dtype == torch.bfloat16
    # Five roundings to 8 bits of terms that are larger than the result by the sum of their coefficients.
    assert (low.double() - exact).abs().max() < 0.04 * exact.abs().max()


def test_polynomials_are_never_kept():
    adj, x = pattern("lattice", (2000,)), torch.randn(2000, 64)
    weight = torch.randn(64, 5 * 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.chebyshev_conv(adj, x, weight).sum()
    big = [t for t in kept if t.numel() >= x.numel()]
    assert len(big) == 1 and big[0].data_ptr() == x.data_ptr()


def test_errors():
    adj, x = graph(False), torch.randn(16, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="K P"):
        ops.chebyshev_conv(adj, x, torch.randn(3, 7))
    learned = Adjacency(adj.crow, adj.col, adj.weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="detach"):
        ops.chebyshev_conv(learned, x, torch.randn(3, 8))
    with pytest.raises(ValueError, match="expected 5"):
        ChebConv(5, 3)(torch.randn(1, 2, 4), torch.eye(2)[None])
    with pytest.raises(ValueError, match="K is 0"):
        ChebConv(5, 3, K=0)


def padded_graph(batch=2, size=7):
    edges = torch.rand(batch, size, size)
    return torch.randn(batch, size, 4), (edges + edges.mT) * (edges * edges.mT > 0.3)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("given", [None, 3.0, torch.tensor([2.5, 4.0])[:, None, None]])
def test_layer_equals_the_formula(sparse, given):
    x, adj = padded_graph()
    layer = ChebConv(4, 3, K=4)
    found = layer(x, adj.to_sparse() if sparse else adj, given)
    for i in range(2):
        laplacian = (torch.diag(adj[i].sum(0)) - adj[i]).double()
        scale = torch.linalg.eigvalsh(laplacian)[-1] if given is None else torch.as_tensor(given).flatten().expand(2)[i]
        packed = Adjacency.from_padded(adj[i : i + 1].double(), None, 7)
        weight = layer.fc.weight.double()
        expected = dense_convolution(packed, x[i].double(), weight, scale.double().expand(7))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-4)


# The largest eigenvalue is that of symmetric graphs only.
@pytest.mark.parametrize("computed, directed", [(False, False), (False, True), (True, False)])
def test_torchmil_layout_equals_torchmil(computed, directed):
    theirs_class = pytest.importorskip("torchmil.nn").ChebConv
    x, adj = padded_graph()
    adj = adj * (torch.rand_like(adj) < 0.8) if directed else adj
    theirs, ours = theirs_class(4, 3, 4, computed), ChebConv(4, 3, 4, computed, torchmil_layout=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x, adj), theirs(x, adj), rtol=1e-4, atol=1e-4)


def test_lazy_width():
    x, adj = padded_graph()
    layer = ChebConv(None, 3, K=2)
    assert layer(x, adj).shape == (2, 7, 3) and layer.fc.weight.shape == (3, 8)


def test_instances_joined_to_themselves_only():
    """D - A is zero, so that the polynomials are x and -x; nothing is left of the rounding of D x - A x."""
    layer, x = ChebConv(4, 3, K=3), torch.randn(1, 5, 4)
    first, second, third = layer.fc.weight.split(4, 1)
    torch.testing.assert_close(layer(x, 0.37 * torch.eye(5)[None]), x @ (first - second + third).T)


def test_largest_eigenvalue_of_a_graph_rounded_to_float32():
    x, adj = padded_graph()
    degree = adj.sum(2).clamp_min(1e-3).sqrt()
    adj = adj / degree[:, :, None] / degree[:, None]
    assert not torch.equal(adj, adj.mT)
    layer = ChebConv(4, 3)
    found = layer(x, adj)
    torch.testing.assert_close(layer.double()(x.double(), adj.double()).float(), found, rtol=1e-4, atol=1e-4)


def test_the_largest_eigenvalue_of_a_directed_graph_is_refused():
    layer, adj = ChebConv(4, 3, compute_lambda_max=True).double(), graph(symmetric=False)
    x, segments = torch.randn(sum(SIZES), 4, dtype=torch.float64), Segments.from_sizes(SIZES)
    with pytest.raises(ValueError, match="needs a symmetric graph"):
        layer.forward_packed(x, adj, segments)
    assert layer.forward_packed(x, adj, segments, lambda_max=2.0).shape == (sum(SIZES), 3)
