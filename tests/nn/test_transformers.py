"""Attention layers, transformer layers and row-wise chunks: torchmil's numbers, masks, gradients, memory."""

from unittest import mock

import pytest
import torch
from torch import nn as tnn

from bigbag import nn
from bigbag.bags import PackedBags, Segments
from bigbag.nn import rows as rows_module
from bigbag.nn.rows import by_rows

LENGTHS = (7, 3, 1)
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0, 0, 1, 0, 0, 0, 0]], dtype=torch.uint8)


def twins(name, **arguments):
    """torchmil's module and bigbag's with the same weights."""
    theirs = getattr(pytest.importorskip("torchmil.nn"), name)(**arguments).eval()
    ours = getattr(nn, name)(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def each_alone(module, X, *rest):
    """``module`` on the valid rows of every bag by itself, put back in its place."""
    out = None
    for b, keep in enumerate(MASK.bool()):
        y = module(X[b : b + 1, keep], *(other[b : b + 1] for other in rest))
        out = y.new_zeros(*X.shape[:2], y.shape[-1]) if out is None else out
        out[b, keep] = y[0]
    return out


ATTENTIONS = [
    {"in_dim": 8, "att_dim": 12, "n_heads": 3},
    {"in_dim": 8, "out_dim": 12, "att_dim": 12, "n_heads": 2},
    {"in_dim": 8, "out_dim": 5, "n_heads": 4, "learn_weights": False},
]


@pytest.mark.parametrize("arguments", ATTENTIONS)
def test_self_attention_equals_torchmil(arguments):
    theirs, ours = twins("MultiheadSelfAttention", **arguments)
    X = torch.randn(3, 7, 8)
    torch.testing.assert_close(ours(X), theirs(X))
    (y, att), (expected, expected_att) = ours(X, return_att=True), theirs(X, return_att=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(att, expected_att)
    torch.testing.assert_close(ours(X, MASK), each_alone(theirs, X))


def test_dense_attention_of_masked_bags_leaves_out_what_is_masked():
    attention = nn.MultiheadSelfAttention(8, att_dim=12, n_heads=3)
    X = torch.randn(3, 7, 8)
    _, att = attention(X, MASK, return_att=True)
    valid = MASK.bool()
    assert (att.permute(0, 2, 3, 1)[~(valid[:, :, None] & valid[:, None])] == 0).all()
    torch.testing.assert_close(att.sum(-1), valid[:, None].expand(3, 3, 7).float())


@pytest.mark.parametrize("arguments", ATTENTIONS)
def test_cross_attention_equals_torchmil(arguments):
    theirs, ours = twins("MultiheadCrossAttention", **arguments)
    X, Y = torch.randn(3, 7, 8), torch.randn(3, 4, 8)
    torch.testing.assert_close(ours(X, Y), theirs(X, Y))
    torch.testing.assert_close(ours(X, Y, MASK), each_alone(theirs, X, Y))
    y_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]])
    kept = [theirs(X[b : b + 1], Y[b : b + 1, m == 1]) for b, m in enumerate(y_mask)]
    torch.testing.assert_close(ours(X, Y, y_mask=y_mask), torch.cat(kept))


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention, X = nn.MultiheadSelfAttention(8, att_dim=8, n_heads=2, dropout=0.5), torch.randn(1, 50, 8)
    assert not torch.equal(attention(X), attention(X))
    assert torch.equal(attention.eval()(X), attention(X))


LAYERS = [
    ("TransformerLayer", {"in_dim": 8, "att_dim": 12, "n_heads": 3}),
    ("TransformerLayer", {"in_dim": 8, "att_dim": 8, "out_dim": 5, "n_heads": 2, "use_mlp": False}),
    ("TransformerEncoder", {"in_dim": 8, "att_dim": 12, "out_dim": 6, "n_heads": 2, "n_layers": 2}),
    ("TransformerEncoder", {"in_dim": 8, "att_dim": 8, "n_heads": 2, "n_layers": 3, "add_self": True}),
]


