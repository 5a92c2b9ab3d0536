"""FROC: how many lesions are found at how many false alarms per slide, as CAMELYON16 counts them.

- A *detection* is a point with a score. Of instance scores the detections are the instances that no stronger instance
  suppresses (:func:`detect`).
- A *lesion* is a connected component of positive instances on the grid, corners included (:func:`lesions_of`), or a
  polygon (:func:`lesions_hit`). Lesions whose longest diameter is below a limit, isolated tumour cells, are excluded.
- A lesion has the score of the strongest detection in it; a detection in no lesion is a false positive; one in an
  excluded lesion is neither; more detections in one lesion count once (:func:`match`).
- At each threshold: the share of all lesions of all slides with a score of at least it, over the false positives per
  slide, slides without lesions included. The FROC score is the mean sensitivity at 1/4, 1/2, 1, 2, 4 and 8 false
  positives per slide, linear between thresholds, and constant beyond the last. As in the published script, the lowest
  distinct score is no threshold, a lesion that is undetected or excluded having the lowest of all.

Ehteshami Bejnordi et al., JAMA 2017; ``evaluation_FROC.py`` of CAMELYON16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which the sensitivity is averaged."""


@dataclass(frozen=True)
class Findings:
    """What was found on one slide.

    Attributes:
        false_positives: scores of the detections outside all lesions.
        lesions: ``(L,)`` score of each lesion that counts; -inf where it was not detected.
        num_excluded: lesions that do not count.
    """

    false_positives: np.ndarray
    lesions: np.ndarray
    num_excluded: int = 0


@dataclass(frozen=True)
class Froc:
    """The curve, from strict to lenient thresholds.

    Attributes:
        false_positives: false positives per slide.
        sensitivity: share of the lesions found.
        at: the sensitivity at each of ``RATES``.
        score: their mean; all NaN where there is no lesion.
    """

    false_positives: np.ndarray
    sensitivity: np.ndarray
    at: np.ndarray
    score: float


def froc(slides: Sequence[Findings]) -> Froc:
    """The FROC curve of some slides, and its score."""
    events = _Events(slides)
    every = np.ones(len(slides))
    at = events.at(every)
    return Froc(*events.curve(every), at, float(at.mean()))


def froc_under(slides: Sequence[Findings], weights: np.ndarray) -> dict[str, np.ndarray]:
    """``froc`` and ``froc_<rate>`` under each weighting of the slides.

    Args:
        slides: S of them.
        weights: ``(R, S)``, such as how often each slide was drawn.

    Returns:
        name -> ``(R,)``; NaN where no slide with a lesion has weight.
    """
    events = _Events(slides)
    at = np.stack([events.at(own) for own in weights])
    return {"froc": at.mean(1), **{f"froc_{rate:g}": at[:, i] for i, rate in enumerate(RATES)}}


