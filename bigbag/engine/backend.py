"""What carries a training step: plain torch, or DeepSpeed.

Both present the same small seam. The loss that they are given is already a share of the global step's mean loss, so
the gradient of a step is the sum over its packs and ranks, whatever their number.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.config import Config, ConfigError, check_arguments
from bigbag.engine.optim import build_optimizer
from bigbag.engine.precision import autocast
from bigbag.engine.world import World, launched
from bigbag.models import MILModel

_BUCKET = 500_000_000


class StepModule(torch.nn.Module):
    """A model as the backends see it: packs in; logits, losses and instance scores out, in the run's precision."""

    def __init__(self, model: MILModel, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, bags: PackedBags, want: str) -> Any:
        """``want`` is "loss" (by name each loss, a mean over the bags), "logits" or "logits and scores"."""
        with autocast(bags.device.type, self.precision):
            if want == "loss":
                assert bags.y is not None
                _, losses = self.model.compute_loss(bags.y, bags)
                return {name: loss.float() for name, loss in losses.items()}
            return self.model.predict(bags, return_inst_pred=want == "logits and scores")


class WholeModule(StepModule):
    """A :class:`StepModule` whose weights ZeRO 3 fetches together, and gives back once a backward pass is over.

    By itself ZeRO 3 fetches the weights of each layer when that is called, and for its backward pass when the gradient
    of its output arrives. That does not suit layers that compute parts of themselves, or of others, again in the
    backward pass. So the module is one whole to it (a "leaf"): its weights come before its forward pass and, again,
    before its backward pass, and go when the gradient of an input is there. ``anchor`` is such an input: the losses
    depend on it, and of what a backward pass computes, what was put into the graph first comes last.
    """

    def forward(self, bags: PackedBags, want: str, anchor: Tensor | None = None) -> Any:
        """As :meth:`StepModule.forward`; losses as a tuple, since hooks don't look into dicts, after their names."""
        found = super().forward(bags, want)
        if want != "loss":
            return found
        assert anchor is not None
        return tuple(found), *(loss + anchor for loss in found.values())


class Backend(Protocol):
    """The seam between the training loop and what carries it out."""

    def __call__(self, bags: PackedBags, want: str) -> Any:
        """:meth:`StepModule.forward`."""

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one pack; ``last`` marks the last pack of the global step."""

    def discard_gradient(self) -> bool:
        """Forget the gradient of a step that failed before its last pack was done, on this rank alone.

        False where that is not possible: where ranks have parts of the gradient, or of a bag, in each other's memory.
        """

    def step(self, lr: float) -> None:
        """Clip, update the weights with learning rate ``lr``, clear the gradient."""

    def save(self, folder: Path, tag: str) -> None:
        """Write what a resume needs to ``folder/tag``; called by all ranks."""

    def load(self, folder: Path, tag: str) -> None:
        """Restore what :meth:`save` wrote; called by all ranks."""

    def model_state(self) -> dict[str, Tensor]:
        """The whole model's state dict on the main rank (contents undefined elsewhere); called by all ranks."""


class TorchBackend:
    """Every rank has all weights and optimiser states; no dependencies."""

    def __init__(self, module: StepModule, config: Config, world: World) -> None:
        self.module, self.world = module.to(world.device), world
        self.optimizer = build_optimizer(module, config.optim)
        self.clip_norm = config.optim.clip_norm

    def __call__(self, bags: PackedBags, want: str) -> Any:
        return self.module(bags, want)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if last and self.world.size > 1:
            trained = [p for p in self.module.parameters() if p.requires_grad]
            for p in trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            total = self.world.sum(torch.cat([p.grad.flatten() for p in trained]))  # type: ignore[union-attr]
            for p, part in zip(trained, total.split([p.numel() for p in trained])):
                p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]

    def discard_gradient(self) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        return self.world.bag_ranks == 1

    def step(self, lr: float) -> None:
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path, tag: str) -> None:
        if not self.world.is_main:
            return
        (folder / tag).mkdir(parents=True, exist_ok=True)
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / tag / "state.pt")

    def load(self, folder: Path, tag: str) -> None:
        path = folder / tag / "state.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: was this run started with DeepSpeed? Resume it with its launcher"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def model_state(self) -> dict[str, Tensor]:
        return self.module.model.state_dict()


def _give_scalars_a_dimension(model: torch.nn.Module) -> None:
    """DeepSpeed can't take weights without dimensions, such as Sm's: they get one, which state dicts do not show."""
    scalars = {name: p for name, p in model.named_parameters() if p.dim() == 0}

    def reshape(state: dict[str, Any], prefix: str, shape: tuple[int, ...]) -> None:
        for key in (prefix + name for name in scalars):
            if key in state and state[key].numel() == 1:  # of weights that ZeRO 3 shares out there is nothing here
                state[key] = state[key].view(shape)

    for p in scalars.values():
        p.data = p.data.view(1)
    model.register_state_dict_post_hook(lambda module, state, prefix, _: reshape(state, prefix, ()))
    model.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: reshape(state, prefix, (1,)))


