"""Canvases of patches and slices: torchmil's pictures where it is right, and the borders that it leaves out."""

import numpy as np
import pytest

from bigbag import visualize

RNG = np.random.default_rng(0)
COLOURS = {"max_color": np.array([0.9, 0.1, 0.3]), "min_color": np.array([0.1, 0.2, 0.9])}


def patches(num: int, size: int, side: int):
    cells = RNG.permutation(side * side)[:num]
    rows, columns = np.divmod(cells, side)
    return list(RNG.integers(0, 256, (num, size, size, 3), dtype=np.uint8)), rows, columns


@pytest.fixture
def torchmil():
    return pytest.importorskip("torchmil.visualize")


@pytest.mark.parametrize("num, size, side", [(1, 7, 1), (40, 10, 8), (5000, 3, 90)])
def test_patches_as_torchmil(torchmil, num, size, side):
    tiles, rows, columns = patches(num, size, side)
    canvas = visualize.patches_to_canvas(tiles, rows, columns, size)
    assert np.array_equal(canvas, torchmil.patches_to_canvas(tiles, rows, columns, size))
    assert np.array_equal(canvas, visualize.patches_to_canvas(np.stack(tiles), rows, columns, size))
    values = RNG.random(num)
    for options in ({}, {"alpha": 0.3, **COLOURS}, {"alpha": 1.0}, {"min_color": "blank"}):
        args = (canvas, values, size, rows, columns)
        assert np.array_equal(
            visualize.draw_heatmap_wsi(*args, **options), torchmil.draw_heatmap_wsi(*args, **options)
        ), options


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.45, 0.7])
def test_contour_as_torchmil_off_the_border(torchmil, share):
    """On a canvas with an empty row and column at its top and left, where torchmil forgets nothing."""
    tiles, rows, columns = patches(30, 10, 7)
    rows, columns = rows + 1, columns + 1
    canvas = visualize.patches_to_canvas(tiles, rows, columns, 10)
    drawn = visualize.draw_patches_contour(canvas, rows, columns, 10, share)
    assert np.array_equal(drawn, torchmil.draw_patches_contour(canvas, rows, columns, 10, share))
    assert np.array_equal(canvas, visualize.patches_to_canvas(tiles, rows, columns, 10)), "the canvas is not changed"


def test_contour_at_all_four_borders():
    canvas = np.full((20, 20, 3), 255, np.uint8)
    drawn = visualize.draw_patches_contour(canvas, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 10, 0.2)
    expected = np.zeros((20, 20), bool)
    for edge in (0, 10, 20):
        expected[max(edge - 2, 0) : edge + 2] = expected[:, max(edge - 2, 0) : edge + 2] = True
    assert np.array_equal(drawn[..., 0] == 0, expected)


def test_contour_on_a_canvas_that_cuts_patches():
    drawn = visualize.draw_patches_contour(np.full((15, 13, 3), 9, np.uint8), np.array([1]), np.array([1]), 10, 0.1)
    expected = np.zeros((15, 13), bool)
    expected[9:11, 10:13] = expected[10:15, 9:11] = True
    assert np.array_equal(drawn[..., 0] == 0, expected)


def test_slices_as_torchmil(torchmil):
    tiles = list(RNG.integers(0, 256, (6, 11, 11, 3), dtype=np.uint8))
    canvas = visualize.slices_to_canvas(tiles, 11)
    assert np.array_equal(canvas, torchmil.slices_to_canvas(tiles, 11))
    assert visualize.slices_to_canvas([], 11).shape == torchmil.slices_to_canvas([], 11).shape == (11, 0, 3)
    for num, options in ((6, {}), (4, {"alpha": 0.8, **COLOURS})):
        values = RNG.random(num)
        expected = torchmil.draw_heatmap_ctscan(canvas, values, 11, **options)
        assert np.array_equal(visualize.draw_heatmap_ctscan(canvas, values, 11, **options), expected)
    for share in (0.0, 0.05, 0.1, 0.33):
        drawn, expected = (m.draw_slices_contour(canvas, 11, share) for m in (visualize, torchmil))
        half = int(share * 11)
        assert np.array_equal(drawn[:, half:], expected[:, half:])
        assert not drawn[:, :half].any(), "the first slice has a left border, too"


def test_the_last_of_two_patches_in_one_cell_is_seen():
    tiles = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20)]
    canvas = visualize.patches_to_canvas(tiles, np.array([0, 0]), np.array([0, 0]), 2)
    assert (canvas == 20).all()
    drawn = visualize.draw_heatmap_wsi(
        canvas,
        np.array([0.0, 1.0]),
        2,
        np.array([0, 0]),
        np.array([0, 0]),
        alpha=1,
        max_color=np.ones(3),
        min_color="black",
    )
    assert (drawn == 255).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, c, i: v.patches_to_canvas([np.zeros((3, 3, 3))], i, i, 2), "expected \\(2, 2, 3\\)"),
        (lambda v, c, i: v.patches_to_canvas([], i, i, 2), "0 patches for 1 rows"),
        (lambda v, c, i: v.patches_to_canvas([np.zeros((2, 2, 3))], i - 1, i, 2), "whole numbers of 0 or more"),
        (lambda v, c, i: v.draw_patches_contour(c, i + 2, i, 2), "outside the canvas"),
        (lambda v, c, i: v.draw_heatmap_wsi(c, np.array([1.5]), 2, i, i), "from 0 to 1"),
        (lambda v, c, i: v.draw_heatmap_wsi(c, np.array([np.nan]), 2, i, i), "from 0 to 1"),
        (lambda v, c, i: v.draw_heatmap_wsi(c, np.array([0.5]), 2, i, i, min_color="white"), "'white'"),
        (lambda v, c, i: v.draw_heatmap_ctscan(c, np.ones(3), 2), "outside the canvas"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(visualize, np.zeros((4, 4, 3), np.uint8), np.array([0]))
