"""Graph layers against torchmil and against dense formulas in double precision."""

import pytest
import torch

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bench.models import lattice
from bigbag.graphs import build_adjacency
from bigbag.memory import peak_bytes
from bigbag.nn import DeepGCNLayer, GCNConv, GNNIdentity
from bigbag.nn.graph_stack import graph_stack
from bigbag.samples.graphs import pattern


def directed_graph(sizes=(5, 1, 0, 9), dtype=torch.float64) -> Adjacency:
    """Directed edges with weights of both signs, loops and repetitions among them."""
    graph = pattern("random", sizes)
    weight = torch.randn(graph.num_edges, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Adjacency(graph.crow, graph.col, weight)


def padded_graph(batch=2, size=7, dtype=torch.float32):
    adj = torch.rand(batch, size, size, dtype=dtype) * (torch.rand(batch, size, size) < 0.4)
    return torch.randn(batch, size, 4, dtype=dtype), adj


def test_transpose_and_self_loops():
    adj = directed_graph()
    dense = adj.to_coo().to_dense()
    torch.testing.assert_close(ops.transpose(adj).to_coo().to_dense(), dense.T)
    torch.testing.assert_close(adj.with_self_loops().to_coo().to_dense(), dense + torch.eye(15))
    symmetric = pattern("lattice", (9, 4))
    assert ops.transpose(symmetric) is symmetric
    looped = symmetric.with_self_loops()
    assert looped.symmetric and looped.weight is None
    torch.testing.assert_close(looped.to_coo().to_dense(), symmetric.to_coo().to_dense() + torch.eye(13))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_self_loops": True, "layer_norm": True},
        {"out_dim": 3, "learn_weights": True, "add_self_loops": True, "activation": torch.nn.ReLU()},
        {"out_dim": 6, "learn_weights": True, "normalize": True, "bias": False},
        {"out_dim": 3, "learn_weights": False},
    ],
)
def test_gcn_conv_equals_torchmil(arguments, sparse):
    nn = pytest.importorskip("torchmil.nn")
    theirs, ours = nn.GCNConv(4, **arguments), GCNConv(4, **arguments)
    ours.load_state_dict(theirs.state_dict())
    x, adj = padded_graph()
    torch.testing.assert_close(ours(x, adj.to_sparse() if sparse else adj), theirs(x, adj))


@pytest.mark.parametrize("block", ["plain", "res", "res+", "dense"])
def test_deep_gcn_layer_equals_torchmil(block):
    nn = pytest.importorskip("torchmil.nn")
    theirs, ours = (
        module.DeepGCNLayer(module.GCNConv(4, 4, learn_weights=True), torch.nn.LayerNorm(4), torch.nn.ReLU(), block)
        for module in (nn, __import__("bigbag.nn", fromlist=["nn"]))
    )
    ours.load_state_dict(theirs.state_dict())
    x, adj = padded_graph()
    torch.testing.assert_close(ours(x, adj), theirs(x, adj))


def test_identity_convolution():
    x, adj = padded_graph()
    torch.testing.assert_close(DeepGCNLayer(block="dense")(x, adj), torch.cat([x, x], -1))
    assert GNNIdentity()(x) is x
    with pytest.raises(ValueError, match="out_dim"):
        GCNConv(None, layer_norm=True)


def test_adjacency_of_a_padded_batch_gets_its_gradient():
    x, adj = padded_graph(dtype=torch.float64)
    adj.requires_grad_()
    layer = GCNConv(4, 2, learn_weights=True).double()
    layer(x, adj).square().sum().backward()
    expected = torch.autograd.grad(layer.fc(adj @ x).square().sum(), adj)[0]
    torch.testing.assert_close(adj.grad[adj != 0], expected[adj != 0])


@pytest.mark.parametrize("keep_every", [1, 2, 3])
def test_graph_stack_equals_its_formula(keep_every):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    adj = directed_graph()
    x, shifts = randn(15, 4), [randn(3) for _ in range(5)]
    weights = [randn(3, 4 if i == 0 else 3) for i in range(5)]
    readouts = [randn(2, 4 if i == 0 else 3) for i in range(6)]
    functions = [lambda z, b=b: torch.tanh(z + b) for b in shifts]
    out = graph_stack(x, adj, functions, [[b] for b in shifts], weights, readouts, keep_every)
    u, dense = x, adj.to_coo().to_dense()
    expected = u @ readouts[0].T
    for function, weight, readout in zip(functions, weights, readouts[1:]):
        u = function(dense @ u @ weight.T)
        expected = expected + u @ readout.T
    torch.testing.assert_close(out, expected)
    inputs, factor = [x, *shifts, *weights, *readouts], torch.randn(15, 2, dtype=torch.float64)
    found = torch.autograd.grad((out * factor).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * factor).sum(), inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad((out * factor).sum(), inputs), wanted)


