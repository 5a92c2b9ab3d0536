"""Coordinates in the source's unit, counted in patches when they are packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bigbag import Bag
from bigbag.data import open_store, pack
from bigbag.data.lattice import count_patches, on_lattice
from bigbag.data.sources import MemorySource


def test_strides_that_are_no_whole_number() -> None:
    """Level-0 positions of a stride of 512.4 pixels, cut to integers: flooring would put most of them one too low."""
    places = np.stack(np.divmod(np.arange(400), 20), 1)
    positions = (places * 512.4).astype(np.int64) + [7001, 93]
    np.testing.assert_array_equal(count_patches(positions, 512.4), places)
    assert count_patches(np.empty((0, 2)), 3.0).shape == (0, 2)


def test_the_source_s_coordinates_and_stride_are_kept(tmp_path: Path) -> None:
    places = np.stack(np.divmod(np.arange(30), 6), 1)
    x = np.ones((30, 3), np.float32)
    bags = [
        Bag(x, 0, "pixels.1", places * 448 + 1000, stride=448, attributes={"target_magnification": 20}),
        Bag(x, 1, "patches", places),
    ]
    pack(MemorySource(bags), tmp_path, progress=False)
    store = open_store(tmp_path)
    assert [info.stride for info in store.infos] == [448.0, None]
    pixels, patches = store.read(0), store.read(1)
    np.testing.assert_array_equal(pixels.coords, places)
    np.testing.assert_array_equal(pixels.positions, bags[0].coords)
    assert pixels.stride == 448 and pixels.attributes == {"target_magnification": 20}
    np.testing.assert_array_equal(patches.coords, places)
    assert patches.positions is None and patches.stride is None and patches.attributes == {}
    again = on_lattice(pixels, 7)
    assert again is pixels


@pytest.mark.parametrize(("stride", "coords"), [(0, np.ones((2, 2))), (-1, np.ones((2, 2))), (1, np.ones(2))])
def test_errors(tmp_path: Path, stride: float, coords: np.ndarray) -> None:
    bag = Bag(np.ones((2, 3), np.float32), 0, "s.1", coords, stride=stride)
    with pytest.raises(ValueError, match=r"'s.1': .*expected"):
        pack(MemorySource([bag]), tmp_path, progress=False)
