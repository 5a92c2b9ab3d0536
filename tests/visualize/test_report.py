from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import ndimage
from sklearn.datasets import load_digits

from bigbag.engine.metrics import bag_metrics, instance_metrics, probabilities
from bigbag.visualize import write_report
from bigbag.visualize.run_folder import read_run


def make_slide(rng: np.random.Generator, side: int, lesion: bool) -> dict[str, Any]:
    """A tissue-shaped bag of digits, the zeros of a lesion in it, and attention that mostly finds them."""
    images, digits = load_digits(return_X_y=True)
    noise = ndimage.gaussian_filter(rng.normal(size=(side, side)), side / 9)
    middle = np.hypot(*(np.indices((side, side)) - side / 2)) / side
    row, col = np.nonzero(noise / noise.std() - 6 * middle > -2.2)
    y_inst = np.zeros(len(row), np.int8)
    if lesion:
        centre = rng.integers(len(row))
        radius = rng.uniform(1.2, 4.5)
        y_inst[np.hypot(row - row[centre], col - col[centre]) < radius] = 1
    pick = np.where(
        y_inst, rng.choice(np.flatnonzero(digits == 0), len(row)), rng.choice(np.flatnonzero(digits), len(row))
    )
    stain = rng.uniform(0.75, 1.0)
    scores = rng.normal(0, 0.9, len(row)) + 5.5 * y_inst
    return {
        "scores": scores.astype(np.float32),
        "coords": np.stack([col, row], 1).astype(np.int32),
        "y_inst": y_inst,
        "patches": (images[pick] / 16 * stain).astype(np.float16).reshape(-1, 8, 8),
    }


def make_run(
    folder: Path, *, task: str = "binary", num_test: int = 60, side: int = 110, num_slides: int = 3, seed: int = 0
) -> Path:
    """A run folder such as the engine writes."""
    rng = np.random.default_rng(seed)
    (folder / "attention").mkdir(parents=True)
    num_outputs = 1 if task in ("binary", "regression") else 4
    config = {
        "name": "digits-abmil",
        "data": {"shards": "data/digits", "budget_instances": 131072},
        "model": {"name": "ABMIL", "att_dim": 128, "gated": True},
        "task": {"type": task, "num_outputs": num_outputs},
        "train": {"epochs": 12, "monitor": "auroc" if task != "regression" else "r2"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows, results = [], {}
    for split, count in (("val", 30), ("test", num_test)):
        if task == "regression":
            labels = rng.normal(size=count)
            logits = labels + rng.normal(0, 0.4, count)
        elif task == "binary":
            labels = np.arange(count) % 2
            logits = rng.normal(0, 1.6, count) + 5.2 * labels - 2.6
        else:
            labels = rng.integers(0, 4, count) if task == "multiclass" else rng.integers(0, 2, (count, 4))
            logits = rng.normal(size=(count, 4)) + 2 * (np.eye(4)[labels] if task == "multiclass" else labels - 0.5)
        sizes = rng.integers(2000, 20000, count)
        chances = probabilities(logits, task)
        for i in range(count):
            label = labels[i].tolist()
            row = [f"{split}-{i:04d}", split, json.dumps(label), *np.atleast_1d(logits[i]), *np.atleast_1d(chances[i])]
            rows.append([*row, sizes[i]])
        results[split] = bag_metrics(labels, logits, task) | {"loss": 0.31}
    suffixes = [""] if num_outputs == 1 else [f"_{k}" for k in range(num_outputs)]
    columns = [f"{name}{suffix}" for name in ("logit", "probability") for suffix in suffixes]
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "split", "label", *columns, "num_instances"], *rows])
    write_log(folder, rng)
    slides = [make_slide(rng, side, lesion=True) for _ in range(num_slides)]
    for i, slide in enumerate(slides):
        np.savez_compressed(folder / f"attention/{i:02d}-test.npz", key=f"test-{2 * i + 1:04d}", **slide)
    if slides:
        y_inst, scores = (np.concatenate([slide[name] for slide in slides]) for name in ("y_inst", "scores"))
        results["test"] |= instance_metrics(y_inst, scores)
    left_out = [
        {"name": "train-0013", "reason": "no instance"},
        {"name": "test_<b>x</b>", "reason": "features hold NaN"},
    ]
    (folder / "results.json").write_text(json.dumps({**results, "best_epoch": 9, "left_out": left_out}))
    environment = {
        "versions": {"python": "3.11.9", "bigbag": "0.1.0", "torch": "2.13.0"},
        "devices": {"device": "cpu", "ranks": 1, "backend": "torch", "precision": "fp32"},
        "operators": {"attention_pool": "cpu", "segment_sum": "cpu"},
        "memory": {"largest_pack_instances": 131072, "largest_pack_bytes": 16777216},
        "data": {"bags": {"train": 120, "val": 30, "test": 60}, "instances": {"train": 1320000, "val": 1, "test": 2}},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_log(folder: Path, rng: np.random.Generator) -> None:
    lines = []
    for epoch in range(12):
        for step in range(epoch * 15, epoch * 15 + 15):
            loss = 0.7 * np.exp(-step / 50) + 0.05 * rng.random()
            event = {"kind": "train", "epoch": epoch, "step": step, "loss": loss, "lr": 1e-3 * (1 - step / 180)}
            lines.append(event | {"grad_norm": rng.gamma(2), "instances_per_s": 9e4 + 1e4 * rng.normal()})
        val = {
            "auroc": 1 - 0.45 * np.exp(-epoch / 3),
            "accuracy": 0.9,
            "r2": 0.8,
            "loss": 0.7 * np.exp(-epoch / 4) + 0.1,
        }
        train_loss = 0.7 * np.exp(-epoch / 3.4) + 0.03
        lines.append({"kind": "epoch", "epoch": epoch, "step": 15 * epoch + 15, "train_loss": train_loss, "val": val})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
