"""Transformers with Sm against torchmil."""

import numpy as np
import pytest
import torch

from bigbag import nn
from bigbag.graphs import build_adjacency

SETTINGS = {"in_dim": 6, "att_dim": 8, "n_heads": 2}


def adjacency(size: int) -> torch.Tensor:
    coords = np.stack(np.divmod(np.arange(size), 4), 1)
    return build_adjacency(coords, radius=1.5, normalize="symmetric").to_coo().to_dense()[None]


@pytest.mark.parametrize("mode", ["approx", "exact"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("SmMultiheadSelfAttention", {"out_dim": 5}),
        ("SmMultiheadSelfAttention", {"out_dim": 8}),
        ("SmTransformerLayer", {}),
        ("SmTransformerLayer", {"out_dim": 5, "use_mlp": False}),
        ("SmTransformerEncoder", {"n_layers": 2}),
        ("SmTransformerEncoder", {"n_layers": 2, "add_self": True, "att_dim": 6}),
    ],
)
def test_equal_to_torchmil(name, settings, mode):
    theirs_module = pytest.importorskip("torchmil.nn.transformers.sm_transformer")
    arguments = SETTINGS | settings | {"sm_mode": mode}
    theirs, ours = (getattr(module, name)(**arguments).eval() for module in (theirs_module, nn))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() else torch.nn.init.constant_(parameter, 0.7)
    ours.load_state_dict(theirs.state_dict())
    X, adj = torch.randn(1, 11, 6, requires_grad=True), adjacency(11)
    expected, found = theirs(X, adj), ours(X, adj.to_sparse())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape)
    grads = [torch.autograd.grad((out * weights).sum(), X)[0] for out in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    y, att = ours(X, adj, return_att=True)
    torch.testing.assert_close(y, found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(att.sum(-1), torch.ones(att.shape[:-1]))


def test_padding_is_left_out():
    module = nn.SmTransformerEncoder(**SETTINGS, n_layers=2).eval()
    X, adj, mask = torch.randn(2, 9, 6), torch.rand(2, 9, 9), torch.ones(2, 9)
    mask[1, 4:] = 0
    adj[0], adj[1, :4, :4] = adjacency(9)[0], adjacency(4)[0]
    y = module(X, adj, mask)
    torch.testing.assert_close(y[1:, :4], module(X[1:, :4], adj[1:, :4, :4]), rtol=1e-5, atol=1e-5)


def test_a_layer_needs_sm_right_behind_the_attention():
    attention = nn.SmMultiheadSelfAttention(6, out_dim=5, att_dim=8, n_heads=2)
    layer = nn.Layer(attention, 6, 6, att_out_dim=5)
    with pytest.raises(ValueError, match="out_dim = att_dim = 8"):
        layer(torch.randn(1, 4, 6), adj=adjacency(4))
    with pytest.raises(ValueError, match="needs adj"):
        layer(torch.randn(1, 4, 6))
