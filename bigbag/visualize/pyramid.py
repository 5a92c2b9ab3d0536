"""DeepZoom pyramids of heatmaps, for OpenSeadragon: sharp at every zoom, transparent where there is no tissue.

A pyramid of a slide's whole box lies on the slide's own pyramid when both get the same width in the viewer, whatever
their numbers of pixels::

    tileSources: [{tileSource: "slide.dzi", width: 1}, {tileSource: "heatmap.dzi", width: 1, opacity: 0.5}]
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path

import numpy as np

from bigbag.files import write_atomically
from bigbag.visualize.heatmap import png
from bigbag.visualize.placement import Box

TILE = 256
_COVERED = 64  # a quarter of a pixel


def write_deepzoom(
    path: str | Path, render: Callable[[Box, tuple[int, int]], np.ndarray], box: Box, shape: tuple[int, int]
) -> int:
    """Write ``<name>.dzi`` and the tiles ``<name>_files/<level>/<column>_<row>.png``.

    Every level is made by ``render`` at its own resolution, in strips as high as a tile. The description is written
    last, and takes the place of an older pyramid only when all tiles are there.

    Args:
        path: the ``.dzi`` file.
        render: makes the picture uint8 ``(*shape, 4)`` of a box, such as :meth:`Heatmap.render`; pixels of which a
            quarter is covered become solid, others clear.
        box: what the pyramid shows, in level-0 pixels.
        shape: height and width of its finest level.

    Returns:
        the number of tiles.
    """
    path = Path(path)
    tiles, made = path.with_name(f"{path.stem}_files"), path.with_name(f".{path.stem}_files.{os.getpid()}.tmp")
    num, clear = 0, png(np.zeros((TILE, TILE, 4), np.uint8))
    try:
        for level, (height, width), down in _levels(shape):
            folder = made / str(level)
            folder.mkdir(parents=True)
            step_x, step_y = (box[2] - box[0]) / shape[1] * down, (box[3] - box[1]) / shape[0] * down
            for row, top in enumerate(range(0, height, TILE)):
                rows = min(TILE, height - top)
                y = box[1] + top * step_y
                strip = _solid(render((box[0], y, box[0] + width * step_x, y + rows * step_y), (rows, width)))
                for column, left in enumerate(range(0, width, TILE)):
                    tile = strip[:, left : left + TILE]
                    empty = tile.shape[:2] == (TILE, TILE) and not tile[..., 3].any()
                    (folder / f"{column}_{row}.png").write_bytes(clear if empty else png(tile))
                    num += 1
        path.unlink(missing_ok=True)
        shutil.rmtree(tiles, ignore_errors=True)
        made.rename(tiles)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    write_atomically(
        path,
        '<?xml version="1.0" encoding="UTF-8"?>\n<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
        f'Format="png" Overlap="0" TileSize="{TILE}"><Size Height="{shape[0]}" Width="{shape[1]}"/></Image>\n',
    )
    return num


def square_pixels(box: Box, shape: tuple[int, int]) -> tuple[Box, tuple[int, int]]:
    """The box with its lower edge moved by less than a pixel, and a shape of its width, so that pixels are squares.

    Viewers place a pyramid by its width, and take its height from its pixels.
    """
    side = (box[2] - box[0]) / shape[1]
    height = max(ceil((box[3] - box[1]) / side - 1e-6), 1)
    return (box[0], box[1], box[2], box[1] + height * side), (height, shape[1])


def _solid(image: np.ndarray) -> np.ndarray:
    """Each pixel covered or clear: OpenSeadragon's WebGL drawer adds what is partly transparent too brightly."""
    covered = image[..., 3] >= _COVERED
    return np.where(covered[..., None], image | np.array([0, 0, 0, 255], np.uint8), 0).astype(np.uint8)


def _levels(shape: tuple[int, int]) -> list[tuple[int, tuple[int, int], int]]:
    """Number, shape and reduction of each level, from one pixel to all of them."""
    finest = ceil(log2(max(*shape, 1)))
    return [
        (level, (ceil(shape[0] / 2 ** (finest - level)), ceil(shape[1] / 2 ** (finest - level))), 2 ** (finest - level))
        for level in range(finest + 1)
    ]
