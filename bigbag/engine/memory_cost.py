"""The working memory of a step, measured on a few instances and told for any number of them."""

from __future__ import annotations

import copy
import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bigbag.bags import Bag, PackedBags
from bigbag.data.buffers import Buffers
from bigbag.data.cap import take_rows
from bigbag.engine.backend import StepModule
from bigbag.memory import peak_bytes
from bigbag.models import MILModel
from bigbag.nn.rows import chunk_rows

_SECONDS = 2.0
_SHARE_OF_RUN = 0.02
_MOST_BAGS = 8
_PAGE = 64 * 1024
_PROBED_CHUNKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Recomputation:
    """How activations are kept low without changing a result.

    Attributes:
        active: activations are recomputed in the backward pass.
        chunk_instances: instances that go through a feature extractor together; None: as many as its rows allow.
    """

    active: bool
    chunk_instances: int | None

    def apply(self, model: MILModel) -> None:
        model.activation_checkpointing, model.chunk_instances = self.active, self.chunk_instances


@dataclass(frozen=True)
class StepCost:
    """Bytes that a step on T instances in B bags takes beyond these and the weights, linear in T and B."""

    fixed: float
    per_instance: float
    per_bag: float

    def __call__(self, num_instances: int, num_bags: int) -> float:
        return self.fixed + self.per_instance * num_instances + self.per_bag * num_bags


def first_rows(bag: Bag, count: int) -> Bag:
    """The bag of the first ``count`` instances, its features where they are."""
    others = take_rows(replace(bag, x=np.empty((bag.num_instances, 0))), np.arange(count))
    return replace(others, x=bag.x[:count])


def num_probed(in_shape: Sequence[int], device: torch.device) -> int:
    """The most instances that :class:`StepProbe` looks at, of this shape."""
    return _PROBED_CHUNKS[-1] * chunk_rows(torch.empty(1, *in_shape, device=device))


class StepProbe:
    """Steps of a copy of a model on instances of a bag.

    Args:
        model: the model; it stays as it is.
        sample: the bag; its first instances count.
        device: where it computes.
        dtype: precision of the features in a pack; None: that of the bag.
    """

    def __init__(self, model: MILModel, sample: Bag, device: torch.device, dtype: torch.dtype | None) -> None:
        self.sample, self.device, self.dtype = sample, device, dtype
        self.model = copy.deepcopy(model).to(device)
        self._known: dict[tuple[Any, ...], StepCost] = {}

    def cost(
        self,
        recomputation: Recomputation,
        precision: str,
        training: bool,
        packs: Sequence[tuple[int, int]],
        passes: int,
    ) -> StepCost:
        """The cost of packs of so many instances and bags; gradients of the weights are in it, in training.

        Measured with one chunk of instances, two, four and so on up to the largest pack, as long as the next takes no
        more than two seconds, or a fiftieth of the time that ``passes`` over all packs will; and with the last of
        these numbers cut into up to eight bags. Where attention makes large numbers slow, the prediction is the better
        the longer the run.
        """
        most_instances, most_bags = max(rows for rows, _ in packs), max(bags for _, bags in packs)
        run_instances = passes * sum(rows for rows, _ in packs)
        asked = (recomputation, precision, training, most_instances, most_bags, run_instances)
        if asked not in self._known:
            self._known[asked] = self._measure(*asked)
        return self._known[asked]

    def _measure(
        self,
        recomputation: Recomputation,
        precision: str,
        training: bool,
        most_instances: int,
        most_bags: int,
        run_instances: int,
    ) -> StepCost:
        recomputation.apply(self.model)
        module = StepModule(self.model, precision).train(training)
        row = torch.empty(1, *self.sample.x.shape[1:], device=self.device)
        chunk = min(chunk_rows(row), chunk_rows(row, recomputation.chunk_instances))
        self._peak(module, min(256, most_instances), 1)  # so that what is made once and kept does not count
        gc.collect()
        points = [(0, 0, 0)]
        for num_instances in sorted({min(chunks * chunk, most_instances) for chunks in _PROBED_CHUNKS}):
            started = time.process_time()  # others on the machine must not change what is found
            points.append((num_instances, self._bags(num_instances, 1), self._peak(module, num_instances, 1)))
            seconds = time.process_time() - started
            if len(points) > 2 and 3 * seconds > max(_SECONDS, _SHARE_OF_RUN * run_instances * seconds / num_instances):
                break
        (n0, b0, p0), (n1, b1, p1) = points[-2:]
        cut = min(most_bags, _MOST_BAGS, n1)
        per_bag = max(0.0, (self._peak(module, n1, cut) - p1) / (cut - b1)) if cut > b1 else 0.0
        per_instance = max(0.0, (p1 - p0 - per_bag * (b1 - b0)) / (n1 - n0))
        return StepCost(p1 - per_instance * n1 - per_bag * b1, per_instance, per_bag)

    def _bags(self, num_instances: int, num_bags: int) -> int:
        """Bags that so many instances are laid in: more than asked for where the sample has too few for one."""
        return max(num_bags, -(-num_instances // self.sample.num_instances))

    def _peak(self, module: StepModule, num_instances: int, num_bags: int) -> int:
        cuts = np.linspace(0, num_instances, self._bags(num_instances, num_bags) + 1).astype(int)
        bags = [first_rows(self.sample, size) for size in np.diff(cuts)]
        in_place = len(bags) == 1 and self.dtype is None
        pack = PackedBags.from_bags(bags, dtype=self.dtype, share_x=in_place).to(self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return peak_bytes(lambda: _step(module, pack), self.device.type, warm_up=False)


def _step(module: StepModule, pack: PackedBags) -> None:
    if not module.training:
        with torch.no_grad():
            module(pack, "logits and scores")
        return
    torch.stack(list(module(pack, "loss").values())).sum().backward()
    module.zero_grad(set_to_none=True)


def most_held(sizes: Sequence[int], count: int) -> int:
    """Most bytes of ``count`` buffers while packs of ``sizes`` bytes pass, each in use while the next ``count - 1`` are
    read."""
    # A byte stands for a page of 64 KiB: what is asked about may be more than there is.
    buffers, in_use, most = Buffers(count), deque[Any](maxlen=count - 1), 0
    for size in sizes:
        in_use.append(buffers.lease(-(-size // _PAGE)))
        most = max(most, buffers.num_bytes)
    return most * _PAGE
