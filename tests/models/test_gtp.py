"""GTP: torchmil's numbers where it is right, the paper's GraphCAM on dense matrices, chunks and memory."""

import pytest
import torch

from bigbag import Bag, PackedBags
from bigbag.graphs import build_adjacency
from bigbag.memory import peak_bytes
from bigbag.models import GTP, gtp
from bigbag.nn.relprop import TransformerEncoder

WIDTH = 12
VARIANTS = [
    {"att_dim": 16},
    {"att_dim": 8, "n_layers": 2},
    {"att_dim": WIDTH, "n_layers": 3},
    {"att_dim": 8, "n_layers": 2, "use_mlp": False},
]


def model_of(**arguments):
    torch.manual_seed(0)
    model = GTP(in_shape=(WIDTH,), n_heads=4, n_clusters=5, **arguments)
    torch.nn.init.normal_(model.cls_token)
    return model


def make_pack(*sizes: int, width: int = WIDTH) -> PackedBags:
    bags = []
    for seed, size in enumerate(sizes):
        coords = torch.stack([torch.arange(size) // 4, torch.arange(size) % 4], 1).numpy()
        adj = build_adjacency(coords, radius=1.5, normalize="symmetric")
        x = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        bags.append(Bag(x, seed % 2, f"bag{seed}", coords=coords, adj=adj))
    return PackedBags.from_bags(bags)


@pytest.mark.parametrize("arguments", VARIANTS)
def test_equals_torchmil(arguments):
    theirs_class = pytest.importorskip("torchmil.models").GTP
    ours = model_of(**arguments)
    theirs = theirs_class(in_shape=(WIDTH,), n_heads=4, n_clusters=5, **arguments)
    theirs.load_state_dict(ours.state_dict())
    X, A = torch.randn(3, 10, WIDTH), (torch.rand(3, 10, 10) < 0.4).float()
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [0, 1] * 5], dtype=torch.uint8)
    A = A * mask[:, :, None] * mask[:, None, :]
    Y = torch.tensor([1, 0, 1])
    for ours_in, theirs_in in [((X, A), (X, A)), ((X, A.to_sparse(), mask), (X, A, mask))]:
        (logits, losses), (expected, expected_losses) = (
            model.compute_loss(Y, *batch) for model, batch in ((ours, ours_in), (theirs, theirs_in))
        )
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(losses, expected_losses)
        sum(losses.values()).backward()
        sum(expected_losses.values()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    torch.testing.assert_close({n: p.grad for n, p in ours.named_parameters() if n in gradients}, gradients)


def test_returns_are_torchmils():
    model, pack = model_of().eval(), make_pack(6, 3)
    X, adj = pack.to_padded(pack.x), torch.zeros(2, 6, 6)
    assert model(X, adj).shape == (2,)
    logits, cam, losses = model(X, adj, pack.mask(), return_cam=True, return_loss=True)
    assert cam.shape == (2, 6) and (cam[1, 3:] == 0).all() and set(losses) == {"MinCutLoss", "OrthoLoss"}
    assert model.predict(X, adj, pack.mask(), return_inst_pred=False).shape == logits.shape == (2,)


def rule(function, R, *inputs, alpha_beta=False):
    """Relevance by autograd: ``x * d/dx <f(x), R / f(x)>`` (arXiv 2012.09838, equation 3)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.where(out == 0, 0, R / out).detach())
    return [x.detach() * grad for x, grad in zip(inputs, grads)]


def linear_rule(weight, R, x):
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    return sum(rule(lambda p, n: p @ up.T + n @ down.T, R, positive, negative))


def sum_rule(R, a, b):
    R_a, R_b = rule(torch.add, R, a, b)
    norm = R_a.sum().abs() + R_b.sum().abs()
    return [part * part.sum().abs() / norm * R.sum() / part.sum() for part in (R_a, R_b)]


def graph_cam(encoder, classifier, tokens, output):
    """Class map of one bag ``(n, D)``, step by step with one head at a time."""
    heads, steps, x = encoder.layers[0].att_module.n_heads, [], tokens.detach().requires_grad_()
    for layer in encoder.layers:
        normed = layer.norm1(x)
        q, k, v = layer.att_module.qkv_nn(normed).chunk(3, 1)
        parts = [tuple(t.chunk(heads, 1)[h] for t in (q, k, v)) for h in range(heads)]
        atts = [(a @ b.T / a.shape[1] ** 0.5).softmax(1) for a, b, _ in parts]
        mixed = torch.cat([att @ c for att, (_, _, c) in zip(atts, parts)], 1)
        skip = layer.in_proj(x)
        z = skip + mixed
        inner = layer.norm2(z)
        hidden = torch.relu(layer.mlp_module[0](inner))
        update = layer.mlp_module[3](hidden)
        steps.append((layer, x, normed, parts, atts, mixed, skip, z, inner, hidden, update))
        x = layer.out_proj(z + update)
    first = encoder.norm(x)[0]
    slopes = torch.autograd.grad(classifier(first)[output], [att for step in steps for att in step[4]])
    slopes = [slopes[i : i + heads] for i in range(0, len(slopes), heads)]
    R = torch.zeros_like(x)
    R[0] = linear_rule(classifier.weight, torch.eye(classifier.out_features, dtype=x.dtype)[output], first)
    joint = torch.eye(len(x), dtype=x.dtype)
    for (layer, x, normed, parts, atts, mixed, skip, z, inner, hidden, update), slope in zip(steps[::-1], slopes[::-1]):
        if isinstance(layer.out_proj, torch.nn.Linear):
            R = linear_rule(layer.out_proj.weight, R, z + update)
        R, R_mlp = sum_rule(R, z, update)
        R_mlp = linear_rule(layer.mlp_module[3].weight, R_mlp, hidden)
        R_skip, R_mixed = sum_rule(R + linear_rule(layer.mlp_module[0].weight, R_mlp, inner), skip, mixed)
        R_q, R_k, R_v, R_att = [], [], [], []
        for h, (q, k, v) in enumerate(parts):
            att_h, v_h = (part / 2 for part in rule(torch.matmul, R_mixed.chunk(heads, 1)[h], atts[h], v))
            q_h, k_h = (part / 2 for part in rule(lambda a, b: a @ b.T, att_h, q, k))
            for parts_of, part in zip((R_q, R_k, R_v, R_att), (q_h, k_h, v_h, att_h)):
                parts_of.append(part)
        joint = joint @ (
            torch.eye(len(x), dtype=x.dtype) + sum((s * r).clamp(min=0) for s, r in zip(slope, R_att)) / heads
        )
        R = linear_rule(layer.att_module.qkv_nn.weight, torch.cat([*R_q, *R_k, *R_v], 1), normed)
        R = R + (linear_rule(layer.in_proj.weight, R_skip, x) if isinstance(layer.in_proj, torch.nn.Linear) else R_skip)
    return joint[0, 1:]


@pytest.mark.parametrize("arguments", [v for v in VARIANTS if v.get("use_mlp", True)])
def test_instance_scores_are_the_papers_graph_cam(arguments):
    model, pack = model_of(out_dim=2, **arguments).double().eval(), make_pack(7, 9)
    pack = pack.with_x(pack.x.double())
    logits, cam = model.predict(pack)
    clusters, s = [], []
    for i, j in zip(pack.segments.starts, pack.segments.starts[1:]):
        dense = pack.adj.to_coo().to_dense()[i:j, i:j].double()
        h = torch.relu(model.gcn_conv.fc(dense @ pack.x[i:j] + pack.x[i:j]))
        s.append(model.cluster_proj(h).softmax(1))
        clusters.append(s[-1].T @ h)
    for b, (part, features) in enumerate(zip(s, clusters)):
        tokens = torch.cat([model.cls_token[0], features])
        expected = part @ graph_cam(model.transformer_encoder, model.classifier, tokens, int(logits[b].argmax()))
        torch.testing.assert_close(cam[sum(pack.sizes[:b]) :][: pack.sizes[b]], expected.detach(), rtol=1e-5, atol=1e-9)
    assert cam.min() >= 0 and cam.max() > 0 and not cam.requires_grad


@pytest.mark.parametrize("use_mlp", [True, False])
def test_relevance_rules_are_torchmils(use_mlp):
    theirs_class = pytest.importorskip("torchmil.nn.relprop").TransformerEncoder
    torch.manual_seed(0)
    # Wide enough that every row has a positive product, without which relevance is lost.
    ours = TransformerEncoder(48, 40, att_dim=32, n_heads=2, n_layers=1, use_mlp=use_mlp).double()
    theirs = theirs_class(48, 40, att_dim=32, n_heads=2, n_layers=1, use_mlp=use_mlp).double()
    theirs.load_state_dict(ours.state_dict())
    x, R = torch.randn(1, 4, 48).double(), torch.randn(1, 4, 40).double()
    torch.testing.assert_close(theirs(x), ours(x))
    _, expected = theirs.relprop(R, return_att_relevance=True, alpha=1)
    layer = ours.layers[0]
    R_in, R_att = layer.relprop(layer.trace(x), R)
    # The authors halve the relevance of each factor of a product; torchmil doesn't, and adds 1e-9 to entries it divides
    # by when it joins two branches.
    torch.testing.assert_close(2 * R_att, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(R_in.sum(), R.sum())


def test_scores_need_no_gradients_and_draw_nothing():
    model, pack = model_of(dropout=0.5).train(), make_pack(9, 4)
    with torch.no_grad():
        first, second = (model(pack, return_cam=True)[1] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(model.predict(pack)[1], first)
    assert all(p.grad is None for p in model.parameters())


def test_scores_do_not_see_what_the_softmax_does_not():
    model, pack = model_of().eval(), make_pack(9)
    logits, cam = model.predict(pack)
    with torch.no_grad():
        model.cluster_proj.bias += 3
    torch.testing.assert_close(model.predict(pack), (logits, cam), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 7])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_change_nothing(monkeypatch, rows, recompute):
    pack = make_pack(5, 0, 9, 1, 4)
    Y = torch.ones(5)

    def run():
        model = model_of()
        model.activation_checkpointing = recompute
        logits, losses = model.compute_loss(Y, pack)
        sum(losses.values()).backward()
        return logits, losses, model.predict(pack)[1], [p.grad for p in model.parameters()]

    whole = run()
    monkeypatch.setitem(gtp._ROWS, "cpu", rows)
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-5)


def test_memory_is_linear_and_lower_with_checkpointing():
    width = 64

    def peak(size, recompute=False, predict=False):
        model, pack = GTP(in_shape=(width,), att_dim=8, n_clusters=4), make_pack(size, width=width)
        model.activation_checkpointing = recompute

        def train():
            sum(model.compute_loss(torch.ones(1), pack)[1].values()).backward()

        return peak_bytes((lambda: model.predict(pack)) if predict else train)

    small, large = peak(4_000), peak(16_000)
    # Beside chunks: A X + X, H, and a few rows of 4 clusters and 9 edges.
    assert large - small < 12_000 * 4 * (2 * width + 80)
    assert peak(16_000, recompute=True) < 0.75 * large
    assert peak(16_000, predict=True) < large
