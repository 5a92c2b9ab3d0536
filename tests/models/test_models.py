"""What every model must hold; a new model in ``MODELS`` is picked up by itself."""

import numpy as np
import pytest
import torch

from bigbag import Bag, PackedBags, load_model
from bigbag.config import ConfigError, ModelConfig, TaskConfig
from bigbag.graphs import build_adjacency, permute
from bigbag.models import MODELS, MILModel, MILModelWrapper, build_model, save_model
from bigbag.nn import AttentionPool
from bigbag.nn import rows as rows_module

WIDTH = 6
SIZES = (5, 1, 9)
SMALL: dict = {
    "CAMIL": {"nystrom_att_dim": 8, "n_heads": 2, "n_landmarks": 4},
    "LongNetMIL": {"att_dim": 8, "n_heads": 2, "segment_lengths": [4, 8], "dilations": [1, 2], "pool_att_dim": 4},
    "GTP": {"att_dim": 8, "n_clusters": 3, "n_heads": 2},
    "SETMIL": {"att_dim": 8, "set_n_heads": 2, "set_n_layers": 2},
    "TransMIL": {"att_dim": 8, "n_heads": 2, "n_landmarks": 4},
    "ProbSmoothABMIL": {"att_dim": 4, "n_samples_train": 50},
    "SmoothABMIL": {"att_dim": 4},
    "TransformerProbSmoothABMIL": {
        "transf_att_dim": 6,
        "transf_n_heads": 2,
        "pool_att_dim": 4,
        "n_samples_train": 50,
    },
    "SmTransformerABMIL": {"transf_att_dim": 6, "transf_n_heads": 2, "pool_att_dim": 4},
    "TransformerABMIL": {"transf_att_dim": 6, "transf_n_heads": 2, "pool_att_dim": 4},
    "IIBMIL": {"att_dim": 4, "n_heads": 2},
    "VAEABMIL": {"feat_ext": {"name": "VariationalAutoEncoderMIL", "layer_sizes": [8, 4]}},
}
"""Model -> arguments that keep it small enough for these tests."""
DRAWS = {"VAEABMIL", "ProbSmoothABMIL", "TransformerProbSmoothABMIL"}
"""Models whose training draws numbers for every instance: no two training passes agree."""
UNTRAINED = {
    "GTP": "transformer_encoder.layers.0.in_proj.weight",
    "SETMIL": "se_transf.layers.1.att_module.rpe_k",
}
"""Parameters without a gradient: GTP's class token starts as zeros; SETMIL's has no place, so its relative positions
to all are the same."""
ORDERED = {"CAMIL", "TransMIL"}
"""Models of which the order of the instances is a part: landmarks of neighbouring rows, bags laid out as squares."""
BOUNDED = {"VAEABMIL", "ProbSmoothABMIL", "TransformerProbSmoothABMIL"}
"""Models whose loss holds an entropy, of the features or of the attention, which no training removes."""
VARIANTS = [(name, SMALL.get(name, {})) for name in MODELS] + [
    ("ABMIL", {"gated": True, "att_act": "relu"}),
    ("ABMIL", {"feat_ext": {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]}}),
    ("DTFDMIL", {"distill_mode": "max", "n_groups": 2}),
    ("DTFDMIL", {"distill_mode": "afs", "feat_ext": {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]}}),
    (
        "ProbSmoothABMIL",
        {"covar_mode": "zero", "feat_ext": {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]}},
    ),
    ("LongNetMIL", {"att_dim": 4, "n_heads": 1, "segment_lengths": [4], "dilations": [1], "pool": "mean"}),
    (
        "DeepGraphSurv",
        {"n_layers_rep": 2, "n_layers_att": 2, "hidden_dim": 8, "att_dim": 4, "compute_lambda_max": True},
    ),
    ("PatchGCN", {"n_gcn_layers": 5, "mlp_depth": 2, "hidden_dim": 4}),
    (
        "GTP",
        {
            "att_dim": 6,
            "n_clusters": 3,
            "n_heads": 2,
            "n_layers": 2,
            "use_mlp": False,
            "feat_ext": {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]},
        },
    ),
    ("SETMIL", {"att_dim": 4, "set_n_heads": 2, "set_n_layers": 2, "use_pmf": True, "rpe_method": "cross"}),
    (
        "SmTransformerABMIL",
        {"transf_n_heads": 3, "transf_att_dim": 6, "transf_n_layers": 2, "transf_sm_mode": "exact", "pool_att_dim": 4},
    ),
    ("SmABMIL", {"sm_where": "mid", "att_act": "gelu"}),
    ("SmABMIL", {"sm_where": "late", "sm_mode": "exact"}),
    ("SmABMIL", {"sm_mode": "exact", "feat_ext": {"name": "MLP", "linear_sizes": [7], "activations": ["relu"]}}),
]
IDS = [f"{name}-{'-'.join(arguments) or 'default'}" for name, arguments in VARIANTS]
each_model = pytest.mark.parametrize("name, arguments", VARIANTS, ids=IDS)


