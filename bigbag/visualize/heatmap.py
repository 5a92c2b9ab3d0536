"""Heatmaps: scores of instances in colours, over the picture of their slide or alone.

Every picture is made at its own resolution straight from the instances (:func:`bigbag.visualize.placement.average`), so
a thumbnail, a tile of a pyramid and a close-up all show the exact mean over each of their pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bigbag.files import write_atomically
from bigbag.visualize.figures import colour_range, colours, log_attention
from bigbag.visualize.placement import Box, Placement, average

COLOUR_MAP = "turbo"
OPACITY = 0.5
ScaleName = Literal["rank", "linear", "attention"]
_BAR_WIDTH = 18
_BAND_PIXELS = 1 << 22  # drawn at once: 48 bytes each


@dataclass(frozen=True)
class Scale:
    """Scores as numbers from 0 to 1, and what these numbers mean.

    Attributes:
        values: ``(N,)`` float64, 0 to 1.
        ticks: place on the scale, 0 to 1, and text of the marks of a colour bar.
        label: what the ticks count.
        name: what the values are called.
    """

    values: np.ndarray
    ticks: tuple[tuple[float, str], ...]
    label: str
    name: str


def scaled(scores: np.ndarray, how: ScaleName = "rank", limits: Sequence[float] | None = None) -> Scale:
    """Instance scores, of whatever range a model gives them, as numbers from 0 to 1.

    Args:
        scores: ``(N,)``.
        how: "rank": the share of the slide's instances with a lower score, equal scores sharing their mean rank;
            "linear": from the lowest to the highest score, or between ``limits``; "attention": the logarithm of the
            weight against the average of the slide (:func:`bigbag.visualize.figures.log_attention`).
        limits: scores of both ends of a linear scale, so that slides can be compared.

    Raises:
        ValueError: scores that are not finite, an unknown scale, or limits that are not ascending.
    """
    scores = np.asarray(scores, np.float64).reshape(-1)
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
    if limits is not None and (how != "linear" or not limits[0] < limits[1]):
        raise ValueError(f"limits {limits}: expected two ascending numbers, and the scale linear, not {how}")
    if how == "rank":
        ticks = tuple((share, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
        return Scale(_ranks(scores), ticks, "instances with a lower score", "score rank")
    if how == "linear":
        low, high = limits or ((float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0))
        return _between(scores, low, high, "score", "scaled score", lambda value: f"{value:.3g}")
    if how == "attention":
        weights = log_attention(scores).astype(np.float64)
        low, high = colour_range(weights) if len(weights) else (0.0, 1.0)
        return _between(
            weights, low, high, "attention, times the average", "scaled attention", lambda value: f"{10**value:.2g}"
        )
    raise ValueError(f"scale is {how!r}, expected rank, linear or attention")


def _ranks(scores: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    if len(scores) < 2:
        return np.full(len(scores), 0.5)
    return (rankdata(scores) - 1) / (len(scores) - 1)


def _between(values: np.ndarray, low: float, high: float, label: str, name: str, text: Callable[[float], str]) -> Scale:
    span = high - low
    if span <= 0:
        return Scale(np.full(len(values), 0.5), ((0.5, text(low)),), label, name)
    ticks = tuple((share, text(low + share * span)) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return Scale(np.clip((values - low) / span, 0, 1), ticks, label, name)


@dataclass(frozen=True)
class Heatmap:
    """Instances of a slide in colours.

    Attributes:
        placement: where they are.
        scale: their values.
        colour_map: a name that matplotlib knows.
    """

    placement: Placement
    scale: Scale
    colour_map: str = COLOUR_MAP

    def render(self, box: Box, shape: tuple[int, int]) -> np.ndarray:
        """The heatmap alone: uint8 ``(*shape, 4)``; what no instance covers is transparent, as are parts of pixels.

        Where instances overlap, the colour is that of their mean.

        Args:
            box: what to show, in level-0 pixels.
            shape: height and width of the picture.
        """
        height, width = shape
        image = np.empty((height, width, 4), np.uint8)
        palette, step, rows = colours(self.colour_map), (box[3] - box[1]) / height, max(_BAND_PIXELS // width, 1)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            band = (box[0], box[1] + top * step, box[2], box[1] + bottom * step)
            mean, cover = average(self.placement, self.scale.values, band, (bottom - top, width))
            image[top:bottom] = palette[np.clip(np.rint(mean * 255), 0, 255).astype(np.uint8)]
            image[top:bottom, :, 3] = np.rint(cover * 255)
            image[top:bottom][cover == 0] = 0
        return image


def blend(picture: np.ndarray, overlay: np.ndarray, opacity: float = OPACITY) -> np.ndarray:
    """Lay an ``overlay`` of :meth:`Heatmap.render` over a picture of the same box.

    Args:
        picture: uint8 ``(H, W, 3)``.
        overlay: uint8 ``(H, W, 4)``.
        opacity: of what is covered, 0 to 1.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        ValueError: sizes that differ, or an opacity outside 0 to 1.
    """
    if picture.shape[:2] != overlay.shape[:2] or not 0 <= opacity <= 1:
        raise ValueError(
            f"blend: picture {picture.shape}, overlay {overlay.shape}, opacity {opacity}: expected one size, and 0 to 1"
        )
    alpha = overlay[..., 3:].astype(np.float32) * (opacity / 255)
    return np.rint(picture + alpha * (overlay[..., :3].astype(np.float32) - picture)).astype(np.uint8)


def with_colour_bar(picture: np.ndarray, scale: Scale, colour_map: str = COLOUR_MAP) -> np.ndarray:
    """The picture with a colour bar to its right: a white strip beside it, so that no pixel of the picture moves."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    size = int(np.clip(height / 40, 11, 28))
    font = ImageFont.load_default(size)
    bar = max(_BAR_WIDTH, size)
    room = max((font.getlength(text) for _, text in scale.ticks), default=0.0)
    strip = int(bar + room + 5 * size)
    image = Image.new("RGB", (width + strip, height), "white")
    image.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(image)
    top, bottom, left = size, max(height - size, size + 1), width + size
    ramp = colours(colour_map)[np.linspace(255, 0, bottom - top).round().astype(int)][:, None, :3]
    image.paste(Image.fromarray(np.ascontiguousarray(np.repeat(ramp, bar, axis=1))), (left, top))
    for share, text in scale.ticks:
        y = bottom - share * (bottom - top)
        draw.line((left + bar, y, left + bar + size // 2, y), fill="black")
        draw.text((left + bar + size * 0.7, y), text, fill="black", font=font, anchor="lm")
    label = Image.new("RGB", (int(font.getlength(scale.label)) + 2, int(1.4 * size)), "white")
    ImageDraw.Draw(label).text((0, 0), scale.label, fill="black", font=font)
    turned = label.rotate(90, expand=True)
    image.paste(turned, (width + strip - turned.width - 2, max((height - turned.height) // 2, 0)))
    return np.asarray(image)


def picture_shape(box: Box, max_side: int, finest: float = 1.0) -> tuple[int, int]:
    """Height and width of a picture of ``box`` of at most ``max_side`` pixels.

    Args:
        box: what it shows.
        max_side: longer side in pixels.
        finest: level-0 pixels that a pixel shows at least.
    """
    width, height = max(box[2] - box[0], finest), max(box[3] - box[1], finest)
    scale = min(max_side / max(width, height), 1 / finest)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def gallery(patches: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, side: int = 128) -> np.ndarray:
    """Patches in rows with a caption below each, on white.

    Args:
        patches: uint8 ``(h, w, 3)`` each, drawn at ``side`` pixels.
        captions: of the patches.
        columns: most patches in a row.
        side: of a patch in pixels.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    from PIL import Image, ImageDraw, ImageFont

    line, gap = side // 6 + 2, 4
    columns = max(min(columns, len(patches)), 1)
    rows = max(-(-len(patches) // columns), 1)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(side // 9 + 1)
    for i, (patch, caption) in enumerate(zip(patches, captions)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + line + gap)
        sheet.paste(Image.fromarray(patch).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x + side / 2, y + side + line / 2), caption, fill="black", font=font, anchor="mm")
    return np.asarray(sheet)


def png(image: np.ndarray) -> bytes:
    """A uint8 ``(H, W, 3 or 4)`` picture as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a uint8 ``(H, W, 3 or 4)`` picture, atomically; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(image))