def test_graph_stack_draws_the_same_random_numbers_again():
    adj, x = pattern("lattice", (40,)), torch.randn(40, 3)
    adj = Adjacency(adj.crow, adj.col, torch.full((adj.num_edges,), 0.2), True)
    weights, readouts = [torch.randn(3, 3, requires_grad=True) for _ in range(3)], [torch.randn(1, 3)] * 4
    found = []
    for keep_every in (1, 2):
        torch.manual_seed(3)
        dropout = [torch.nn.Dropout(0.5)] * 3
        out = graph_stack(x, adj, dropout, [[], [], []], weights, readouts, keep_every, dropout)
        torch.rand(7)
        found.append([out, *torch.autograd.grad(out.sum(), weights)])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    # Dropout is linear given what it drops: a step along a weight changes the output by the gradient.
    moved = [weights[0], weights[1] + 0.5, weights[2]]
    torch.manual_seed(3)
    change = graph_stack(x, adj, dropout, [[], [], []], moved, readouts, modules=dropout).sum() - found[0][0].sum()
    torch.testing.assert_close(change, 0.5 * found[0][2].sum(), rtol=1e-4, atol=1e-4)


def test_graph_stack_draws_new_numbers_in_every_layer_and_pass():
    adj, x = pattern("lattice", (30,)), torch.rand(30, 4) + 1
    drops: list[torch.Tensor] = []

    def function(z):
        drops.append(dropout(torch.ones_like(z)) == 0)
        return z

    dropout = torch.nn.Dropout(0.5)
    for _ in range(2):
        graph_stack(x, adj, [function] * 2, [[], []], [torch.eye(4)] * 2, [torch.eye(4)] * 3, modules=[dropout])
    assert len(drops) == 4 and len({tuple(drop.flatten().tolist()) for drop in drops}) == 4


def test_graph_stack_trains_only_what_is_to_be_trained():
    adj, x = directed_graph((6,), torch.float32), torch.randn(6, 3)
    norm = torch.nn.LayerNorm(3)
    norm.weight.requires_grad_(False)
    weight = torch.randn(3, 3, requires_grad=True)
    out = graph_stack(x, adj, [norm], [[norm.weight, norm.bias]], [weight], [torch.zeros(2, 3), torch.ones(2, 3)])
    out.sum().backward()
    torch.testing.assert_close(norm.bias.grad, torch.full((3,), 12.0))
    assert norm.weight.grad is None and weight.grad.abs().sum() > 0
    learned = Adjacency(adj.crow, adj.col, adj.weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="detach"):
        graph_stack(x, learned, [norm], [[]], [weight], [torch.zeros(2, 3)] * 2)


# Kept layers, or one kept and those after it computed again, the last of which holds its own gradient; beside them the
# output, its gradient, a gradient within, and one product with the graph.
@pytest.mark.parametrize("keep_every, matrices", [(1, 4 + 4), (2, 3 + 3)])
def test_graph_stack_keeps_few_matrices(keep_every, matrices):
    def peak(num_instances):
        adj = build_adjacency(lattice(num_instances), radius=1.5)
        x, weights = torch.randn(num_instances, 256), [torch.randn(256, 256, requires_grad=True) for _ in range(4)]
        norms = [torch.nn.LayerNorm(256) for _ in range(4)]
        parameters = [list(norm.parameters()) for norm in norms]
        readouts = [torch.randn(256, 256)] * 5

        def step():
            out = graph_stack(x, adj, norms, parameters, weights, readouts, keep_every)
            out.backward(torch.ones_like(out))

        return peak_bytes(step)

    assert (peak(8192) - peak(4096)) / (4096 * 256 * 4) < matrices + 0.3


def test_layers_are_in_torchmils_place():
    import bigbag.nn.gnns

    theirs = pytest.importorskip("torchmil.nn.gnns")
    assert all(hasattr(bigbag.nn.gnns, name) for name in ("GCNConv", "DeepGCNLayer", "ChebConv", "dense_mincut_pool"))
    assert bigbag.nn.gnns.GCNConv is GCNConv and theirs.GCNConv is not GCNConv
