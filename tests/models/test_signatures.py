"""Every model and layer takes torchmil's arguments: same names, order and defaults, extras at the end."""

import inspect

import pytest
import torch

import bigbag.models
import bigbag.nn

theirs_models, theirs_nn = pytest.importorskip("torchmil.models"), pytest.importorskip("torchmil.nn")

MODELS = sorted(name for name, cls in vars(theirs_models).items() if inspect.isclass(cls))
LAYERS = sorted(name for name, cls in vars(theirs_nn).items() if inspect.isclass(cls) or inspect.isfunction(cls))
METHODS = ("forward", "compute_loss", "predict")
DIFFERENT = {
    ("VAEABMIL", "__init__", "feat_ext"): None,  # made from in_shape where it is left out
    ("VAEABMIL", "forward", "n_samples"): None,  # one in training, the posterior's mean in eval
}
"""Defaults that differ on purpose."""


def arguments(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def plain(default):
    return list(map(plain, default)) if isinstance(default, list | tuple) else default


def compare(name, method, theirs, ours):
    ours = arguments(ours)
    for place, expected in enumerate(arguments(theirs)):
        if ours[place].kind is inspect.Parameter.VAR_POSITIONAL:
            return  # passed on to forward, which is compared by itself
        if expected.kind is inspect.Parameter.VAR_KEYWORD:
            return  # what they pass on has names here
        found = ours[place]
        assert found.name == expected.name, f"{name}.{method}: argument {place}"
        default = DIFFERENT.get((name, method, expected.name), expected.default)
        if isinstance(default, torch.nn.Module):
            assert found.default is None or type(found.default) is type(default)
        elif default is not inspect.Parameter.empty:  # what torchmil demands may have a default here
            assert plain(found.default) == plain(default), f"{name}.{method}: default of {found.name}"
    extras = ours[len(arguments(theirs)) :]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in extras)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("MILModel", "MILModelWrapper")])
def test_model_takes_torchmils_arguments(name):
    theirs, ours = getattr(theirs_models, name), getattr(bigbag.models, name)
    for method in ("__init__", *METHODS):
        compare(name, method, getattr(theirs, method), getattr(ours, method))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("MILModel", "MILModelWrapper")])
def test_a_seed_gives_torchmils_parameters_in_torchmils_order(name):
    """An optimiser's state_dict goes by that order."""

    def parameters(models, layers):
        arguments = {"feat_ext": layers.VariationalAutoEncoderMIL((6,), [4])} if name == "VAEABMIL" else {}
        if name == "CAMIL":
            arguments["n_landmarks"] = 4  # torchmil's default raises
        torch.manual_seed(0)
        return list(getattr(models, name)(in_shape=(6,), **arguments).named_parameters())

    torch.manual_seed(1)
    expected = parameters(theirs_models, theirs_nn)
    torch.manual_seed(1)
    found = parameters(bigbag.models, bigbag.nn)
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(found, expected))


@pytest.mark.parametrize(
    "name, arguments",
    [("ABMIL", {"gated": True}), ("DTFDMIL", {"distill_mode": "afs"}), ("SmoothABMIL", {})],
)
def test_a_seed_gives_torchmils_parameters_where_the_first_input_tells_the_width(name, arguments):
    """Whether that input comes with gradients or without, where models compute features only when they need them."""

    def parameters(models, grad):
        torch.manual_seed(2)
        model = getattr(models, name)(feat_ext=torch.nn.Linear(6, 5), **arguments)
        with torch.set_grad_enabled(grad):
            model(torch.ones(2, 4, 6))
        return model.state_dict()

    expected = parameters(theirs_models, True)
    for grad in (True, False):
        found = parameters(bigbag.models, grad)
        assert list(found) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", LAYERS)
def test_layer_takes_torchmils_arguments(name):
    theirs, ours = getattr(theirs_nn, name), getattr(bigbag.nn, name)
    compare(name, "__init__", theirs, ours)
    if inspect.isclass(theirs):
        compare(name, "forward", theirs.forward, ours.forward)
