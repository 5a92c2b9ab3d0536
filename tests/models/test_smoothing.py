"""The smoothing family against torchmil: exactly, or where it draws, in the mean."""

import numpy as np
import pytest
import torch

from bigbag import PackedBags
from bigbag.graphs import build_adjacency
from bigbag.memory import peak_bytes
from bigbag.models import MODELS, ProbSmoothABMIL, SmABMIL, SmoothABMIL
from bigbag.nn.survival import CoxLoss, cox_loss

WIDTH = 6


def adjacency(size: int, normalize: str = "symmetric") -> torch.Tensor:
    """(1, size, size) dense, of a lattice four wide joined to its 8 neighbours."""
    coords = np.stack(np.divmod(np.arange(size), 4), 1)
    return build_adjacency(coords, radius=1.5, normalize=normalize).to_coo().to_dense()[None]


def padded(X: list[torch.Tensor], adj: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bags (1, size, width), their mask and adjacencies, padded to the longest."""
    longest = max(x.shape[1] for x in X)
    short = [longest - x.shape[1] for x in X]
    mask = torch.stack([torch.arange(longest) < x.shape[1] for x in X]).float()
    x = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, n)) for x, n in zip(X, short)])
    return x, mask, torch.cat([torch.nn.functional.pad(a, (0, n, 0, n)) for a, n in zip(adj, short)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("where", ["early", "mid", "late", "none"])
@pytest.mark.parametrize("mode", ["approx", "exact"])
def test_sm_abmil_equals_torchmil(mode, where, sparse):
    theirs_class = pytest.importorskip("torchmil.models").SmABMIL
    settings = {"in_shape": (WIDTH,), "att_dim": 4, "sm_mode": mode, "sm_where": where, "sm_alpha": 0.8}
    theirs, ours = theirs_class(**settings).eval(), SmABMIL(**settings).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in (1, 13):
        X, Y, dense = torch.randn(1, size, WIDTH), torch.ones(1), adjacency(size)
        adj = dense.to_sparse() if sparse else dense
        torch.testing.assert_close(ours.predict(X, adj), theirs.predict(X, dense), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(X, adj), theirs(X, dense), rtol=1e-4, atol=1e-5)
        expected, losses = (m.compute_loss(Y, X, dense)[1] for m in (theirs, ours))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_sm_abmil_needs_a_shape_and_a_graph():
    with pytest.raises(ValueError, match="needs in_shape"):
        SmABMIL(in_shape=None)
    with pytest.raises(ValueError, match="needs adj"):
        SmABMIL((WIDTH,))(torch.randn(1, 3, WIDTH))


@pytest.mark.parametrize("sparse", [False, True])
def test_smooth_abmil_equals_torchmil(sparse):
    theirs_class = pytest.importorskip("torchmil.models").SmoothABMIL
    theirs, ours = theirs_class((WIDTH,), 4).eval(), SmoothABMIL((WIDTH,), 4).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in (1, 13):
        X, Y, dense = torch.randn(1, size, WIDTH), torch.ones(1), adjacency(size)
        adj = dense.to_sparse() if sparse else dense
        expected, found = (m.compute_loss(Y, X, adj) for m in (theirs, ours))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.predict(X), theirs.predict(X), rtol=1e-5, atol=1e-5)


def random_pair(name: str, **settings):
    """torchmil's model with weights that make its draws spread, and ours with the same."""
    models = pytest.importorskip("torchmil.models")
    torch.manual_seed(0)
    theirs, ours = (cls(in_shape=(WIDTH,), **settings).eval() for cls in (getattr(models, name), MODELS[name]))
    for parameter in theirs.pool.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


PROBABILISTIC = [
    ("ProbSmoothABMIL", {"att_dim": 4}),
    ("TransformerProbSmoothABMIL", {"pool_att_dim": 4, "transf_att_dim": WIDTH, "transf_n_heads": 2}),
]


@pytest.mark.parametrize("name, settings", PROBABILISTIC)
def test_probabilistic_models_agree_with_torchmil_in_the_mean(name, settings):
    """Logits, scores and losses lie within 5 standard errors of torchmil's 5,000 draws; the KL term is equal."""
    theirs, ours = random_pair(name, **settings)
    X, Y, adj = torch.randn(1, 13, WIDTH), torch.ones(1), adjacency(13)
    with torch.no_grad():
        samples, f = theirs(X, adj, return_att=True, return_samples=True)
        logits, scores = ours(X, adj, return_att=True)
    error = samples.std() / samples.shape[1] ** 0.5
    assert float(error) > 1e-4 and abs(float(logits - samples.mean())) < 5 * float(error)
    assert bool(((scores - f.mean(2)).abs() < 5 * f.std(2) / f.shape[2] ** 0.5).all())
    # With gradients the exact mean goes through autograd, not through the kernel.
    torch.testing.assert_close(ours.predict(X)[0], logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours.predict(X)[0], logits, rtol=0, atol=0)
        (_, expected), (mean, losses) = (m.compute_loss(Y, X, adj) for m in (theirs, ours))
    assert list(losses) == list(expected) == ["BCEWithLogitsLoss", "KLDiv"]
    torch.testing.assert_close(losses["KLDiv"], expected["KLDiv"], rtol=1e-4, atol=1e-5)
    spread = torch.nn.functional.softplus(-samples).std() / samples.shape[1] ** 0.5
    assert abs(float(losses["BCEWithLogitsLoss"] - expected["BCEWithLogitsLoss"])) < 7 * float(spread)
    assert abs(float(mean - logits)) < 5 * float(error)
    torch.testing.assert_close(ours.compute_loss(Y, X, adj)[1], losses, rtol=0, atol=0)


@pytest.mark.parametrize("name, settings", PROBABILISTIC)
def test_samples_where_they_are_asked_for(name, settings):
    model = MODELS[name]((WIDTH,), n_samples_train=3, n_samples_test=7, **settings)
    X, adj, mask = torch.randn(2, 5, WIDTH), torch.cat([adjacency(5)] * 2), torch.ones(2, 5)
    mask[1, 3:] = 0
    logits, f, kl_div = model(X, adj, mask, return_att=True, return_samples=True, return_kl_div=True)
    assert logits.shape == (2, 3) and f.shape == (2, 5, 3) and kl_div.shape == ()
    assert bool((f[1, 3:] == 0).all()) and not torch.equal(logits, model(X, adj, mask, return_samples=True))
    logits, f = model.eval().predict(X, mask, return_samples=True)
    assert logits.shape == (2, 7) and f.shape == (2, 5, 7)
    assert model.predict(X, mask, return_inst_pred=False).shape == (2,)
    with pytest.raises(ValueError, match="needs adj"):
        model.compute_loss(torch.ones(2), X, None, mask)


@pytest.mark.parametrize("name", ["ProbSmoothABMIL", "TransformerProbSmoothABMIL"])
def test_the_loss_of_a_bag_in_eval_does_not_depend_on_its_pack(name):
    model, sizes = MODELS[name]((WIDTH,)).eval(), (5, 9, 12)
    X, Y = [torch.randn(1, size, WIDTH) for size in sizes], torch.tensor([1.0, 0.0, 1.0])
    adj = [adjacency(size) for size in sizes]
    packs = [PackedBags.from_padded(x, adj=a) for x, a in zip(X, adj)]
    alone = [model.compute_loss(Y[b : b + 1], pack)[1]["BCEWithLogitsLoss"] for b, pack in enumerate(packs)]
    whole = PackedBags.from_padded(*padded(X, adj))
    torch.testing.assert_close(model.compute_loss(Y, whole)[1]["BCEWithLogitsLoss"], torch.stack(alone).mean())


def test_classifier_and_pooling_commute():
    """The logits of the draws are the classifier's of the pooled features."""
    model = ProbSmoothABMIL((WIDTH,), 4, n_samples_train=6, out_dim=3)
    pack = PackedBags.from_padded(torch.randn(2, 9, WIDTH))
    torch.manual_seed(3)
    logits, f = model(pack, return_att=True, return_samples=True)
    z = torch.einsum("bns,bnd->bsd", f.view(2, 9, 6).softmax(1), pack.x.view(2, 9, WIDTH))
    torch.testing.assert_close(logits, model.classifier(z), rtol=1e-5, atol=1e-5)


def test_each_draw_has_a_risk_set_of_its_own():
    model = ProbSmoothABMIL((WIDTH,), 4, n_samples_train=6, criterion=CoxLoss())
    X, Y = torch.randn(5, 9, WIDTH), torch.tensor([[2.0, 1], [1, 1], [3, 0], [1, 1], [5, 1]])
    adj = adjacency(9).expand(5, 9, 9)
    torch.manual_seed(3)
    loss = model.compute_loss(Y, X, adj)[1]["CoxLoss"]
    torch.manual_seed(3)
    draws = model(X, adj, return_samples=True)
    expected = torch.stack([cox_loss(draws[:, s], Y[:, 0], Y[:, 1]) for s in range(6)]).mean()
    torch.testing.assert_close(loss, expected.to(loss))


@pytest.mark.parametrize("mode", ["approx", "exact"])
def test_sm_transformer_abmil_equals_torchmil(mode):
    theirs_class = pytest.importorskip("torchmil.models").SmTransformerABMIL
    settings = {"pool_att_dim": 4, "transf_att_dim": WIDTH, "transf_n_heads": 2, "transf_n_layers": 2}
    settings |= {"transf_sm_mode": mode, "pool_sm_mode": mode}
    theirs, ours = theirs_class((WIDTH,), **settings).eval(), MODELS["SmTransformerABMIL"]((WIDTH,), **settings).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in (1, 13):
        X, Y, adj = torch.randn(1, size, WIDTH), torch.ones(1), adjacency(size)
        torch.testing.assert_close(ours.predict(X, adj), theirs.predict(X, adj), rtol=1e-4, atol=1e-5)
        expected, losses = (m.compute_loss(Y, X, adj)[1] for m in (theirs, ours))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, settings",
    [("SmABMIL", {"att_dim": 8}), ("SmABMIL", {"att_dim": 8, "sm_mode": "exact"}), ("SmoothABMIL", {"att_dim": 4})],
)
def test_a_step_holds_nothing_of_the_size_of_the_features(name, settings):
    """Nor a copy of a batch without padding: all tensors of a step together are smaller than the bag."""
    model = MODELS[name](in_shape=(1024,), **settings)
    X, mask, Y, adj = torch.randn(1, 1500, 1024), torch.ones(1, 1500), torch.ones(1), adjacency(1500).to_sparse()

    def step():
        sum(model.compute_loss(Y, X, adj, mask)[1].values()).backward()

    peak = peak_bytes(step)
    assert 0 < peak < X.nbytes / 2
