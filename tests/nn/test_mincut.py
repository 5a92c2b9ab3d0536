"""Min-cut pooling: torchmil's function, the paper's formulas on dense matrices, memory."""

import pytest
import torch

from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.graphs import build_adjacency
from bigbag.nn import dense_mincut_pool
from bigbag.nn.mincut import mincut_losses, mincut_pool

MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0, 1] * 4 + [1]], dtype=torch.uint8)


def graph(*shape: int, seed: int = 0, inside: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted, directed; with ``inside`` without edges to padding."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(*shape, generator=generator, dtype=torch.float64)
    a = a * (torch.rand(*shape, generator=generator) < 0.5)
    return a if inside is None else a * inside[:, :, None] * inside[:, None, :]


def losses_on_dense(s: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas for one bag; ``s`` sums to 1 over the clusters."""
    cut = -torch.trace(s.T @ a @ s) / torch.trace(s.T @ torch.diag(a.sum(1)) @ s)
    overlap, identity = s.T @ s, torch.eye(s.shape[1], dtype=s.dtype)
    return cut, (overlap / overlap.norm() - identity / identity.norm()).norm()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("masked, temp", [(False, 1.0), (True, 0.5)])
def test_equals_torchmil(sparse, masked, temp):
    theirs = pytest.importorskip("torchmil.nn").dense_mincut_pool
    torch.manual_seed(0)
    mask = MASK if masked else torch.ones_like(MASK)
    x, s = torch.randn(3, 9, 5).double(), torch.randn(3, 9, 4).double()
    a = graph(3, 9, 9, inside=mask.double())
    expected = theirs(x, a, s, mask if masked else None, temp)
    found = dense_mincut_pool(x, a.to_sparse() if sparse else a, s, mask if masked else None, temp)
    torch.testing.assert_close(found, expected)
    one = dense_mincut_pool(x[0], a[0], s[0], temp=temp)
    torch.testing.assert_close(one, theirs(x[0], a[0], s[0], temp=temp))


def test_edges_to_padding_do_not_count():
    s, x = torch.randn(3, 9, 4).double(), torch.randn(3, 9, 5).double()
    found = dense_mincut_pool(x, graph(3, 9, 9), s, MASK)
    inside = dense_mincut_pool(x, graph(3, 9, 9, inside=MASK.double()), s, MASK)
    torch.testing.assert_close(found, inside)


def test_losses_and_gradients_equal_those_on_dense_matrices():
    sizes = (7, 3, 12)
    blocks = [graph(n, n, seed=n) for n in sizes]
    sparse = [Adjacency.from_padded(block[None], None, len(block)) for block in blocks]
    weight = Adjacency.block_diagonal(sparse).weight.clone().requires_grad_()
    whole = Adjacency.block_diagonal(sparse)
    adj = Adjacency(whole.crow, whole.col, weight)
    scores = torch.randn(sum(sizes), 4, dtype=torch.float64, requires_grad=True)
    s = scores.softmax(1)
    cut, ortho = mincut_losses(s, adj, Segments.from_sizes(sizes))
    dense = torch.zeros(22, 22, dtype=torch.float64).index_put((adj.rows(), adj.col.long()), weight)
    starts = [0, 7, 10, 22]
    expected = [losses_on_dense(s[i:j], dense[i:j, i:j]) for i, j in zip(starts, starts[1:])]
    torch.testing.assert_close(cut, torch.stack([c for c, _ in expected]))
    torch.testing.assert_close(ortho, torch.stack([o for _, o in expected]))
    mix = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def gradients(cuts, orthos):
        return torch.autograd.grad((mix * cuts + mix.square() * orthos).sum(), (scores, weight), retain_graph=True)

    found = gradients(cut, ortho)
    torch.testing.assert_close(found, gradients(*(torch.stack(values) for values in zip(*expected))))


def test_bags_without_edges_or_instances_are_finite():
    segments = Segments.from_sizes((3, 1, 0))
    adj = Adjacency.from_edges(torch.tensor([0, 1]), torch.tensor([1, 0]), None, 4)
    scores = torch.randn(4, 5, requires_grad=True)
    x = torch.randn(4, 2, requires_grad=True)
    cut, ortho = mincut_losses(scores.softmax(1), adj, segments)
    assert cut[0] < 0 and cut[1:].tolist() == [0, 0] and ortho[2].item() == pytest.approx(1)
    pooled, coarse, *losses = mincut_pool(x, adj, scores, segments)
    assert pooled[2].abs().sum() == 0 and coarse[1:].abs().sum() == 0
    assert coarse.diagonal(dim1=1, dim2=2).abs().sum() == 0
    (pooled.sum() + coarse.square().sum() + sum(losses)).backward()
    assert torch.isfinite(scores.grad).all() and torch.isfinite(x.grad).all()


def test_memory_is_linear():
    from bigbag.memory import peak_bytes

    def peak(size: int) -> int:
        side = int(size**0.5)
        coords = torch.stack([torch.arange(side * side) // side, torch.arange(side * side) % side], 1).numpy()
        adj = build_adjacency(coords, radius=1.5)
        x = torch.randn(side * side, 32, requires_grad=True)
        scores = torch.randn(side * side, 8, requires_grad=True)
        segments = Segments.from_sizes((side * side,))
        return peak_bytes(lambda: sum(out.sum() for out in mincut_pool(x, adj, scores, segments)).backward())

    assert peak(120**2) < 4.5 * peak(60**2)


def test_packed_form_takes_narrow_instances():
    torch.manual_seed(0)
    x, a, s = torch.randn(2, 6, 3), graph(2, 6, 6).float(), torch.randn(2, 6, 4)
    bags = PackedBags.from_padded(x.half(), adj=a)
    found = mincut_pool(bags.x, bags.adj, s.flatten(0, 1), bags.segments)
    torch.testing.assert_close(found, dense_mincut_pool(x.half().float(), a, s))
