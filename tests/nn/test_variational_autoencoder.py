"""Variational autoencoders against torchmil's, and against their densities written with torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from bigbag import nn
from bigbag.memory import peak_bytes

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
MODES = pytest.mark.parametrize("mode", ["single", "diagonal"])


def build(mode, cls=nn.VariationalAutoEncoder, sizes=(8, 3)):
    torch.manual_seed(0)
    return cls((6,), list(sizes), covar_mode=mode)


def normal(mean, log_std):
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)


@MODES
@pytest.mark.parametrize("sizes", [(3,), (8, 3), (8, 5, 3)])
def test_equals_torchmil(mode, sizes):
    theirs = pytest.importorskip("torchmil.nn")
    for name, x in (("VariationalAutoEncoder", X[0]), ("VariationalAutoEncoderMIL", X)):
        ours, other = (build(mode, getattr(package, name), sizes) for package in (nn, theirs))
        other.load_state_dict(ours.state_dict(), strict=True)
        calls = [
            lambda m, x=x: m(x, n_samples=3, return_mean_logstd=True),
            lambda m, x=x: m.compute_loss(x, n_samples=2, reduction="none"),
            lambda m, x=x: m.compute_loss(x, n_samples=2),
            lambda m, x=x: m.compute_loss(x, return_samples=True),
            lambda m, x=x: m.complete_forward_samples(x),
        ]
        for call in calls:
            results = []
            for module in (ours, other):
                torch.manual_seed(1)
                results.append(call(module))
            torch.testing.assert_close(*results)
        flat = x.reshape(-1, 6)
        torch.testing.assert_close(ours.get_raw_output_enc(flat), other.get_raw_output_enc(flat))
        torch.testing.assert_close(ours.get_raw_output_dec(flat[:, :3]), other.get_raw_output_dec(flat[:, :3]))


@MODES
def test_terms_are_those_of_the_densities(mode):
    vae, x = build(mode), X[0]
    torch.manual_seed(2)
    samples, mean, log_std = vae(x, 4, return_mean_logstd=True)
    torch.manual_seed(2)
    losses, same = vae.compute_loss(x, "none", 4, return_samples=True)
    torch.testing.assert_close(same, samples.flatten(0, 1))
    posterior, prior = normal(mean, log_std), normal(torch.zeros(5, 3), torch.zeros(5, 3))
    torch.testing.assert_close(losses["VaeKL"], kl_divergence(posterior, prior))
    likelihoods = torch.stack([normal(*vae.get_raw_output_dec(z)).log_prob(x) for z in samples.unbind(1)])
    torch.testing.assert_close(losses["VaeELL"], -likelihoods.mean(0))
    torch.manual_seed(2)
    evidence = vae.log_marginal_likelihood_importance_sampling(x, 4)
    z = samples.transpose(0, 1)
    weights = likelihoods + prior.log_prob(z) - posterior.log_prob(z)
    torch.testing.assert_close(evidence, weights.logsumexp(0) - torch.tensor(4.0).log())
    total = sum(vae.compute_loss(x, "sum").values())
    total.backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.parameters())


def test_masks():
    vae = build("single", nn.VariationalAutoEncoderMIL)
    padded = torch.where(MASK[..., None] == 1, X, 1e6)
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(0)
        found = vae.compute_loss(padded, MASK, reduction)
        torch.manual_seed(0)
        of_instances = nn.VariationalAutoEncoder.compute_loss(vae, X[MASK == 1], "none")
        for name, loss in found.items():
            first, second = of_instances[name][:5], of_instances[name][5:]
            if reduction == "none":
                torch.testing.assert_close(loss[MASK == 1], of_instances[name])
                assert not loss[MASK == 0].any()
            else:
                bags = [getattr(part, reduction)() for part in (first, second)]
                torch.testing.assert_close(loss, sum(bags) / 2)
    evidence = vae.log_marginal_likelihood_importance_sampling(padded, MASK, 3)
    assert evidence.shape == (2, 5) and not evidence[MASK == 0].any() and torch.isfinite(evidence).all()


def test_samples_stay_with_their_instances():
    vae = build("single", nn.VariationalAutoEncoderMIL)
    with torch.no_grad():
        vae.encoder.net[-1].bias[-1] = -20.0  # hardly any noise
        samples = vae.compute_loss(X, n_samples=4, return_samples=True)[1]
        assert samples.shape == (2, 4, 5, 3)
        mean = vae(X, return_mean_logstd=True)[1]
    torch.testing.assert_close(samples, mean[:, None].expand(-1, 4, -1, -1), atol=1e-3, rtol=0)


@MODES
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_same_in_16_bits_but_for_rounding(mode, recompute):
    """There errors are squared one by one; in float32 and one deviation per instance they are summed up unseen."""
    x, found = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)), []
    for low in (False, True):
        vae = build(mode)
        vae.recompute = recompute
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses = vae.compute_loss(x, n_samples=2)
        sum(losses.values()).backward()
        found.append([*losses.values(), torch.cat([p.grad.flatten() for p in vae.parameters()])])
    for exact, rounded in zip(*found):
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.detach().abs().max()))


def test_errors():
    with pytest.raises(NotImplementedError, match="not valid"):
        nn.VariationalAutoEncoder((6,), covar_mode="full")
    with pytest.raises(ValueError, match="'max'"):
        build("single").compute_loss(X[0], reduction="max")


def test_no_reconstruction_of_the_whole_pack_is_kept():
    vae, x = nn.VariationalAutoEncoder((256,), [32, 8]), torch.randn(20_000, 256)
    peak = peak_bytes(lambda: sum(vae.compute_loss(x).values()).backward())
    assert peak < x.nbytes
