"""Algorithmic unit tests: data sets that a model solves only if it respects what multiple instances mean.

Training and test bags differ by instances that a model must not lean on; one that does falls below chance on the test
bags. E. Raff and J. Holt, "Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit Tests",
NeurIPS 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

from bigbag.datasets.base import InMemoryDataset


class _UnitTestDataset(InMemoryDataset):
    """Draws positive, then negative bags from Gaussian concepts, all from a generator of its own."""

    def __init__(self, D: int, num_bags: int, pos_class_prob: float, train: bool, seed: int) -> None:
        self.num_bags, self.pos_class_prob, self.train, self.seed = num_bags, pos_class_prob, train, seed
        self.split = "train" if train else "test"
        ones = torch.ones(D)
        self.pos_distr = [Normal(2 * ones, 0.1 * ones), Normal(3 * ones, 0.1 * ones)]
        self.neg_distr = Normal(0 * ones, ones)
        self.poisoning = Normal(-10 * ones, 0.1 * ones)

    def _create_bags(self) -> list[dict[str, Tensor]]:
        self._generator = torch.Generator().manual_seed(self.seed)
        num_positive = int(self.num_bags * self.pos_class_prob)
        bags = []
        for index in range(self.num_bags):
            parts = self._positive_parts() if index < num_positive else self._negative_parts()
            y_inst = torch.cat([torch.full((len(part),), float(label)) for part, label in parts])
            bags.append(
                {"X": torch.cat([x for x, _ in parts]), "Y": torch.tensor(int(index < num_positive)), "y_inst": y_inst}
            )
        del self._generator  # generators can't be sent to the workers of a loader
        return bags

    def _positive_parts(self) -> list[tuple[Tensor, int]]:
        """Groups of instances of a positive bag, each with its instance label."""
        raise NotImplementedError

    def _negative_parts(self) -> list[tuple[Tensor, int]]:
        raise NotImplementedError

    def _draw(self, *concepts: Normal) -> Tensor:
        """One instance of each of ``concepts``, ``(len(concepts), D)``."""
        drawn = [torch.normal(c.mean, c.stddev, generator=self._generator) for c in concepts]
        return torch.stack(drawn) if drawn else torch.empty(0, *self.neg_distr.mean.shape)

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self._generator))

    def _poison(self, present: bool) -> list[tuple[Tensor, int]]:
        return [(self._draw(self.poisoning), -1)] if present else []

    def _negatives(self) -> tuple[Tensor, int]:
        return self._draw(*[self.neg_distr] * self._integer(1, 10)), 0


class MCStandardMILDataset(_UnitTestDataset):
    """Multi-concept standard test (algorithm 2 of the paper): a bag is positive if it holds both positive concepts.

    Concepts are ``N(2, 0.1^2)`` and ``N(3, 0.1^2)`` in every feature, background ``N(0, 1)``. A positive bag has one to
    three instances of each, a negative one a single instance of either; both have one to nine of the background. In
    training negative bags, and in testing positive ones, also hold a poisonous instance ``N(-10, 0.1^2)``, with the
    instance label -1.

    The bags are torchmil's after ``torch.manual_seed(seed)``; its own ``seed`` has no effect, since it seeds numpy and
    draws from torch.

    Args:
        D: number of features.
        num_bags: number of bags, of which ``int(num_bags * pos_class_prob)`` come first and are positive.
        pos_class_prob: share of positive bags.
        train: training or test bags.
        seed: seed of everything random.
    """

    def __init__(self, D: int, num_bags: int, pos_class_prob: float = 0.5, train: bool = True, seed: int = 0) -> None:
        super().__init__(D, num_bags, pos_class_prob, train, seed)
        self.bags_list = self._create_bags()

    def _positive_parts(self) -> list[tuple[Tensor, int]]:
        poison = self._poison(not self.train)
        return [*poison, (self._draw(*self.pos_distr * self._integer(1, 4)), 1), self._negatives()]

    def _negative_parts(self) -> list[tuple[Tensor, int]]:
        poison = self._poison(self.train)
        return [*poison, (self._draw(self.pos_distr[self._integer(0, 2)]), 1), self._negatives()]


class SCStandardMILDataset(_UnitTestDataset):
    """Single-concept standard test (algorithm 1 of the paper): a bag is positive if it holds a positive instance.

    Positive instances are ``N(0, 3^2)`` or ``N(1, 1)`` in every feature, one to three in a positive bag; the ``B``
    others are ``N(0, 1)``. Poison as in :class:`MCStandardMILDataset`, which see for the seed.

    Args:
        D: number of features.
        num_bags: number of bags, of which ``int(num_bags * pos_class_prob)`` come first and are positive.
        B: number of negative instances in each bag.
        pos_class_prob: share of positive bags.
        train: training or test bags.
        seed: seed of everything random.
    """

    def __init__(
        self, D: int, num_bags: int, B: int, pos_class_prob: float = 0.5, train: bool = True, seed: int = 0
    ) -> None:
        super().__init__(D, num_bags, pos_class_prob, train, seed)
        self.D, self.B = D, B
        ones = torch.ones(D)
        self.pos_distr = [Normal(0 * ones, 3 * ones), Normal(ones, ones)]
        self.neg_dist = self.neg_distr
        self.bags_list = self._create_bags()

    def _positive_parts(self) -> list[tuple[Tensor, int]]:
        poison = self._poison(not self.train)
        num_positives = self._integer(1, 4)
        chosen = torch.randint(2, (num_positives,), generator=self._generator).tolist()
        return [*poison, (self._draw(*[self.pos_distr[i] for i in chosen]), 1), self._negatives()]

    def _negative_parts(self) -> list[tuple[Tensor, int]]:
        return [*self._poison(self.train), self._negatives()]

    def _negatives(self) -> tuple[Tensor, int]:
        return self._draw(*[self.neg_distr] * self.B), 0


class FalseFrequencyMILDataset(_UnitTestDataset):
    """False-frequency test (algorithm 3 of the paper): concepts must be present, their number says nothing.

    A positive bag has one instance of each positive concept of :class:`MCStandardMILDataset`. A negative bag has
    instances of the first concept only: 1 in training, 35 to 44 in testing. Both have one to nine of the background.
    :class:`MCStandardMILDataset` says what the seed does.

    Args:
        D: number of features.
        num_bags: number of bags, of which ``int(num_bags * pos_class_prob)`` come first and are positive.
        pos_class_prob: share of positive bags.
        train: training or test bags.
        seed: seed of everything random.
    """

    def __init__(self, D: int, num_bags: int, pos_class_prob: float = 0.5, train: bool = True, seed: int = 0) -> None:
        super().__init__(D, num_bags, pos_class_prob, train, seed)
        self.bags_list = self._create_bags()

    def _positive_parts(self) -> list[tuple[Tensor, int]]:
        counts = [self._integer(1, 2) for _ in self.pos_distr]
        concepts = [c for c, count in zip(self.pos_distr, counts) for _ in range(count)]
        return [(self._draw(*concepts), 1), self._negatives()]

    def _negative_parts(self) -> list[tuple[Tensor, int]]:
        count = self._integer(1, 2) if self.train else self._integer(35, 45)
        concept = self.pos_distr[self._integer(0, 1)]
        return [(self._draw(*[concept] * count), 1), self._negatives()]
