"""SETMIL: torchmil's numbers in its layout; in the right one its parts, put together as the paper says."""

import pytest
import torch
import torch.nn.functional as F

from bigbag import models
from bigbag.models.setmil import PMF, T2TLayer
from bigbag.nn.lattice import Lattice, Window

WIDTH = 6
SMALL = {"in_shape": (WIDTH,), "att_dim": 8, "set_n_heads": 2, "set_n_layers": 2, "pmf_n_heads": 2}


def twins(layout, **arguments):
    """torchmil's model and bigbag's with the same random weights and tables."""
    theirs = pytest.importorskip("torchmil.models").SETMIL(**SMALL, **arguments).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lookup_table" in key:
                p.normal_()
    ours = models.SETMIL(**SMALL, **arguments, torchmil_layout=layout).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def holes(size, count):
    """Places of ``count`` instances in a square of ``size``, in any order; corners are taken."""
    order = torch.randperm(size * size - 2)[: count - 2] + 1
    number = torch.cat([order, torch.tensor([0, size * size - 1])])
    return torch.stack([number // size, number % size], 1)


@pytest.mark.parametrize("arguments", [
    {},
    {"rpe_method": "cross", "rpe_mode": "bias"},
    {"rpe_method": "euc", "rpe_on": "qkv", "rpe_shared_head": False},
    {"use_pmf": True},
    {"use_pmf": True, "pmf_kernel_list": [(3, 3), (1, 1)], "pmf_stride_list": [(2, 2)] * 2,
     "pmf_padding_list": [(1, 1), (0, 0)], "pmf_dilation_list": [(1, 1)] * 2},
])  # fmt: skip
def test_torchmil_layout_gives_torchmils_numbers(arguments):
    theirs, ours = twins(True, **arguments)
    X, coords = torch.randn(1, 14, WIDTH), holes(6, 14)[None]
    logits, scores = ours(X, coords, return_att=True)
    expected, att = theirs(X, coords, return_att=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if not arguments.get("use_pmf"):
        torch.testing.assert_close(scores, att, atol=1e-4, rtol=1e-4)
    Y = torch.tensor([1.0])
    losses = [model.compute_loss(Y, X, coords)[1] for model in (ours, theirs)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def right_attention(self, x, mask=None, return_att=False, height=None, width=None):
    """torchmil's attention on queries, keys and values that are cut into heads as they should be."""
    q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in self._qkv(x))
    out = self._scaled_dot_product_attention(q, k, v, return_att=return_att)
    y, *att = out if return_att else (out,)
    y = self.out_proj(y.transpose(1, 2).flatten(2))
    return (y, *att) if return_att else y


@pytest.mark.parametrize("use_pmf", [False, True])
@pytest.mark.parametrize("mode, on", [("bias", "k"), ("contextual", "k"), ("contextual", "qk")])
def test_full_square_equals_torchmils_parts(use_pmf, mode, on, monkeypatch):
    """Every cell of the square has an instance: torchmil is right but for its mixed axes."""
    theirs, ours = twins(False, use_pmf=use_pmf, rpe_mode=mode, rpe_on=on)
    monkeypatch.setattr(type(theirs.se_transf.layers[0].att_module), "forward", right_attention)
    X, coords = torch.randn(1, 36, WIDTH), holes(6, 36)
    place = coords[:, 0] * 6 + coords[:, 1]
    rows = theirs.proj(X)[:, place.argsort()]
    if use_pmf:
        rows = theirs.pmf(rows.mT.unflatten(2, (6, 6)))
    sequence = torch.cat([theirs.cls_token, rows], 1)
    y, att = theirs.se_transf(sequence + theirs.pos_embed(sequence), return_att=True)
    logits, scores = ours(X, coords[None] + 3, return_att=True)
    torch.testing.assert_close(logits, theirs.classifier(y[:, 0])[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[0], att[-1, 0, :, 0, 1:].mean(0)[place], atol=1e-4, rtol=1e-4)


def test_only_cells_with_instances_are_tokens():
    """Windows see zeros in empty cells; attention sees tokens of cells with an instance only."""
    pmf = PMF(4, 5, att_dim=6, n_heads=2)
    coords = holes(7, 20)
    rows, lattice = torch.randn(20, 4), Lattice(coords, torch.tensor([[7, 7]]), one(20))
    found = pmf.forward_packed(rows, lattice, lattice)
    image = torch.zeros(1, 4, 7, 7)
    image[0, :, coords[:, 0], coords[:, 1]] = rows.t()
    place = coords[:, 0] * 7 + coords[:, 1]
    parts = []
    for layer, kernel in zip(pmf.layers, (3, 5, 7)):
        windows = F.unfold(image, kernel, padding=kernel // 2)[0].t()[place]
        parts.append(layer.transf_layer(windows[None])[0])
    torch.testing.assert_close(found, pmf.out_proj(torch.cat(parts, 1)), atol=1e-5, rtol=1e-5)


def one(size):
    from bigbag import Segments

    return Segments.from_sizes((size,))


@pytest.mark.parametrize("window", [
    Window((3, 3), (1, 1), (1, 1)), Window((3, 3), (2, 2), (1, 1)), Window((2, 3), (2, 1), (0, 2), (1, 2)),
    Window((3, 3), (1, 1), (2, 2)), Window((3, 3), (3, 2)),
])  # fmt: skip
def test_windows_are_those_of_unfold(window):
    image = torch.randn(2, 3, 7, 9)
    rows, lattice = image.flatten(2).mT.flatten(0, 1), Lattice.full([(7, 9)] * 2)
    tokens, _ = lattice.windows(window, full=True)
    index = lattice.neighbours(tokens, window)
    found = torch.where(index[..., None] >= 0, rows[index.clamp_min(0)], 0).mT.flatten(1)
    expected = F.unfold(image, window.kernel, window.dilation, window.padding, window.stride).mT.flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    some, window_of = lattice.windows(window)
    assert {tuple(p) for p in some.places.tolist()} <= {tuple(p) for p in tokens.places.tolist()}
    assert (window_of[window_of >= 0].bincount() <= window.stride[0] * window.stride[1]).all()


def test_modules_equal_torchmil():
    setmil = pytest.importorskip("torchmil.models.setmil")
    X = torch.randn(2, 3, 6, 6)
    for name, ours_class, arguments in (("PMF", PMF, {"out_dim": 5}), ("T2TLayer", T2TLayer, {"out_dim": 7})):
        arguments = {"in_dim": 3, "att_dim": 8, "n_heads": 2} | arguments
        theirs, ours = getattr(setmil, name)(**arguments).eval(), ours_class(**arguments).eval()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"use_pmf": True}, {"use_pmf": True, "pmf_stride_list": [(2, 2)] * 3}])
def test_neither_order_nor_origin_nor_unit_matters(arguments):
    _, model = twins(False, **arguments)
    X, coords = torch.randn(1, 14, WIDTH), holes(6, 14)[None]
    coords[0, 3] = coords[0, 4]  # two instances in one cell
    logits, scores = model.predict(X, coords)
    order = torch.randperm(14)
    moved_logits, moved_scores = model.predict(X[:, order], coords[:, order] + torch.tensor([5, -2]))
    torch.testing.assert_close(moved_logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved_scores, scores[:, order], atol=1e-5, rtol=1e-5)
    model.unit = 256
    torch.testing.assert_close(model(X, coords * 256 + 17), logits, atol=1e-5, rtol=1e-5)


def test_masked_bags_are_each_alone():
    _, model = twins(False, use_pmf=True)
    X, coords = torch.randn(2, 12, WIDTH), torch.stack([holes(5, 12), holes(4, 12)])
    mask = torch.ones(2, 12)
    mask[0, [1, 5, 7]] = 0
    coords[0, 1] = 10**6  # of an instance that is not there
    alone = [model(X[b : b + 1, m == 1], coords[b : b + 1, m == 1]) for b, m in enumerate(mask)]
    torch.testing.assert_close(model(X, coords, mask=mask), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="needs coords"):
        models.SETMIL(**SMALL)(torch.randn(1, 3, WIDTH))
    with pytest.raises(ValueError, match="two coordinates"):
        models.SETMIL(**SMALL)(torch.randn(1, 3, WIDTH), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="equal strides and centres"):
        PMF(3, kernel_list=[(3, 3), (5, 5)], padding_list=[(1, 1), (1, 1)])
