"""Slices of a volume side by side on a canvas, with torchmil's names and results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bigbag.visualize.vis_wsi import MAX_COLOR, MIN_COLOR, draw_heatmap_wsi, patches_to_canvas


def slices_to_canvas(slices_list: Sequence[np.ndarray] | np.ndarray, slice_size: int) -> np.ndarray:
    """Lay slices side by side.

    Args:
        slices_list: N slices ``(slice_size, slice_size, 3)``, as a list or one array.
        slice_size: side of a slice in pixels.

    Returns:
        uint8 ``(slice_size, N * slice_size, 3)``.

    Raises:
        ValueError: slices of another shape.
    """
    num = len(slices_list)
    if not num:
        return np.full((slice_size, 0, 3), 255, np.uint8)
    return patches_to_canvas(slices_list, np.zeros(num, np.int64), np.arange(num), slice_size)


def draw_slices_contour(canvas: np.ndarray, slice_size: int, contour_prop: float = 0.05) -> np.ndarray:
    """Draw a black line of ``2 * contour_prop * slice_size`` pixels between slices, and half of it at both ends.

    torchmil draws none at the left end.

    Args:
        canvas: ``(slice_size, N * slice_size, ...)``, as of :func:`slices_to_canvas`.
        slice_size: side of a slice in pixels.
        contour_prop: half of the width of the line, as a share of ``slice_size``.

    Returns:
        a new canvas.
    """
    result = np.array(canvas)
    half = contour_prop * slice_size
    edges = np.arange(0, canvas.shape[1] + slice_size, slice_size)
    for first, last in zip(np.trunc(edges - half).astype(int).tolist(), np.trunc(edges + half).astype(int).tolist()):
        result[:slice_size, max(first, 0) : last] = 0
    return result


def draw_heatmap_ctscan(
    canvas: np.ndarray,
    values: np.ndarray,
    slice_size: int,
    alpha: float = 0.5,
    max_color: np.ndarray = MAX_COLOR,
    min_color: np.ndarray = MIN_COLOR,
) -> np.ndarray:
    """Blend a colour over each slice, between ``min_color`` at 0 and ``max_color`` at 1.

    Args:
        canvas: ``(slice_size, N * slice_size, 3)``, as of :func:`slices_to_canvas`.
        values: ``(M,)`` numbers from 0 to 1 for the first M slices.
        slice_size: side of a slice in pixels.
        alpha: opacity, 0 to 1.
        max_color: ``(3,)`` red, green and blue from 0 to 1.
        min_color: as ``max_color``.

    Returns:
        uint8, a new canvas; fractions are cut off.

    Raises:
        ValueError: more values than slices, or a value or ``alpha`` outside 0 to 1.
    """
    num = len(values)
    blended = draw_heatmap_wsi(
        np.asarray(canvas, float),
        values,
        slice_size,
        np.zeros(num, np.int64),
        np.arange(num),
        alpha,
        max_color,
        min_color,
    )
    return np.clip(blended, 0, 255).astype(np.uint8)
