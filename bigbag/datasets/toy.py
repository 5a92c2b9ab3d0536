"""Bags drawn from labelled instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bigbag.datasets.base import InMemoryDataset


class ToyDataset(InMemoryDataset):
    """Bags of instances of ``data``; a bag is positive if one of them has a label in ``obj_labels``.

    A positive bag of size N holds ``U{1, ..., N // 2 - 1}`` positive instances (1 where N < 4). Instances are dealt
    from shuffled piles, so that each is used once before any is used again; within a bag they are sorted by label.
    The same seed gives torchmil's bags, without its touching numpy's global state.

    Args:
        data: ``(num_instances, num_features)``; anything that numpy makes an array of, such as a tensor.
        labels: ``(num_instances,)``, likewise.
        num_bags: number of bags, of which ``int(num_bags * pos_class_prob)`` are positive.
        obj_labels: labels of positive instances.
        bag_size: instances per bag, or ``(low, high)`` for sizes drawn evenly from ``low`` to ``high - 1``.
        pos_class_prob: share of positive bags.
        seed: seed of everything random.

    Raises:
        ValueError: no instance is positive, or none negative, where bags need some.
    """

    def __init__(
        self,
        data: npt.ArrayLike,
        labels: npt.ArrayLike,
        num_bags: int,
        obj_labels: Sequence[int],
        bag_size: int | tuple[int, int],
        pos_class_prob: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.data, self.labels = np.asarray(data), np.asarray(labels)
        self.num_bags, self.obj_labels, self.bag_size = num_bags, obj_labels, bag_size
        self.pos_class_prob = pos_class_prob
        self.bags_list = self._create_bags(np.random.RandomState(seed))

    def _create_bags(self, rng: np.random.RandomState) -> list[dict[str, Tensor]]:
        is_positive = np.isin(self.labels, self.obj_labels)
        positives, negatives = (_Pile(rng, np.flatnonzero(which)) for which in (is_positive, ~is_positive))
        num_positive_bags = int(self.num_bags * self.pos_class_prob)
        bags = []
        for index in range(self.num_bags):
            size = self.bag_size if isinstance(self.bag_size, int) else int(rng.randint(*self.bag_size))
            num_positive = 0
            if index < num_positive_bags:
                num_positive = 1 if size // 2 <= 1 else int(rng.randint(1, size // 2))
            rows = np.concatenate([positives.deal(num_positive), negatives.deal(size - num_positive)])
            bags.append(self._bag_of(rows[np.argsort(self.labels[rows])], is_positive))
        order = np.arange(len(bags))
        rng.shuffle(order)
        return [bags[index] for index in order]

    def _bag_of(self, rows: np.ndarray, is_positive: np.ndarray) -> dict[str, Tensor]:
        y_inst = torch.from_numpy(is_positive[rows]).long()
        return {"X": torch.from_numpy(self.data[rows]).float(), "Y": y_inst.max(), "y_inst": y_inst}


class _Pile:
    """Shuffled instances that are dealt from the end, over and over."""

    def __init__(self, rng: np.random.RandomState, rows: np.ndarray) -> None:
        rng.shuffle(rows)
        self.rows, self.dealt = rows[::-1], 0

    def deal(self, count: int) -> np.ndarray:
        if count and not len(self.rows):
            raise ValueError("ToyDataset: bags need both instances with and without a label in obj_labels")
        places = np.arange(self.dealt, self.dealt + count) % max(1, len(self.rows))
        self.dealt += count
        return self.rows[places]
