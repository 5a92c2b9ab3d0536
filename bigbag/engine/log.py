"""Where a run writes what happens: ``metrics.jsonl``, TensorBoard events and a progress bar, on the main rank only."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbag.config import Config, ConfigError
from bigbag.engine.world import World


class RunLog:
    """Append-only record of a run.

    Args:
        config: the settings of the run.
        world: the ranks; only the main one writes.
        resume_at: length in bytes to which ``metrics.jsonl`` is cut back, so that a resumed run has each step once.
        resume_step: global step from which TensorBoard drops what an interrupted run wrote.

    Raises:
        ConfigError: ``report.wandb`` is set, and wandb is not installed.
    """

    def __init__(self, config: Config, world: World, resume_at: int = 0, resume_step: int = 0) -> None:
        self._path = config.run_dir / "metrics.jsonl"
        self._events: Any = None
        if not world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path.touch()
        os.truncate(self._path, min(resume_at, self._path.stat().st_size))
        self._wandb = None if config.report.wandb is None else _start_wandb(config)
        self._events = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=resume_step)

    @property
    def position(self) -> int:
        """Bytes of ``metrics.jsonl`` so far."""
        return self._path.stat().st_size if self._events is not None else 0

    def write(self, kind: str, global_step: int, values: Mapping[str, Any]) -> None:
        """Append one line, and its numbers as scalars."""
        if self._events is None:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        for name, value in _scalars(values):
            self._events.add_scalar(f"{kind}/{name}", value, global_step)

    def write_curve(self, name: str, positive: np.ndarray, probability: np.ndarray, global_step: int) -> None:
        """A precision-recall curve of bags, ``(B,)`` each, for TensorBoard alone."""
        if self._events is not None:
            self._events.add_pr_curve(name, positive, probability, global_step)

    def write_picture(self, name: str, picture: np.ndarray, global_step: int) -> None:
        """A grey uint8 ``(H, W)`` picture, for TensorBoard alone."""
        if self._events is not None:
            self._events.add_image(name, picture, global_step, dataformats="HW")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish()


def _start_wandb(config: Config) -> Any:
    """The run in Weights & Biases, which takes over what goes to TensorBoard from now on; the same one on resuming."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"report.wandb is {config.report.wandb!r}, but wandb is not installed: pip install bigbag[wandb], or leave "
            "the setting out"
        ) from None
    identity = hashlib.sha256(f"{config.run_dir.resolve()} {config.digest()}".encode()).hexdigest()[:16]
    return wandb.init(
        project=config.report.wandb,
        name=config.name,
        id=identity,
        resume="allow",
        dir=str(config.run_dir),
        config=config.model_dump(mode="json"),
        sync_tensorboard=True,
    )


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("epoch", "step"):
            yield f"{prefix}{name}", value


def progress(total: int, initial: int, title: str, world: World) -> Any:
    """A progress bar over global steps, shown on the main rank's terminal."""
    from tqdm import tqdm

    quiet = not (world.is_main and sys.stderr.isatty())
    return tqdm(total=total, initial=initial, desc=title, unit="step", disable=quiet, leave=False)
