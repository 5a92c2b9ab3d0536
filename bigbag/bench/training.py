"""The engine's training loop, made ready to be measured epoch by epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from bigbag.config import Config
from bigbag.data import open_store
from bigbag.engine.backend import build_backend
from bigbag.engine.checkpoint import Progress
from bigbag.engine.trainer import Trainer
from bigbag.engine.world import World
from bigbag.models import build_model


def make_trainer(config: Config, backend: str, world: World) -> Trainer:
    """A trainer of ``config.model`` on all bags of ``config.data.shards``, started; the caller closes its log."""
    store = open_store(config.data.shards)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.feature_shape, config.task)
    carrier = build_backend(backend, model, config, world)
    trainer = Trainer(config, store, {"train": range(len(store))}, model, carrier, world)
    trainer.start(Progress())
    return trainer


def waiting_share(config: Config, epochs: int = 3) -> tuple[float, float]:
    """Seconds of the last of some epochs in this process, and the share of it in which steps wait for their packs."""
    trainer = make_trainer(config, "torch", World())
    waited, packs = 0.0, trainer.feed.packs

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal waited
        items = iter(packs(*args, **kwargs))
        while True:
            started = time.perf_counter()
            item = next(items, None)
            waited += time.perf_counter() - started
            if item is None:
                return
            yield item
            del item  # its buffer is for another pack

    trainer.feed.packs = timed  # type: ignore[method-assign]
    for _ in range(epochs):
        waited, started = 0.0, time.perf_counter()
        trainer.train_epoch(Progress())
    elapsed = time.perf_counter() - started
    trainer.log.close()
    return elapsed, waited / elapsed
