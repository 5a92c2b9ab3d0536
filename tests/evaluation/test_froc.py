"""FROC against the definition of CAMELYON16's script, on cases made by hand and at random."""

from __future__ import annotations

import numpy as np
import pytest

from bigbag.evaluation.froc import (
    RATES,
    Findings,
    detect,
    find,
    froc,
    froc_under,
    lesions_hit,
    lesions_of,
    longest_diameters,
    match,
)


def published(slides: list[tuple[np.ndarray, list[tuple[float, int, int]], set[int]]]) -> tuple[float, np.ndarray]:
    """The published evaluation, step by step: slides of (mask of numbered lesions, detections, excluded lesions)."""
    false_alarms: list[float] = []
    found: list[float] = []
    num_lesions = 0
    for mask, detections, excluded in slides:
        best = dict.fromkeys(range(1, mask.max() + 1), 0.0)
        for score, row, column in detections:
            lesion = mask[row, column]
            if lesion == 0:
                false_alarms.append(score)
            elif lesion not in excluded and score > best[lesion]:
                best[lesion] = score
        found += best.values()
        num_lesions += len(best) - len(excluded)
    alarms_per_slide, sensitivity = [], []
    for threshold in sorted({*false_alarms, *found})[1:]:
        alarms_per_slide.append(sum(score >= threshold for score in false_alarms) / len(slides))
        sensitivity.append(sum(score >= threshold for score in found) / num_lesions)
    alarms_per_slide.append(0.0)
    sensitivity.append(0.0)
    at = np.interp([0.25, 0.5, 1, 2, 4, 8], alarms_per_slide[::-1], sensitivity[::-1])
    return at.mean(), at


def ours(slides: list[tuple[np.ndarray, list[tuple[float, int, int]], set[int]]]) -> list[Findings]:
    return [
        match(
            np.array([mask[row, column] for _, row, column in detections], dtype=np.int64),
            np.array([score for score, _, _ in detections]),
            int(mask.max()),
            sorted(excluded),
        )
        for mask, detections, excluded in slides
    ]


def test_by_hand() -> None:
    # lesions found at .9, .6 and one missed; false alarms at .8, .7, .5 on two slides: rates (0, 0) (0, 1/3) (.5, 1/3)
    # (1, 1/3) (1, 2/3) (1.5, 2/3)
    slides = [
        Findings(np.array([0.8, 0.5]), np.array([0.9, -np.inf])),
        Findings(np.array([0.7]), np.array([0.6])),
    ]
    found = froc(slides)
    np.testing.assert_allclose(found.false_positives, [0, 0, 0.5, 1, 1, 1.5])
    np.testing.assert_allclose(found.sensitivity, np.array([0, 1, 1, 1, 2, 2]) / 3)
    np.testing.assert_allclose(found.at, np.array([1, 1, 2, 2, 2, 2]) / 3)
    assert found.score == pytest.approx(10 / 18)


def test_perfect_useless_and_undefined() -> None:
    assert froc([Findings(np.array([0.1]), np.array([0.9])), Findings(np.array([0.2]), np.zeros(0))]).score == 1
    assert froc([Findings(np.array([0.3, 0.1]), np.array([-np.inf]))]).score == 0
    nothing = froc([Findings(np.array([0.3]), np.zeros(0))])
    assert np.isnan(nothing.score) and np.isnan(nothing.at).all()


@pytest.mark.parametrize("seed", range(8))
def test_against_the_published_evaluation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slides = []
    for _ in range(6):
        mask = np.zeros((20, 20), dtype=np.int64)
        for lesion in range(1, int(rng.integers(0, 4)) + 1):
            mask[6 * lesion - 5 : 6 * lesion - 2, 4:9] = lesion
        scores = rng.integers(1, 40, int(rng.integers(0, 30))) / 40  # coarse: ties
        detections = [(score, *rng.integers(0, 20, 2)) for score in scores]
        slides.append((mask, detections, {1} if mask.max() > 1 and rng.random() < 0.5 else set()))
    score, at = published(slides)
    found = froc(ours(slides))
    assert found.score == pytest.approx(score, abs=1e-12)
    np.testing.assert_allclose(found.at, at, atol=1e-12)


def test_an_excluded_lesion_has_the_lowest_score() -> None:
    """The only counted lesion is found by the only detection: a threshold, since the excluded lesion has none."""
    mask = np.array([[1, 0, 2]])
    slides = [(mask, [(0.5, 0, 0)], {2})]
    assert froc(ours(slides)).score == published(slides)[0] == 1.0
    assert froc(ours([(mask, [(0.5, 0, 0)], set())])).score == published([(mask, [(0.5, 0, 0)], set())])[0] == 0.5
    assert froc(ours([(mask[:, :2], [(0.5, 0, 0)], set())])).score == 0.0  # as published: no threshold at all


