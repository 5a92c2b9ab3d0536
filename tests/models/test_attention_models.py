"""TransformerABMIL, TransMIL, CAMIL and SETMIL: torchmil's numbers, the papers' formulas, and what they cost."""

import pytest
import torch

from bigbag import models

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