class _Events:
    """False positives and lesions of all slides, strongest first."""

    def __init__(self, slides: Sequence[Findings]) -> None:
        parts = [part for slide in slides for part in (slide.false_positives, slide.lesions)]
        scores = np.concatenate([np.zeros(0), *parts])
        slide = np.repeat(np.arange(len(slides)).repeat(2), [len(part) for part in parts])
        is_lesion = np.repeat(np.tile([False, True], len(slides)), [len(part) for part in parts])
        order = np.argsort(-scores, kind="stable")
        self.slide, self.is_lesion = slide[order], is_lesion[order]
        ranked = scores[order]
        if any(slide.num_excluded for slide in slides):
            ranked = np.append(ranked, -np.inf)
        # the last of each distinct score, but of the lowest
        self.last = np.flatnonzero(ranked[:-1] != ranked[1:])
        self.num_lesions = np.array([len(found.lesions) for found in slides], dtype=np.float64)
        # Far more false positives than the largest rate asks for: what comes after them is rarely needed.
        enough = 4 * RATES[-1] * len(slides)
        self.cut = int(np.searchsorted(np.cumsum(~self.is_lesion)[self.last], enough)) + 1

    def curve(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False positives per slide and sensitivity, from (0, 0) on; empty where there is no lesion."""
        return self._curve(weights, self.last)

    def at(self, weights: np.ndarray) -> np.ndarray:
        """The sensitivity at each of ``RATES``."""
        rates, sensitivity = self._curve(weights, self.last[: self.cut])
        if len(rates) and rates[-1] <= RATES[-1]:
            rates, sensitivity = self._curve(weights, self.last)
        return np.interp(RATES, rates, sensitivity) if len(rates) else np.full(len(RATES), np.nan)

    def _curve(self, weights: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_lesions, num_slides = weights @ self.num_lesions, weights.sum()
        if num_lesions == 0:
            return np.zeros(0), np.zeros(0)
        stop = last[-1] + 1 if len(last) else 0
        own, is_lesion = weights[self.slide[:stop]], self.is_lesion[:stop]
        false = np.cumsum(own * ~is_lesion)[last] / num_slides
        true = np.cumsum(own * is_lesion)[last] / num_lesions
        return np.r_[0.0, false], np.r_[0.0, true]


def find(
    coords: np.ndarray,
    scores: np.ndarray,
    y_inst: np.ndarray,
    radius: float = 2.0,
    min_diameter: float = 0.0,
) -> Findings:
    """The findings on one slide from the scores and labels of its instances.

    Detections on instances of unknown label do not count.

    Args:
        coords: ``(N, 2)`` places on the grid, in steps of the grid.
        scores: ``(N,)``.
        y_inst: ``(N,)`` 1 positive, 0 negative, -1 unknown.
        radius: of :func:`detect`, in steps.
        min_diameter: lesions with a longest diameter below it, in steps, are excluded. CAMELYON16's limit for isolated
            tumour cells is 275 micrometres.
    """
    lesion = lesions_of(coords, y_inst)
    points = detect(coords, scores, radius)
    points = points[y_inst[points] >= 0]
    small = longest_diameters(coords, lesion) < min_diameter
    return match(lesion[points], scores[points], len(small), 1 + np.flatnonzero(small))


def match(hit: np.ndarray, scores: np.ndarray, num_lesions: int, excluded: Sequence[int] | np.ndarray = ()) -> Findings:
    """Sort detections into lesions found and false positives.

    Args:
        hit: ``(D,)`` the lesion, from 1, in which each detection lies; 0 = none.
        scores: ``(D,)``.
        num_lesions: L, the excluded ones included.
        excluded: numbers of the lesions that do not count.
    """
    best = np.full(num_lesions + 1, -np.inf)
    np.maximum.at(best, hit, scores.astype(np.float64))
    counts = ~np.isin(np.arange(1, num_lesions + 1), excluded)
    return Findings(np.asarray(scores, dtype=np.float64)[hit == 0], best[1:][counts], int((~counts).sum()))


def detect(coords: np.ndarray, scores: np.ndarray, radius: float = 2.0) -> np.ndarray:
    """Indices of the detections: instances from the strongest on, less those within ``radius`` of a stronger detection.

    Args:
        coords: ``(N, c)``.
        scores: ``(N,)``; of equal scores the first in order comes first.
        radius: in the unit of ``coords``; 0 makes every instance a detection.
    """
    from scipy.spatial import cKDTree

    strongest_first = np.argsort(-scores, kind="stable")
    if radius <= 0 or not len(scores):
        return strongest_first
    tree, free, found = cKDTree(coords), np.ones(len(scores), dtype=bool), []
    for i in strongest_first.tolist():
        if free[i]:
            found.append(i)
            free[tree.query_ball_point(coords[i], radius)] = False
    return np.array(found)


def lesions_of(coords: np.ndarray, y_inst: np.ndarray) -> np.ndarray:
    """``(N,)`` number of the lesion of each instance, from 1; 0 = none: positives that touch on the grid, corners too.

    Args:
        coords: ``(N, c)`` in steps of the grid.
        y_inst: ``(N,)``, 1 = positive.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    positive = np.flatnonzero(np.asarray(y_inst) == 1)
    lesion = np.zeros(len(y_inst), dtype=np.int64)
    if len(positive):
        pairs = cKDTree(coords[positive]).query_pairs(1.0 + 1e-6, p=np.inf, output_type="ndarray")
        graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(positive), len(positive)))
        lesion[positive] = 1 + connected_components(graph, directed=False)[1]
    return lesion


def longest_diameters(coords: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """``(L,)`` the major axis of the ellipse with each lesion's second moments, ``4 sqrt(largest variance)``.

    As in the published script (scikit-image's ``major_axis_length``); a lesion of one instance has 0.
    """
    parts = [np.asarray(coords[lesion == k], dtype=np.float64) for k in range(1, int(lesion.max(initial=0)) + 1)]
    variances = [np.linalg.eigvalsh(np.cov(part.T, bias=True).reshape(part.shape[1], -1)).max() for part in parts]
    return 4 * np.sqrt(np.maximum(np.array(variances), 0.0))


def lesions_hit(points: np.ndarray, polygons: Sequence[np.ndarray]) -> np.ndarray:
    """``(D,)`` number, from 1, of the first polygon that each point lies in; 0 = none. For :func:`match`.

    Args:
        points: ``(D, 2)``.
        polygons: ``(V, 2)`` corners of each, in the unit of ``points``; the last joins the first. A point is inside
            where a ray from it crosses the outline an odd number of times.
    """
    hit = np.zeros(len(points), dtype=np.int64)
    x, y = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
    for number, polygon in enumerate(polygons, 1):
        start = np.asarray(polygon, dtype=np.float64)
        inside = np.zeros(len(points), dtype=bool)
        for (x0, y0), (x1, y1) in zip(start, np.roll(start, -1, axis=0)):
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        hit[inside & (hit == 0)] = number
    return hit
