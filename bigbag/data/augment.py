"""Changes to training bags, off by default, each drawn from (seed, epoch, bag, draw): the same whatever reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bigbag.bags import Bag, PackedBags
from bigbag.data.cap import take_rows
from bigbag.data.join import join_bags
from bigbag.data.plan import derive_seed

_MIXUP, _DROPOUT, _NOISE = 0xA1, 0xA2, 0xA3
_PIECE = 1 << 18

Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class Augmentation:
    """What is done to each training bag, in this order.

        mixup:             X' = (n - k random rows of X, k random rows of X_o),   y' = (1 - k/n) y + k/n y_o,
                           k = min(n_o, round((1 - l) n)),   l ~ Beta(mixup, mixup),   o another training bag
        instance_dropout:  n - round(instance_dropout n) random rows, at least one
        feature_noise:     X' = X + feature_noise E,   E ~ N(0, 1)

    Bags keep their number of instances under mixup, so that the plan of an epoch does not depend on it. It is mixup
    (Zhang et al., ICLR 2018, arXiv:1710.09412) of bags rather than of features, as in pseudo-bag mixup (Liu et al.,
    IEEE TMI 2024, arXiv:2306.16180), with random parts in place of pseudo-bags. The parts keep the edges within them;
    weights of a graph are not normalised anew.

    Args:
        mixup: the parameter of the Beta distribution; 0: no mixup.
        instance_dropout: share of the instances of each bag that are left out, below 1.
        feature_noise: standard deviation of the noise, in the unit of the features.
        partners: the bags that others are mixed with.
    """

    mixup: float = 0.0
    instance_dropout: float = 0.0
    feature_noise: float = 0.0
    partners: tuple[int, ...] = ()

    def sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the changed bags, for planning."""
        return tuple(self._num_kept(size) for size in sizes)

    def _num_kept(self, size: int) -> int:
        return max(min(size, 1), size - round(self.instance_dropout * size))

    def change(self, bag: Bag, key: Key, read: Callable[[int], Bag]) -> Bag:
        """The bag after mixup and dropout.

        Args:
            bag: the bag.
            key: (seed, epoch, number of the bag, how often it has been drawn before in the epoch).
            read: gives any other bag by its number.
        """
        if self.mixup and bag.num_instances and len(self.partners) > 1:
            rng = _generator(key, _MIXUP)
            place = int(rng.integers(len(self.partners)))
            other = self.partners[place if self.partners[place] != key[2] else place - 1]
            bag = mix(bag, read(other), float(rng.beta(self.mixup, self.mixup)), rng)
        if self.instance_dropout:
            kept = _rows(_generator(key, _DROPOUT), bag.num_instances, self._num_kept(bag.num_instances))
            bag = take_rows(bag, kept)
        return bag

    def add_noise(self, pack: PackedBags, keys: Sequence[Key]) -> None:
        """Add the noise to the features of a pack, in place.

        Raises:
            ValueError: features that are integers.
        """
        if not self.feature_noise:
            return
        if not pack.x.is_floating_point():
            raise ValueError(
                f"data.augment.feature_noise: features are {pack.x.dtype}, expected floats; set data.dtype"
            )
        before = (0,) * pack.num_bags if pack.parts is None else pack.parts.before
        step = max(1, _PIECE // max(1, math.prod(pack.x.shape[1:])))
        for key, x, first in zip(keys, pack.x.split(list(pack.sizes)), before):
            # Each run of ``step`` rows of the whole bag has a seed of its own, so that a rank draws for its part alone.
            for start in range(first - first % step, first + len(x), step):
                stop = min(start + step, first + len(x))
                rng = np.random.Generator(np.random.SFC64(derive_seed(*key, _NOISE, start // step)))
                noise = rng.standard_normal((stop - start, *x.shape[1:]), dtype=np.float32)[max(first - start, 0) :]
                rows = x[stop - first - len(noise) : stop - first]
                rows.copy_(rows.float().add_(torch.from_numpy(noise), alpha=self.feature_noise))

    def counted(self, sizes: Sequence[int]) -> dict[str, Any]:
        """What is done to bags of ``sizes`` in an epoch that visits each once, for the results; {} if nothing."""
        found: dict[str, Any] = {}
        if self.mixup:
            found["mixup"] = {"alpha": self.mixup, "mixed_bags": len(sizes) if len(self.partners) > 1 else 0}
        if self.instance_dropout:
            left_out = sum(sizes) - sum(self.sizes(sizes))
            found["instance_dropout"] = {"share": self.instance_dropout, "instances_left_out": left_out}
        if self.feature_noise:
            found["feature_noise"] = {"std": self.feature_noise, "instances": sum(self.sizes(sizes))}
        return found


def mix(bag: Bag, other: Bag, share: float, rng: np.random.Generator) -> Bag:
    """``bag`` with all but ``share`` of its instances replaced by instances of ``other``, and labels mixed alike."""
    size = bag.num_instances
    num_other = min(other.num_instances, round((1 - share) * size))
    parts = [
        take_rows(bag, _rows(rng, size, size - num_other)),
        take_rows(other, _rows(rng, other.num_instances, num_other)),
    ]
    weight = num_other / size
    y = (1 - weight) * np.asarray(bag.y, np.float64) + weight * np.asarray(other.y, np.float64)
    return join_bags(parts, key=bag.key, y=y.tolist())


def _rows(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.sort(rng.choice(size, count, replace=False, shuffle=False))


def _generator(key: Key, kind: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(*key, kind, 0))
