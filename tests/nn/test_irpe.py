"""Relative position encoding: torchmil's numbers in its layout, its formula in the right one, masks, class tokens."""

import pytest
import torch

from bigbag import nn
from bigbag.bags import Segments

METHODS = ["euc", "quant", "cross", "product"]
MODES = [("bias", "k"), ("bias", "q"), ("bias", "qk"), ("contextual", "k"), ("contextual", "q"), ("contextual", "qkv")]
each_form = pytest.mark.parametrize("mode, on", MODES, ids="-".join)
each_method = pytest.mark.parametrize("method", METHODS)


def twins(name="iRPEMultiheadSelfAttention", layout=True, **arguments):
    """torchmil's module and bigbag's with the same random weights and tables."""
    arguments = {"in_dim": 8, "att_dim": 12, "n_heads": 3} | arguments
    theirs = getattr(pytest.importorskip("torchmil.nn"), name)(**arguments).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lookup_table" in key:
                p.normal_()
    ours = getattr(nn, name)(**arguments, torchmil_layout=layout).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@each_method
@each_form
@pytest.mark.parametrize("shared", [True, False])
def test_torchmil_layout_gives_torchmils_numbers(method, mode, on, shared):
    theirs, ours = twins(rpe_method=method, rpe_mode=mode, rpe_on=on, rpe_shared_head=shared or "v" in on)
    X = torch.randn(2, 1 + 36, 8)
    for mine, other in zip(ours(X, return_att=True), theirs(X, return_att=True)):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
    y = torch.autograd.grad(ours(X).sin().sum(), list(ours.parameters()))
    other = torch.autograd.grad(theirs(X).sin().sum(), list(theirs.parameters()))
    torch.testing.assert_close(y, other, atol=1e-4, rtol=1e-3)


def right(theirs, X):
    """torchmil's attention of one bag on queries, keys and values that are cut into heads as they should be."""
    q, k, v = (t.unflatten(-1, (theirs.n_heads, -1)).transpose(1, 2) for t in theirs._qkv(X))
    out = theirs._scaled_dot_product_attention(q, k, v, return_att=False)
    return theirs.out_proj(out.transpose(1, 2).flatten(2))


@each_method
@each_form
@pytest.mark.parametrize("skip", [0, 1])
def test_right_layout(method, mode, on, skip):
    theirs, ours = twins(layout=False, rpe_method=method, rpe_mode=mode, rpe_on=on, rpe_skip=skip)
    X = torch.randn(2, skip + 25, 8)
    torch.testing.assert_close(ours(X), right(theirs, X), atol=2e-5, rtol=1e-4)


@each_method
@each_form
def test_blocks_are_bags_and_blocks(method, mode, on, monkeypatch):
    """Bags of a pack, in blocks of few queries, give what they give alone; so do padded ones."""
    _, ours = twins(layout=False, rpe_method=method, rpe_mode=mode, rpe_on=on)
    X, mask = torch.randn(2, 17, 8), torch.ones(2, 17)
    mask[0, 11:] = 0
    mask[1, 5] = 0
    padded = ours(X, mask)
    monkeypatch.setattr("bigbag.nn.attention.irpe_multihead_self_attention._BLOCK_ELEMENTS", 100)
    bags, extras = ours.pack(X, mask)
    assert torch.equal(extras["coords"][1], torch.tensor([0.0, 0.0])) and extras["coords"][0].isnan().all()
    packed = ours.forward_packed(bags.x, bags.segments, **extras)
    torch.testing.assert_close(padded[mask == 1], packed, atol=1e-5, rtol=1e-4)
    alone = ours.forward_packed(bags.x[:11], Segments.from_sizes((11,)), coords=bags.coords[:11])
    torch.testing.assert_close(alone, packed[:11], atol=1e-5, rtol=1e-4)


@each_form
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("layout", [False, True])
def test_first_rows_are_those_of_the_whole(mode, on, skip, layout):
    _, ours = twins("iRPETransformerEncoder", layout, rpe_mode=mode, rpe_on=on, rpe_skip=skip, n_layers=2)
    segments, x = Segments.from_sizes((10, 5)), torch.randn(15, 8)
    coords = torch.randint(0, 9, (15, 2)).float()
    coords[[0, 10]] = torch.nan
    first, att = ours.forward_first(x, segments, return_att=True, coords=coords)
    whole = ours.forward_packed(x, segments, coords=coords)[[0, 10]]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=1e-4)
    last = ours.layers[-1]
    y = ours.layers[0].forward_packed(x, segments, coords=coords)
    q, k, _ = last.att_module.project(y, enter=last.entry)
    matrices = last.att_module.attention_matrices(q, k, segments, coords=coords)
    torch.testing.assert_close(att, torch.cat([m[:, 0].t() for m in matrices]), atol=1e-5, rtol=1e-4)


def test_layers_and_encoders_equal_torchmil():
    for name, extra in (("iRPETransformerLayer", {}), ("iRPETransformerEncoder", {"n_layers": 2, "out_dim": 5})):
        theirs, ours = twins(name, **extra)
        X = torch.randn(2, 17, 8)
        for mine, other in zip(ours(X, return_att=True), theirs(X, return_att=True)):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def test_any_number_of_positions_and_no_encoding():
    plain = nn.iRPEMultiheadSelfAttention(8, att_dim=12, n_heads=3, rpe_mode=None)
    exact = nn.MultiheadSelfAttention(8, att_dim=12, n_heads=3)
    exact.load_state_dict(plain.state_dict())
    X = torch.randn(2, 12, 8)
    torch.testing.assert_close(plain(X), exact(X))
    encoded = nn.iRPEMultiheadSelfAttention(8, att_dim=12, n_heads=3)
    torch.nn.init.normal_(encoded.rpe_k.lookup_table_weight)
    assert encoded(X, height=1, width=11).shape == (2, 12, 8)
    assert not torch.allclose(encoded(X, height=1), encoded(X))
    torch.testing.assert_close(encoded(X, None, False, 1, 11), encoded(X, height=1, width=11))


@pytest.mark.parametrize("wrong", [{"rpe_method": "x"}, {"rpe_mode": "x"}, {"rpe_on": "kq"}, {"rpe_skip": 2}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        nn.iRPEMultiheadSelfAttention(8, **wrong)
    with pytest.raises(ValueError, match="must be 'contextual'"):
        nn.iRPEMultiheadSelfAttention(8, rpe_on="v", rpe_mode="bias")
