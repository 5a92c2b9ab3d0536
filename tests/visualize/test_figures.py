from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from bigbag.visualize.figures import (
    BACKGROUND,
    attention_image,
    colour_range,
    lattice,
    log_attention,
    outline_path,
    png_bytes,
    slide_image,
)

L_SHAPE = np.array([[0, 0], [0, 1], [0, 2], [1, 2]])  # x, y: three down, one to the right at the bottom


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int64])
@pytest.mark.parametrize(("step", "origin"), [(1, 0), (256, 1000), (224, -500)])
def test_lattice_finds_the_step(dtype: type, step: int, origin: int) -> None:
    grid = lattice((L_SHAPE * step + origin).astype(dtype))
    assert (grid.shape, grid.crowded) == ((3, 2), False)
    assert (grid.row.tolist(), grid.col.tolist()) == ([0, 1, 2, 2], [0, 0, 0, 1])


def test_lattice_of_one_instance() -> None:
    assert lattice(np.array([[7.5, 3.25]])).shape == (1, 1)


def test_lattice_of_scattered_points_is_about_as_fine_as_they_are() -> None:
    points = np.random.default_rng(0).uniform(0, 50_000, (20_000, 2))
    for coords in (points, points.astype(np.int32)):
        grid = lattice(coords)
        assert grid.crowded and 80 < max(grid.shape) < 160
        filled = len(np.unique(grid.cell)) / (grid.shape[0] * grid.shape[1])
        assert 0.7 < filled < 0.9  # 1 - exp(-1.25 ** 2) = 0.79
        assert np.corrcoef(grid.col, coords[:, 0])[0, 1] > 0.999 and np.corrcoef(grid.row, coords[:, 1])[0, 1] > 0.999


def test_lattice_larger_than_the_picture_is_binned() -> None:
    side = np.arange(120)
    grid = lattice(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), max_side=50)
    assert grid.crowded and grid.shape == (40, 40)
    assert np.bincount(grid.cell).tolist() == [9] * 1600


@pytest.mark.parametrize("coords", [np.zeros((0, 2)), np.zeros((3, 3)), np.array([[0.0, np.nan]]), np.zeros(4)])
def test_lattice_refuses(coords: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected finite positions \(N, 2\)"):
        lattice(coords)


def test_patches_stand_where_their_coordinates_say() -> None:
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)
    image = slide_image(lattice(L_SHAPE), patches=patches)
    assert image.shape == (24, 12, 3)
    for (x, y), patch in zip(L_SHAPE, patches):
        np.testing.assert_array_equal(image[y * 8 : y * 8 + 8, x * 6 : x * 6 + 6], patch)
    assert (image[:16, 6:] == BACKGROUND).all()


def test_patches_are_averaged_down_to_the_size_of_the_picture() -> None:
    patches = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    image = slide_image(lattice(L_SHAPE), patches=patches, max_side=8)  # 2 pixels per cell
    assert image.shape == (6, 4, 3)
    expected = patches.reshape(4, 2, 4, 2, 4, 3).mean((2, 4))
    assert np.abs(image[4:, 2:] - expected[3]).max() <= 0.5


def test_grey_patches_get_darker_with_ink_whatever_their_range() -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    grid = lattice(np.zeros((1, 2)))
    unit, other = (slide_image(grid, patches=ramp * scale + shift) for scale, shift in ((1, 0), (500, -200)))
    brightness = unit.sum(-1).reshape(-1).astype(int)
    assert (np.diff(brightness) <= 0).all() and brightness[0] > 700 and brightness[-1] < 250
    assert np.abs(unit.astype(int) - other).max() < 12


def test_colours_of_crowded_cells_are_averaged() -> None:
    side = np.arange(4)
    grid = lattice(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), max_side=2)
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = slide_image(grid, rgb=rgb.reshape(-1, 3))
    np.testing.assert_array_equal(image, np.floor(rgb.reshape(2, 2, 2, 2, 3).mean((1, 3))).astype(np.uint8))


def test_slide_image_refuses() -> None:
    grid = lattice(L_SHAPE)
    with pytest.raises(ValueError, match="either patches or rgb"):
        slide_image(grid)
    with pytest.raises(ValueError, match="for 4 instances"):
        slide_image(grid, rgb=np.zeros((3, 3), np.uint8))


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_log_attention_is_relative_to_the_average(shift: float) -> None:
    scores = np.array([0.0, 1.0, 2.0, 5.0]) + shift
    weights = np.exp(scores - shift) / np.exp(scores - shift).sum()
    np.testing.assert_allclose(log_attention(scores), np.log10(4 * weights), rtol=1e-5)
    np.testing.assert_allclose(log_attention(weights), np.log10(4 * weights), rtol=1e-5)


