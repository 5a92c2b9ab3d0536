"""Checkpoints to resume from.

``checkpoints/<tag>/`` holds what the backend saved and ``progress.json``; ``checkpoints/latest.json`` names the newest
complete one and is written last. The plan is pure, so ``(epoch, step)`` is all the state that the data need.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from bigbag.engine.backend import Backend
from bigbag.engine.world import World
from bigbag.files import write_json

_KEEP = 2


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: epoch under way.
        step: steps done in it.
        loss_sum: sum over these steps' bags of the training loss.
        num_bags: number of these bags.
        best_epoch: epoch of the best validation so far, -1 for none.
        best_value: its monitored metric.
        best_loss: its validation loss.
        stale_epochs: epochs since then.
        log_position: bytes of ``metrics.jsonl``.
        finished: True once training is over.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    num_bags: int = 0
    best_epoch: int = -1
    best_value: float | None = None
    best_loss: float | None = None
    stale_epochs: int = 0
    log_position: int = 0
    finished: bool = False


def save_checkpoint(folder: Path, backend: Backend, progress: Progress, world: World) -> None:
    """Write a checkpoint and make it the latest; called by all ranks. The newest two are kept."""
    tag = f"epoch{progress.epoch:04d}-step{progress.step:06d}" + ("-finished" if progress.finished else "")
    if world.is_main:
        shutil.rmtree(folder / tag, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    backend.save(folder, tag)
    world.barrier()
    if world.is_main:
        write_json(folder / tag / "progress.json", asdict(progress))
        previous = _latest_tags(folder)
        tags = [tag, *(t for t in previous if t != tag)][:_KEEP]
        write_json(folder / "latest.json", {"tags": tags})
        for stale in set(previous) - set(tags):
            shutil.rmtree(folder / stale, ignore_errors=True)
    world.barrier()


def load_checkpoint(folder: Path, backend: Backend, world: World) -> Progress | None:
    """Restore the latest checkpoint, or return None where there is none; called by all ranks."""
    tags = _latest_tags(folder)
    if not tags:
        return None
    backend.load(folder, tags[0])
    return Progress(**json.loads((folder / tags[0] / "progress.json").read_text()))


def _latest_tags(folder: Path) -> list[str]:
    path = folder / "latest.json"
    return json.loads(path.read_text())["tags"] if path.is_file() else []
