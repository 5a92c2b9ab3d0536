"""Heatmaps: level-0 geometry, overlap, and a real slide whose heatmap must lie on its tissue."""

import numpy as np
import pytest

from bigbag.visualize import heatmap as heatmap_module
from bigbag.visualize import slide_image
from bigbag.visualize.heatmap import Heatmap, blend, gallery, picture_shape, scaled, with_colour_bar
from bigbag.visualize.placement import Placement, average, mean_distance, place
from bigbag.visualize.slide_image import SlideImage, find_slides

PATCH = 64


def test_average_is_the_mean_over_each_pixel():
    """Against pictures of eighths of a pixel, in which the squares have whole sides."""
    rng = np.random.default_rng(0)
    corners, size, fine = rng.integers(-20, 120, (60, 2)).astype(float), 24.0, 8
    values = rng.random(60)
    box_height = 12 * 8
    mean, cover = average(Placement(corners, size, None), values, (10.0, 20.0, 90.0, 20.0 + box_height), (12, 10))
    count, total = np.zeros((box_height, 80)), np.zeros((box_height, 80))
    for (x, y), value in zip(corners.astype(int) - [10, 20], values):
        part = np.s_[max(y, 0) : max(y + 24, 0), max(x, 0) : max(x + 24, 0)]
        count[part] += 1
        total[part] += value
    count, total = (grid.reshape(12, fine, 10, fine).sum((1, 3)) for grid in (count, total))
    assert (count == 0).any() and (count > 64).any(), "some pixels are empty, some squares overlap"
    assert np.allclose(cover, np.minimum(count / 64, 1), atol=1e-6)
    assert np.allclose(mean, np.divide(total, count, out=np.zeros_like(total), where=count > 0), atol=1e-6)


def test_a_part_of_a_picture_is_that_part(monkeypatch):
    rng = np.random.default_rng(1)
    heatmap = Heatmap(Placement(rng.random((500, 2)) * 1000, 37.3, None), scaled(rng.random(500)))
    whole = heatmap.render((0, 0, 1000, 1000), (100, 100))
    part = heatmap.render((200, 400, 700, 600), (20, 50))
    assert np.abs(whole[40:60, 20:70].astype(int) - part).max() <= 1
    monkeypatch.setattr(heatmap_module, "_BAND_PIXELS", 700)
    assert np.abs(heatmap.render((0, 0, 1000, 1000), (100, 100)).astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    "stride, attributes, options, corner, size, step",
    [
        (512, {}, {}, 1024, 512, 512),
        (384.0, {"patch_size": 256, "patch_size_level0": 512, "overlap": 64}, {}, 1024, 512, 384),
        (512, {"patch_size": 256, "patch_level": 1, "downsample": [4, 4]}, {}, 1024, 1024, 512),
        (512, {"patch_size_level0": 512}, {"size": 600}, 1024, 600, 512),
        (256, {"unit": "um", "tile_size_um": 256.0}, {"mpp": 0.5}, 2048, 512, 512),
        (512, {"anchor": "centre"}, {}, 768, 512, 512),
        (None, {}, {}, 1024, 512, 512),
    ],
)
def test_place(stride, attributes, options, corner, size, step):
    positions = np.array([[1024, 2048], [1024 + 512, 2048], [1024, 2048 + 512]])
    found = place(positions, stride, attributes, **options)
    assert (found.corners[0, 0], found.size, found.stride) == (corner, size, step)


def test_instances_on_no_lattice_stand_in_the_middle_of_their_square():
    points = np.random.default_rng(0).random((4000, 2)) * 10_000
    assert mean_distance(points) == pytest.approx(10_000 / np.sqrt(4000), rel=0.1)
    found = place(points)
    assert found.stride is None and np.allclose(found.centres, points)


def test_positions_in_micrometres_need_the_slide():
    with pytest.raises(ValueError, match="--slides"):
        place(np.zeros((2, 2)), 256, {"unit": "um"})


def test_scales():
    scores = np.array([3.0, -1.0, 3.0, 10.0])
    assert np.allclose(scaled(scores).values, [0.5, 0, 0.5, 1])
    assert np.allclose(scaled(scores, "linear").values, [4 / 11, 0, 4 / 11, 1])
    limited = scaled(scores, "linear", (0.0, 5.0))
    assert np.allclose(limited.values, [0.6, 0, 0.6, 1]) and limited.ticks[-1] == (1.0, "5")
    assert scaled(np.full(3, 7.0), "linear").ticks == ((0.5, "7"),)
    assert len(scaled(np.empty(0), "attention").values) == 0
    with pytest.raises(ValueError, match="2 of 3 scores are not finite"):
        scaled(np.array([np.nan, 1, np.inf]))
    with pytest.raises(ValueError, match="limits"):
        scaled(scores, "rank", (0.0, 1.0))


def test_colour_bar_moves_no_pixel():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (120, 90, 3), dtype=np.uint8)
    wide = with_colour_bar(picture, scaled(rng.random(9)))
    assert wide.shape[0] == 120 and wide.shape[1] > 110 and np.array_equal(wide[:, :90], picture)
    assert len(np.unique(wide[:, 90:].reshape(-1, 3), axis=0)) > 80, "a ramp of colours"


