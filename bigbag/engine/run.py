"""One run from settings to results: ``runs/<name>/`` and everything in it but the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bigbag import ops
from bigbag.config import Config, ConfigError, check_arguments
from bigbag.data import BagStore, PatientStore, capped_sizes, count_capped, open_store, split_bags
from bigbag.data.split_tables import splits_table
from bigbag.data.splits import splits_digest
from bigbag.engine.attention_maps import save_attention_maps
from bigbag.engine.backend import StepModule, build_backend, choose_backend
from bigbag.engine.compiling import compile_extractor
from bigbag.engine.environment import banner, describe_environment
from bigbag.engine.evaluate import Predictions, predict_bags, score
from bigbag.engine.feed import configured_augmentation
from bigbag.engine.labels import check_labels
from bigbag.engine.memory_plan import MemoryPlan, plan_memory, strictest
from bigbag.engine.monitor import check_monitor
from bigbag.engine.predictions import write_predictions
from bigbag.engine.trainer import Trainer
from bigbag.engine.world import World, import_deepspeed, start_world
from bigbag.files import alone_in, read_json, write_atomically, write_json
from bigbag.memory import PeakMemory
from bigbag.models import MODELS, MILModel, build_model, load_model
from bigbag.models.criteria import fit_task

_EVALUATED = ("val", "test")
SPLITS_NAME = "splits.csv"
_WRITE_AGAIN = "`bigbag train` writes it again, without training"
_UNKNOWN_RUN = "remove it, if the run there is that of these settings, or train with --restart to delete the run"


def train(config: Config, store: BagStore | None = None, world: World | None = None) -> dict[str, Any]:
    """Train, evaluate the best model and write the results; resume where the run's folder holds a checkpoint.

    Args:
        config: the settings.
        store: the bags; None opens ``config.data.shards``.
        world: the ranks; None joins those of the launcher's environment.

    Returns:
        the content of ``results.json``.

    Raises:
        ValueError: settings, data or a loss that can't be used; the message names the culprit and the remedy.
        FileNotFoundError: missing shards.
    """
    backend_name = choose_backend(config.engine.backend)
    world = (world or start_world(backend_name, config.engine.threads, config.engine.timeout_s)).sharing_bags(
        config.parallel.bag
    )
    _use_impl(config)
    store, splits = _open(config, store)
    fitted, model, memory = _prepare(config, store, splits, world)
    compile_extractor(model, config)
    # Not before: settings that no model takes claim no folder.
    with _claimed_run_dir(config, store, splits, world):
        return _train(fitted, store, splits, model, memory, backend_name, world)


def _train(
    config: Config,
    store: BagStore,
    splits: Mapping[str, Sequence[int]],
    model: MILModel,
    memory: MemoryPlan,
    backend_name: str,
    world: World,
) -> dict[str, Any]:
    """:func:`train`, once all is there and the run's folder is this run's."""
    memory = strictest(world.gather(memory))
    memory.recomputation.apply(model)
    environment = describe_environment(config, store, splits, memory, backend_name, world)
    if world.is_main:
        write_json(config.run_dir / "environment.json", environment)
        print(banner(environment, config.name), flush=True)
    with PeakMemory(world.device) as peak:
        backend = build_backend(backend_name, model, config, world)
        trainer = Trainer(config, store, splits, model, backend, world, memory.most_between_steps)
        progress = trainer.fit()
        world.barrier()
        results = evaluate(config, store, world, splits, progress.best_epoch, progress.skipped, model.chunk_instances)
    measured = max((of_rank for of_rank in world.gather(peak.num_bytes) if of_rank is not None), default=None)
    if world.is_main:
        environment["memory"]["measured_peak_bytes"] = measured
        write_json(config.run_dir / "environment.json", environment)
    return results


def plan(config: Config, num_ranks: int = 1) -> MemoryPlan:
    """What :func:`train` would take of each device's memory, and the settings it would choose; nothing is written.

    Args:
        config: the settings.
        num_ranks: processes of the run, all on this machine.

    Raises:
        ValueError: as :func:`train`.
    """
    if num_ranks < 1 or num_ranks % config.parallel.bag:
        raise ConfigError(f"plan: ranks is {num_ranks}, expected a multiple of parallel.bag = {config.parallel.bag}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if choose_backend(config.engine.backend) == "deepspeed" or (num_ranks > 1 and config.engine.backend == "auto"):
        import_deepspeed(device)  # a part of what each process takes
    world = World(size=num_ranks, local_size=num_ranks, bag_ranks=config.parallel.bag, device=device)
    _use_impl(config)
    store, splits = _open(config)
    return _prepare(config, store, splits, world)[-1]


def _use_impl(config: Config) -> None:
    check_arguments("engine.impl", config.engine.impl, list(ops.chosen("cpu")))
    ops.use_impl(config.engine.impl)


def _open(config: Config, store: BagStore | None = None) -> tuple[BagStore, dict[str, tuple[int, ...]]]:
    """The bags and their splits, checked against the settings."""
    store = store or open_configured_store(config)
    splits = split_bags(store, config.data.splits)
    _check_run(config, store, splits)
    return store, splits


def _prepare(
    config: Config, store: BagStore, splits: Mapping[str, Sequence[int]], world: World
) -> tuple[Config, MILModel, MemoryPlan]:
    """The settings with the task fitted to the training labels, the model as it starts, and its memory plan."""
    task = fit_task(config.task, [store.infos[bag].label for bag in splits["train"]])
    config = config.model_copy(update={"task": task})
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.feature_shape, config.task)
    return config, model, plan_memory(config, store, splits, model, world)


def evaluate(
    config: Config,
    store: BagStore | None = None,
    world: World | None = None,
    splits: Mapping[str, Sequence[int]] | None = None,
    best_epoch: int | None = None,
    skipped: Mapping[str, int] | None = None,
    chunk_instances: int | None = None,
) -> dict[str, Any]:
    """Evaluate the best model of a run on its validation and test bags and write results and predictions.

    Args:
        config: the settings of the run.
        store: the bags; None opens ``config.data.shards``.
        world: the ranks; None joins those of the launcher's environment.
        splits: split name to bag numbers; None takes those of the run (its ``splits.csv``).
        best_epoch: epoch of the best model, from 0; None reads it from the run's earlier results.
        skipped: key of a bag that training went without to the number of steps; None: as ``best_epoch``.
        chunk_instances: instances that go through a feature extractor together; None: ``train.chunk_instances``.

    Returns:
        the content of ``results.json``.
    """
    world = world or start_world(choose_backend(config.engine.backend), config.engine.threads, config.engine.timeout_s)
    world = world.sharing_bags(config.parallel.bag)
    store = store or open_configured_store(config)
    splits = splits or _splits_of_run(config, store)
    model = load_model(config.run_dir).to(world.device)
    model.chunk_instances = chunk_instances or config.train.chunk_instances
    forward = StepModule(model, config.train.precision).eval()
    if best_epoch is None:
        best_epoch = _read_results(config)["best_epoch"] - 1
    results: dict[str, Any] = {}
    predictions: dict[str, Predictions] = {}
    for split in (name for name in _EVALUATED if splits.get(name)):
        predictions[split] = predict_bags(forward, store, splits[split], config, world, with_instances=True)
        threshold = results.get("val", {}).get("instance_best_threshold")
        results[split] = score(predictions[split], store, model, config, threshold)
    results |= {"best_epoch": best_epoch + 1, "left_out": list(store.left_out), **_capped(config, store, splits)}
    results |= _changed(config, store, splits.get("train", ()))
    if config.train.nonfinite == "skip":
        skipped = _read_results(config)["skipped_bags"] if skipped is None else skipped
        results["skipped_bags"] = dict(sorted(skipped.items()))
    if world.is_main:
        write_predictions(config, store, predictions)
        save_attention_maps(config, store, forward, predictions.get("test"), world.device)
        write_json(config.run_dir / "results.json", results)
    world.barrier()
    return results


def open_configured_store(config: Config) -> BagStore:
    """The packed set that the config names."""
    data = config.data
    store = open_store(
        data.shards,
        check_digests=data.check_digests,
        cache_dir=data.cache_dir,
        cache_bytes=data.cache_bytes,
        allow_pipe=data.allow_pipe,
    )
    return PatientStore(store) if data.bag == "patient" else store


def _check_run(config: Config, store: BagStore, splits: Mapping[str, Sequence[int]]) -> None:
    check_labels(store, splits, config.task)
    _check_fields(config, store)
    check_monitor(config, store, splits)


_PACKING_REMEDIES = {
    "adj": "add data.graph to the config (data.graph={} takes the defaults)",
    "coords": "give the bags of the source coordinates",
}


def _check_fields(config: Config, store: BagStore) -> None:
    """Refuse a set that lacks what the model needs, or whose graph is not the one that the config describes."""
    wanted = None if config.data.graph is None else config.data.graph.model_dump(mode="json")
    if wanted is not None and store.fields is not None and "adj" in store.fields and store.graph not in (None, wanted):
        raise ConfigError(
            f"data.graph is {wanted}, but {config.data.shards} was packed with {store.graph}: pack again with "
            "bigbag pack --overwrite, or take those settings"
        )
    model = MODELS.get(config.model.name)
    if model is not None and config.parallel.bag > 1 and not model.in_parts:
        able = ", ".join(name for name, other in MODELS.items() if other.in_parts)
        raise ConfigError(
            f"parallel.bag is {config.parallel.bag}, but model {config.model.name} computes on whole bags: set it "
            f"to 1, or take one of {able}"
        )
    if config.data.augment.mixup and model is not None and model.hard_labels:
        raise ConfigError(f"data.augment.mixup mixes labels, but model {config.model.name} takes them for classes")
    for name in model.needs if model is not None and store.fields is not None else ():
        if name not in store.fields:  # type: ignore[operator]
            raise ConfigError(
                f"model {config.model.name} needs {name}, which not every bag of {config.data.shards} has: "
                f"{_PACKING_REMEDIES[name]} and pack again with bigbag pack --overwrite"
            )


def run_identity(config: Config, store: BagStore, splits: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Digests of what determines the result of a run: a run goes on only where all of them are the same."""
    return {"config": config.digest(), "data": store.digest(), "splits": splits_digest(store, splits)}


