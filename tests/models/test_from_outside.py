"""What torch's tools do to a model from outside: hooks, pruning, adapters, forward mode, empty batches."""

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from bigbag.models import ABMIL, CLAM_SB, DSMIL, MODELS
from tests.models.test_models import DRAWS, SMALL, WIDTH, build, make_pack, padded

each_model = pytest.mark.parametrize("name", MODELS)


def small(name: str) -> torch.nn.Module:
    return build(name, SMALL.get(name, {}))


def backward(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    pack = make_pack()
    sum(model.compute_loss(pack.y, pack)[1].values()).backward()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    backward(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@each_model
def test_gradient_hooks_see_the_whole_gradient_once(name):
    """Some layers differentiate chunk by chunk in their backward pass, where a hook must not act as well."""
    model, expected = small(name), gradients(small(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: 2 * grad)
    for _ in range(2):  # the hooks are still there
        model.zero_grad()
        for key, found in gradients(model).items():
            torch.testing.assert_close(found, 2 * expected[key], rtol=1e-4, atol=1e-6, msg=key)


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


@each_model
def test_weights_that_hooks_compute_are_those_of_parametrizations(name):
    losses = []
    for normalise in (parametrizations.weight_norm, torch.nn.utils.weight_norm):
        model, history = small(name), []
        pack = make_pack()
        for layer in linear_layers(model):
            normalise(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(1)
            loss = sum(model.compute_loss(pack.y, pack)[1].values())
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert losses[0].unique().numel() == 3
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ABMIL", "TransformerABMIL", "SmABMIL", "PatchGCN"])
def test_pruned_models_train_as_torchmils(name):
    theirs = getattr(pytest.importorskip("torchmil.models"), name)((WIDTH,), **SMALL.get(name, {}))
    ours, outputs = small(name), []
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        for layer in linear_layers(model):
            prune.l1_unstructured(layer, "weight", amount=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pack = make_pack()
        for _ in range(3):
            optimizer.zero_grad()
            sum(model.compute_loss(pack.y.float(), **padded(ours, pack, 0.0))[1].values()).backward()
            optimizer.step()
        outputs.append(model(**padded(ours, pack, 0.0)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class Adapter(torch.nn.Module):
    """As LoRA does: a layer beside another one, of which it shows the weight."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, torch.nn.Linear(base.in_features, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.added(x)


def test_adapters_act_or_are_refused():
    pack = make_pack()
    model = ABMIL((WIDTH,), att_dim=4)
    model.pool.fc1.module = Adapter(model.pool.fc1.module)
    with pytest.raises(ValueError, match=r"test_from_outside\.Adapter stands for a linear layer that is read"):
        model(pack)
    model = DSMIL((WIDTH,), att_dim=4)
    model.q_nn = Adapter(model.q_nn)
    base, added = model.q_nn.base, model.q_nn.added
    whole = DSMIL((WIDTH,), att_dim=4)
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if "q_nn" not in k}, strict=False)
    with torch.no_grad():
        whole.q_nn.weight.copy_(base.weight + added.weight)
        whole.q_nn.bias.copy_(base.bias + added.bias)
    torch.testing.assert_close(model(pack), whole(pack))


@pytest.mark.parametrize("model", [ABMIL, CLAM_SB, DSMIL], ids=lambda cls: cls.__name__)
def test_derivatives_in_forward_mode(model):
    torch.manual_seed(0)
    model = model((WIDTH,), att_dim=4).double().eval()
    inputs = padded(model, make_pack(), 0.0)
    x, direction = inputs.pop("X").double(), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    _, found = torch.func.jvp(lambda x: model(x, **inputs), (x,), (direction,))
    ahead, behind = (model(x + step * direction, **inputs) for step in (1e-5, -1e-5))
    torch.testing.assert_close(found, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-7)
    assert found.abs().min() > 0


@each_model
def test_derivatives_in_forward_mode_are_never_zeros_in_silence(name):
    if name in DRAWS - {"VAEABMIL"}:
        pytest.skip("its derivative is refused in eval, and random in training")
    model, pack = small(name).eval(), make_pack()
    try:
        # Not along ones, of which layer normalisation leaves nothing.
        direction = torch.linspace(-1, 2, pack.x.numel()).sin().view_as(pack.x)
        _, found = torch.func.jvp(lambda x: model(pack.with_x(x)), (pack.x,), (direction,))
    except (RuntimeError, NotImplementedError) as error:
        assert "autograd.Function" in str(error) or "forward AD" in str(error)
    else:
        assert found.abs().min() > 0


@pytest.mark.parametrize("name", ["ABMIL", "GTP", "IIBMIL", "SmABMIL", "TransformerABMIL"])
def test_a_batch_without_bags_has_no_logits(name):
    model, batch = small(name), padded(small(name), make_pack(), 0.0)
    batch = {key: (value.to_dense() if value.is_sparse else value)[:0] for key, value in batch.items()}
    assert model(**batch).shape == (0,)


@pytest.mark.parametrize("name", ["SmABMIL", "SmoothABMIL", "GTP"])
def test_gradients_to_a_dense_graph_are_torchmils_at_its_edges(name):
    theirs = getattr(pytest.importorskip("torchmil.models"), name)((WIDTH,), **SMALL.get(name, {}))
    ours, found = small(name), []
    ours.load_state_dict(theirs.state_dict())
    batch = {key: value for key, value in padded(ours, make_pack((5,), (1,)), 0.0).items() if key != "adj"}
    adj = padded(small("SmABMIL"), make_pack((5,), (1,)), 0.0)["adj"].to_dense()
    for model in (ours, theirs):
        given = adj.clone().requires_grad_()
        sum(model.compute_loss(torch.ones(1), **batch, adj=given)[1].values()).backward()
        found.append(given.grad)
    torch.testing.assert_close(found[0], found[1] * (adj != 0), rtol=1e-4, atol=1e-6)
    assert found[0].abs().max() > 1e-4
