"""Digit slides: whole-slide-like bags made of real handwritten digits, the data set that bigbag ships with.

A slide is a patch of "tissue" on a lattice; every lattice cell in it is one real 8 x 8 handwritten digit. A positive
slide hides a few small connected lesions of one target digit among thousands of other digits; a negative slide holds
none of it. Nothing is downloaded: the 1,797 digits come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from bigbag.bags import Bag
from bigbag.data.sources.base import SourceEntry

SPLITS = ("train", "val", "test")
IMAGE_FRACTIONS = (0.55, 0.15, 0.30)
"""Share of the images of each digit that train, val and test slides are made of."""

_MAX_PIECES = 3
_MAX_LESIONS = 3


class Digits:
    r"""Digit slides with known lesions (a :class:`bigbag.data.sources.Source`).

    A slide holds ``N ~ LogUniform(min_instances, max_instances)`` digits on a tissue-shaped region of a lattice. A
    positive slide has ``max(1, round(w N))`` target digits in one to three connected lesions, ``w`` log-uniform in
    ``large_witness_rate`` for a share ``large_fraction`` of the positive slides ("macrometastases") and in
    ``witness_rate`` for the others ("micrometastases"). All other digits are drawn evenly from the nine that are not
    the target. Pixels are ``clip((1 + staining * g) * image + noise * e, 0, 1)`` with ``g`` standard normal per slide
    and ``e`` per pixel. No image occurs in two splits, and every slide is a function of ``(arguments, split, index)``
    alone.

    Instances have ``x (N, 64)`` float16 in [0, 1]; ``coords (N, 2)`` int32, (column, row) on the lattice; ``y_inst
    (N,)`` int8, 1 = target digit. The label is 1 where the slide holds the target digit.

    Args:
        target: digit of the lesions, 0 to 9.
        num_train: number of training slides.
        num_val: number of validation slides.
        num_test: number of test slides.
        min_instances: smallest slide, in instances (digits).
        max_instances: largest slide, in instances (digits).
        witness_rate: smallest and largest share of target digits in a slide with small lesions, in (0, 1).
        large_witness_rate: the same for a slide with large lesions.
        large_fraction: share of the positive slides of each split that have large lesions, in [0, 1]. Their signal is
            what training finds first: without them most runs do not leave the plateau at a loss of log 2.
        positive_fraction: share of positive slides in each split, in (0, 1).
        staining: standard deviation over slides of the contrast, relative to 1.
        noise: standard deviation of the noise of each pixel, in intensities from 0 to 1.
        seed: seed of everything random, the split of the images included.

    Raises:
        ValueError: an argument that no slide can satisfy.
    """

    patch_shape: tuple[int, int] | None = (8, 8)

    def __init__(
        self,
        target: int = 0,
        num_train: int = 200,
        num_val: int = 50,
        num_test: int = 100,
        min_instances: int = 5000,
        max_instances: int = 12000,
        witness_rate: tuple[float, float] = (0.0005, 0.0006),
        large_witness_rate: tuple[float, float] = (0.015, 0.02),
        large_fraction: float = 0.4,
        positive_fraction: float = 0.5,
        staining: float = 0.05,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.num_slides = {"train": num_train, "val": num_val, "test": num_test}
        self.min_instances = min_instances
        self.max_instances = max_instances
        self.witness_rate = witness_rate
        self.large_witness_rate = large_witness_rate
        self.large_fraction = large_fraction
        self.positive_fraction = positive_fraction
        self.staining = staining
        self.noise = noise
        self.seed = seed
        self._check()

    def entries(self) -> Sequence[SourceEntry]:
        """All slides: training, then validation, then test; each split in the order of its index."""
        return [
            SourceEntry(name=f"{split}-{index:04d}", split=split, label=int(lesions != "none"))
            for split in SPLITS
            for index, lesions in enumerate(self._lesions(split))
        ]

    def load(self, entry: SourceEntry) -> Bag:
        """Generate one slide.

        Raises:
            ValueError: ``entry`` is not one of :meth:`entries`.
        """
        split, index = self._locate(entry.name)
        lesions = self._lesions(split)[index]
        rng = self._rng(split, index + 1)
        num = round(self.min_instances * (self.max_instances / self.min_instances) ** rng.random())
        tissue = tissue_mask(rng, num)
        y_inst = np.zeros(num, dtype=np.int8)
        if lesions != "none":
            low, high = self.large_witness_rate if lesions == "large" else self.witness_rate
            rate = low * (high / low) ** rng.random()
            y_inst[grow_lesions(rng, tissue, max(1, round(rate * num)))] = 1
        row, column = np.nonzero(tissue)
        coords = np.stack([column, row], axis=1).astype(np.int32)
        return Bag(self._render(rng, split, y_inst), y=int(y_inst.any()), key=entry.name, coords=coords, y_inst=y_inst)

    def description(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "source": "digits",
            "target": self.target,
            **{f"num_{split}": count for split, count in self.num_slides.items()},
            "min_instances": self.min_instances,
            "max_instances": self.max_instances,
            "witness_rate": list(self.witness_rate),
            "large_witness_rate": list(self.large_witness_rate),
            "large_fraction": self.large_fraction,
            "positive_fraction": self.positive_fraction,
            "staining": self.staining,
            "noise": self.noise,
            "seed": self.seed,
        }

    def image_ids(self, split: str) -> np.ndarray:
        """Ids (rows of scikit-learn's ``load_digits().data``) of the images that ``split`` is made of."""
        return np.sort(np.concatenate(self._ids_by_digit[split]))

    @cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """``(1797, 64)`` float32 in [0, 1] and the ``(1797,)`` digits."""
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        return (images / 16).astype(np.float32), digits

    @cached_property
    def _ids_by_digit(self) -> dict[str, list[np.ndarray]]:
        """For each split the ids of the images of each digit; stratified by digit, disjoint between splits."""
        digits = self._images[1]
        rng = np.random.default_rng([self.seed, len(SPLITS)])
        ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for digit in range(10):
            shuffled = rng.permutation(np.flatnonzero(digits == digit))
            cuts = np.round(np.cumsum(IMAGE_FRACTIONS)[:-1] * len(shuffled)).astype(int)
            for split, part in zip(SPLITS, np.split(shuffled, cuts)):
                ids[split].append(part)
        return ids

    def _lesions(self, split: str) -> list[str]:
        """ "none", "small" or "large" for each slide of ``split``: fixed numbers of each, in random order."""
        num = self.num_slides[split]
        positive = round(self.positive_fraction * num)
        large = round(self.large_fraction * positive)
        kinds = ["large"] * large + ["small"] * (positive - large) + ["none"] * (num - positive)
        return [kinds[i] for i in self._rng(split, 0).permutation(num)]

    def _rng(self, split: str, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(split), stream])

    def _locate(self, name: str) -> tuple[str, int]:
        split, _, number = name.partition("-")
        if split not in SPLITS or not number.isdigit() or int(number) >= self.num_slides[split]:
            counts = ", ".join(f"{split}: {num}" for split, num in self.num_slides.items())
            raise ValueError(f"digits: no slide {name!r}; names are <split>-<index>, with slides {counts}")
        return split, int(number)

    def _render(self, rng: np.random.Generator, split: str, y_inst: np.ndarray) -> np.ndarray:
        """Draw a digit for every cell, then an image of that digit, and stain the slide."""
        others = np.delete(np.arange(10), self.target)
        digit = np.where(y_inst == 1, self.target, rng.choice(others, size=len(y_inst)))
        pools = self._ids_by_digit[split]
        starts = np.concatenate([[0], np.cumsum([len(pool) for pool in pools])])
        pick = starts[digit] + (rng.random(len(digit)) * np.diff(starts)[digit]).astype(np.int64)
        x = self._images[0][np.concatenate(pools)[pick]]
        x *= np.float32(1 + self.staining * rng.standard_normal())
        x += np.float32(self.noise) * rng.standard_normal(x.shape, dtype=np.float32)
        return np.clip(x, 0, 1, out=x).astype(np.float16)

    def _check(self) -> None:
        fewest = min(self.num_slides, key=lambda split: self.num_slides[split])
        rules: list[tuple[str, Any, bool, str]] = [
            ("target", self.target, self.target in range(10), "a digit from 0 to 9"),
            (f"num_{fewest}", self.num_slides[fewest], self.num_slides[fewest] >= 2, "at least 2 slides"),
            ("min_instances", self.min_instances, self.min_instances >= 100, "at least 100"),
            (
                "max_instances",
                self.max_instances,
                self.max_instances >= self.min_instances,
                f"at least min_instances = {self.min_instances}",
            ),
            ("witness_rate", self.witness_rate, _is_range(self.witness_rate), "(low, high) with 0 < low <= high < 1"),
            (
                "large_witness_rate",
                self.large_witness_rate,
                _is_range(self.large_witness_rate),
                "(low, high) with 0 < low <= high < 1",
            ),
            ("large_fraction", self.large_fraction, 0 <= self.large_fraction <= 1, "a number in [0, 1]"),
            ("positive_fraction", self.positive_fraction, 0 < self.positive_fraction < 1, "a number in (0, 1)"),
            ("staining", self.staining, 0 <= self.staining < 0.5, "a number in [0, 0.5)"),
            ("noise", self.noise, self.noise >= 0, "a number >= 0"),
            ("seed", self.seed, self.seed >= 0, "an integer >= 0"),
        ]
        for name, got, fine, expected in rules:
            if not fine:
                raise ValueError(f"digits: {name} is {got!r}, expected {expected}")


