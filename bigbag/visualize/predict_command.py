"""``bigbag predict``: a trained model on new slides, their scores as files and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bigbag.data import open_store
from bigbag.data.manifest import MANIFEST_NAME
from bigbag.data.sources.base import SourceEntry
from bigbag.data.validate import plain_label
from bigbag.datasets import open_source, recognise
from bigbag.datasets.command import source_arguments
from bigbag.datasets.registry import arguments_of_source
from bigbag.engine.bag_settings import BagSettings
from bigbag.engine.new_bags import NewBag, bags_of_source, bags_of_store
from bigbag.engine.predict import Failure, Predicted, Predictor, predict_bags_of, write_results
from bigbag.engine.world import World
from bigbag.visualize.prediction import Pictures, draw, settle
from bigbag.visualize.slide_image import find_slides

_FILES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".safetensors")
_INNER_FOLDERS = ("h5_files", "pt_files", "embeddings")


def predict_command(options: argparse.Namespace, world: World) -> None:
    """Predict, draw, and say where the results are.

    Raises:
        ValueError: wrong options, or bags that could not be predicted; all others are.
    """
    if options.overrides:
        raise ValueError(f"predict takes no settings ({options.overrides[0]}): those of the run are beside its model")
    pictures = Pictures(**{f.name: getattr(options, f.name) for f in fields(Pictures) if hasattr(options, f.name)})
    predictor = Predictor(options.checkpoint, world.device)
    bags, left_out, salt = _new_bags(options, predictor)
    if not bags:
        raise ValueError(f"{options.root}: holds no slides to predict")
    locate = None if options.slides is None else _locator(options.slides, [s for bag in bags for s in bag.slides])
    options.out.mkdir(parents=True, exist_ok=True)
    if world.is_main and pictures.any:
        settle(options.out, pictures, locate is not None)
    world.barrier()
    rows, failures = [], list[Failure]()
    left_out = list(left_out) if world.is_main else []
    for number, found in enumerate(predict_bags_of(predictor, bags, options.out, world, salt), 1):
        if isinstance(found, Predicted):
            rows.append(found.row)
            failures += _draw(found, options.out, pictures, locate)
        elif found.empty and options.empty == "leave_out":
            left_out.append({"name": found.name, "reason": "no instances"})
        else:
            failures.append(found)
        _say(number, found, -(-len(bags) // world.size), world)
    failed = write_results(predictor, rows, failures, left_out, options.out, world)
    if world.is_main:
        print(f"predictions: {options.out / 'predictions.csv'}\nscores: {options.out / 'scores'}", flush=True)
    if failed:
        listed = "; ".join(f"{one.name}: {one.reason}" for one in failed[:3]) + ("; ..." if len(failed) > 3 else "")
        num, all_of_them = len({one.name for one in failed}), options.out / "prediction.json"
        raise ValueError(f"{num} of {len(bags)} bags have no or not all results ({all_of_them} has them all): {listed}")


def _new_bags(options: argparse.Namespace, predictor: Predictor) -> tuple[list[NewBag], Sequence[dict[str, str]], Any]:
    """The bags of ``--from``, what its source leaves out, and what else determines them."""
    settings, needs, root = predictor.settings, predictor.model.needs, options.root
    remote = root.startswith(("http://", "https://", "file://"))
    if remote or Path(root).name == MANIFEST_NAME or (Path(root) / MANIFEST_NAME).is_file():
        store = open_store(root)
        return bags_of_store(store, settings, needs), store.left_out, None
    described, one = _source_settings(options, settings)
    source = open_source(**described)
    known: dict[str, SourceEntry] = {}
    if options.labels is not None:
        # A source of its own, since slides that the table does not have are predicted, too.
        named = "classes" in arguments_of_source(described["name"]) and settings.classes
        classes = {"classes": settings.classes} if named else {}
        labelled = open_source(**{**classes, **described, "labels": options.labels})
        known = {entry.name: entry for entry in labelled.entries()}
    entries = [_with(entry, known.get(entry.name, entry)) for entry in source.entries()]
    if one is not None:
        entries = [entry for entry in entries if any(_same(path, one) for path in (entry.path, *entry.parts))]
        if not entries:
            raise ValueError(
                f"{one}: is no slide of {described['root']} as {described['name']} has them; give --format"
            )
    if settings.bag == "patient" and any(entry.patient is None for entry in entries):
        print("slides without a patient are bags of their own; --patients names the patients", flush=True)
    left_out = () if one is not None else getattr(source, "left_out", ())
    if left_out:
        print(f"left out by the source: {len(left_out)}, the first of them {left_out[0]}", flush=True)
    salt = {key: value for key, value in described.items() if key not in ("root", "slides")}
    return bags_of_source(source, entries, settings, needs), left_out, salt


def _source_settings(options: argparse.Namespace, settings: BagSettings) -> tuple[dict[str, Any], Path | None]:
    """Name and arguments of the source of ``--from``, and the file that alone is wanted of it."""
    place = Path(options.root)
    one = place if place.suffix.lower() in _FILES and place.is_file() else None
    if one is not None:
        place = one.parent.parent if one.parent.name in _INNER_FOLDERS else one.parent
    given = source_arguments(None, options.patients, options.column, options.option)
    described = recognise(str(place), options.format, given)
    if "bags" in arguments_of_source(described["name"]):
        described.setdefault("bags", settings.source_bags)
    return described, one


def _with(entry: SourceEntry, said: SourceEntry) -> SourceEntry:
    """The entry with the label, split and patient that a table says."""
    patient, split = said.patient or entry.patient, said.split or entry.split
    return replace(entry, label=plain_label(said.label), split=split, patient=patient)


def _same(path: str, file: Path) -> bool:
    return Path(path).is_file() and Path(path).samefile(file)


def _locator(folder: str, names: Sequence[str]) -> Callable[[str], Path]:
    """The file of a slide by its name; all that are known before they are read are looked for at once."""
    known = find_slides(folder, names)

    def locate(name: str) -> Path:
        return known[name] if name in known else find_slides(folder, [name])[name]

    return locate


def _draw(found: Predicted, out: Path, pictures: Pictures, locate: Callable[[str], Path] | None) -> list[Failure]:
    """Draw the slides of a bag; what went wrong."""
    failures = []
    for path in found.files if pictures.any else ():
        try:
            draw(path, out, pictures, locate)
        except (ValueError, OSError) as error:
            failures.append(Failure(found.row.key, str(error)))
    return failures


def _say(number: int, found: Predicted | Failure, total: int, world: World) -> None:
    if not world.is_main:
        return
    if isinstance(found, Failure):
        print(f"[{number}/{total}] {found.name}: {found.reason}", flush=True)
        return
    chances = ", ".join(f"{value:.4f}" for value in found.row.probabilities.tolist())
    state = "" if found.fresh else ", there already"
    print(f"[{number}/{total}] {found.row.key}: {chances} ({found.row.num_instances:,} instances{state})", flush=True)