@pytest.mark.parametrize("name, arguments", LAYERS)
def test_layers_equal_torchmil(name, arguments):
    theirs, ours = twins(name, **arguments)
    X = torch.randn(3, 7, 8)
    torch.testing.assert_close(ours(X), theirs(X))
    for mine, other in zip(ours(X, return_att=True), theirs(X, return_att=True)):
        torch.testing.assert_close(mine, other)
    valid = MASK.bool()
    torch.testing.assert_close(ours(X, MASK)[valid], each_alone(theirs, X)[valid])


@pytest.mark.parametrize("name, arguments", LAYERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_torchmil(name, arguments, recompute, monkeypatch):
    monkeypatch.setitem(rows_module._ROWS, "cpu", 5)
    theirs, ours = twins(name, **arguments)
    ours.recompute = recompute
    inputs = [torch.randn(1, 13, 8).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    for module, X in zip((theirs, ours), inputs):
        module(X).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (key, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters()):
        unused = not arguments.get("use_mlp", True) and "norm2" in key
        assert mine.requires_grad != unused
        if not unused:
            torch.testing.assert_close(mine.grad, other.grad, msg=key)


@pytest.mark.parametrize("name, arguments", LAYERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_first_rows_are_those_of_the_whole(name, arguments, recompute):
    module = getattr(nn, name)(**arguments)
    module.recompute = recompute
    segments, x = Segments.from_sizes((4, 1, 9)), torch.randn(14, 8)
    gradients = []
    for found in (module.forward_first(x, segments), module.forward_packed(x, segments)[[0, 4, 5]]):
        found.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])
        module.zero_grad()
        gradients[-1].append(found)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_attention_of_first_rows():
    encoder = nn.TransformerEncoder(8, att_dim=12, n_heads=3, n_layers=2)
    x, sizes = torch.randn(1, 6, 8), (6,)
    _, att = encoder.forward_first(x[0], Segments.from_sizes(sizes), return_att=True)
    torch.testing.assert_close(att, encoder(x, return_att=True)[1][-1, 0, :, 0].t())


def test_layer_takes_any_attention_in_the_padded_form():
    theirs_layer = pytest.importorskip("torchmil.nn.transformers.layer").Layer

    class Mean(tnn.Module):
        def forward(self, x, return_att=False):
            y = x.mean(1, keepdim=True).expand_as(x)
            return (y, y) if return_att else y

    theirs, ours = (cls(Mean(), in_dim=5, att_in_dim=8, out_dim=3) for cls in (theirs_layer, nn.Layer))
    ours.load_state_dict(theirs.state_dict())
    X = torch.randn(2, 4, 5)
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours(X, return_att=True)[1], theirs(X, return_att=True)[1])


def test_heads_must_divide_the_width():
    for cls in (nn.MultiheadSelfAttention, nn.MultiheadCrossAttention):
        with pytest.raises(ValueError, match="att_dim = 10 is not divisible by n_heads = 4"):
            cls(8, att_dim=10, n_heads=4)
        with pytest.raises(ValueError, match="in_dim = 8 is not divisible by n_heads = 3"):
            cls(8, n_heads=3, learn_weights=False)


def test_what_is_added_to_itself_must_keep_its_width():
    encoder = nn.TransformerEncoder(8, att_dim=12, n_layers=2, add_self=True)  # as torchmil's, it can be built
    x, segments = torch.randn(5, 8), Segments.from_sizes([5])
    for run in (lambda: encoder(x[None]), lambda: encoder.forward_packed(x, segments)):
        with pytest.raises(ValueError, match="add_self .* 8 wide, .* one is 12 wide"):
            run()
    assert nn.TransformerEncoder(8, att_dim=12, n_layers=1, add_self=True)(x[None]).shape == (1, 5, 8)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    """Outputs and gradients, with dropout (the same numbers in both passes) and under autocast."""
    monkeypatch.setitem(rows_module._ROWS, "cpu", 3)
    mlp = tnn.Sequential(tnn.Linear(4, 6), tnn.Dropout(0.5), tnn.Linear(6, 2))
    x, scale = torch.randn(8, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    kept = []

    def function(rows):
        hidden = mlp[1](mlp[0](rows))
        kept.append((hidden != 0).detach())
        return mlp[2](hidden) * scale, rows.sum(1)

    y, sums = by_rows(function, x, modules=[mlp], shared=[scale])
    (y.square().sum() + sums.sum()).backward()
    assert [len(part) for part in kept] == [3, 3, 2] * 2
    assert all(torch.equal(*pair) for pair in zip(kept[:3], kept[3:]))
    found = [t.grad.clone() for t in (x, scale, *mlp.parameters())]
    for t in (x, scale, *mlp.parameters()):
        t.grad = None
    expected = mlp[2](mlp[0](x) * torch.cat(kept[:3]) * 2) * scale
    (expected.square().sum() + x.sum(1).sum()).backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, [t.grad for t in (x, scale, *mlp.parameters())])


