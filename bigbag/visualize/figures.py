"""Pictures of one bag, as functions on arrays: its instances laid out by position, and its attention in the same place.

Positions become cells of a grid once (:func:`lattice`); every picture of the bag then has the geometry of that grid,
so that pictures lie on top of each other. All work is array indexing: there is no loop over instances.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

BACKGROUND = (255, 255, 255)
_PALE, _DARK = np.array([250.0, 236.0, 242.0]), np.array([74.0, 32.0, 92.0])  # grey patches get the colours of a stain
_GREY_LEVELS = 48
_MAX_OUTLINE_RUNS = 20_000


@dataclass(frozen=True)
class Lattice:
    """Where the instances of a bag lie on a grid of ``shape`` cells.

    Attributes:
        row: ``(N,)`` int64.
        col: ``(N,)`` int64.
        shape: rows and columns of the grid.
        crowded: True if a cell may hold several instances (positions off a grid, or a grid too large to draw).
    """

    row: np.ndarray
    col: np.ndarray
    shape: tuple[int, int]
    crowded: bool

    @property
    def cell(self) -> np.ndarray:
        """``(N,)`` int64: the cells, numbered row by row."""
        return self.row * self.shape[1] + self.col

    def window(self, centre: int, side: int) -> tuple[int, int, int, int]:
        """``(row, col, rows, cols)`` of the window of at most ``side x side`` cells around instance ``centre``."""
        rows, cols = min(side, self.shape[0]), min(side, self.shape[1])
        row = min(max(int(self.row[centre]) - rows // 2, 0), self.shape[0] - rows)
        col = min(max(int(self.col[centre]) - cols // 2, 0), self.shape[1] - cols)
        return row, col, rows, cols

    def crop(self, window: tuple[int, int, int, int]) -> tuple[Lattice, np.ndarray]:
        """The part inside ``window``, and the ``(M,)`` indices of its instances."""
        top, left, rows, cols = window
        inside = (self.row >= top) & (self.row < top + rows) & (self.col >= left) & (self.col < left + cols)
        kept = np.flatnonzero(inside)
        return Lattice(self.row[kept] - top, self.col[kept] - left, (rows, cols), self.crowded), kept


def lattice(coords: np.ndarray, max_side: int = 1600) -> Lattice:
    """Find the grid that positions lie on.

    Integer positions on a regular grid of any step (lattice units, or pixels in multiples of the patch size) keep one
    cell each. Other positions are binned to about one instance per cell. No side exceeds ``max_side`` cells.

    Args:
        coords: ``(N, 2)`` positions ``(x, y)``, y growing downwards, in any unit.
        max_side: cells along the longer side.

    Raises:
        ValueError: ``coords`` is not ``(N, 2)``, is empty or is not finite.
    """
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 2 or len(coords) == 0 or not np.isfinite(coords).all():
        raise ValueError(f"coords: expected finite positions (N, 2) with N > 0, got {coords.dtype} {coords.shape}")
    low = coords.min(0)
    steps = [_step(coords[:, axis]) for axis in (0, 1)]
    regular = None not in steps
    if regular:
        cells = ((coords - low) // np.array(steps)).astype(np.int64)
        regular = _mostly_neighbours(cells)
    if not regular:
        extent = np.maximum(coords.max(0) - low, 1e-9).astype(np.float64)
        pitch = max(1.25 * float(np.sqrt(extent.prod() / len(coords))), float(extent.max()) / (max_side - 1))
        cells = ((coords - low) / pitch).astype(np.int64)
    factor = -(-(int(cells.max()) + 1) // max_side)
    cells //= factor
    rows, cols = int(cells[:, 1].max()) + 1, int(cells[:, 0].max()) + 1
    return Lattice(cells[:, 1].copy(), cells[:, 0].copy(), (rows, cols), crowded=factor > 1 or not regular)


def _step(values: np.ndarray) -> int | None:
    """The largest step whose multiples reach every value; None where the values are not integers."""
    if values.dtype.kind == "f":
        if not np.array_equal(values, np.rint(values)):
            return None
        values = values.astype(np.int64)
    gaps = np.diff(np.unique(values.astype(np.int64)))
    return max(int(np.gcd.reduce(gaps)), 1) if len(gaps) else 1


def _mostly_neighbours(cells: np.ndarray) -> bool:
    """Whether a quarter of the instances have another one in the next cell to the right or below."""
    width = int(cells[:, 0].max()) + 2
    code = np.unique(cells[:, 1] * width + cells[:, 0])
    near = np.isin(code + 1, code, assume_unique=True) | np.isin(code + width, code, assume_unique=True)
    return len(code) == 1 or bool(near.mean() >= 0.25)


def slide_image(
    grid: Lattice, patches: np.ndarray | None = None, rgb: np.ndarray | None = None, max_side: int = 1600
) -> np.ndarray:
    """The bag drawn from its instances, each in its cell.

    Args:
        grid: from :func:`lattice`.
        patches: ``(N, h, w)`` grey, drawn in the colours of a stain, or ``(N, h, w, 3)``; uint8, or floating with any
            range (0 to 1 is kept, another range is stretched between its 0.5 and 99.5 % quantiles).
        rgb: ``(N, 3)`` uint8, one colour per instance, where there are no patches.
        max_side: of the picture, in pixels: patches are averaged down by a power of two until they fit.

    Returns:
        uint8 ``(H, W, 3)`` where H and W are the grid's rows and columns times the pixels per cell. Empty cells are
        ``BACKGROUND``; where several instances share a cell it has their mean colour.

    Raises:
        ValueError: neither or both of ``patches`` and ``rgb`` are given, or their shape does not fit ``grid``.
    """
    if (patches is None) == (rgb is None):
        raise ValueError("slide_image: expected either patches or rgb")
    tiles = np.asarray(rgb)[:, None, None, :] if patches is None else np.asarray(patches)
    if len(tiles) != len(grid.row) or tiles.ndim not in (3, 4) or (tiles.ndim == 4 and tiles.shape[3] != 3):
        raise ValueError(f"slide_image: got tiles {tiles.shape} for {len(grid.row)} instances; expected (N, h, w[, 3])")
    tiles = _shrink(tiles, 1 if grid.crowded else max(max_side // max(grid.shape), 1))
    tiles = _colour(tiles)
    rows, cols = grid.shape
    height, width = tiles.shape[1:3]
    canvas = np.empty((rows, cols, height, width, 3), dtype=np.uint8)
    canvas[:] = BACKGROUND
    if grid.crowded:
        count = np.bincount(grid.cell, minlength=rows * cols)
        for channel in range(3):
            total = np.bincount(grid.cell, tiles[:, 0, 0, channel], minlength=rows * cols)
            mean = (total / np.maximum(count, 1)).reshape(rows, cols)
            canvas[:, :, 0, 0, channel][count.reshape(rows, cols) > 0] = mean[count.reshape(rows, cols) > 0]
    else:
        canvas[grid.row, grid.col] = tiles
    return canvas.transpose(0, 2, 1, 3, 4).reshape(rows * height, cols * width, 3)


def _shrink(tiles: np.ndarray, max_pixels: int) -> np.ndarray:
    """Average ``(N, h, w, ...)`` over blocks of 2, 4, 8, ... pixels until no side exceeds ``max_pixels``."""
    factor = 1
    while max(tiles.shape[1:3]) > max_pixels * factor:
        factor *= 2
    if factor == 1:
        return tiles
    rows, cols = (np.arange(0, side, factor) for side in tiles.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(tiles, rows, axis=1, dtype=np.float32), cols, axis=2)
    areas = np.outer(*(np.diff([*starts, side]) for starts, side in zip((rows, cols), tiles.shape[1:3])))
    sums /= areas.reshape(*areas.shape, *(1,) * (tiles.ndim - 3))
    return sums if tiles.dtype.kind == "f" else np.rint(sums).astype(np.uint8)


def _colour(tiles: np.ndarray) -> np.ndarray:
    """``(N, h, w)`` or ``(N, h, w, 3)`` of any range as uint8 ``(N, h, w, 3)``."""
    if tiles.dtype != np.uint8:
        sample = tiles[:: max(len(tiles) // 2000, 1)].astype(np.float32)
        low, high = 0.0, 1.0
        if sample.min() < 0 or sample.max() > 1:
            low, high = (float(q) for q in np.quantile(sample, [0.005, 0.995]))
        tiles = np.clip((tiles.astype(np.float32) - low) * (255 / max(high - low, 1e-9)), 0, 255).astype(np.uint8)
    if tiles.ndim == 4:
        return tiles
    level = np.arange(256) * _GREY_LEVELS // 256 / (_GREY_LEVELS - 1)
    stain = np.rint(_PALE + level[:, None] * (_DARK - _PALE)).astype(np.uint8)
    return stain[tiles]


def log_attention(scores: np.ndarray) -> np.ndarray:
    """Attention of each instance against the average, ``log10(N * a)`` with ``a = softmax(scores)``.

    Args:
        scores: ``(N,)`` before the softmax; or after it, which is seen by their being non-negative with the sum 1.

    Returns:
        float32 ``(N,)``: 0 is the average, 1 ten times the average.

    Raises:
        ValueError: a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError(f"attention: {int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    if len(values) and values.min() >= 0 and abs(values.sum() - 1) < 1e-2:
        values = np.log(np.maximum(values, 1e-12 / len(values)))
    values = values - values.max(initial=-np.inf) if len(values) else values
    values -= np.log(np.exp(values).mean()) if len(values) else 0.0
    return (values / np.log(10)).astype(np.float32)


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """The median and the third largest value: the background takes one colour, a small lesion stands out, and no single
    instance sets the scale."""
    third = max(len(values) - 3, 0)
    return float(np.median(values)), float(np.partition(values, third)[third])


def attention_image(
    grid: Lattice, values: np.ndarray, low: float, high: float, colormap: str = "inferno"
) -> np.ndarray:
    """Values by position, one pixel per cell.

    Args:
        grid: from :func:`lattice`.
        values: ``(N,)``, such as :func:`log_attention`; of several in one cell the largest is shown.
        low: what gets the first colour, with everything below it.
        high: what gets the last colour, with everything above it.
        colormap: a name that matplotlib knows.

    Returns:
        uint8 ``(rows, cols, 4)``; empty cells are transparent.
    """
    raster = np.full(grid.shape[0] * grid.shape[1], -np.inf, dtype=np.float32)
    np.maximum.at(raster, grid.cell, np.asarray(values, dtype=np.float32))
    image = np.zeros((*grid.shape, 4), dtype=np.uint8)
    filled = (raster > -np.inf).reshape(grid.shape)
    scaled = (raster.reshape(grid.shape)[filled] - low) / max(high - low, 1e-9)
    image[filled] = colours(colormap)[np.clip(scaled * 255, 0, 255).astype(np.uint8)]
    return image


def colours(colormap: str) -> np.ndarray:
    """uint8 ``(256, 4)``: the colours of a matplotlib colour map."""
    import matplotlib

    return (matplotlib.colormaps[colormap](np.linspace(0, 1, 256)) * 255).round().astype(np.uint8)


def outline_path(grid: Lattice, inside: np.ndarray) -> str:
    """The border of the cells that hold marked instances, as the ``d`` of an SVG path in units of cells.

    Args:
        grid: from :func:`lattice`.
        inside: ``(N,)`` bool.

    Returns:
        straight runs ``M x y H x`` and ``M x y V y``; empty if nothing is marked. A border of more than 20,000 runs is
        drawn around blocks of 2 x 2, 4 x 4, ... cells instead.
    """
    size, row, col = 1, grid.row[inside], grid.col[inside]
    while True:
        marked = np.zeros((grid.shape[0] // size + 3, grid.shape[1] // size + 3), dtype=np.int8)
        marked[row // size + 1, col // size + 1] = 1
        across = _runs(np.diff(marked, axis=0) != 0)
        down = _runs((np.diff(marked, axis=1) != 0).T)
        if len(across) + len(down) <= _MAX_OUTLINE_RUNS:
            break
        size *= 2
    (high, wide), scale = grid.shape, size
    parts = [f"M{min(a * scale, wide)} {min(r * scale, high)}H{min(b * scale, wide)}" for r, a, b in across.tolist()]
    parts += [f"M{min(c * scale, wide)} {min(a * scale, high)}V{min(b * scale, high)}" for c, a, b in down.tolist()]
    return "".join(parts)


def _runs(edges: np.ndarray) -> np.ndarray:
    """``(E, 3)``: line, first and last point of the runs of True along the rows of ``edges``, less the padding."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    line, first = np.nonzero(steps == 1)
    last = np.nonzero(steps == -1)[1]
    return np.stack([line, first - 1, last - 1], axis=1)


def png_bytes(image: np.ndarray) -> bytes:
    """A uint8 ``(H, W, 3 or 4)`` picture as a PNG file; with a palette where 256 colours are enough."""
    from PIL import Image

    picture = Image.fromarray(image)
    if image.shape[2] == 3:
        packed = image.astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16], dtype=np.uint32)
        palette, index = np.unique(packed, return_inverse=True)
        if len(palette) <= 256:
            picture = Image.fromarray(index.reshape(image.shape[:2]).astype(np.uint8))
            picture.putpalette(
                np.stack([palette & 255, palette >> 8 & 255, palette >> 16], 1).astype(np.uint8).tobytes()
            )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
