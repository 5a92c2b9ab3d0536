"""Positions at level 0 to grid positions, and the stride that takes them there."""

import os
from pathlib import Path

import numpy as np
import pytest

from bigbag.graphs import build_adjacency, grid_coords, infer_stride


def tissue(seed: int, side: int = 40, kept: float = 0.6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    return grid[rng.random(len(grid)) < kept]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("stride", [256, 513, 1024])
def test_grid_of_pixels(stride, dtype):
    grid = tissue(0)
    back = grid_coords((grid * stride + [999, 12345]).astype(dtype), stride)
    assert back.dtype == np.int64
    np.testing.assert_array_equal(back, grid - grid.min(0))


def test_grid_survives_float_rounding():
    """0.3 / 0.1 is 2.9999999999999996, whose floor would put two patches in one cell."""
    grid = tissue(1)
    for stride in (0.1, 0.7, 56.32):
        for dtype in (np.float32, np.float64):
            np.testing.assert_array_equal(grid_coords((grid * stride).astype(dtype), stride), grid - grid.min(0))


def test_grid_is_the_floor_between_lattice_lines():
    coords = np.random.default_rng(0).integers(-5000, 5000, (300, 2))
    np.testing.assert_array_equal(grid_coords(coords, 224), (coords - coords.min(0)) // 224)
    np.testing.assert_array_equal(grid_coords(coords, [224, 100]), (coords - coords.min(0)) // [224, 100])
    assert grid_coords(np.empty((0, 2)), 5).shape == (0, 2)


@pytest.mark.parametrize("kept", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("stride", [1, 256, 0.1, 56.32])
def test_stride_of_a_lattice_with_holes(stride, kept):
    assert infer_stride(tissue(2, side=60, kept=kept) * stride + 17) == pytest.approx(stride)


def test_stride_of_rounded_positions_and_three_axes():
    grid = tissue(3)
    assert infer_stride(np.rint(grid * 512.3).astype(int)) == pytest.approx(512.3, abs=0.5)
    volume = np.stack(np.meshgrid(*[np.arange(6)] * 3), -1).reshape(-1, 3) * 32
    assert infer_stride(volume) == 32


def test_stride_of_pieces_whose_lattices_are_not_aligned():
    """CLAM starts a new lattice at every piece of tissue; a few rows of two pieces coincide."""
    first = tissue(4) * 256
    second = np.concatenate([tissue(5) * 256 + [37 + 41 * 256, 3], tissue(6, side=4) * 256 + [37 + 41 * 256, 256 * 45]])
    assert infer_stride(np.concatenate([first, second])) == 256


def test_level0_stride_keeps_the_graph_that_torchmil_loses():
    """A 40x slide cut at 20x: 256-pixel patches stand 512 apart at level 0."""
    coords = tissue(7, kept=1.0) * 512
    right = build_adjacency(grid_coords(coords, infer_stride(coords)), radius=2**0.5)
    wrong = build_adjacency(grid_coords(coords, 256), radius=2**0.5)
    assert wrong.num_edges == 0 and right.num_edges == 8 * 38**2 + 5 * 4 * 38 + 3 * 4


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (np.zeros((5, 2)), "no gap"),
        (np.empty((0, 2)), "no gap"),
        (np.random.default_rng(0).random((500, 2)), "no gap"),
        (tissue(8) * [256, 512], "axes disagree"),
        (np.cumsum(np.random.default_rng(0).integers(100, 5000, (400, 1)), axis=0), "no common step"),
    ],
    ids=["one place", "empty", "scattered", "axes", "irregular"],
)
def test_no_stride_is_guessed(coords, message):
    with pytest.raises(ValueError, match=message):
        infer_stride(coords)


def test_nuclei_stand_on_no_lattice():
    root = Path(os.environ.get("BIGBAG_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / "hgsc" / "hgsc_points.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    points = np.load(path)["xy"][:100_000]
    with pytest.raises(ValueError, match="state the stride"):
        infer_stride(points)
    adj = build_adjacency(points, radius=60.0)
    rows = np.random.default_rng(0).integers(0, len(points), 50)
    square = ((points[rows, None].astype(np.int64) - points[None].astype(np.int64)) ** 2).sum(-1)
    np.testing.assert_array_equal(adj.crow.diff().numpy()[rows], (square <= 3600).sum(1) - 1)


@pytest.mark.parametrize("stride", [0, -1, float("nan"), [1, 2, 3]])
def test_bad_strides_are_refused(stride):
    with pytest.raises(ValueError, match="positive number"):
        grid_coords(np.zeros((2, 2)), stride)
