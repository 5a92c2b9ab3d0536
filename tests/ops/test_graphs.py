"""Operators on adjacencies: dense references, torchmil. The proof of the contract is in test_proof.py."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigbag import Segments
from bigbag.adjacency import Adjacency
from bigbag.ops.chebyshev import chebyshev, lambda_max
from bigbag.ops.neighbor_attention import neighbor_attention, neighbor_scores
from bigbag.ops.quadratic import dirichlet_energy, quadratic_form
from bigbag.ops.smooth import smooth
from bigbag.ops.smooth_exact import IndefiniteSystem, smooth_exact
from bigbag.ops.spmm import degrees, graph_of, spmm
from bigbag.samples.graphs import SAMPLES, pattern

spmm_module = importlib.import_module("bigbag.ops.spmm")  # the name in bigbag.ops is the function
NAMED = {str(sample): sample for sample in SAMPLES}
OPS = sorted({sample.op for sample in SAMPLES})


def dense(adj: Adjacency) -> Tensor:
    """(T, T) with repeated edges added up, by a loop in Python."""
    out = torch.zeros(adj.num_nodes, adj.num_nodes, dtype=torch.float64)
    for i in range(adj.num_nodes):
        for e in range(int(adj.crow[i]), int(adj.crow[i + 1])):
            out[i, int(adj.col[e])] += 1.0 if adj.weight is None else float(adj.weight[e])
    return out


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised_lattice(*sizes: int) -> Adjacency:
    """D^-1/2 A D^-1/2 in float32."""
    adj = pattern("lattice", sizes)
    scale = adj.crow.diff().clamp_min(1).float().rsqrt()
    return replace(adj, weight=scale[adj.rows()] * scale[adj.col.long()])


@pytest.mark.parametrize(
    ("crow", "col", "said"),
    [
        ([0, 1, 2, 2, 2], [1, 4], "col names nodes 1 to 4, but there are 4"),
        ([0, 1, 2, 2, 2], [1, -1], "col names nodes -1 to 1"),
        ([0, 1, 2, 2, 3], [1, 0], "from 0 to 3, and falls 0 times"),
        ([0, 2, 1, 2, 2], [1, 0], "falls 1 times"),
        ([1, 1, 2, 2, 2], [1, 0], "from 1 to 2"),
    ],
)
def test_edges_that_lead_nowhere_are_refused(crow: list[int], col: list[int], said: str) -> None:
    adj, x = Adjacency(torch.tensor(crow), torch.tensor(col, dtype=torch.int32)), randn(4, 6)
    calls = (spmm, dirichlet_energy, lambda adj, x: smooth(adj, x, torch.tensor(0.5), 3))
    for call in (*calls, lambda adj, x: neighbor_attention(*[x[:, None]] * 3, adj)):
        with pytest.raises(ValueError, match=said):
            call(adj, x)


def test_edges_that_change_in_place_are_looked_at_again() -> None:
    adj, x = Adjacency(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([1, 0], dtype=torch.int32)), randn(4, 6)
    assert torch.equal(spmm(adj, x)[:2], x[[1, 0]])
    adj.col[0] = 9
    with pytest.raises(ValueError, match="col names nodes 0 to 9"):
        spmm(adj, x)


@pytest.mark.parametrize(
    ("row", "col", "said"), [([0, 9], [1, 2], "row .* 0 to 9"), ([0, 1], [-1, 2], "col .* -1 to 2")]
)
def test_edges_of_no_nodes_are_refused(row: list[int], col: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Adjacency.from_edges(torch.tensor(row), torch.tensor(col), None, 4)


@pytest.mark.parametrize("kind", ["random", "star", "lattice"])
def test_linear_operators_agree_with_dense_matrices(kind: str, any_impl: str, device: str) -> None:
    adj = pattern(kind, (23, 9))
    adj = replace(adj, weight=torch.rand(adj.num_edges)) if kind != "lattice" else adj
    matrix, x, device = dense(adj), randn(32, 6), device
    there, features = adj.to(device), x.to(device)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=1e-5, atol=2e-5)

    close(spmm(there, features, impl=any_impl), matrix @ x.double())
    close(degrees(there, impl=any_impl), matrix.sum(1))
    steps = x.double()
    for _ in range(3):
        steps = 0.3 * x.double() + 0.7 * matrix @ steps
    close(smooth(there, features, 0.7, 3, impl=any_impl), steps)
    laplacian = 2 * (matrix.sum(1).diag() - matrix) / (9 + 1e-6) - torch.eye(32)
    terms = [x.double(), laplacian @ x.double()]
    terms += [2 * laplacian @ terms[1] - terms[0]]
    close(chebyshev(there, features, 3, 9.0, impl=any_impl), torch.stack(terms))
    total = torch.einsum("ij,ic,jc->", matrix, x.double(), x.double())
    close(quadratic_form(there, features, impl=any_impl), total)
    differences = (x.double()[:, None] - x.double()[None]).square().sum(2)
    cut = Segments.from_sizes((23, 9), device)
    energies = torch.stack([(matrix * differences)[s:e, s:e].sum() / 2 for s, e in ((0, 23), (23, 32))])
    close(dirichlet_energy(there, features, cut, impl=any_impl), energies)


def test_attention_agrees_with_masked_dense_attention(any_impl: str, device: str) -> None:
    adj = pattern("lattice", (23, 9, 1))
    q, k, v = (randn(33, 8, seed=s) for s in range(3))
    mask = dense(adj) > 0
    scores = (q @ k.T / 8**0.5).masked_fill(~mask, -float("inf"))
    expected = scores.softmax(1).nan_to_num(0) @ v
    found = neighbor_attention(*(t.to(device) for t in (q, k, v)), adj.to(device), impl=any_impl)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert found[32].abs().sum() == 0


def test_camil_s_context_is_the_softmax_of_neighbor_scores() -> None:
    camil = pytest.importorskip("torchmil.models.camil")
    adj, x = normalised_lattice(23), randn(23, 12)
    layer = camil.CAMILSelfAttention(12, 6)
    expected = layer(x[None], adj.to_coo()[None])[0]
    q, k = layer.qk_nn(x).chunk(2, -1)
    found = neighbor_scores(q, k, adj).softmax(0)[:, None] * layer.v_nn(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_smooth_and_its_gradients_are_torchmil_s() -> None:
    sm = pytest.importorskip("torchmil.nn.sm")
    adj, x = normalised_lattice(64), randn(64, 5)
    results = []
    for ours in (True, False):
        theirs = sm.ApproxSm("trainable", num_steps=7)
        f = x.clone().requires_grad_()
        if ours:
            out = smooth(adj, f, 1 / (1 + theirs.coef), 7, impl="cpu")
        else:
            out = theirs(f[None], adj.to_coo()[None])[0]
        results.append((out, *torch.autograd.grad((out * randn(64, 5, seed=1)).sum(), [f, theirs.coef])))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("laplacian", ["normalized", "combinatorial"])
def test_smooth_exact_and_its_gradients_are_those_of_a_dense_solve(laplacian: str) -> None:
    adj, gamma = normalised_lattice(64, 9), torch.tensor(1.7, requires_grad=True)
    weight, f = adj.weight.clone().requires_grad_(), randn(73, 70).requires_grad_()
    out = smooth_exact(replace(adj, weight=weight), f, gamma, laplacian=laplacian, tolerance=1e-7, impl="cpu")
    matrix = torch.zeros(73, 73).index_put((adj.rows(), adj.col.long()), weight)
    own = torch.eye(73) if laplacian == "normalized" else matrix.sum(1).diag()
    expected = torch.linalg.solve(torch.eye(73) + gamma * (own - matrix), f)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad((z * randn(73, 70, seed=1)).sum(), [f, gamma, weight]) for z in (out, expected)]
    for found, wanted in zip(*grads):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # Sm by steps converges to it.
    if laplacian == "normalized":
        alpha = 1.7 / 2.7
        torch.testing.assert_close(smooth(adj, f, alpha, 60), expected, rtol=1e-4, atol=1e-5)


def test_smooth_exact_is_torchmil_s() -> None:
    sm = pytest.importorskip("torchmil.nn.sm")
    adj, x = normalised_lattice(40), randn(40, 3)
    expected = sm.ExactSm(alpha=0.6)(x[None], adj.to_coo().to_dense()[None])[0]
    torch.testing.assert_close(smooth_exact(adj, x, 0.6 / 0.4), expected, rtol=1e-5, atol=1e-5)


def test_smooth_exact_refuses_what_conjugate_gradients_cannot_solve() -> None:
    adj = pattern("lattice", (30,))
    # Eigenvalues up to 8: I + gamma (I - A) is indefinite.
    with pytest.raises(IndefiniteSystem, match="not positive definite; normalise"):
        smooth_exact(adj, randn(30, 2), 5.0)
    with pytest.raises(ValueError, match="residual .* after 3 steps, expected 1e-06"):
        smooth_exact(normalised_lattice(30), randn(30, 2), 50.0, max_steps=3)
    with pytest.raises(ValueError, match=r"adj\.symmetric is False"):
        smooth_exact(replace(adj, symmetric=False), randn(30, 2), 1.0)


@pytest.mark.parametrize("laplacian", [True, False])
def test_lambda_max_is_the_largest_eigenvalue_of_each_bag(laplacian: bool) -> None:
    sizes = (23, 0, 1, 40)
    adj = pattern("lattice", sizes).with_self_loops()
    adj = replace(adj, weight=adj.rows().double().cos().square() + 0.5 + adj.col.double().cos().square())
    matrix = dense(adj)
    matrix = matrix.sum(1).diag() - matrix if laplacian else matrix
    starts = Segments.from_sizes(sizes).starts
    bags = [matrix[s:e, s:e] for s, e in zip(starts, starts[1:])]
    expected = [float(torch.linalg.eigvalsh(bag).max()) if len(bag) else 0.0 for bag in bags]
    found = lambda_max(adj, Segments.from_sizes(sizes), laplacian=laplacian, num_steps=400)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    # Few steps give a lower bound, and a bag gives the same alone.
    few = lambda_max(adj, Segments.from_sizes(sizes), laplacian=laplacian, num_steps=20)
    assert (few <= found + 1e-9).all() and (few > 0.9 * found - 1e-9).all()
    alone = Adjacency(adj.crow[:24], adj.col[: int(adj.crow[23])], adj.weight[: int(adj.crow[23])], True)
    torch.testing.assert_close(lambda_max(alone, laplacian=laplacian, num_steps=20), few[:1])


def test_chebyshev_scales_every_bag_by_its_own_eigenvalue() -> None:
    sizes = (20, 0, 30)
    segments, x = Segments.from_sizes(sizes), randn(50, 4)
    largest = torch.tensor([12.0, 1.0, 5.0])
    together = chebyshev(pattern("lattice", sizes), x, 4, largest, segments)
    # Patterns of one bag are the same alone.
    for part, size, value in ((slice(0, 20), 20, 12.0), (slice(20, 50), 30, 5.0)):
        torch.testing.assert_close(together[:, part], chebyshev(pattern("lattice", (size,)), x[part], 4, value))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_transposes(impl: str) -> None:
    """Triton's is PyTorch on any device."""
    pytest.importorskip("triton") if impl == "triton" else None
    adj = pattern("random", (60, 0, 5))
    adj = replace(adj, weight=torch.rand(adj.num_edges))
    crow, col, perm = spmm_module.kernels(impl).transpose(adj.crow, adj.col)
    assert crow.dtype == torch.int64 and col.dtype == torch.int32
    assert torch.equal(dense(Adjacency(crow, col, adj.weight[perm])), dense(adj).T)