def _splits_of_run(config: Config, store: BagStore) -> dict[str, tuple[int, ...]]:
    """The splits in the run's ``splits.csv``, whole."""
    path, identity = config.run_dir / SPLITS_NAME, config.run_dir / "identity.json"
    if not config.run_dir.is_dir():
        raise ConfigError(f"{config.run_dir}: no such run; train it first, or give the name and out of one (name=...)")
    splits = split_bags(store, table=str(path))
    there = read_json(identity, _UNKNOWN_RUN) if identity.is_file() else {}
    if there.get("data") == store.digest() and there.get("splits") != splits_digest(store, splits):
        raise ValueError(f"{path}: has not the splits that the run was trained with: {_WRITE_AGAIN}")
    return splits


def delete_run(folder: Path) -> None:
    """Delete the folder of a run, if there is one.

    Raises:
        ConfigError: the folder holds something else.
        OSError: it can't be deleted.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not any((folder / name).exists() for name in ("identity.json", "checkpoints")):
        raise ConfigError(
            f"{folder}: holds no run (identity.json is missing), so it is not deleted: choose another name "
            "(name=...), or delete it yourself"
        )
    # Checkpoints first, since a run would go on from what an interrupted deletion left of them.
    with _only_training(folder, World()):
        for part in (folder / "checkpoints", folder):
            shutil.rmtree(part)


@contextmanager
def _claimed_run_dir(
    config: Config, store: BagStore, splits: Mapping[str, Sequence[int]], world: World
) -> Iterator[None]:
    """Make the run's folder, or make sure that the run in it has the same settings, data and splits."""
    folder = config.run_dir
    path = folder / "identity.json"
    identity = run_identity(config, store, splits)
    if path.is_file():
        there = read_json(path, _UNKNOWN_RUN)
        for what, remedy in (("config", "settings"), ("data", "data"), ("splits", "splits")):
            if there.get(what) != identity[what]:
                raise ConfigError(
                    f"{folder} holds a run with other {remedy}{_differences(config) if what == 'config' else ''}: "
                    f"choose another name (name=...), or train with --restart to delete that run"
                )
    world.barrier()
    with _only_training(folder, world):
        if world.is_main:
            write_atomically(folder / "config.yaml", config.to_yaml())
            of_bag = {bag: name for name, bags in splits.items() if name != "unassigned" for bag in bags}
            table = splits_table(store.infos, [of_bag.get(i) for i in range(len(store))])
            write_atomically(folder / SPLITS_NAME, table)
            write_json(path, identity)
        world.barrier()
        yield