def test_gallery():
    sheet = gallery([np.full((64, 64, 3), value, np.uint8) for value in (10, 200, 90)], ["a", "b", "c"], 2, 32)
    for value in (10, 200, 90):
        assert (sheet == value).all(2).sum() >= 32 * 32
    assert gallery([], []).shape[2] == 3


@pytest.fixture(scope="module")
def slide(test_data):
    pytest.importorskip("openslide")
    path = test_data / "wsi" / "cmu_small_region.svs"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set BIGBAG_TEST_DATA")
    with SlideImage(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def tissue(slide):
    """``(2967, 2220)`` bool: where the slide has colour."""
    width, height = slide.size
    pixels = slide.picture((height, width)).astype(int)
    return pixels.max(2) - pixels.min(2) > 25


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_the_heatmap_of_a_real_slide_lies_on_its_tissue(slide, tissue):
    """Patches that are half tissue, drawn on the thumbnail: what is covered is the patches to the pixel, and their
    overlap with the tissue is that of the patches at level 0, the limit of their grid. Moved, it is less."""
    width, height = slide.size
    x, y = (grid.reshape(-1) for grid in np.meshgrid(np.arange(0, width, PATCH), np.arange(0, height, PATCH)))
    share = np.array([tissue[b : b + PATCH, a : a + PATCH].mean() for a, b in zip(x, y)])
    kept = share > 0.5
    drawn = np.zeros((height, width), bool)
    for a, b in zip(x[kept], y[kept]):
        drawn[b : b + PATCH, a : a + PATCH] = True
    limit = iou(drawn, tissue)
    heatmap = Heatmap(place(np.stack([x, y], 1)[kept], PATCH), scaled(share[kept]))

    full = heatmap.render((0, 0, width, height), (height, width))
    assert np.array_equal(full[..., 3] == 255, drawn) and not full[~drawn].any()

    shape = picture_shape((0, 0, width, height), 990)
    assert shape == (990, 741)
    small = heatmap.render((0, 0, width, height), shape)
    thumbnail = slide.picture(shape).astype(int)
    on_thumbnail = thumbnail.max(2) - thumbnail.min(2) > 25
    found = iou(small[..., 3] > 127, on_thumbnail)
    assert limit > 0.75 and found >= limit - 0.01
    step = PATCH * shape[0] // height // 2  # half a patch
    for shift in (-step, step):
        for axis in (0, 1):
            assert iou(np.roll(small[..., 3] > 127, shift, axis), on_thumbnail) < found - 0.005

    laid = blend(slide.picture(shape), small, 0.5)
    assert np.array_equal(laid[small[..., 3] == 0], slide.picture(shape)[small[..., 3] == 0])


def test_overlapping_patches_of_a_real_slide_are_averaged(slide):
    width, height = slide.size
    x, y = (grid.reshape(-1) for grid in np.meshgrid(np.arange(0, width - 63, 32), np.arange(0, height - 63, 32)))
    values = x / x.max()
    placement = place(np.stack([x, y], 1), None, {"patch_size_level0": 64})
    assert (placement.stride, placement.size) == (32, 64)
    mean, cover = average(placement, values, (0, 0, width, height), (height, width))
    # Two columns of patches cover each column of pixels away from the borders.
    columns = np.arange(64, 2048)
    assert (
        np.allclose(mean[1000, columns], (columns // 32 * 32 - 16) / x.max(), atol=1e-5)
        and (cover[64:2048, columns] == 1).all()
    )


def test_pictures_in_bands_are_those_at_once(slide, monkeypatch):
    whole = slide.picture((495, 370))
    monkeypatch.setattr(slide_image, "_BAND_BYTES", 2220 * 4 * 100)
    assert np.abs(slide.picture((495, 370)).astype(int) - whole).max() <= 2
    assert slide.mpp == pytest.approx(0.499) and slide.bounds == (0, 0)
    assert slide.patch(640, 640, 64, 64).shape == (64, 64, 3)
    assert np.array_equal(slide.patch(640, 640, 64, 64), slide.picture((2967, 2220))[640:704, 640:704])


def test_slides_are_found_by_name(tmp_path):
    for name in ("a.b.svs", "sub/c.tif", "d.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_slides(tmp_path, ["a.b", "c.h5"]) == {"a.b": tmp_path / "a.b.svs", "c.h5": tmp_path / "sub" / "c.tif"}
    with pytest.raises(ValueError, match="no image of 1 of 2 slides \\('d'\\)"):
        find_slides(tmp_path, ["c", "d"])
    (tmp_path / "c.ndpi").touch()
    with pytest.raises(ValueError, match="two files of slide 'c'"):
        find_slides(tmp_path, ["c"])
    pytest.importorskip("openslide")
    with pytest.raises(ValueError, match="not a slide"):
        SlideImage(tmp_path / "c.ndpi")
