"""The sections of a config: every setting with its type, default and meaning."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from bigbag.config.base import Named, Place, Section, Seed, Share
from bigbag.config.data import DataConfig

_DATA_KEYS_WITHOUT_EFFECT = (
    "num_workers",
    "prefetch_packs",
    "check_digests",
    "allow_pipe",
    "cache_dir",
    "cache_bytes",
    "source",
    "storage_dtype",
    "graph",
    "shard_bytes",
    "empty_bags",
    "missing_bags",
    "invalid_bags",
    "splits",  # their outcome is part of the identity of a run
)
_TRAIN_KEYS_WITHOUT_EFFECT = ("checkpoint_every_steps", "log_every_steps")
_ENGINE_KEYS_WITHOUT_EFFECT = ("threads", "memory_bytes")


class ModelConfig(Named):
    """A class of ``bigbag.models`` and its constructor arguments."""


class TaskConfig(Section):
    """What a bag's label means."""

    type: Literal["binary", "multiclass", "multilabel", "regression", "survival", "survival_discrete"] = "binary"
    """binary: 0 or 1; multiclass: 0 .. num_outputs - 1; multilabel: num_outputs times 0 or 1; regression: numbers;
    survival: (time, event), Cox's partial likelihood over the bags of a step; survival_discrete: (time, event), the
    likelihood over num_outputs time bins. event: 1 = observed, 0 = censored."""
    num_outputs: PositiveInt = 1
    """Logits per bag: 1 for binary and survival, the number of classes, labels, targets or time bins otherwise."""
    class_weights: list[float] | Literal["balanced"] | None = None
    """multiclass: weight of each class in the loss; balanced: n / (K n_k) of the n training bags and K classes."""
    pos_weight: float | list[float] | Literal["balanced"] | None = None
    """binary, multilabel (one number each): weight of the positives in the loss; balanced: negatives / positives of the
    training bags."""
    time_bins: list[float] | None = None
    """survival_discrete: the num_outputs - 1 inner edges of the bins, ascending; None: quantiles of the observed
    training times."""
    alpha: float = 0.0
    """survival_discrete: by how much censored bags weigh less, 0 to 1."""

    @property
    def is_survival(self) -> bool:
        return self.type.startswith("survival")

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        single = self.type in ("binary", "survival")
        if single != (self.num_outputs == 1) and self.type != "regression":
            raise ValueError(f"task type {self.type!r} does not go with num_outputs {self.num_outputs}")
        self._check_belongs("class_weights", self.class_weights, ("multiclass",), self.num_outputs)
        self._check_belongs("pos_weight", self.pos_weight, ("binary", "multilabel"), self.num_outputs)
        self._check_belongs("time_bins", self.time_bins, ("survival_discrete",), self.num_outputs - 1)
        if self.time_bins is not None and sorted(set(self.time_bins)) != self.time_bins:
            raise ValueError(f"time_bins {self.time_bins}, expected ascending edges")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, expected 0 to 1")
        return self

    def _check_belongs(self, name: str, value: object, types: tuple[str, ...], length: int) -> None:
        if value is not None and self.type not in types:
            raise ValueError(f"{name} goes with task type {' or '.join(types)}, not with {self.type}")
        numbers = value if isinstance(value, list) else [value] * (length if self.type == "binary" else 0)
        if value in (None, "balanced"):
            return
        if len(numbers) != length:
            raise ValueError(f"{name} is {value}, expected {length} numbers")
        if name != "time_bins" and min(numbers) <= 0:
            raise ValueError(f"{name} is {value}, expected positive weights")


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay, stepped once per global step."""

    lr: NonNegativeFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay, applied to matrices only (not to biases and other vectors)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Length of the linear warm-up from 0, in epochs."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    final_lr_fraction: Share = 0.0
    """Learning rate at the end of a cosine schedule, as a share of ``lr``."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest L2 norm of the whole gradient; None: no clipping."""


class ConstantSchedule(Section):
    """The same coefficient in every step."""

    schedule: Literal["constant"]
    """Name of the schedule."""
    coef: float = 1.0
    """The coefficient."""


class LinearSchedule(Section):
    """From one coefficient to another in ``n_steps`` optimiser steps, and constant from then on."""

    schedule: Literal["linear"]
    """Name of the schedule."""
    coef_init: float = 0.0
    """Coefficient of the first step."""
    coef_end: float = 1.0
    """Coefficient from step ``n_steps`` on."""
    n_steps: PositiveInt = 100
    """Steps between the two."""