@contextmanager
def _only_training(folder: Path, world: World) -> Iterator[None]:
    """Keep other trainings out of a run's folder; all ranks call it."""
    with alone_in(folder / "checkpoints") if world.is_main else nullcontext(True) as alone:
        if not all(world.gather(alone)):
            raise ConfigError(
                f"{folder}: another training is at this run: wait for it or stop it, or choose another name (name=...)"
            )
        yield


def _differences(config: Config) -> str:
    """The settings in which the run's folder differs from ``config``, as text."""
    import yaml

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix[:-1]: value}
        return {k: v for key, below in value.items() for k, v in flatten(below, f"{prefix}{key}.").items()}

    try:
        there = flatten(yaml.safe_load((config.run_dir / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return " (its config.yaml, which would tell them, cannot be read)"
    here = flatten(yaml.safe_load(config.to_yaml()))
    changed = [f"{key}: {there.get(key)!r} -> {here.get(key)!r}" for key in here if there.get(key) != here[key]]
    return f" ({'; '.join(changed)})" if changed else ""


def _capped(config: Config, store: BagStore, splits: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What an instance cap left out, for the results."""
    cap = config.data.max_instances
    if cap is None:
        return {}
    num_bags, left_out = count_capped([store.sizes[bag] for part in splits.values() for bag in part], cap)
    return {"capped": {"max_instances": cap, "num_bags": num_bags, "instances_left_out": left_out}}


def _changed(config: Config, store: BagStore, bags: Sequence[int]) -> dict[str, Any]:
    """How training departed from every whole bag once an epoch, for the results."""
    found: dict[str, Any] = {}
    sampling = config.data.sampling
    if sampling is not None:
        draws = {"training_bags": len(bags), "draws_per_epoch": sampling.num_bags or len(bags)}
        found["sampling"] = {**sampling.model_dump(mode="json", exclude={"num_bags"}), **draws}
    sizes = capped_sizes([store.sizes[bag] for bag in bags], config.data.max_instances)
    counted = configured_augmentation(config, bags).counted(sizes)
    return {**found, **({"augmentation_per_epoch": counted} if counted else {})}


def _read_results(config: Config) -> dict[str, Any]:
    path = config.run_dir / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train the run, or, if it is trained, {_WRITE_AGAIN}")
    results = read_json(path, _WRITE_AGAIN)
    if not isinstance(results.get("best_epoch"), int):
        raise ValueError(f"{path}: best_epoch is {results.get('best_epoch')!r}, expected a number: {_WRITE_AGAIN}")
    return results