def _is_range(rates: Sequence[float]) -> bool:
    return len(rates) == 2 and 0 < rates[0] <= rates[1] < 1


def tissue_mask(rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """A random tissue-shaped region of exactly ``num_cells`` cells: a boolean ``(rows, columns)`` lattice.

    The cells of highest height ``max_j -(|p - c_j| / r_j)^2 + sum_k a_k cos(k . p + phase_k)``: one to three blobs with
    wavy outlines.
    """
    side = int(np.ceil(1.7 * np.sqrt(num_cells))) + 2
    axis = np.linspace(-1, 1, side)
    x, y = axis[None, :], axis[:, None]
    height = np.full((side, side), -np.inf)
    for _ in range(rng.integers(1, _MAX_PIECES + 1)):
        angle, reach, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6), rng.uniform(0.5, 1.0)
        blob = -((x - reach * np.cos(angle)) ** 2 + (y - reach * np.sin(angle)) ** 2) / radius**2
        height = np.maximum(height, blob)
    for _ in range(8):
        fx, fy = rng.normal(0, 5, size=2)
        height += 0.08 * np.cos(fx * x + fy * y + rng.uniform(0, 2 * np.pi))
    mask = np.zeros(side * side, dtype=bool)
    mask[np.argpartition(height.ravel(), -num_cells)[-num_cells:]] = True
    return mask.reshape(side, side)


