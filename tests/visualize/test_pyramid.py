"""DeepZoom pyramids: the levels of the format, tiles that put together are the picture."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from bigbag.visualize.heatmap import Heatmap, scaled
from bigbag.visualize.placement import Placement
from bigbag.visualize.pyramid import TILE, square_pixels, write_deepzoom


def together(folder):
    """The picture of a level from its tiles."""
    tiles = {tuple(map(int, path.stem.split("_"))): np.asarray(Image.open(path)) for path in folder.iterdir()}
    columns, rows = (max(axis) + 1 for axis in zip(*tiles))
    return np.concatenate([np.concatenate([tiles[c, r] for c in range(columns)], 1) for r in range(rows)])


@pytest.fixture
def heatmap():
    rng = np.random.default_rng(0)
    return Heatmap(Placement(rng.random((300, 2)) * [4000, 2000], 160.0, 160.0), scaled(rng.random(300)))


def test_levels_and_tiles(heatmap, tmp_path):
    openslide, deepzoom = pytest.importorskip("openslide"), pytest.importorskip("openslide.deepzoom")
    box, shape = (0.0, 0.0, 4000.0, 2200.0), (550, 1000)
    num = write_deepzoom(tmp_path / "a.b.dzi", heatmap.render, box, shape)
    plain = openslide.ImageSlide(Image.new("RGB", (1000, 550)))
    expected = deepzoom.DeepZoomGenerator(plain, tile_size=TILE, overlap=0)
    files = tmp_path / "a.b_files"
    assert num == expected.tile_count == sum(1 for _ in files.rglob("*.png"))
    for level, (width, height) in enumerate(expected.level_dimensions):
        assert together(files / str(level)).shape == (height, width, 4)
    for back, of_level in ((1, shape), (2, (275, 500))):
        found, drawn = together(files / str(expected.level_count - back)).astype(int), heatmap.render(box, of_level)
        solid = drawn[..., 3] >= 64
        assert 0.1 < solid.mean() < 0.9 and (found[..., 3] == 255 * solid).mean() > 0.999
        both = solid & (found[..., 3] == 255)
        assert np.abs(found - drawn)[both][:, :3].max() <= 1 and not found[found[..., 3] == 0].any()
    described, wanted = (
        ElementTree.fromstring(text) for text in ((tmp_path / "a.b.dzi").read_text(), expected.get_dzi("png"))
    )
    assert described.tag == wanted.tag and described.attrib == wanted.attrib
    assert described[0].tag == wanted[0].tag and described[0].attrib == wanted[0].attrib


def test_pixels_are_squares():
    (left, top, right, bottom), (height, width) = square_pixels((5.0, 7.0, 2225.0, 2974.0), (742, 555))
    assert (left, top, right, width) == (5, 7, 2225, 555) and 2974 <= bottom < 2974 + 4
    assert (bottom - top) / height == pytest.approx((right - left) / width)


def test_a_pyramid_that_fails_leaves_the_old_one(heatmap, tmp_path):
    path, box = tmp_path / "h.dzi", (0.0, 0.0, 4000.0, 2000.0)
    write_deepzoom(path, heatmap.render, box, (100, 200))
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def broken(part, shape):
        if shape[1] > 100:
            raise ValueError("broken")
        return heatmap.render(part, shape)

    with pytest.raises(ValueError, match="broken"):
        write_deepzoom(path, broken, box, (300, 600))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
