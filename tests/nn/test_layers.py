"""Layers against torchmil's, where torchmil is right."""

import pytest
import torch

from bigbag import nn

theirs = pytest.importorskip("torchmil.nn")
X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def test_mean_and_max_pool():
    torch.testing.assert_close(nn.MeanPool()(X, MASK), theirs.MeanPool()(X, MASK))
    torch.testing.assert_close(nn.MaxPool()(X, MASK.to(torch.uint8)), theirs.MaxPool()(X, MASK.bool()))
    torch.testing.assert_close(nn.MaxPool()(X), X.amax(1))


def test_attention_pool():
    ours, other = nn.AttentionPool(4, 3, "gelu", gated=True), theirs.AttentionPool(4, 3, "gelu", gated=True)
    ours.load_state_dict(other.state_dict())
    (z, f), (expected_z, expected_f) = ours(X, MASK, return_att=True), other(X, MASK, return_att=True)
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(f[MASK == 1], expected_f[MASK == 1])
    torch.testing.assert_close(ours(X), other(X))


def test_masked_softmax():
    torch.testing.assert_close(nn.masked_softmax(X, MASK), theirs.masked_softmax(X, MASK))
    torch.testing.assert_close(nn.MaskedSoftmax()(X), torch.softmax(X, 1))
    nothing = nn.masked_softmax(X.requires_grad_(), torch.zeros(3, 5))
    nothing.sum().backward()
    assert not nothing.any() and torch.isfinite(X.grad).all()


def test_mlp_and_lazy_linear():
    ours = nn.MLP(4, [6, 2], ["relu", "none"])
    other = theirs.MLP(4, [6, 2], ["relu", "none"])
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(X), other(X))
    assert nn.get_feat_dim(ours, (4,)) == 2
    normed = nn.MLP(4, [6, 2], ["relu", "none"], layer_norm=True)
    normed.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(
        normed(3 * X + 1), other((X - X.mean(-1, keepdim=True)) / X.std(-1, keepdim=True, correction=0))
    )
    assert nn.LazyLinear(out_features=3)(X).shape == (3, 5, 3)
    assert nn.LazyLinear(4, 3).state_dict().keys() == theirs.LazyLinear(4, 3).state_dict().keys()
    with pytest.raises(ValueError, match="one each"):
        nn.MLP(4, [6, 2], ["relu"])
    with pytest.raises(ValueError, match="'swish'"):
        nn.MLP(4, [6], ["swish"])


def test_helpers_of_torchmil_users():
    from bigbag.nn import utils

    other = pytest.importorskip("torchmil.nn.utils")
    torch.testing.assert_close(utils.log_sum_exp(X[0]), other.log_sum_exp(X[0]))
    y, labels = torch.tensor([1, 0, 2]), torch.arange(3)
    for alpha in (None, 0.5):
        torch.testing.assert_close(utils.delta(y, labels, alpha), other.delta(y, labels, alpha))
