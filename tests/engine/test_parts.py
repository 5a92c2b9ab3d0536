"""The parts of the engine one by one."""

import math

import pytest
import torch

from bigbag.config import ConfigError, OptimConfig, build_config
from bigbag.engine.backend import check_deepspeed, choose_backend, deepspeed_config
from bigbag.engine.optim import build_optimizer, learning_rate
from bigbag.engine.world import World, start_world
from bigbag.testing import run_ranks


def test_learning_rate_warms_up_and_decays():
    optim = OptimConfig(lr=2.0, warmup_epochs=0.5, final_lr_fraction=0.1)
    rates = [learning_rate(optim, step, steps_per_epoch=8, epochs=3) for step in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 24):
        t = (step - 4) / 20
        assert rates[step] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2))
    assert learning_rate(optim, 24, 8, 3) == pytest.approx(0.2)


def test_constant_schedule_without_warmup():
    optim = OptimConfig(lr=0.3, schedule="constant", warmup_epochs=0)
    assert {learning_rate(optim, step, 5, 2) for step in range(10)} == {0.3}


def test_weight_decay_spares_vectors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, vectors = build_optimizer(model, OptimConfig(weight_decay=0.5)).param_groups
    assert [p.dim() for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.5
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0


def test_deepspeed_settings_are_derived_and_merged():
    settings = {"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}, "optim": {"clip_norm": None}}
    extra = {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}
    derived = deepspeed_config(build_config({**settings, "engine": {"zero_stage": 2, "deepspeed": extra}}), 70)
    assert derived["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 70, "overlap_comm": True}
    assert derived["gradient_clipping"] == 0.0 and derived["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    "extra, expected",
    [
        ({"gradient_cliping": 1.0}, "unknown setting 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"overlap_com": True}}, r"(?s)engine.deepspeed: .*overlap_com\b.* not permitted"),
        ({"train_micro_batch_size_per_gpu": 0}, "engine.deepspeed: Train batch size: 0 has to be"),
    ],
)
def test_settings_that_deepspeed_does_not_read_are_refused(extra, expected):
    settings = {"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}, "engine": {"deepspeed": extra}}
    with pytest.raises(ConfigError, match=expected):
        check_deepspeed(deepspeed_config(build_config(settings), 70))


def test_settings_that_deepspeed_reads_are_taken():
    settings = {"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}}
    names = ("flops_profiler", "comms_logger", "autotuning", "tensorboard", "wandb", "torch_autocast")
    extra = {name: {"enabled": False} for name in names} | {"aio": {}, "dump_state": False, "prescale_gradients": True}
    check_deepspeed(deepspeed_config(build_config({**settings, "engine": {"deepspeed": extra}}), 70))


def test_zero_is_not_asked_of_plain_torch():
    settings = {"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}}
    for engine in ({"zero_stage": 1}, {"deepspeed": {"comms_logger": {"enabled": True}}}):
        with pytest.raises(ConfigError, match=rf"{next(iter(engine))} is DeepSpeed's, and backend is torch"):
            build_config({**settings, "engine": {**engine, "backend": "torch"}})


def partitioned_gradient() -> float:
    """The largest error, beside the largest number, of a gradient through a layer whose input DeepSpeed partitions."""
    world = start_world("deepspeed")
    from deepspeed.runtime.activation_checkpointing import checkpointing

    class AllRanks:
        get_model_parallel_rank = staticmethod(torch.distributed.get_rank)
        get_model_parallel_world_size = staticmethod(torch.distributed.get_world_size)
        get_model_parallel_group = staticmethod(lambda: torch.distributed.group.WORLD)
        get_data_parallel_rank = staticmethod(lambda: 0)

    checkpointing.configure(AllRanks(), partition_activations=True, num_checkpoints=1)
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(world.rank), requires_grad=True)
    checkpointing.checkpoint(lambda rows: layer(rows).tanh(), x).square().sum().backward()
    (expected,) = torch.autograd.grad(layer(x).tanh().square().sum(), x)
    return float((x.grad - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
def test_activations_that_differ_between_ranks_are_not_partitioned():
    """DeepSpeed's gradient is wrong by more than its size where ranks have different rows; so the key is refused."""
    assert max(run_ranks(partitioned_gradient, 2)) > 0.1
    settings = {"name": "x", "data": {"shards": "y"}, "model": {"name": "ABMIL"}}
    with pytest.raises(ConfigError, match=r"these have different\s+bags or instances: leave it out"):
        build_config({**settings, "engine": {"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}}})


def test_backend_follows_the_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_backend("auto") == "torch" and choose_backend("deepspeed") == "deepspeed"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_backend("auto") == "deepspeed"


def test_a_world_of_one():
    world = World()
    assert world.sharing_bags(1) is world
    with pytest.raises(ValueError, match="parallel.bag is 2, but there are 1 ranks: start a multiple of 2"):
        world.sharing_bags(2)
    assert world.is_main and world.gather({"a": 1}) == [{"a": 1}]
    assert world.sum(torch.tensor([2.0])).item() == 2.0