class DeepSpeedBackend:
    """Any number of processes: ZeRO stages 0 to 3."""

    def __init__(self, module: StepModule, config: Config, world: World) -> None:
        import deepspeed

        self.world = world
        self.zero_stage = config.engine.zero_stage
        settings = deepspeed_config(config, sum(p.numel() for p in module.parameters() if p.requires_grad))
        check_deepspeed(settings)
        _give_scalars_a_dimension(module.model)
        if self.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_module(module, True)
        optimizer = build_optimizer(module, config.optim)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=module.parameters(),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )

    def __call__(self, bags: PackedBags, want: str) -> Any:
        if self.zero_stage < 3 or want != "loss":
            return self.engine(bags, want)
        names, *losses = self.engine(bags, want, torch.zeros((), device=bags.device, requires_grad=True))
        return dict(zip(names, losses))

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the ranks; the loss is a share of a sum over them.
        self.engine.backward(loss * self.world.size)

    def discard_gradient(self) -> bool:
        self.engine.module.zero_grad(set_to_none=True)
        return self.world.bag_ranks == 1 and self.zero_stage == 0

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        if (folder / tag / "state.pt").is_file():
            raise ValueError(f"{folder / tag} was written by plain torch; resume it with python, without a launcher")
        shares = len(list((folder / tag).glob("*_optim_states.pt")))
        if shares in (0, self.world.size):
            self._load(folder, tag)
        else:
            self._load_universal(folder, tag)

    def _load(self, folder: Path, tag: str) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise FileNotFoundError(f"{folder / tag}: DeepSpeed found no checkpoint there")

    def _load_universal(self, folder: Path, tag: str) -> None:
        """Load the optimizer's states that another number of ranks shared out, by way of DeepSpeed's universal form."""
        from deepspeed.checkpoint import ds_to_universal

        universal = f"{tag}-universal"
        if self.world.is_main:
            shutil.rmtree(folder / universal, ignore_errors=True)
            arguments = {"input_folder": str(folder / tag), "output_folder": str(folder / universal)}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
            with contextlib.redirect_stdout(io.StringIO()):
                ds_to_universal.main(argparse.Namespace(**arguments, **workers, **flags))
        self.world.barrier()
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = True
        try:
            self._load(folder, universal)
        finally:
            self.engine._config.load_universal_checkpoint = False
        # ZeRO 3 has given all groups the settings of the first, its weight decay among them, and one counter of steps.
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        for state in self.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(folder / universal)
            (folder / "latest_universal").unlink()

    def model_state(self) -> dict[str, Tensor]:
        import deepspeed

        model = self.engine.module.model
        if self.zero_stage < 3:
            return model.state_dict()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}


def deepspeed_config(config: Config, num_weights: int) -> dict[str, Any]:
    """DeepSpeed's settings, derived from ours; ``engine.deepspeed`` is merged over them.

    Accumulation and loss scaling stay with the training loop, which knows from the plan how many packs a step has;
    precision stays with :class:`StepModule`, so that one process with plain torch computes the same.
    """
    bucket = max(1, min(_BUCKET, num_weights))
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        # DeepSpeed allocates whole buckets, by default of 500 million numbers, however few weights there are.
        "zero_optimization": {"stage": config.engine.zero_stage, "reduce_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return _merge(derived, config.engine.deepspeed)


class _Asked(dict[str, Any]):
    """Settings that remember which keys were asked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.asked: set[str] = set()

    def __copy__(self) -> _Asked:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def check_deepspeed(settings: dict[str, Any]) -> None:
    """Refuse settings that DeepSpeed does not read, which it passes over where they stand at the top, and bad ones.

    Raises:
        ConfigError: names the key and the nearest one that it reads.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    recorded = _Asked(settings)
    try:
        DeepSpeedConfig(recorded)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"engine.deepspeed: {error}") from None
    check_arguments("engine.deepspeed", settings, sorted(recorded.asked))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def choose_backend(setting: str) -> str:
    """ "torch" or "deepspeed" for the config's "auto": DeepSpeed under a launcher, plain torch otherwise."""
    return ("deepspeed" if launched() else "torch") if setting == "auto" else setting


def build_backend(name: str, model: MILModel, config: Config, world: World) -> Backend:
    """The backend called ``name``, carrying ``model``."""
    if name == "torch":
        return TorchBackend(StepModule(model, config.train.precision), config, world)
    kind = WholeModule if config.engine.zero_stage == 3 else StepModule
    return DeepSpeedBackend(kind(model, config.train.precision), config, world)