def test_rows_under_autocast_keep_gradients_of_weights():
    linear, x = tnn.Linear(4, 3), torch.randn(5000, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = by_rows(linear, x, modules=[linear])
        again = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, again, rtol=0, atol=0)
    y.float().square().mean().backward()
    low, linear.weight.grad = linear.weight.grad, None
    linear(x).square().mean().backward()
    torch.testing.assert_close(low, linear.weight.grad, rtol=0.02, atol=0.02)


def test_rows_of_an_empty_pack():
    linear = tnn.Linear(4, 3)
    y = by_rows(linear, torch.zeros(0, 4), modules=[linear])
    y.sum().backward()
    assert y.shape == (0, 3) and (linear.weight.grad == 0).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_a_layer_is_linear_and_small(recompute):
    """Bytes kept for backward per row: x, q, k, v, out and logsumexp, or x and out; not all that is row-wise too."""
    width, size = 32, 6000
    layer = nn.TransformerLayer(width, att_dim=width, n_heads=2)
    layer.recompute = recompute
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(size, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.forward_packed(x, Segments.from_sizes((size,)))
    # x, q, k, v and out are `width` floats each; logsumexp is one per head, offsets and weights are small.
    limit = (2 if recompute else 5) * 4 * width * size + 4 * 2 * size + (1 << 18)
    assert 4 * width * size <= sum(kept.values()) <= limit
    assert torch.isfinite(y).all()


def test_pack_of_bags_equals_each_bag():
    encoder = nn.TransformerEncoder(8, att_dim=12, n_heads=2, n_layers=2)
    X = torch.randn(3, 7, 8)
    bags = PackedBags.from_padded(X, MASK)
    packed = encoder.forward_packed(bags.x, bags.segments)
    alone = [encoder(X[b : b + 1, keep])[0] for b, keep in enumerate(MASK.bool())]
    torch.testing.assert_close(packed, torch.cat(alone))
    assert bags.sizes == LENGTHS


@pytest.mark.parametrize("rows", [8, 2500])
@pytest.mark.parametrize("stored", [torch.float16, torch.float64])
def test_projection_of_rows_in_another_precision(rows, stored):
    linear = tnn.Linear(4, 2)
    x = torch.randn(rows, 4).to(stored).requires_grad_()
    y = by_rows(lambda x: x * 2, x, projection=rows_module.Projection(linear.weight, linear.bias))
    (found,) = torch.autograd.grad(y.sum(), linear.weight)
    torch.testing.assert_close(found, (2 * x).float().sum(0).expand(2, 4), rtol=1e-3, atol=1e-2)


def test_projection_is_not_computed_again(monkeypatch):
    """Its gradients come without its outputs; parts that nobody uses give none."""
    monkeypatch.setitem(rows_module._ROWS, "cpu", 3)
    norm, linear = tnn.LayerNorm(4), tnn.Linear(4, 6)
    x, calls = torch.randn(8, 4, requires_grad=True), []
    original = rows_module.Projection.into
    monkeypatch.setattr(rows_module.Projection, "into", lambda *args: calls.append(1) or original(*args))
    first, _, last = by_rows(norm, x, projection=rows_module.Projection(linear.weight, linear.bias, (2, 2, 2)))
    (first.square().sum() + last.sin().sum()).backward()
    assert len(calls) == 3
    found = [t.grad.clone() for t in (x, *norm.parameters(), *linear.parameters())]
    for t in (x, *norm.parameters(), *linear.parameters()):
        t.grad = None
    expected = linear(norm(x))
    torch.testing.assert_close(torch.cat([first, last], 1), expected[:, [0, 1, 4, 5]])
    (expected[:, :2].square().sum() + expected[:, 4:].sin().sum()).backward()
    torch.testing.assert_close(found, [t.grad for t in (x, *norm.parameters(), *linear.parameters())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_not_computed_again(monkeypatch, dtype):
    """The same results and gradients as in chunks, dropout, a projection in parts and a residual included."""
    mlp = tnn.Sequential(tnn.LayerNorm(4), tnn.Dropout(0.5))
    linear = tnn.Linear(4, 6)
    cases = [
        (rows_module.Projection(linear.weight, linear.bias, (2, 4)), lambda rows: mlp(rows)),
        (rows_module.Projection(linear.weight, None, added=True), lambda rows: (mlp(rows), rows.repeat(1, 2)[:, :6])),
    ]
    x = torch.randn(8, 4, requires_grad=True)
    for projection, function in cases:
        calls, results = [], []

        def counted(rows, function=function, calls=calls):
            calls.append(len(rows))
            return function(rows)

        for rows in (2048, 10):
            monkeypatch.setitem(rows_module._ROWS, "cpu", rows)
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = by_rows(counted, x, modules=[mlp], projection=projection)
            parts = [found] if torch.is_tensor(found) else list(found)
            loss = torch.stack([part.float().sin().sum() for part in parts]).sum()
            wanted = [t for t in (x, *mlp.parameters(), *projection[:2]) if t is not None]
            results.append([*parts, *torch.autograd.grad(loss, wanted)])
            assert all(part.dtype == dtype and part.is_contiguous() for part in parts)
        assert calls == [8, 8, 8], "once, then forward and backward"
        torch.testing.assert_close(*results, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


def test_windows_are_those_of_unfold(monkeypatch):
    """Through a transformer layer, outputs and gradients; -1 stands for the zeros around the grid."""
    monkeypatch.setitem(rows_module._ROWS, "cpu", 3)
    layer, x = nn.TransformerLayer(4 * 9, att_dim=8, n_heads=2), torch.randn(12, 4, requires_grad=True)
    numbers = torch.arange(1.0, 13).view(1, 1, 3, 4)
    index = tnn.functional.unfold(numbers, 3, padding=1)[0].t().long() - 1
    assert (index == -1).any()
    windows = rows_module.Windows(x, index)
    assert windows.shape == (12, 36)
    dense = tnn.functional.unfold(x.t().view(1, 4, 3, 4), 3, padding=1)[0].t()
    results = []
    for rows in (windows, dense):
        y = layer.forward_packed(rows, Segments.from_sizes((12,)))
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *layer.parameters()))))
    torch.testing.assert_close(*results)