def build(name, arguments, task=None, **kwargs):
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **arguments, **kwargs), (WIDTH,), task or TaskConfig())


def make_bag(size: int, label: int, seed: int) -> Bag:
    """Random features on a lattice three wide, joined to their 8 neighbours."""
    x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(seed))
    coords = np.stack(np.divmod(np.arange(size), 3), 1)
    adj = build_adjacency(coords, radius=1.5, normalize="symmetric")
    return Bag(x, label, f"bag{seed}", coords=coords, adj=adj)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """So that three rows are kept in one go, and what has more is computed again in chunks, a bag in two of them."""
    monkeypatch.setitem(rows_module._ROWS, "cpu", 6)


def make_pack(sizes=SIZES, labels=(1, 0, 1)) -> PackedBags:
    return PackedBags.from_bags([make_bag(n, y, i) for i, (n, y) in enumerate(zip(sizes, labels))])


def padded(model, pack: PackedBags, fill: float = 99.0) -> dict:
    """The arguments of ``model.forward`` for the padded batch of ``pack``."""
    arguments = {"X": pack.to_padded(pack.x, fill), "mask": pack.mask().to(torch.uint8)}
    if "adj" in model.needs:
        dense, size = pack.adj.to_coo().to_dense(), max(pack.sizes)
        blocks = [dense[s:e, s:e] for s, e in zip(pack.segments.starts, pack.segments.starts[1:])]
        pads = [torch.nn.functional.pad(block, (0, size - len(block)) * 2) for block in blocks]
        arguments["adj"] = torch.stack(pads).to_sparse()
    if "coords" in model.needs:
        arguments["coords"] = pack.to_padded(pack.coords, 0)
    return arguments


def reordered(bag: Bag, order: torch.Tensor) -> Bag:
    return Bag(bag.x[order], bag.y, bag.key, coords=bag.coords[order], adj=permute(bag.adj, order))


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_packed_alone_and_padded_agree(name, arguments, training):
    if training and name in DRAWS:
        pytest.skip("draws numbers in training")
    model, pack = build(name, arguments).train(training), make_pack()

    def run(*args, **kwargs):
        torch.manual_seed(1)  # the same pseudo-bags of DTFDMIL
        return model(*args, **kwargs)

    logits, scores = run(pack, return_att=True)
    assert logits.shape == (3,) and scores.shape == (sum(SIZES),)
    padded_logits, padded_scores = run(**padded(model, pack), return_att=True)
    torch.testing.assert_close(padded_logits, logits)
    assert padded_scores.squeeze(-1).shape == (3, max(SIZES))  # DSMIL's attention is torchmil's (B, N, 1)
    torch.testing.assert_close(padded_scores[pack.mask()].reshape(-1), scores)
    for i, size in enumerate(SIZES):
        alone = PackedBags.from_bags([make_bag(size, 0, i)])
        torch.testing.assert_close(run(alone), logits[i : i + 1])