def test_log_attention_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        log_attention(np.array([0.0, np.inf, 1.0]))


def test_attention_image_keeps_the_peak_of_a_cell() -> None:
    side = np.arange(4)
    grid = lattice(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), max_side=2)
    values = np.zeros(16)
    values[[0, 15]] = 0.5, 1.0
    image = attention_image(grid, values, 0.0, 1.0)
    assert (image[..., 3] == 255).all()
    light = image[..., :3].astype(int).sum(-1)
    assert light[0, 1] == light[1, 0] < light[0, 0] < light[1, 1]


def test_attention_image_is_transparent_where_nothing_is() -> None:
    image = attention_image(lattice(L_SHAPE), np.arange(4.0), 0.0, 3.0)
    assert image[..., 3].tolist() == [[255, 0], [255, 0], [255, 255]]


def test_colour_range_is_not_set_by_one_instance() -> None:
    values = np.append(np.linspace(0, 1, 9999), 1e6)
    assert colour_range(values) == pytest.approx((0.5, 1.0), abs=1e-2)


def test_colour_range_lets_a_small_lesion_stand_out() -> None:
    values = np.append(np.linspace(-4.0, -1.0, 8_000), [0.5, 1.5, 2.5, 3.0])
    low, high = colour_range(values)
    assert low == pytest.approx(-2.5, abs=0.01) and high == 1.5


def test_outline_of_an_l_shape() -> None:
    coords = np.stack(np.meshgrid(np.arange(5), np.arange(5)), -1).reshape(-1, 2)
    inside = np.array([(tuple(c - 1) in set(map(tuple, L_SHAPE.tolist()))) for c in coords])
    parts = outline_path(lattice(coords), inside).split("M")[1:]
    # corners (1,1) (2,1) (2,3) (3,3) (3,4) (1,4)
    assert sorted(parts) == sorted(["1 1H2", "2 3H3", "1 4H3", "1 1V4", "2 1V3", "3 3V4"])
    assert outline_path(lattice(coords), np.zeros(25, bool)) == ""


def test_outline_at_the_edge_of_the_grid() -> None:
    parts = outline_path(lattice(L_SHAPE), np.ones(4, bool)).split("M")[1:]
    assert sorted(parts) == sorted(["0 0H1", "1 2H2", "0 3H2", "0 0V3", "1 0V2", "2 2V3"])


def test_window_stays_inside() -> None:
    coords = np.stack(np.meshgrid(np.arange(30), np.arange(12)), -1).reshape(-1, 2)
    grid = lattice(coords)
    assert grid.window(0, 20) == (0, 0, 12, 20)
    window = grid.window(len(coords) - 1, 8)
    assert window == (4, 22, 8, 8)
    close, kept = grid.crop(window)
    assert close.shape == (8, 8) and len(kept) == 64
    assert coords[kept].min(0).tolist() == [22, 4] and coords[kept].max(0).tolist() == [29, 11]


@pytest.mark.parametrize("num_colours", [7, 2000])
def test_png_holds_the_picture(num_colours: int) -> None:
    rng = np.random.default_rng(3)
    palette = rng.integers(0, 256, (num_colours, 3), dtype=np.uint8)
    picture = palette[rng.integers(0, num_colours, (90, 70))]
    read = Image.open(io.BytesIO(png_bytes(picture)))
    assert read.mode == ("P" if num_colours == 7 else "RGB")
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), picture)


def test_a_lattice_of_a_million_is_drawn_in_seconds() -> None:
    rng = np.random.default_rng(4)
    coords = np.stack(np.meshgrid(np.arange(1000), np.arange(1000)), -1).reshape(-1, 2).astype(np.int32)
    scores, inside = rng.normal(size=len(coords)).astype(np.float32), rng.random(len(coords)) < 0.5
    started = time.perf_counter()
    grid = lattice(coords)
    image = attention_image(grid, log_attention(scores), -1.0, 1.0)
    path = outline_path(grid, inside)
    assert time.perf_counter() - started < 15  # about 1 s; a loop over patches takes minutes
    assert image.shape == (1000, 1000, 4) and 0 < path.count("M") <= 20_000
