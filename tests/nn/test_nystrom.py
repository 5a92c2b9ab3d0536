"""Nystrom attention and transformer layers: torchmil's numbers bag by bag, masks, the residual convolution."""

import pytest
import torch
import torch.nn.functional as F

from bigbag import nn
from bigbag.bags import Segments

MASK = torch.tensor([[1] * 11, [1] * 3 + [0] * 8, [0, 0, 1] + [0] * 8], dtype=torch.uint8)
CASES = [
    ("NystromAttention", {"in_dim": 8, "att_dim": 12, "n_heads": 3, "n_landmarks": 4}),
    ("NystromAttention", {"in_dim": 8, "att_dim": 8, "out_dim": 8, "n_heads": 2, "learn_weights": False}),
    ("NystromTransformerLayer", {"in_dim": 8, "att_dim": 12, "n_heads": 3, "n_landmarks": 3, "use_mlp": True}),
    ("NystromTransformerLayer", {"in_dim": 8, "att_dim": 8, "n_heads": 2, "n_landmarks": 16, "pinv_iterations": 3}),
    ("NystromTransformerEncoder", {"in_dim": 8, "att_dim": 12, "n_heads": 2, "n_layers": 2, "n_landmarks": 5}),
    ("NystromTransformerEncoder", {"in_dim": 8, "att_dim": 8, "n_layers": 2, "add_self": True, "n_landmarks": 5}),
]


def twins(name, arguments):
    theirs = getattr(pytest.importorskip("torchmil.nn"), name)(**arguments).eval()
    ours = getattr(nn, name)(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name, arguments", CASES)
@pytest.mark.parametrize("size", [1, 11, 12, 300])
def test_one_bag_equals_torchmil(name, arguments, size):
    theirs, ours = twins(name, arguments)
    X = torch.randn(1, size, 8)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-4, rtol=1e-4)
    if size <= 12:
        for mine, other in zip(ours(X, return_att=True), theirs(X, return_att=True)):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, arguments", CASES)
def test_masked_bags_equal_each_bag_alone(name, arguments):
    theirs, ours = twins(name, arguments)
    X, valid = torch.randn(3, 11, 8), MASK.bool()
    alone = torch.cat([theirs(X[b : b + 1, keep])[0] for b, keep in enumerate(valid)])
    torch.testing.assert_close(ours(X, MASK)[valid], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, arguments", CASES[2:])
@pytest.mark.parametrize("extra", [{}, {"zero_padding": False}, {"conv_residual": True}])
def test_first_rows_are_those_of_the_whole(name, arguments, extra):
    module = getattr(nn, name)(**arguments, **extra)
    segments, x = Segments.from_sizes((4, 1, 40)), torch.randn(45, 8)
    results = []
    for found in (module.forward_first(x, segments), module.forward_packed(x, segments)[[0, 4, 5]]):
        found.square().sum().backward()
        results.append([found, *(None if p.grad is None else p.grad.clone() for p in module.parameters())])
        module.zero_grad()
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_attention_of_first_rows():
    encoder = nn.NystromTransformerEncoder(8, att_dim=12, n_heads=3, n_layers=2, n_landmarks=4)
    X = torch.randn(2, 6, 8)
    _, att = encoder.forward_first(X.flatten(0, 1), Segments.from_sizes((6, 6)), return_att=True)
    expected = encoder(X, return_att=True)[1][-1, :, :, 0].transpose(1, 2)
    torch.testing.assert_close(att.view(2, 6, 3), expected)


def test_without_zero_padding_all_instances_as_landmarks_give_exact_attention():
    """A bag has at most one landmark per instance, and with as many the approximation is exact."""
    torch.manual_seed(0)
    arguments = {"in_dim": 8, "att_dim": 8, "n_heads": 2}
    exact = nn.MultiheadSelfAttention(**arguments)
    nystrom = nn.NystromAttention(**arguments, n_landmarks=64, pinv_iterations=40, zero_padding=False)
    nystrom.load_state_dict(exact.state_dict())
    with torch.no_grad():
        exact.qkv_nn.weight.mul_(4)
        nystrom.qkv_nn.weight.mul_(4)
    X = torch.randn(2, 9, 8).double()
    torch.testing.assert_close(nystrom.double()(X), exact.double()(X))


def test_residual_convolution():
    plain = nn.NystromAttention(8, att_dim=8, n_heads=2, n_landmarks=4)
    residual = nn.NystromAttention(8, att_dim=8, n_heads=2, n_landmarks=4, conv_residual=True)
    residual.load_state_dict(plain.state_dict(), strict=False)
    X = torch.randn(1, 50, 8)
    v = plain.qkv_nn(X)[0, :, 16:]
    kernels = residual.res_conv.weight.view(2, 33)
    expected = torch.empty_like(v)
    for column in range(8):
        series = F.pad(v[:, column], (16, 16)).unfold(0, 33, 1)
        expected[:, column] = series @ kernels[column // 4]
    torch.testing.assert_close(residual(X) - plain(X), expected[None], atol=1e-5, rtol=1e-4)