@each_model
def test_inference_mode(name, arguments):
    model, pack = build(name, arguments).eval(), make_pack()
    with torch.inference_mode():
        found = model(**padded(model, make_pack()))
    torch.testing.assert_close(found, model(pack))


@each_model
def test_order_of_instances_does_not_matter(name, arguments):
    if name in ORDERED:
        pytest.skip("the order of the instances is part of the model")
    model, bag = build(name, arguments).eval(), make_bag(12, 1, 5)
    order = torch.randperm(12)
    logits, scores = model(PackedBags.from_bags([bag]), return_att=True)
    permuted_logits, permuted_scores = model(PackedBags.from_bags([reordered(bag, order)]), return_att=True)
    torch.testing.assert_close(permuted_logits, logits)
    torch.testing.assert_close(permuted_scores, scores[order])


@each_model
def test_every_parameter_gets_a_gradient(name, arguments):
    model, pack = build(name, arguments), make_pack()
    logits, losses = model.compute_loss(pack.y, pack)
    sum(losses.values()).backward()
    untrained = UNTRAINED.get(name, "none")
    trained = [p for key, p in model.named_parameters() if p.requires_grad and not key.startswith(untrained)]
    assert logits.shape == (3,) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@each_model
def test_second_derivatives_are_right_or_refused(name, arguments):
    model = build(name, arguments).double().eval()
    inputs = padded(model, make_pack(), 0.0)
    x = inputs.pop("X").double().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def gradient(x, **kwargs):
        return torch.autograd.grad(model(x, **inputs).sum(), x, **kwargs)[0]

    x.grad = torch.zeros_like(x)
    try:
        (gradient(x, create_graph=True) * direction).sum().backward()
    except RuntimeError as error:
        assert "gradients have no gradients" in str(error)
        return
    ahead, behind = (gradient(x.detach().add(direction, alpha=step).requires_grad_()) for step in (1e-5, -1e-5))
    torch.testing.assert_close(x.grad, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)


