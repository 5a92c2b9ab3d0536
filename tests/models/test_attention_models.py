"""TransformerABMIL, TransMIL, CAMIL and SETMIL: torchmil's numbers, the papers' formulas, and what they cost."""

import pytest
import torch

from bigbag import models
from bigbag.memory import peak_bytes

WIDTH = 6


def twins(name, **arguments):
    """torchmil's model and bigbag's with the same random weights."""
    theirs = getattr(pytest.importorskip("torchmil.models"), name)(in_shape=(WIDTH,), **arguments).eval()
    ours = getattr(models, name)(in_shape=(WIDTH,), **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(theirs, ours, Y, *inputs):
    """Logits, instance scores, losses and gradients of one batch."""
    for found, expected in zip(ours(*inputs, return_att=True), theirs(*inputs, return_att=True)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    losses = [model.compute_loss(Y, *inputs)[1] for model in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    gradients = []
    for loss, model in zip(losses, (ours, theirs)):
        sum(loss.values()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() <= gradients[1].keys()
    torch.testing.assert_close(gradients[0], {key: gradients[1][key] for key in gradients[0]}, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0, 1] + [0] * 7])])
@pytest.mark.parametrize("arguments", [
    {"pool_gated": True, "transf_n_layers": 2, "transf_att_dim": 6, "transf_n_heads": 3},
    {"pool_act": "relu", "transf_att_dim": 8, "transf_use_mlp": False, "transf_add_self": False},
])  # fmt: skip
def test_transformer_abmil_equals_torchmil(arguments, mask):
    theirs, ours = twins("TransformerABMIL", **arguments)
    X, Y = torch.randn(3, 9, WIDTH), torch.tensor([1.0, 0, 1])
    if mask is None:
        assert_same(theirs, ours, Y, X)
    else:
        expected = torch.cat([theirs(X[b : b + 1, keep]) for b, keep in enumerate(mask.bool())])
        torch.testing.assert_close(ours(X, mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 9, 30])
@pytest.mark.parametrize("arguments", [
    {"att_dim": 8, "n_heads": 2, "n_landmarks": 4},
    {"att_dim": WIDTH, "n_heads": 3, "n_layers": 3, "use_mlp": True},
])  # fmt: skip
def test_transmil_equals_torchmil_on_one_bag(arguments, size):
    theirs, ours = twins("TransMIL", **arguments)
    assert_same(theirs, ours, torch.tensor([1.0]), torch.randn(1, size, WIDTH))


def test_transmil_masks_and_packs_equal_torchmil_bag_by_bag():
    theirs, ours = twins("TransMIL", att_dim=8, n_heads=2, n_landmarks=4)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0, 1] + [0] * 7], dtype=torch.uint8)
    X, keep = torch.randn(3, 9, WIDTH), mask.bool()
    alone = [theirs(X[b : b + 1, keep[b]], return_att=True) for b in range(3)]
    logits, scores = ours.predict(X, mask=mask)
    torch.testing.assert_close(logits, torch.cat([a for a, _ in alone]), atol=1e-4, rtol=1e-4)
    expected = torch.cat([a[0] for _, a in alone])
    torch.testing.assert_close(scores[keep], expected, atol=1e-4, rtol=1e-4)


def test_ppeg_equals_torchmil():
    theirs = pytest.importorskip("torchmil.models.transmil").PPEG(6)
    from bigbag.models.transmil import PPEG

    ours = PPEG(6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 1 + 3 * 5, 6)
    torch.testing.assert_close(ours(x, 3, 5), theirs(x, 3, 5), atol=1e-5, rtol=1e-5)


