"""Models on graphs against torchmil, and their memory."""

import pytest
import torch

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
