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
from bigbag.data import BagStore, capped_sizes
from bigbag.engine.feed import budget_instances
from bigbag.engine.world import World

_CHECKPOINT_BYTES = 256 * 2**20
_PACKAGES = ("bigbag", "torch", "deepspeed", "webdataset", "xformers", "triton", "numba", "numpy", "scikit-learn")


def describe_environment(
    config: Config,
    store: BagStore,
    splits: Mapping[str, Sequence[int]],
    model: torch.nn.Module,
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
            "backend": backend + (f", ZeRO {config.engine.zero_stage}" if backend == "deepspeed" else ""),
            "precision": config.train.precision,
        },
        "operators": ops.chosen(world.device),
        "memory": _memory(config, store, splits, model),
        "data": {
            "shards": config.data.shards,
            "bags": {name: len(bags) for name, bags in splits.items()},
            "instances": {name: sum(store.infos[b].num_instances for b in bags) for name, bags in splits.items()},
            "feature_shape": list(store.feature_shape),
            "feature_dtype": str(np.dtype(store.feature_dtype)),
        },
    }


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
            f"  memory     largest pack {memory['largest_pack_instances']:,} instances = "
            f"{memory['largest_pack_bytes'] / 2**20:.0f} MiB, {memory['packs_in_flight']} in flight per rank, "
            f"activations {'recomputed' if memory['activation_checkpointing'] else 'kept'}; "
            f"weights, gradients and AdamW states {memory['model_bytes'] / 2**20:.1f} MiB",
        ]
    )


def largest_pack_instances(config: Config, store: BagStore, bags: Sequence[int]) -> int:
    """The most instances that one pack of ``bags`` can have."""
    sizes = capped_sizes([store.sizes[bag] for bag in bags], config.data.max_instances)
    return max(max(sizes, default=0), min(budget_instances(config, store), sum(sizes)))


def wants_checkpointing(config: Config, store: BagStore, bags: Sequence[int]) -> bool:
    """Whether activations are recomputed: as set or, for "auto", with a chunk size, or a pack that is large in fp32 or
    over ``data.budget_bytes``."""
    setting = config.train.activation_checkpointing
    if setting != "auto":
        return setting
    if config.train.chunk_instances is not None:
        return True
    width, largest = int(np.prod(store.feature_shape)), largest_pack_instances(config, store, bags)
    budget, stored = config.data.budget_bytes, np.dtype(store.feature_dtype).itemsize
    if budget is not None and largest * width * stored > budget * config.parallel.bag:
        return True
    return largest * width * 4 > _CHECKPOINT_BYTES * config.parallel.bag


def _memory(
    config: Config, store: BagStore, splits: Mapping[str, Sequence[int]], model: torch.nn.Module
) -> dict[str, int | bool]:
    largest = largest_pack_instances(config, store, [bag for bags in splits.values() for bag in bags])
    row_bytes = int(np.prod(store.feature_shape)) * np.dtype(store.feature_dtype).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "activation_checkpointing": wants_checkpointing(config, store, splits["train"]),
        "largest_pack_instances": largest,
        "largest_pack_bytes": largest * row_bytes,
        "packs_in_flight": 2 + config.data.num_workers * config.data.prefetch_packs,
        "model_bytes": parameters * 4 * 4,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
