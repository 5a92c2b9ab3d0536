"""Time of a training step with ``engine.compile``, as a share of the time without.

    python -m tests.engine.measure_compiling [INSTANCES]

ABMIL behind 1024 -> 512 -> 512 with layer norms, GELU and dropout, one bag in fp32, one thread; medians of 7 steps of
each, in turn, activations kept and recomputed.
"""

import statistics
import sys

import torch

from bigbag import PackedBags, Segments
from bigbag.bench.measure import machine, seconds
from bigbag.config import build_config
from bigbag.engine.compiling import compile_extractor
from bigbag.models import ABMIL


def build(compiled: bool, recompute: bool) -> ABMIL:
    nn = torch.nn
    layers = [
        layer for n in (1024, 512) for layer in (nn.Linear(n, 512), nn.LayerNorm(512), nn.GELU(), nn.Dropout(0.25))
    ]
    model = ABMIL((1024,), feat_ext=nn.Sequential(*layers)).train()
    model.activation_checkpointing = recompute
    settings = {"name": "run", "data": {"shards": ""}, "model": {"name": "ABMIL"}, "engine": {"compile": compiled}}
    compile_extractor(model, build_config(settings))
    return model


def main(num_instances: int) -> None:
    torch.set_num_threads(1)
    segments, y = Segments.from_sizes((num_instances,)), torch.ones(1)
    pack = PackedBags(torch.randn(num_instances, 1024), segments.offsets, segments.sizes, y=y)
    print(machine("cpu"))
    for recompute in (False, True):
        models = [build(compiled, recompute) for compiled in (False, True)]
        times: list[list[float]] = [[], []]
        for turn in range(8):
            for model, of in zip(models, times):
                of.append(seconds(lambda m=model: sum(m.compute_loss(y, pack)[1].values()).backward(), "cpu"))
                model.zero_grad()
            if not turn:
                times = [[], []]
        plain, compiled = map(statistics.median, times)
        print(f"recompute {recompute}: {plain:.3f} s, compiled {compiled:.3f} s, {compiled / plain:.2f} of it")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12_000)
