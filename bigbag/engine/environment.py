"""What a run stands on: versions, devices, implementations, memory; printed as a banner and kept beside the results."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bigbag import ops
from bigbag.config import Config
from bigbag.data import BagStore
from bigbag.engine import precision
from bigbag.engine.memory_plan import MemoryPlan
from bigbag.engine.world import World

_PACKAGES = ("bigbag", "torch", "deepspeed", "webdataset", "xformers", "triton", "numba", "numpy", "scikit-learn")


def describe_environment(
    config: Config,
    store: BagStore,
    splits: Mapping[str, Sequence[int]],
    memory: MemoryPlan,
    backend: str,
    world: World,
) -> dict[str, Any]:
    """Versions, devices, operator implementations and expected memory of a run, JSON-able."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": {
            "machine": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "ranks": world.size,
            "threads_per_rank": torch.get_num_threads(),
            "backend": _in_words(backend, config),
            "precision": precision.in_words(world.device.type, config.train.precision),
        },
        "operators": ops.chosen(world.device),
        "memory": memory.to_json(),
        "data": {
            "shards": config.data.shards,
            "bags": {name: len(bags) for name, bags in splits.items()},
            "instances": {name: sum(store.infos[b].num_instances for b in bags) for name, bags in splits.items()},
            "feature_shape": list(store.feature_shape),
            "feature_dtype": str(np.dtype(store.feature_dtype)),
        },
    }


def _in_words(backend: str, config: Config) -> str:
    if backend == "deepspeed":
        return f"deepspeed, ZeRO {config.engine.zero_stage}"
    unused = [f"engine.{name}" for name in ("zero_stage", "deepspeed") if getattr(config.engine, name)]
    return backend + (f" (only under a launcher: {', '.join(unused)})" if unused else "")


def banner(environment: dict[str, Any], name: str) -> str:
    """A few lines for the start of a run."""
    devices, data, memory = environment["devices"], environment["data"], environment["memory"]
    bags = ", ".join(
        f"{split} {count} bags / {data['instances'][split]:,} instances" for split, count in data["bags"].items()
    )
    operators = ", ".join(f"{operator} -> {impl}" for operator, impl in environment["operators"].items())
    return "\n".join(
        [
            f"bigbag {environment['versions']['bigbag']}: run {name}",
            f"  device     {devices['device']}, {devices['ranks']} rank(s) x {devices['threads_per_rank']} thread(s), "
            f"{devices['backend']}, {devices['precision']}",
            f"  data       {bags}; features {tuple(data['feature_shape'])} {data['feature_dtype']}",
            f"  operators  {operators}",
            *memory_lines(memory),
        ]
    )


def memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """What a :class:`~bigbag.engine.memory_plan.MemoryPlan` (its JSON) says, as lines of the banner."""
    way = memory["recomputation"]
    chunks = f" in chunks of {way['chunk_instances']:,} instances" if way["chunk_instances"] else ""
    parts = ", ".join(
        f"{what} {_mib(memory[f'{name}_bytes'])}"
        for name, what in (("process", "process"), ("states", "optimiser"), ("packs", "packs"), ("step", "step"))
    )
    limit = "" if memory["limit_bytes"] is None else f" of {_mib(memory['limit_bytes'])}"
    lines = [
        f"  memory     peak {_mib(memory['peak_bytes'])}{limit} expected on each device: {parts}",
        f"             largest pack {memory['largest_pack_instances']:,} instances, "
        f"{_mib(memory['largest_pack_bytes'])}{' and its features in their file' * memory['largest_pack_in_place']}; "
        f"activations {'recomputed' if way['active'] else 'kept'}{chunks}",
    ]
    if not memory["fits"]:
        lines.append("             that does not fit; what lowers it:")
        lines += [f"               {setting}: {_mib(peak)}" for setting, peak in memory["remedies"].items()]
    return lines


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
