"""Models on graphs against torchmil, and their memory."""

import pytest
import torch

from bigbag.memory import peak_bytes

WIDTH = 5


def padded_batch(sizes=(9, 6, 1), seed=0):
    """Random bags with random symmetric graphs, padded: X, adj, mask."""
    torch.manual_seed(seed)
    longest = max(sizes)
    mask = (torch.arange(longest) < torch.tensor(sizes)[:, None]).to(torch.uint8)
    edges = torch.rand(len(sizes), longest, longest)
    adj = (edges + edges.mT) * (edges * edges.mT > 0.3) * mask[:, :, None] * mask[:, None, :]
    return torch.randn(len(sizes), longest, WIDTH) * mask[..., None], adj, mask


def pair(name, **arguments):
    theirs = getattr(pytest.importorskip("torchmil.models"), name)(in_shape=(WIDTH,), **arguments)
    import bigbag.models

    ours = getattr(bigbag.models, name)(in_shape=(WIDTH,), **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def assert_same_gradients(theirs, ours, batch, labels):
    for model in (theirs, ours):
        sum(model.compute_loss(labels, *batch)[1].values()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    torch.testing.assert_close({name: p.grad for name, p in ours.named_parameters()}, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"hidden_dim": 7, "n_gcn_layers": 2, "att_dim": 3},
        {"mlp_depth": 3, "n_gcn_layers": 1, "hidden_dim": 3},
        {"feat_ext": torch.nn.Linear(WIDTH, 6)},
    ],
)
def test_patch_gcn_equals_torchmil(arguments):
    theirs, ours = pair("PatchGCN", **arguments)
    X, adj, mask = batch = padded_batch()
    (expected, expected_f), (logits, f) = (m(*batch, return_att=True) for m in (theirs, ours))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(f[mask == 1], expected_f[mask == 1])
    torch.testing.assert_close(ours(X, adj.to_sparse(), mask), expected)
    assert_same_gradients(theirs, ours, batch, torch.tensor([1, 0, 1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"hidden_dim": 7, "n_layers_rep": 2, "n_layers_att": 2, "att_dim": 3, "K": 3},
        {"feat_ext": torch.nn.Linear(WIDTH, 6), "hidden_dim": 4, "K": 2},
    ],
)
def test_deep_graph_surv_in_torchmil_layout_equals_torchmil(arguments):
    import bigbag.models

    theirs, ours = pair("DeepGraphSurv", **arguments)
    ours = bigbag.models.DeepGraphSurv((WIDTH,), **arguments, torchmil_layout=True).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.double(), ours.double()  # the scores reach hundreds, by sums that cancel
    X, adj, _ = padded_batch((9,))
    X, adj = X.double(), adj.double()
    (expected, expected_f), (logits, f) = (m(X, adj, return_att=True) for m in (theirs, ours))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(f, expected_f)
    assert_same_gradients(theirs, ours, (X, adj), torch.tensor([1]))


def test_deep_graph_surv_equals_its_formula():
    from bigbag.models import DeepGraphSurv

    torch.manual_seed(2)
    model = DeepGraphSurv((WIDTH,), n_layers_att=2, att_dim=4, hidden_dim=3, K=3).double().eval()
    X, adj, mask = padded_batch((6, 4))
    X, adj = X.double(), adj.double()
    logits, f = model(X, adj, mask, return_att=True)

    def convolve(layer, x, a):
        laplacian = 2 / (2 + 1e-6) * (torch.diag(a.sum(0)) - a) - torch.eye(len(a), dtype=a.dtype)
        polynomials = torch.cat([x, laplacian @ x, 2 * laplacian @ laplacian @ x - x], 1)
        return torch.relu(polynomials @ layer.fc.weight.T)

    for i, size in enumerate((6, 4)):
        x, a = X[i, :size], adj[i, :size, :size]
        scores = model.proj1d(convolve(model.layers_att[1], convolve(model.layers_att[0], x, a), a)).squeeze(1)
        z = scores.softmax(0) @ convolve(model.layers_rep[0], x, a)
        torch.testing.assert_close(f[i, :size], scores)
        torch.testing.assert_close(logits[i], model.classifier(z)[0])


def test_deep_graph_surv_without_in_shape():
    from bigbag.models import DeepGraphSurv

    X, adj, mask = padded_batch()
    assert DeepGraphSurv(hidden_dim=4, att_dim=2, K=2)(X, adj, mask).shape == (3,)
    with pytest.raises(ValueError, match="hidden_dim"):
        DeepGraphSurv()
    with pytest.raises(ValueError, match="n_layers_att 0"):
        DeepGraphSurv((3,), n_layers_att=0)


def test_deep_graph_surv_keeps_one_matrix_per_convolution():
    from bigbag.bench.models import make_step

    def peak(num_instances):
        step = make_step("bigbag", "DeepGraphSurv", num_instances, 256, torch.float32, False)
        return peak_bytes(step)

    # In the backward pass a gradient and two more terms, and the branch of half the width.
    assert (peak(8192) - peak(4096)) / (4096 * 256 * 4) < 4
