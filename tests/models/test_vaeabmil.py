"""VAEABMIL against torchmil where both draw the same numbers, and what it does without drawing."""

import pytest
import torch

from bigbag import nn
from bigbag.models import VAEABMIL

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
Y = torch.tensor([1.0, 0.0])


def build(**arguments):
    torch.manual_seed(0)
    return VAEABMIL(nn.VariationalAutoEncoderMIL((6,), [8, 3]), (6,), att_dim=4, **arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_torchmil_in_training(reduction):
    models = pytest.importorskip("torchmil.models")
    theirs_nn = pytest.importorskip("torchmil.nn")
    ours = build(vae_loss_reduction=reduction)
    vae = theirs_nn.VariationalAutoEncoderMIL((6,), [8, 3])
    theirs = models.VAEABMIL(vae, (6,), att_dim=4, vae_loss_reduction=reduction)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        results.append([model.compute_loss(Y, X, n_samples=2), model(X, return_att=True, n_samples=3)])
    torch.testing.assert_close(*results)


def test_eval_takes_the_mean_of_the_posterior_unless_samples_are_asked_for():
    model = build().eval()
    logits, f, latent = model(X, MASK, return_att=True, return_latent_repr=True)
    mean = model.feat_ext.get_raw_output_enc(X.flatten(0, 1))[0].view(2, 5, 3)
    torch.testing.assert_close(latent[MASK == 1], mean[MASK == 1])
    expected_z, expected_f = model.pool(mean, MASK, return_att=True)
    torch.testing.assert_close(logits, model.classifier(expected_z).squeeze(-1))
    torch.testing.assert_close(f, expected_f)
    drawn = [model(X, MASK, n_samples=n) for n in (1, 1, 20_000)]
    assert (drawn[0] != drawn[1]).all()
    # Through the attention the mean of the samples is what is pooled: it tends to the posterior's mean.
    torch.testing.assert_close(drawn[2], logits, atol=0.05, rtol=0)


def test_padding_does_not_enter_the_losses():
    model = build().eval()
    loud = torch.where(MASK[..., None] == 1, X, 1e6)
    torch.manual_seed(1)
    losses = model.compute_loss(Y, loud, MASK)[1]
    torch.manual_seed(1)
    clean = model.compute_loss(Y, X, MASK)[1]
    torch.testing.assert_close(losses, clean)
    assert model.log_marginal_likelihood_importance_sampling(loud, MASK, 2).shape == (2, 5)


def test_losses_in_eval_are_those_of_the_bag_alone():
    model = build().eval()
    together = model.compute_loss(Y, X, MASK)[1]
    torch.testing.assert_close(model.compute_loss(Y, X, MASK)[1], together, rtol=0, atol=0)
    alone = [model.compute_loss(Y[b : b + 1], X[b : b + 1], MASK[b : b + 1])[1] for b in range(2)]
    torch.testing.assert_close({name: (alone[0][name] + alone[1][name]) / 2 for name in together}, together)


def test_makes_its_own_autoencoder():
    assert VAEABMIL(in_shape=(6,)).feat_ext.layer_sizes == [128, 64]
    with pytest.raises(ValueError, match="feat_ext"):
        VAEABMIL()
    with pytest.raises(ValueError, match="feat_ext is a Linear, expected a"):
        VAEABMIL(torch.nn.Linear(6, 3), in_shape=(6,))
