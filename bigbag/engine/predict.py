"""A trained model on new slides: one bag at a time, the next one being read meanwhile.

Each slide gets ``scores/<slide>.npz`` when its bag is done, written atomically, so that a prediction that was
interrupted goes on where it was; ``predictions.csv`` is written when all are done, in the format of a run's. Bags are
whole, whatever cap on their instances the run had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bigbag.bags import Bag, PackedBags
from bigbag.config import TaskConfig
from bigbag.data.names import file_name
from bigbag.data.validate import BagError
from bigbag.engine.backend import StepModule
from bigbag.engine.bag_settings import BagSettings
from bigbag.engine.metrics import probabilities
from bigbag.engine.new_bags import NewBag, SlidePlaces
from bigbag.engine.predictions import Row, predictions_table
from bigbag.engine.world import World
from bigbag.files import open_atomically, read_npz, write_atomically, write_json
from bigbag.models import load_model
from bigbag.models.build import saved_model

SCORES = "scores"


class Predictor:
    """A saved model and how its bags are made.

    Args:
        checkpoint: folder of a run (its best model), of a saved model, or the file ``model.safetensors`` in it.
        device: where it computes.

    Attributes:
        model: in eval mode.
        task: what its logits mean.
        settings: how the bags of its run were made.
        in_shape: shape of an instance.
        digest: SHA-256 of its weights and settings.

    Raises:
        FileNotFoundError: no model there.
    """

    def __init__(self, checkpoint: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, about = saved_model(checkpoint)
        self.task = TaskConfig(**about["task"])
        self.settings = BagSettings.from_json(about.get("bags", {}))
        self.in_shape = tuple(about["in_shape"])
        self.device = torch.device(device)
        self.model = load_model(self.folder).to(self.device)
        self.model.chunk_instances = self.settings.chunk_instances
        self._forward = StepModule(self.model, self.settings.precision).eval()
        contents = [(self.folder / name).read_bytes() for name in ("model.json", "model.safetensors")]
        self.digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()

    def pack(self, bag: Bag) -> PackedBags:
        """The bag as a pack of its own, checked.

        Raises:
            BagError: features of another shape than those of training, or a field that the model needs is missing.
        """
        name = type(self.model).__name__
        if bag.x.shape[1:] != self.in_shape:
            raise BagError(
                "features",
                f"bag {bag.key!r}: instances of shape {bag.x.shape[1:]}, but {name} in {self.folder} was trained on "
                f"{self.in_shape}: extract the features with the extractor of its training",
            )
        for need in self.model.needs:
            if getattr(bag, need) is None:
                reason = "its coordinates are unknown"
                if need == "adj" and bag.coords is not None:
                    reason = f"{self.folder}/model.json does not say how the graphs of its run were built"
                raise BagError("graph", f"bag {bag.key!r}: {name} needs {need}, and {reason}")
        dtype = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
        bare = Bag(x=bag.x, key=bag.key, coords=bag.coords, adj=bag.adj if "adj" in self.model.needs else None)
        # A bag in the precision of the run stays where it is: in its mapped shard, which may be larger than memory.
        in_place = self.settings.dtype in (None, bag.x.dtype.name)
        return PackedBags.from_bags([bare], dtype=dtype, share_x=in_place)

    def predict(self, pack: PackedBags) -> tuple[np.ndarray, np.ndarray]:
        """``(K,)`` float32 logits and ``(N,)`` float32 instance scores of a pack of one bag.

        Raises:
            ValueError: they are not finite.
        """
        with torch.no_grad():
            logits, scores = self._forward(pack.to(self.device), "logits and scores")
        found = logits.float().reshape(-1).cpu().numpy(), scores.float().reshape(-1).cpu().numpy()
        for values, what in zip(found, ("logits", "instance scores")):
            if not np.isfinite(values).all():
                raise ValueError(f"bag {pack.keys[0]!r}: its {what} are not finite")
        return found


@dataclass(frozen=True)
class SlideScores:
    """What a model says of the instances of one slide: a file ``scores/<slide>.npz``.

    Attributes:
        key: name of the bag.
        slide: name of the slide.
        logits: ``(K,)`` of the bag.
        probability: ``(K,)`` of the bag.
        scores: ``(N,)`` float32.
        coords: ``(N, c)`` positions in the source's own unit, or None.
        stride: distance of adjacent patches in it, or None.
        attributes: what else the source says of the slide.
    """

    key: str
    slide: str
    logits: np.ndarray
    probability: np.ndarray
    scores: np.ndarray
    coords: np.ndarray | None
    stride: float | None
    attributes: dict[str, Any]

    def write(self, path: Path, fingerprint: str) -> None:
        """Write the file, atomically; ``fingerprint`` names what it was made from."""
        arrays = {name: np.asarray(getattr(self, name)) for name in ("key", "slide", "logits", "probability", "scores")}
        arrays |= {"fingerprint": np.array(fingerprint), "attributes": np.array(json.dumps(self.attributes))}
        arrays |= {} if self.coords is None else {"coords": np.asarray(self.coords)}
        arrays |= {} if self.stride is None else {"stride": np.array(float(self.stride))}
        with open_atomically(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def read_scores(path: str | Path) -> SlideScores:
    """Read a file ``scores/<slide>.npz``."""
    return _slide_scores(read_npz(path))


def _slide_scores(arrays: dict[str, np.ndarray]) -> SlideScores:
    return SlideScores(
        key=str(arrays["key"]),
        slide=str(arrays["slide"]),
        logits=arrays["logits"],
        probability=arrays["probability"],
        scores=arrays["scores"],
        coords=arrays.get("coords"),
        stride=float(arrays["stride"]) if "stride" in arrays else None,
        attributes=json.loads(str(arrays["attributes"])),
    )


class Predicted(NamedTuple):
    """A bag that is done.

    Attributes:
        row: its line of ``predictions.csv``.
        files: the scores of its slides.
        fresh: False where they were there already.
    """

    row: Row
    files: tuple[Path, ...]
    fresh: bool


class Failure(NamedTuple):
    """A bag that could not be predicted, why, and whether only because it has no instances."""

    name: str
    reason: str
    empty: bool = False


def predict_bags_of(
    predictor: Predictor, bags: Sequence[NewBag], out: Path, world: World, salt: Any = None
) -> Iterator[Predicted | Failure]:
    """Predict this rank's share of ``bags``, in order; what is in ``out`` already is not computed again.

    Args:
        predictor: the model.
        bags: all bags.
        out: the folder of the results.
        world: the ranks, each of which takes every ``world.size``-th bag.
        salt: JSON-able; what else determines the result, such as the arguments of the source.
    """
    (out / SCORES).mkdir(parents=True, exist_ok=True)
    mine = bags[world.rank :: world.size]
    with ThreadPoolExecutor(1, "bigbag-read") as pool:
        todo = iter(mine)
        waiting = [_start(pool, predictor, bag, out, salt) for bag in islice(todo, 1)]
        while waiting:
            bag, fingerprint, found = waiting.pop()
            # The next bag is read while this one is computed: two are in memory, whatever their number.
            following = next(todo, None)
            content: Predicted | Failure | _Read
            try:
                content = found.result()
            except (ValueError, OSError) as error:
                content = Failure(bag.entry.name, str(error), isinstance(error, BagError) and error.check == "empty")
            if following is not None:
                waiting.append(_start(pool, predictor, following, out, salt))
            yield (
                content
                if isinstance(content, Failure | Predicted)
                else _finish(predictor, bag, content, out, fingerprint)
            )


_Read = tuple[PackedBags, list[SlidePlaces]]


def _start(
    pool: ThreadPoolExecutor, predictor: Predictor, bag: NewBag, out: Path, salt: Any
) -> tuple[NewBag, str, Future[Predicted | _Read]]:
    identity = json.dumps([predictor.digest, salt, bag.stamp], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def read() -> Predicted | _Read:
        done = _done(bag, out, fingerprint)
        if done is not None:
            return done
        content, places = bag.read()
        return predictor.pack(content), places

    return bag, fingerprint, pool.submit(read)


def _finish(predictor: Predictor, bag: NewBag, content: _Read, out: Path, fingerprint: str) -> Predicted | Failure:
    pack, places = content
    try:
        logits, scores = predictor.predict(pack)
    except ValueError as error:
        return Failure(bag.entry.name, str(error))
    chances = probabilities(logits[None], predictor.task.type)[0]
    files, start = [], 0
    for place in places:
        part = scores[start : start + place.size]
        start += place.size
        path = out / SCORES / f"{file_name(place.name)}.npz"
        about = place.coords, place.stride, dict(place.attributes)
        SlideScores(bag.entry.name, place.name, logits, chances, part, *about).write(path, fingerprint)
        files.append(path)
    return Predicted(_row(bag, logits, chances, pack.num_instances), tuple(files), True)


def _done(bag: NewBag, out: Path, fingerprint: str) -> Predicted | None:
    """What is there of a bag already, made by the same model from the same files."""
    files = [out / SCORES / f"{file_name(name)}.npz" for name in bag.slides]
    try:
        found = [read_npz(path) for path in files]
    except (ValueError, OSError):
        return None
    if not found or any(str(arrays.get("fingerprint")) != fingerprint for arrays in found):
        return None
    parts = [_slide_scores(arrays) for arrays in found]
    num_instances = sum(len(part.scores) for part in parts)
    return Predicted(_row(bag, parts[0].logits, parts[0].probability, num_instances), tuple(files), False)


def _row(bag: NewBag, logits: np.ndarray, chances: np.ndarray, num_instances: int) -> Row:
    entry = bag.entry
    return Row(entry.name, entry.split or "", entry.label, logits, chances, num_instances, entry.patient or "")


def write_results(
    predictor: Predictor,
    rows: Sequence[Row],
    failures: Sequence[Failure],
    left_out: Sequence[dict[str, str]],
    out: Path,
    world: World,
) -> list[Failure]:
    """Write ``predictions.csv`` and ``prediction.json`` of all ranks; every rank calls it with its own share.

    Args:
        predictor: the model.
        rows: lines of ``predictions.csv``.
        failures: bags without results, or without all of them.
        left_out: bags that are not to be predicted, ``{"name": ..., "reason": ...}`` each.
        out: the folder of the results.
        world: the ranks.

    Returns:
        the failures of all ranks.
    """
    gathered = world.gather((list(rows), list(failures), list(left_out)))
    failed = [failure for _, part, _ in gathered for failure in part]
    if world.is_main:
        # Ranks took every so-manieth bag: in turns they give the order of the bags again.
        turns = max((len(part) for part, _, _ in gathered), default=0)
        in_order = [part[i] for i in range(turns) for part, _, _ in gathered if i < len(part)]
        write_atomically(out / "predictions.csv", predictions_table(in_order, predictor.task))
        about = {
            "model": type(predictor.model).__name__,
            "model_sha256": predictor.digest,
            "task": predictor.task.model_dump(mode="json"),
            "bags": predictor.settings.to_json(),
            "num_bags": len(in_order),
            "failed": [{"name": failure.name, "reason": failure.reason} for failure in failed],
            "left_out": [one for _, _, part in gathered for one in part],
        }
        write_json(out / "prediction.json", about)
    world.barrier()
    return failed
