"""Attention maps of a few test bags, saved for the report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bigbag.bags import Bag, PackedBags
from bigbag.config import Config
from bigbag.data import BagStore
from bigbag.engine.evaluate import Predictions


def save_attention_maps(
    config: Config,
    store: BagStore,
    forward: Callable[[PackedBags, str], Any],
    predictions: Predictions | None,
    device: torch.device,
) -> None:
    """Write ``attention/<key>.npz`` for ``report.num_slides`` positive test bags, from the surest to the most missed.

    Each file holds ``key``, ``scores (N,)`` float32 and, where known, ``coords (N, c)``, ``y_inst (N,)`` and
    ``patches (N, h, w)``; where the features are not pixels, ``rgb (N, 3)`` uint8, three principal components.
    """
    folder = config.run_dir / "attention"
    shutil.rmtree(folder, ignore_errors=True)
    if predictions is None or config.task.type != "binary":
        return
    folder.mkdir(parents=True)
    positive = np.array([store.infos[bag].label == 1 for bag in predictions.bags], dtype=bool)
    ranked = predictions.bags[positive][np.argsort(-predictions.logits[positive, 0], kind="stable")]
    places = np.linspace(0, len(ranked) - 1, min(config.report.num_slides, len(ranked))).astype(int)
    for rank, bag_number in enumerate(ranked[places]):
        bag = store.read(int(bag_number))
        with torch.no_grad():
            over = config.data.budget_bytes is not None and bag.x.nbytes > config.data.budget_bytes
            pack = PackedBags.from_bags([bag], share_x=over)
            _, scores = forward(pack.to(device), "logits and scores")
        arrays = {"key": np.array(bag.key), "scores": scores.float().cpu().numpy(), **_picture(bag, store.patch_shape)}
        arrays |= {name: v for name, v in (("coords", bag.coords), ("y_inst", bag.y_inst)) if v is not None}
        safe_name = re.sub(r"[^A-Za-z0-9_-]+", "_", bag.key)
        np.savez_compressed(folder / f"{rank:02d}-{safe_name}.npz", **arrays)


def _picture(bag: Bag, patch_shape: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """Something to draw each instance with: its pixels, or a colour from its features."""
    if patch_shape is not None:
        return {"patches": np.asarray(bag.x, dtype=np.float16).reshape(-1, *patch_shape)}
    x = bag.x.reshape(len(bag.x), -1)
    if min(x.shape) < 3:
        return {}
    generator = np.random.default_rng(0)
    sample = _wide(x[generator.permutation(len(x))[:10_000]])
    centre = sample.mean(0)
    _, _, directions = torch.linalg.svd(sample - centre, full_matrices=False)
    # Some rows at a time: the bag may be larger than memory.
    starts = range(0, len(x), len(sample))
    pieces = [(_wide(x[start : start + len(sample)]) - centre) @ directions[:3].T for start in starts]
    components = torch.cat(pieces).numpy()
    low, high = np.percentile(components, [1, 99], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return {"rgb": (255 * np.clip(scaled, 0, 1)).astype(np.uint8)}


def _wide(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32))
