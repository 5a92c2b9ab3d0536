"""What TensorBoard is given after each epoch, read back by its own reader."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from bigbag.config import ConfigError, build_config
from bigbag.data import open_store
from bigbag.engine.live import attention_raster
from bigbag.engine.run import train
from bigbag.engine.world import World


def test_events_hold_curves_and_attention(run_settings, shards):
    config = build_config(run_settings)
    train(config, world=World())
    events = EventAccumulator(str(config.run_dir / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    log = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in log if line["kind"] == "epoch"]
    curves = events.Tensors("val/precision_recall")
    assert [curve.step for curve in curves] == [line["step"] for line in epochs]
    store = open_store(shards)
    names = [bag.key for bag in store.infos if bag.split == "val"]
    num_positive = sum(bag.label == 1 for bag in store.infos if bag.split == "val")
    for curve, line in zip(curves, epochs):
        true, false, _, missed, _, _ = make_ndarray(curve.tensor_proto)
        middle = len(true) // 2  # of the thresholds 0 to 1
        assert true[0] == num_positive and false[0] == len(names) - num_positive
        assert line["val"]["sensitivity"] == true[middle] / (true[middle] + missed[middle])
    tags = events.Tags()["images"]
    assert len(tags) == 2 and {tag.removeprefix("val/attention/") for tag in tags} <= set(names)
    by_key = {info.key: i for i, info in enumerate(store.infos)}
    for tag in tags:
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [line["step"] for line in epochs]
        image = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)).convert("L"))
        bag = store.read(by_key[tag.removeprefix("val/attention/")])
        assert (image > 0).sum() == len(np.unique(bag.coords, axis=0)) and image.max() == 255


def test_raster_puts_each_instance_in_its_place():
    coords = np.array([[10, 7], [12, 7], [16, 11], [10, 11], [10, 11]])
    image = attention_raster(coords, np.array([0.0, 5.0, 2.0, 1.0, 3.0]))
    assert image.shape == (2, 4) and (image > 0).tolist() == [[True, True, False, False], [True, False, False, True]]
    assert image[0].tolist() == [55, 255, 0, 0] and image[1, 0] == 205 and image[1, 3] == 155
    assert attention_raster(np.zeros((1, 2)), np.ones(1)).shape == (1, 1)
    cloud = np.random.default_rng(0).random((5000, 2)) * [1, 0.5]
    image = attention_raster(cloud, np.arange(5000.0))
    assert image.shape[1] == 512 and image.max() == 255


def test_weights_and_biases_is_asked_to_follow_tensorboard(run_settings, monkeypatch):
    """wandb itself is replaced: what it is told, and when, relative to TensorBoard's writer."""
    told = []

    def init(**options):
        assert not (config.run_dir / "tensorboard").exists(), "it follows writers that are made after it only"
        told.append(options)
        return SimpleNamespace(finish=lambda: told.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = build_config({**run_settings, "report": {"wandb": "slides"}})
    train(config, world=World())
    options, end = told
    assert (options["project"], options["name"], options["sync_tensorboard"]) == ("slides", config.name, True)
    assert options["config"]["optim"]["lr"] == config.optim.lr and end == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install bigbag\[wandb\]"):
        train(build_config({**run_settings, "name": "other", "report": {"wandb": "slides"}}), world=World())
