"""Checkpoints to resume from.

``checkpoints/<tag>/`` holds what the backend saved, ``progress.json``, and ``files.json`` with the size and SHA-256 of
each file; ``checkpoints/latest.json`` names the newest complete ones and is written last. A checkpoint that has been
damaged since is passed over for the one before it, aloud. The plan is pure, so ``(epoch, step)`` is all the state that
the data need.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bigbag.engine.backend import Backend
from bigbag.engine.world import World
from bigbag.files import read_json, write_json

logger = logging.getLogger(__name__)

_KEEP = 2
_LATEST = "latest.json"
_FILES = "files.json"


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
        skipped: key of a bag that steps went without, its loss not being finite, to the number of these steps.
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
    skipped: dict[str, int] = field(default_factory=dict)


def save_checkpoint(folder: Path, backend: Backend, progress: Progress, world: World) -> None:
    """Write a checkpoint and make it the latest; called by all ranks. The newest two are kept.

    Raises:
        OSError: a rank could not write, for want of space say; on all ranks. The checkpoints before are as they were.
    """
    tag = f"epoch{progress.epoch:04d}-step{progress.step:06d}" + ("-finished" if progress.finished else "")
    if world.is_main:
        shutil.rmtree(folder / tag, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    _together(world, folder / tag, lambda: backend.save(folder, tag))
    _together(world, folder / tag, lambda: _publish(folder, tag, progress) if world.is_main else None)


def _together(world: World, checkpoint: Path, write: Callable[[], None]) -> None:
    """Let every rank write its part; if one cannot, the checkpoint is removed and all of them say why."""
    problem = ""
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        problem = str(error)
    problems = list(filter(None, world.gather(problem)))
    if problems:
        if world.is_main:
            shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(checkpoint.parent).free
        raise OSError(
            f"{checkpoint}: could not be written ({problems[0]}; {free / 2**20:.0f} MiB are free there). The "
            "checkpoints before it are as they were: make room, and the same command goes on from the newest"
        )


def _publish(folder: Path, tag: str, progress: Progress) -> None:
    write_json(folder / tag / "progress.json", asdict(progress))
    files = {path.name: path for path in sorted((folder / tag).iterdir())}
    write_json(folder / tag / _FILES, {name: [path.stat().st_size, _sha256(path)] for name, path in files.items()})
    previous = _latest_tags(folder)
    tags = [tag, *(t for t in previous if t != tag)][:_KEEP]
    write_json(folder / _LATEST, {"tags": tags})
    for stale in set(previous) - set(tags):
        shutil.rmtree(folder / stale, ignore_errors=True)


def load_checkpoint(folder: Path, backend: Backend, world: World) -> Progress | None:
    """Restore the latest checkpoint that is whole, or return None where there is none; called by all ranks.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    problem = ""
    for tag in _latest_tags(folder):
        problem = world.gather(_damage(folder / tag) if world.is_main else "")[0]
        if not problem:
            backend.load(folder, tag)
            return Progress(**json.loads((folder / tag / "progress.json").read_text()))
        logger.warning("%s is damaged (%s): going on from the checkpoint before it", folder / tag, problem)
    if problem:
        raise ValueError(f"{folder}: no checkpoint is whole ({problem}); start the run again with --restart")
    return None


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint; "" if nothing is."""
    try:
        for name, (size, digest) in json.loads((checkpoint / _FILES).read_text()).items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if _sha256(checkpoint / name) != digest:
                return f"{name} has another SHA-256 than it was written with"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _latest_tags(folder: Path) -> list[str]:
    path, remedy = folder / _LATEST, "start the run again with --restart"
    tags = read_json(path, remedy).get("tags") if path.is_file() else []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{path}: tags is {tags!r}, expected the names of checkpoints: {remedy}")
    return tags