def test_a_symmetric_graph_is_not_transposed_and_another_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = spmm_module._OPS["transpose", "cpu"]
    monkeypatch.setitem(spmm_module._OPS, ("transpose", "cpu"), lambda *args: calls.append(1) or right(*args))
    x = randn(60, 3).requires_grad_()
    smooth(pattern("lattice", (60,)), x, 0.5).sum().backward()
    assert not calls
    adj = pattern("random", (60,))
    for _ in range(3):
        smooth(adj, spmm(adj, x), 0.5).sum().backward()
    assert len(calls) == 1
    # A change in place is noticed.
    before = graph_of(adj, "cpu", transposed=True)
    adj.col[0] = (int(adj.col[0]) + 1) % 60
    after = graph_of(adj, "cpu", transposed=True)
    assert len(calls) == 2 and not (torch.equal(before.crow_t, after.crow_t) and torch.equal(before.col_t, after.col_t))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    adj, x = normalised_lattice(900), randn(900, 300).requires_grad_()
    alpha, found = torch.tensor(0.6, requires_grad=True), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = smooth(adj, x, alpha, 3)
        loss = out.square().sum() + dirichlet_energy(adj, x)
        found.append([out, *torch.autograd.grad(loss, [x, alpha])])
    for others in found[1:]:
        for one, other in zip(found[0][:2], others[:2]):
            assert torch.equal(one, other)
        # torch sums over all instances in the order of its own threads.
        torch.testing.assert_close(found[0][2], others[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_outputs_are_written_past_the_caches_with_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, acc = spmm_module.kernels("cpu"), spmm_module.accumulation_dtype(dtype)
    for width in (128 + 32, 1024 + 64):
        adj, x = normalised_lattice(300), randn(300, width).to(dtype)
        found = []
        for least in (1 << 40, 0):
            monkeypatch.setattr(kernels, "LARGE_BYTES", least)
            assert kernels._past_caches(x) == (least == 0)
            graph = graph_of(adj, "cpu", transposed=True, same=False)
            found.append((smooth(adj, x, 0.6, 3), *kernels.spmm_backward(*graph, adj.weight[:, None].to(acc), x, x)))
        assert all(torch.equal(cached, streamed) for cached, streamed in zip(*found))
    # Rows that do not begin at cache lines can't be.
    assert not kernels._past_caches(x[:, : width - 1].contiguous()) and not kernels._past_caches(x, heads=64)


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_in_one_pass_are_those_of_two_products(heads: int) -> None:
    """One pass where gradients are not differentiated again, two products where they are."""
    pack = pattern("random", (70, 0, 1, 30))
    graph = graph_of(pack, "cpu", transposed=True, same=False)
    leaves = [randn(101, 300).requires_grad_(), randn(pack.num_edges, heads, seed=1).requires_grad_()]
    out = spmm_module.product(graph, leaves[1], leaves[0], "cpu")
    incoming = randn(101, 300, seed=2)
    once = torch.autograd.grad(out, leaves, incoming, retain_graph=True)
    twice = torch.autograd.grad(out, leaves, incoming, create_graph=True)
    assert twice[0].requires_grad and not once[0].requires_grad
    assert torch.equal(once[0], twice[0])
    torch.testing.assert_close(once[1], twice[1], rtol=1e-5, atol=1e-4)
    gathered = (incoming[pack.rows()] * leaves[0][pack.col.long()]).view(pack.num_edges, heads, -1).double().sum(2)
    torch.testing.assert_close(once[1].double(), gathered, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_an_order_of_their_own_have_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, row_orders = spmm_module.kernels("cpu"), importlib.import_module("bigbag.kernels.cpu.order")
    # Two components, a loop, repeated edges, rows without any, and columns beyond the rows, as of a halo.
    graph = pattern("random", (200, 150))
    crow, col = graph.crow, torch.where(graph.col > 340, graph.col + 10, graph.col)
    weight, x, y = torch.rand(len(col), 1), randn(360, 200).to(dtype), randn(360, 200, seed=1).to(dtype)
    found = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(row_orders, "LARGE_BYTES", least)
        monkeypatch.setattr(row_orders, "_FAR_BYTES", least)
        monkeypatch.setattr(row_orders, "_LONG_ROW_BYTES", least)
        order = row_orders.row_order(crow, col, x)
        if least == 0:
            assert sorted(order.tolist()) == list(range(350)) and row_orders.row_order(crow, col, x) is order
            place = {row: k for k, row in enumerate(order.tolist())}
            # Breadth first: what a row reads is computed, if not before, in the order of those who read.
            reader = {}
            for row in order.tolist():
                for j in col[crow[row] : crow[row + 1]].tolist():
                    reader.setdefault(j, place[row])
            later = [j for j in order.tolist() if reader.get(j, place[j]) < place[j]]
            assert [reader[j] for j in later] == sorted(reader[j] for j in later)
        out = kernels.spmm(crow, col, weight, x, h=y[:350], diagonal=torch.rand(350, generator=torch.manual_seed(0)))
        square = graph_of(graph, "cpu", transposed=True, same=False)
        pair = kernels.spmm_backward(*square, weight, x[:350], y[:350])
        found.append([out, kernels.edge_dots(crow, col, x, y, 2), *pair])
    for natural, ordered in zip(*found):
        assert torch.equal(natural, ordered)


def test_errors_name_what_does_not_fit() -> None:
    adj, x = pattern("lattice", (30,)), randn(29, 4)
    with pytest.raises(
        ValueError, match=r"spmm: x must be floating \(T, \.\.\.\) with T = 30 as in adj, got \(29, 4\)"
    ):
        spmm(adj, x)
    x = randn(30, 4)
    with pytest.raises(ValueError, match="num_steps is -1"):
        smooth(adj, x, 0.5, -1)
    with pytest.raises(ValueError, match="alpha must be a number or a tensor of one element"):
        smooth(adj, x, torch.ones(2))
    with pytest.raises(ValueError, match="num_terms is 0"):
        chebyshev(adj, x, 0)
    with pytest.raises(ValueError, match=r"adj\.weight requires grad"):
        chebyshev(replace(adj, weight=torch.ones(adj.num_edges, requires_grad=True)), x, 2)
    with pytest.raises(ValueError, match="lambda_max has shape"):
        chebyshev(adj, x, 2, torch.ones(3), Segments.from_sizes((10, 20)))
    with pytest.raises(ValueError, match="of one dtype"):
        neighbor_attention(x, x[:, :2], x, adj)
    with pytest.raises(ValueError, match="segments has 31 instances, but adj has 30 nodes"):
        quadratic_form(adj, x, Segments.from_sizes((31,)))
    with pytest.raises(ValueError, match="laplacian must be one of"):
        smooth_exact(adj, x, 1.0, laplacian="none")
