"""``engine.compile``: the same losses and gradients, and no graph for every size of a pack."""

import pytest
import torch
from torch._dynamo.utils import counters

from bigbag import Bag, PackedBags
from bigbag.config import ConfigError, build_config
from bigbag.engine.compiling import compile_extractor, compiler
from bigbag.engine.run import train
from bigbag.engine.world import World
from bigbag.models import build_model

from .test_training import losses, train_alone, with_changes

needs_compiler = pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler, and there is none")
# One row, few and many come first: torch.compile tells these from each other, and no other sizes.
SIZES = [(1,), (9, 4), (4500, 2), (2000, 700), (5, 1, 30), (64,), (3000,), (17, 90), (2049,), (333, 20, 1, 8)]
VAE = {
    "name": "VAEABMIL",
    "feat_ext": {"name": "VariationalAutoEncoderMIL", "layer_sizes": [8, 4], "activations": ["relu", "None"]},
}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model, pack: PackedBags) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(1)  # of the dropout
    model.zero_grad()
    loss = sum(model.compute_loss(pack.y, pack)[1].values())
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_the_same_and_graphs_are_few(run_settings, recompute):
    torch._dynamo.reset()
    models = []
    for compiled in (False, True):
        config = build_config(with_changes(run_settings, engine={"compile": compiled}))
        torch.manual_seed(0)
        models.append(build_model(config.model, (6,), config.task).train())
        models[-1].activation_checkpointing, models[-1].chunk_instances = recompute, 1000
        compile_extractor(models[-1], config)
    generator = torch.Generator().manual_seed(0)
    before, after = graphs(), []
    for sizes in SIZES:
        rows = (torch.randn(n, 6, generator=generator).numpy() for n in sizes)
        pack = PackedBags.from_bags([Bag(x, i % 2, f"bag{i}") for i, x in enumerate(rows)])
        (loss, grads), (compiled_loss, compiled_grads) = (gradients(model, pack) for model in models)
        # fp32: sums of up to 4500 rows in another order.
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        for expected, found in zip(grads, compiled_grads):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        after.append(graphs() - before)
    assert after[0] >= 1 and after[2] == after[-1] <= 6, after


@needs_compiler
def test_a_run_is_the_same(run_settings):
    torch._dynamo.reset()
    before = graphs()
    runs = [
        train_alone(with_changes(run_settings, name=f"compile-{on}", train={"epochs": 2}, engine={"compile": on}))
        for on in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4) and len(losses(runs[0])) == 6
    # In training and without gradients, in both for one row by itself, and as the width of the features was found.
    assert 2 <= graphs() - before <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"feat_ext": None}}, "of which ABMIL has none"),
        ({"model": VAE}, "VAEABMIL calls its parts"),
        ({"engine": {"zero_stage": 3}}, "engine.zero_stage to at most 2"),
        ({}, "needs a C"),
    ],
)
def test_where_it_can_not_work_it_says_so_before_the_run(run_settings, monkeypatch, tmp_path, changes, message):
    if not changes:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    settings = with_changes(with_changes(run_settings, engine={"compile": True}), **changes)
    if changes.get("model") is VAE:
        settings["model"] = VAE
    config = build_config(settings)
    with pytest.raises(ConfigError, match=message):
        train(config, world=World())
    assert not config.run_dir.exists()