def grow_lesions(rng: np.random.Generator, tissue: np.ndarray, num_cells: int) -> np.ndarray:
    """Grow one to three connected lesions, ``num_cells`` cells in all, inside ``tissue``.

    Each starts in a random cell and takes in random free neighbours (Eden growth) up to its share of the cells; where
    it has no room left, another one is started.

    Returns:
        Indices of the lesions' cells among ``np.flatnonzero(tissue)``, ascending.
    """
    rows, columns = tissue.shape
    cells = np.flatnonzero(tissue)
    free = set(cells.tolist())
    num_lesions = int(rng.integers(1, min(_MAX_LESIONS, num_cells) + 1))
    sizes = np.diff(np.linspace(0, num_cells, num_lesions + 1).astype(int)).tolist()
    taken: list[int] = []
    while sizes:
        size = sizes.pop()
        frontier = [_random_free_cell(rng, cells, free)]
        while frontier and size:
            last = int(rng.integers(len(frontier)))
            frontier[last], frontier[-1] = frontier[-1], frontier[last]
            cell = frontier.pop()
            if cell not in free:
                continue
            free.remove(cell)
            taken.append(cell)
            size -= 1
            row, column = divmod(cell, columns)
            around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            frontier += [r * columns + c for r, c in around if 0 <= r < rows and 0 <= c < columns]
        if size:
            sizes.append(size)
    return np.searchsorted(cells, np.sort(taken))


def _random_free_cell(rng: np.random.Generator, cells: np.ndarray, free: set[int]) -> int:
    while (cell := int(rng.choice(cells))) not in free:
        pass
    return cell