def test_transmil_options_change_the_result():
    """The paper's residual convolution, and bags without rows of zeros."""
    torch.manual_seed(0)
    X, plain = torch.randn(1, 20, WIDTH), models.TransMIL((WIDTH,), att_dim=8, n_heads=2)
    for option in ({"zero_padding": False}, {"conv_residual": True}):
        other = models.TransMIL((WIDTH,), att_dim=8, n_heads=2, **option)
        other.load_state_dict(plain.state_dict(), strict=False)
        assert (other(X) - plain(X)).abs() > 1e-4
    assert "layers.0.att_module.res_conv.weight" in other.state_dict()
    with pytest.raises(ValueError, match="n_layers >= 2"):
        models.TransMIL((WIDTH,), n_layers=1)


def chain(batch, size):
    """Adjacency with self-loops of a chain with random weights, dense."""
    weights = torch.rand(batch, size, size)
    near = (torch.arange(size)[:, None] - torch.arange(size)).abs() <= 1
    return weights * near


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("arguments", [
    {"nystrom_att_dim": 8, "n_heads": 2, "n_landmarks": 4, "pool_att_dim": 5},
    {"nystrom_att_dim": WIDTH, "n_heads": 3, "n_landmarks": 4, "gated_pool": True, "use_mlp": True},
])  # fmt: skip
def test_camil_equals_torchmil_on_one_bag(arguments, size):
    theirs, ours = twins("CAMIL", **arguments)
    assert_same(theirs, ours, torch.tensor([1.0]), torch.randn(1, size, WIDTH), chain(1, size))
    X, adj = torch.randn(1, size, WIDTH), chain(1, size)
    torch.testing.assert_close(ours(X, adj.to_sparse()), theirs(X, adj), atol=1e-4, rtol=1e-4)


def test_camil_masks_equal_torchmil_bag_by_bag():
    theirs, ours = twins("CAMIL", nystrom_att_dim=8, n_heads=2, n_landmarks=4)
    keep = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0, 1] + [0] * 7]).bool()
    X, adj = torch.randn(3, 9, WIDTH), chain(3, 9)
    alone = [theirs(X[b : b + 1, k], adj[b : b + 1, k][:, :, k], return_att=True) for b, k in enumerate(keep)]
    logits, scores = ours.predict(X, adj, keep.to(torch.uint8))
    torch.testing.assert_close(logits, torch.cat([a for a, _ in alone]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[keep], torch.cat([a[0] for _, a in alone]), atol=1e-4, rtol=1e-4)


def test_camil_modules_equal_torchmil():
    camil = pytest.importorskip("torchmil.models.camil")
    from bigbag.models.camil import CAMILAttentionPool, CAMILSelfAttention

    X, M, adj = torch.randn(2, 5, 6), torch.randn(2, 5, 6), chain(2, 5)
    theirs, ours = camil.CAMILSelfAttention(6, 4), CAMILSelfAttention(6, 4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X, adj), theirs(X, adj))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    theirs, ours = camil.CAMILAttentionPool(6, 4, gated=True), CAMILAttentionPool(6, 4, gated=True)
    ours.load_state_dict(theirs.state_dict())
    (z, f), (expected_z, expected_f) = (m(X, M, mask, return_att=True) for m in (ours, theirs))
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(f[mask == 1], expected_f[mask == 1])


def test_camil_runs_with_its_defaults():
    model = models.CAMIL((WIDTH,))
    assert model.nystrom_transformer_layer.att_module.n_landmarks == 256
    assert model(torch.randn(2, 5, WIDTH), chain(2, 5)).shape == (2,)


def test_transformer_abmil_keeps_queries_keys_values_and_one_stream():
    """At most the input, queries, keys, values, what attention makes of them and two gradients, per instance."""
    model = models.TransformerABMIL((64,), transf_att_dim=32, transf_n_heads=2, pool_att_dim=4)

    def peak(size):
        x = torch.randn(1, size, 64)
        return peak_bytes(lambda: model.compute_loss(torch.ones(1), x)[1]["BCEWithLogitsLoss"].backward())

    grown = (peak(6_000) - peak(3_000)) / 3_000
    assert grown < 4 * (6 * 32 + 64), f"{grown:.0f} bytes per instance"