class CyclicalSchedule(Section):
    """Cycles that rise linearly and then stay at the top (Fu et al., NAACL 2019)."""

    schedule: Literal["cyclical"]
    """Name of the schedule."""
    cycle_len: PositiveInt
    """Optimiser steps of a cycle."""
    min_coef: float = 0.0
    """Coefficient at the start of a cycle."""
    max_coef: float = 1.0
    """Coefficient at its top."""
    cycle_prop: Share = 0.5
    """Share of the cycle in which the coefficient rises."""
    warmup_steps: NonNegativeInt = 0
    """Steps at ``min_coef`` before the first cycle."""


Schedule = Annotated[ConstantSchedule | LinearSchedule | CyclicalSchedule, Field(discriminator="schedule")]


class TrainConfig(Section):
    """The training loop."""

    epochs: int = 20
    """Passes over the training bags."""
    batch_bags: int = 8
    """Bags per optimiser step, over all ranks; reached by accumulating packs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of matrix products; weights and optimiser states stay in fp32. On a CPU without instructions for bf16
    (AVX-512 BF16, AMX; ARM's) products are computed in fp32, faster and closer, and the banner says so."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass instead of storing them; auto: where the largest pack takes more than
    256 MiB in fp32, ``chunk_instances`` is set, or memory would not suffice."""
    chunk_instances: PositiveInt | None = None
    """Instances that go through ``feat_ext`` together where activations are recomputed: their number, not the size of a
    bag, sets the memory of a trained feature extractor. None: as many as 2048 (GPU: 16,384) rows of 1024 numbers
    hold, or as fit into memory."""
    monitor: str | None = None
    """Validation metric that picks the best epoch ("loss", "auroc", "accuracy", ...); ties go to the lower loss. None:
    "c_index" for survival tasks, "loss" for regression, "auroc" otherwise."""
    loss_coefficients: dict[str, Schedule] = Field(default_factory=dict)
    """Coefficient of each loss of the model by name, e.g. ``{KLDiv: {schedule: linear, n_steps: 1000}}``; 1 where there
    is none. ``metrics.jsonl`` shows the names."""
    mode: Literal["max", "min"] | None = None
    """Whether a larger or smaller ``monitor`` is better; None: "min" for loss, mae and rmse, otherwise "max"."""
    patience: int | None = None
    """Stop after so many epochs without a better ``monitor``; None: never."""
    checkpoint_every_steps: int | None = None
    """Also write a checkpoint to resume from every so many steps within an epoch; None: at the end of each epoch."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a training bag whose loss is NaN or infinite: stop, naming it; or go on without it, and count it
    in ``results.json`` (``skipped_bags``). To skip costs a forward pass with the others, where there is such a bag, and
    waits for each pack's loss."""
    log_every_steps: int = 1
    """Steps between two lines of ``metrics.jsonl``. In between, losses stay on the device and nothing waits for them;
    one that is not finite stops the run at the next line, or before the weights are saved."""

    @field_validator("epochs", "batch_bags", "log_every_steps", "checkpoint_every_steps", "patience")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"expected at least 1, got {value}")
        return value