def test_classes_stand_where_torchmil_has_them():
    import importlib

    for path in (
        "attention",
        "attention.irpe_multihead_self_attention",
        "attention.multihead_cross_attention",
        "attention.multihead_self_attention",
        "attention.nystrom_attention",
        "transformers",
        "transformers.conventional_transformer",
        "transformers.encoder",
        "transformers.irpe_transformer",
        "transformers.layer",
        "transformers.nystrom_transformer",
        "transformers.sm_transformer",
        "transformers.t2t",
    ):
        theirs = pytest.importorskip(f"torchmil.nn.{path}")
        ours = importlib.import_module(f"bigbag.nn.{path}")
        exported = theirs.__name__ if hasattr(theirs, "__path__") else f"{theirs.__name__}."  # not what a file imports
        classes = {
            name
            for name, value in vars(theirs).items()
            if isinstance(value, type) and exported in f"{value.__module__}."
        }
        assert classes and not {name for name in classes if not hasattr(ours, name)}


def test_recomputing_does_not_attend_again():
    from bigbag.kernels.cpu import masked_attention

    encoder, segments = nn.TransformerEncoder(8, att_dim=8, n_heads=2, n_layers=2), Segments.from_sizes([5, 9])
    x, gradients = torch.randn(14, 8), []
    for encoder.recompute in (False, True):
        encoder.zero_grad()
        with mock.patch.object(masked_attention, "forward", wraps=masked_attention.forward) as forward:
            encoder.forward_packed(x, segments).square().sum().backward()
        assert forward.call_count == 2
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