def test_few_detections_against_the_published_evaluation() -> None:
    """Where hardly anything is detected, or everything, the ends of the curve decide."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        slides = []
        for _ in range(int(rng.integers(1, 4))):
            num = int(rng.integers(0, 4))
            mask = np.arange(num + 1)[None]  # a negative place, then lesions of one place each
            places = rng.integers(0, num + 1, int(rng.integers(0, 8)))
            detections = [(score, 0, place) for score, place in zip(rng.integers(1, 10, len(places)) / 10, places)]
            slides.append((mask, detections, {k for k in range(2, num + 1) if rng.random() < 0.4}))
        if any(mask.max() for mask, _, _ in slides):
            assert froc(ours(slides)).score == pytest.approx(published(slides)[0], abs=1e-12)


def test_weights_are_copies_of_slides() -> None:
    rng = np.random.default_rng(9)
    slides = [Findings(rng.random(50), rng.random(3)) for _ in range(4)]
    weights = np.array([[1.0, 1, 1, 1], [0, 3, 1, 0]])
    found = froc_under(slides, weights)
    copies = froc([slides[1]] * 3 + [slides[2]])
    assert found["froc"] == pytest.approx([froc(slides).score, copies.score])
    assert [found[f"froc_{rate:g}"][1] for rate in RATES] == pytest.approx(copies.at)


def test_lesions_touch_at_corners_and_know_their_size() -> None:
    picture = np.array(
        [
            [1, 0, 0, 0, 0, 1],
            [0, 1, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 1],
            [0, 0, 1, 0, 0, 0],
        ]
    )
    coords = np.argwhere(picture >= 0)
    lesion = lesions_of(coords, picture.ravel())
    assert len(np.unique(lesion)) == 4 and (lesion[picture.ravel() == 0] == 0).all()
    by_place = lesion.reshape(picture.shape)
    assert by_place[0, 0] == by_place[1, 1] != by_place[3, 2]
    sizes = longest_diameters(coords, lesion)
    expected = {by_place[0, 0]: 4 * np.sqrt(0.5), by_place[0, 5]: 4 * np.sqrt(2 / 3), by_place[3, 2]: 0.0}
    assert sizes == pytest.approx([expected[k] for k in (1, 2, 3)])


def test_diameters_equal_scikit_image() -> None:
    measure = pytest.importorskip("skimage.measure", reason="scikit-image is not installed")
    mask = np.zeros((12, 12), dtype=int)
    mask[2:4, 1:9] = 1
    mask[6:11, 3:8] = 2
    coords = np.argwhere(mask >= 0)
    expected = [region.axis_major_length for region in measure.regionprops(mask)]
    assert longest_diameters(coords, mask.ravel()) == pytest.approx(expected)


def test_detections_suppress_their_neighbours() -> None:
    coords = np.stack([np.arange(7), np.zeros(7, int)], 1)
    scores = np.array([0.5, 0.9, 0.8, 0.1, 0.3, 0.2, 0.7])
    assert detect(coords, scores, radius=1).tolist() == [1, 6, 4]  # 0, 2 fall to 1; 5 to 6; 3 to 4
    assert detect(coords, scores, radius=2).tolist() == [1, 6]
    assert detect(coords, scores, radius=0).tolist() == [1, 2, 6, 0, 4, 5, 3]


def test_a_slide_from_end_to_end() -> None:
    coords = np.argwhere(np.ones((5, 12)) > 0)
    y_inst, scores = np.zeros(60, int), np.zeros(60)
    place = {(r, c): 12 * r + c for r, c in coords.tolist()}
    for at in ((1, 1), (1, 2), (1, 3)):
        y_inst[place[at]] = 1
    y_inst[place[(3, 10)]], y_inst[place[(4, 5)]] = 1, -1
    scores[place[(1, 2)]], scores[place[(3, 10)]], scores[place[(4, 5)]], scores[place[(0, 7)]] = 0.9, 0.8, 0.7, 0.6
    found = find(coords, scores, y_inst, radius=2)
    assert sorted(found.lesions) == [0.8, 0.9] and found.false_positives.max() == 0.6
    without_single_cells = find(coords, scores, y_inst, radius=2, min_diameter=1.0)
    assert without_single_cells.lesions.tolist() == [0.9] and 0.8 not in without_single_cells.false_positives


def test_points_in_polygons() -> None:
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
    horseshoe = np.array([[10, 0], [16, 0], [16, 6], [14, 6], [14, 2], [12, 2], [12, 6], [10, 6]])
    points = np.array([[1, 1], [3.9, 0.1], [13, 4], [13, 1], [11, 5], [20, 1]])
    assert lesions_hit(points, [square, horseshoe]).tolist() == [1, 1, 0, 2, 2, 0]
    found = match(lesions_hit(points, [square, horseshoe]), np.arange(6) / 10, 2)
    assert found.lesions.tolist() == [0.1, 0.4] and found.false_positives.tolist() == [0.2, 0.5]
