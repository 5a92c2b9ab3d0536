"""Patches of a slide on a canvas, with torchmil's names and results, without a loop over patches.

A canvas is a grid of cells of ``patch_size`` pixels; a patch stands in the cell of its row and column. For slides and
level-0 positions see :mod:`bigbag.visualize.heatmap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_COLOR = np.array([0.8392156862745098, 0.15294117647058825, 0.1568627450980392])
MIN_COLOR = np.array([0.17254901960784313, 0.6274509803921569, 0.17254901960784313])
_CHUNK = 4096
_ROUNDING = 1e-5  # of numbers that were normalised in float32


def patches_to_canvas(
    patches_list: Sequence[np.ndarray] | np.ndarray, row_array: np.ndarray, column_array: np.ndarray, patch_size: int
) -> np.ndarray:
    """Lay patches out on a white canvas; of several in one cell the last one is seen.

    Args:
        patches_list: N patches ``(patch_size, patch_size, 3)``, as a list or one array.
        row_array: ``(N,)`` integers, row of each patch.
        column_array: ``(N,)`` integers, its column.
        patch_size: side of a patch in pixels.

    Returns:
        uint8 ``((max row + 1) * patch_size, (max column + 1) * patch_size, 3)``; one white cell where N is 0.

    Raises:
        ValueError: numbers of patches, rows and columns that differ, another shape of patches, or a negative cell.
    """
    rows, columns = _cells("patches_to_canvas", row_array, column_array, patch_size)
    if len(patches_list) != len(rows):
        raise ValueError(f"patches_to_canvas: {len(patches_list)} patches for {len(rows)} rows, expected one of each")
    if not len(rows):
        return np.full((patch_size, patch_size, 3), 255, np.uint8)
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    canvas = np.full((height, patch_size, width, patch_size, 3), 255, np.uint8)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        patches = np.asarray(patches_list[part])
        if patches.shape[1:] != (patch_size, patch_size, 3):
            raise ValueError(
                f"patches_to_canvas: patches of shape {patches.shape[1:]}, expected ({patch_size}, {patch_size}, 3)"
            )
        canvas[rows[part], :, columns[part]] = patches
    return canvas.reshape(height * patch_size, width * patch_size, 3)


def draw_patches_contour(
    canvas: np.ndarray,
    row_array: np.ndarray,
    column_array: np.ndarray,
    patch_size: int,
    contour_prop: float = 0.05,
) -> np.ndarray:
    """Draw a black line of ``2 * int(contour_prop * patch_size)`` pixels along the four sides of each patch.

    At the border of the canvas the inner half of the line is drawn; torchmil draws none at its top and left.

    Args:
        canvas: ``(H, W, ...)``, as of :func:`patches_to_canvas`.
        row_array: ``(N,)`` integers, row of each patch.
        column_array: ``(N,)`` integers, its column.
        patch_size: side of a patch in pixels.
        contour_prop: half of the width of the line, as a share of ``patch_size``.

    Returns:
        a new canvas.

    Raises:
        ValueError: a cell outside the canvas, or numbers of rows and columns that differ.
    """
    rows, columns = _cells("draw_patches_contour", row_array, column_array, patch_size, canvas)
    result = np.array(canvas, order="C")
    half = int(contour_prop * patch_size)
    if half > 0 and len(rows):
        flat = result.reshape(len(result), -1)
        # Edges between cells: left and right of a cell in its row, above and below it in its column.
        upright = np.zeros((-(-len(canvas) // patch_size), -(-canvas.shape[1] // patch_size) + 1), bool)
        level = np.zeros((len(upright) + 1, upright.shape[1] - 1), bool)
        upright[rows, columns] = upright[rows, columns + 1] = True
        level[rows, columns] = level[rows + 1, columns] = True
        for row in np.flatnonzero(upright.any(1)).tolist():
            _blacken(flat[row * patch_size : (row + 1) * patch_size], _around(upright[row], patch_size, half, canvas))
        for edge in np.flatnonzero(level.any(1)).tolist():
            lines = flat[max(edge * patch_size - half, 0) : edge * patch_size + half]
            _blacken(lines, np.repeat(level[edge], patch_size)[: canvas.shape[1]])
    return result


def _around(edges: np.ndarray, size: int, half: int, canvas: np.ndarray) -> np.ndarray:
    """``(W,)`` bool: the pixels within ``half`` of the edges that are True, which are ``size`` pixels apart."""
    steps = np.zeros(canvas.shape[1] + 1, np.int64)
    places = np.flatnonzero(edges) * size
    np.add.at(steps, np.clip(places - half, 0, len(steps) - 1), 1)
    np.add.at(steps, np.clip(places + half, 0, len(steps) - 1), -1)
    return np.cumsum(steps[:-1]) > 0


def _blacken(lines: np.ndarray, pixels: np.ndarray) -> None:
    """Set the pixels (a mask) of some lines of a canvas, channels end to end, to 0."""
    np.copyto(lines, np.zeros((), lines.dtype), where=np.repeat(pixels, lines.shape[1] // len(pixels)))


def draw_heatmap_wsi(
    canvas: np.ndarray,
    values: np.ndarray,
    patch_size: int,
    row_array: np.ndarray,
    col_array: np.ndarray,
    alpha: float = 0.5,
    max_color: np.ndarray = MAX_COLOR,
    min_color: np.ndarray | str = MIN_COLOR,
) -> np.ndarray:
    """Blend a colour over each patch, between ``min_color`` at 0 and ``max_color`` at 1.

        alpha * 255 * (v * max_color + (1 - v) * min_color) + (1 - alpha) * canvas

    With ``min_color="blank"`` the colour is ``max_color`` and its opacity ``v``.

    Args:
        canvas: ``(H, W, 3)``, as of :func:`patches_to_canvas`.
        values: ``(N,)`` numbers from 0 to 1; of several patches in one cell the last one counts. torchmil takes other
            numbers too, whose colours overflow.
        patch_size: side of a patch in pixels.
        row_array: ``(N,)`` integers, row of each patch.
        col_array: ``(N,)`` integers, its column.
        alpha: opacity, 0 to 1.
        max_color: ``(3,)`` red, green and blue from 0 to 1.
        min_color: as ``max_color``, or "blank", or "black" (which torchmil names but cannot draw).

    Returns:
        a new canvas of the same type; fractions are cut off.

    Raises:
        ValueError: a cell outside the canvas, a value or ``alpha`` outside 0 to 1, or lengths that differ.
    """
    rows, columns = _cells("draw_heatmap_wsi", row_array, col_array, patch_size, canvas)
    values = checked_values("draw_heatmap_wsi", values, len(rows), alpha)
    high = np.asarray(max_color, float)
    if isinstance(min_color, str):
        if min_color not in ("blank", "black"):
            raise ValueError(f"draw_heatmap_wsi: min_color is {min_color!r}, expected a colour, 'blank' or 'black'")
        low, blank = np.zeros(3), min_color == "blank"
    else:
        low, blank = np.asarray(min_color, float), False
    result = np.array(canvas, order="C")
    height, width = canvas.shape[:2]
    flat = result.reshape(height, -1)
    number = np.full((-(-height // patch_size), -(-width // patch_size)), -1)
    number[rows, columns] = np.arange(len(rows))
    for row in np.unique(rows).tolist():
        filled = np.flatnonzero(number[row] >= 0)
        v = values[number[row, filled], None]
        opacity = np.zeros((number.shape[1], 1))
        opacity[filled] = v if blank else alpha
        tint = np.zeros((number.shape[1], 3))
        tint[filled] = 255 * high if blank else 255 * (v * high + (1.0 - v) * low)
        strip = flat[row * patch_size : (row + 1) * patch_size]
        # The order of the operations is torchmil's, so that fractions are cut off in the same places.
        blended = strip * _pixels(np.broadcast_to(1.0 - opacity, tint.shape), patch_size, width)
        blended += _pixels(opacity * tint, patch_size, width)
        np.copyto(strip, blended, casting="unsafe")
    return result


def _pixels(cells: np.ndarray, size: int, width: int) -> np.ndarray:
    """``(width * 3,)``: the colours of the cells of a row as those of a line of pixels."""
    return np.repeat(cells, size, axis=0)[:width].reshape(-1)


def _cells(
    where: str, row_array: np.ndarray, column_array: np.ndarray, size: int, canvas: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns as int64, checked."""
    rows, columns = np.asarray(row_array), np.asarray(column_array)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(f"{where}: rows {rows.shape} and columns {columns.shape}, expected two of shape (N,)")
    for name, index in (("row", rows), ("column", columns)):
        if len(index) and (index.min() < 0 or not np.array_equal(index, index.astype(np.int64))):
            raise ValueError(f"{where}: the {name}s are not all whole numbers of 0 or more")
    if size < 1:
        raise ValueError(f"{where}: patch_size is {size}, expected 1 or more")
    if (
        canvas is not None
        and len(rows)
        and (rows.max() * size >= len(canvas) or columns.max() * size >= canvas.shape[1])
    ):
        raise ValueError(
            f"{where}: cell ({rows.max()}, {columns.max()}) of {size} pixels is outside the canvas {canvas.shape[:2]}"
        )
    return rows.astype(np.int64), columns.astype(np.int64)


def checked_values(where: str, values: np.ndarray, num: int, alpha: float) -> np.ndarray:
    """``(num,)`` float64 values, which lie between 0 and 1, as ``alpha`` does; else a ``ValueError``."""
    checked = np.asarray(values, np.float64)
    if checked.shape != (num,):
        raise ValueError(f"{where}: values has shape {checked.shape}, expected ({num},)")
    if not ((checked >= -_ROUNDING) & (checked <= 1 + _ROUNDING)).all():
        raise ValueError(f"{where}: values from {checked.min()} to {checked.max()}, expected numbers from 0 to 1")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha is {alpha}, expected 0 to 1")
    return np.clip(checked, 0, 1)