class EngineConfig(Section):
    """What runs the optimiser steps."""

    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: DeepSpeed under a launcher (WORLD_SIZE is set), plain torch for a single process. torch also runs under a
    launcher, with all weights and optimiser states on every rank."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 1 shards optimiser states, 2 also gradients, 3 also weights, which are whole on every rank
    only while a pack is computed. A single process without a launcher has no others to share with: it runs plain torch
    (``backend: auto``), and its banner says so. Not with ``backend: torch``."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Extra DeepSpeed keys, merged over the derived configuration: the one escape hatch. One that DeepSpeed does
    not read is an error.

    Not ``activation_checkpointing``: what DeepSpeed partitions over ranks (and, partitioned, moves to the CPU) are
    activations that all of them hold, as under tensor parallelism. Here each rank has other bags, or with
    ``parallel.bag`` other instances, and would get back pieces of the others' activations.
    ``train.activation_checkpointing`` recomputes, and keeps the inputs of layers alone."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each rank; None: cores divided by the ranks of this node when there is no GPU."""
    timeout_s: PositiveInt = 1800
    """Seconds for which a rank waits for the others before it gives up, saying where: one of them is stuck or gone."""
    memory_bytes: PositiveInt | None = None
    """Bytes that each rank may take on its device; None: what is free (on CPU, shared out over the ranks of a machine).
    Where a run would take more, what ``train.activation_checkpointing`` and ``train.chunk_instances`` leave open is
    chosen so that it fits; ``bigbag plan`` tells."""
    compile: bool = False
    """Compile ``model.feat_ext`` by torch.compile (which takes some seconds, and a C++ compiler): one graph for packs
    of all sizes, with the losses of the extractor as it is, to rounding. Not with ZeRO 3. On CPU it does not pay for
    matrix products: 1024 -> 512 -> 512 took 1.04 of the time, recomputed 1.05
    (``python -m tests.engine.measure_compiling``, a core of an AMD EPYC)."""
    impl: dict[str, str] = Field(default_factory=dict)
    """Operator implementations to force, e.g. ``{attention_pool: reference}``; empty: the best for the device."""

    @field_validator("deepspeed")
    @classmethod
    def _without_partitions(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "activation_checkpointing" in value:
            raise ValueError(
                "activation_checkpointing of DeepSpeed partitions what all ranks hold alike, but these have different "
                "bags or instances: leave it out, and set train.activation_checkpointing"
            )
        return value

    @model_validator(mode="after")
    def _only_what_happens(self) -> EngineConfig:
        if self.backend == "torch" and (self.zero_stage or self.deepspeed):
            name = "zero_stage" if self.zero_stage else "deepspeed"
            raise ValueError(f"{name} is DeepSpeed's, and backend is torch: leave one of them out")
        return self


class ParallelConfig(Section):
    """How ranks share the work: bags are dealt out to groups of ranks, and a group shares each of its bags."""

    bag: PositiveInt = 1
    """Ranks that share every bag, each holding a run of its instances: for bags that are too large for one. The number
    of all ranks must be a multiple of it. Models that can: those with ``in_parts``."""


class ReportConfig(Section):
    """What is drawn for ``report.html``."""

    num_slides: NonNegativeInt = 4
    """Positive test bags whose attention maps are saved and drawn, and validation bags whose attention TensorBoard
    shows after each epoch."""
    instance_scores: bool = False
    """Save the score of every instance of the evaluated bags with instance labels (13 bytes each) in ``instances.npz``:
    what FROC is computed from."""
    wandb: str | None = None
    """Project of Weights & Biases that is shown what TensorBoard is (``pip install bigbag[wandb]``; its own variables,
    such as ``WANDB_MODE=offline``, hold). None: none."""


class CompareConfig(Section):
    """Arguments of the models that ``bigbag compare`` trains in place of ``model``."""

    common: dict[str, Any] = Field(default_factory=dict)
    """Arguments for every model that takes them, e.g. ``{att_dim: 64, feat_ext: {name: MLP, ...}}``."""
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Arguments of single models, by name, over those in common."""
    overrides: dict[str, list[str]] = Field(default_factory=dict)
    """Further settings of the runs of single models, by name, e.g. ``{SmABMIL: [optim.lr=1e-4]}``."""


class Config(Section):
    """One run."""

    name: str
    """Name of the run: its folder is ``out/name``."""
    out: Place = Field("runs", min_length=1)
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of initial weights, order of bags and dropout."""
    data: DataConfig
    """Bags."""
    model: ModelConfig
    """Model."""
    task: TaskConfig = TaskConfig()
    """Meaning of the labels."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    train: TrainConfig = TrainConfig()
    """Training loop."""
    engine: EngineConfig = EngineConfig()
    """Distribution and numerics."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks that share a bag."""
    report: ReportConfig = ReportConfig()
    """Report."""
    compare: CompareConfig = CompareConfig()
    """Comparison of models."""

    @field_validator("name")
    @classmethod
    def _below_out(cls, value: str) -> str:
        parts = Path(value).parts
        if not parts or ".." in parts or Path(value).is_absolute() or "\0" in value:
            raise ValueError("expected the name of a folder below out, which --restart may delete")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.data.augment.mixup and self.task.type not in ("binary", "multilabel", "regression"):
            raise ValueError(f"data.augment.mixup mixes labels, which those of task.type {self.task.type} do not allow")
        return self

    @property
    def monitor(self) -> str:
        """Validation metric that picks the best epoch."""
        by_task = "c_index" if self.task.is_survival else "loss" if self.task.type == "regression" else "auroc"
        return self.train.monitor or by_task

    @property
    def monitor_mode(self) -> str:
        """ "max" or "min"."""
        return self.train.mode or ("min" if self.monitor in ("loss", "mae", "rmse") else "max")

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / self.name

    def digest(self) -> str:
        """SHA-256 of the settings that determine the result: a run resumes only under the same digest."""
        settings = self.model_dump(mode="json", exclude={"name", "out", "parallel", "report", "compare"})
        without_effect = {
            "data": _DATA_KEYS_WITHOUT_EFFECT,
            "train": _TRAIN_KEYS_WITHOUT_EFFECT,
            "engine": _ENGINE_KEYS_WITHOUT_EFFECT,
        }
        for section, keys in without_effect.items():
            for key in keys:
                settings[section].pop(key)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved settings as YAML that :func:`bigbag.config.load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