@each_model
def test_checkpointing_changes_memory_only(name, arguments):
    gradients = []
    for on in (False, True):
        model, pack = build(name, arguments), make_pack()
        model.activation_checkpointing = on
        sum(model.compute_loss(pack.y, pack)[1].values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@each_model
def test_twenty_steps_lower_the_loss(name, arguments):
    model, pack = build(name, arguments), make_pack()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    history = []
    for _ in range(20):
        loss = sum(model.compute_loss(pack.y, pack)[1].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < (0.95 if name in BOUNDED else 0.5) * history[0]


@each_model
def test_bf16_is_close_to_fp32(name, arguments):
    model, pack = build(name, arguments).eval(), make_pack()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(pack)
    torch.testing.assert_close(low.float(), model(pack), atol=0.05, rtol=0.05)


@each_model
def test_features_stored_in_fp16_are_widened_exactly(name, arguments):
    model, pack = build(name, arguments).eval(), make_pack()
    half = pack.with_x(pack.x.half())
    torch.testing.assert_close(model(half), model(pack.with_x(half.x.float())), atol=2e-3, rtol=2e-3)


@each_model
@pytest.mark.parametrize("task, outputs", [("multiclass", 3), ("multilabel", 2), ("regression", 1), ("regression", 2)])
def test_other_tasks(name, arguments, task, outputs):
    model, pack = build(name, arguments, TaskConfig(type=task, num_outputs=outputs)), make_pack()
    labels = torch.tensor([2, 0, 1]) if task == "multiclass" else torch.rand(3, outputs).squeeze(-1)
    logits, losses = model.compute_loss(labels, pack)
    assert logits.shape == ((3, outputs) if outputs > 1 else (3,))
    assert torch.isfinite(sum(losses.values()))


@each_model
def test_saved_model_loads_anywhere(name, arguments, tmp_path):
    model, pack = build(name, arguments).eval(), make_pack()
    save_model(tmp_path, model.state_dict(), ModelConfig(name=name, **arguments), (WIDTH,), TaskConfig())
    loaded = load_model(str(tmp_path))
    assert not loaded.training
    torch.testing.assert_close(loaded(pack), model(pack), rtol=0, atol=0)


@each_model
def test_empty_bag_in_a_batch_is_finite(name, arguments):
    model = build(name, arguments)
    logits = model(PackedBags.from_bags([make_bag(2, 1, 0), make_bag(0, 0, 1)]))
    logits.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(logits).all() and all(torch.isfinite(grad).all() for grad in gradients)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("att_act", ["tanh", "relu", "gelu"])
def test_abmil_equals_torchmil(gated, att_act):
    theirs_class = pytest.importorskip("torchmil.models").ABMIL
    from bigbag.models import ABMIL

    arguments = {"in_shape": (WIDTH,), "att_dim": 4, "gated": gated, "att_act": att_act}
    theirs, ours = theirs_class(**arguments).eval(), ABMIL(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    X, Y = torch.randn(3, 7, WIDTH), torch.tensor([1, 0, 1])
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6], dtype=torch.uint8)
    (expected, expected_f), (logits, f) = (m(X, mask, return_att=True) for m in (theirs, ours))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(f[mask == 1], expected_f[mask == 1])
    expected_loss, loss = (m.compute_loss(Y, X, mask)[1] for m in (theirs, ours))
    torch.testing.assert_close(loss, expected_loss)


def test_lazy_input_width():
    from bigbag.models import ABMIL

    model = ABMIL(gated=True)
    assert model(torch.randn(2, 3, 11)).shape == (2,)
    assert model.pool.fc_gated.module.weight.shape == (128, 11)


def test_errors_name_the_setting():
    def message(**settings):
        with pytest.raises(ConfigError) as caught:
            build_model(ModelConfig(**settings), (WIDTH,), TaskConfig())
        return str(caught.value)

    assert "known models: ABMIL" in message(name="ABMill")
    assert "did you mean 'att_dim'" in message(name="ABMIL", att_dims=3)
    assert "unknown setting 'criterion'" in message(name="ABMIL", criterion="x")
    assert "(7,)" in message(name="ABMIL", in_shape=[7])
    assert "not a class of bigbag.nn" in message(name="ABMIL", feat_ext={"name": "Nope"})
    assert "expected {name" in message(name="ABMIL", feat_ext="MLP")
    assert "must be 'tanh'" in message(name="ABMIL", att_act="swish")


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints/best"):
        load_model(str(tmp_path))


def test_a_users_own_model_without_a_criterion_has_no_losses():
    """As torchmil's base class; its wrapper passes the mask on."""

    def own(base, pool):
        class Own(base):
            def __init__(self):
                super().__init__()
                self.pool, self.classifier = pool(WIDTH, att_dim=4), torch.nn.Linear(WIDTH, 1)

            def forward(self, X, mask=None):
                return self.classifier(self.pool(X, mask)).squeeze(-1)

        return Own()

    theirs_models, theirs_nn = pytest.importorskip("torchmil.models"), pytest.importorskip("torchmil.nn")
    theirs, ours = own(theirs_models.MILModel, theirs_nn.AttentionPool), own(MILModel, AttentionPool)
    ours.load_state_dict(theirs.state_dict())
    X, Y, mask = torch.randn(2, 5, WIDTH), torch.ones(2), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    expected, nothing = theirs.compute_loss(Y, X, mask)
    found, losses = ours.compute_loss(Y, X, mask)
    torch.testing.assert_close(found, expected)
    assert losses == nothing == {}
    torch.testing.assert_close(MILModelWrapper(ours).compute_loss({"X": X, "Y": Y, "mask": mask})[0], expected)
