"""Pictures of slides: any file that OpenSlide reads, or a plain image."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigbag.data.names import SUFFIXES, bare_name

_IMAGES = tuple(suffix for suffix in SUFFIXES if suffix not in {
    ".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".csv", ".safetensors", ".zarr"
})  # fmt: skip
_BAND_BYTES = 32 * 2**20


class SlideImage:
    """A slide's file; a context manager.

    Args:
        path: a whole-slide image, or a plain image.

    Raises:
        ValueError: OpenSlide is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import openslide
        except ImportError:
            raise ValueError(f"{path}: reading slides needs OpenSlide: pip install 'bigbag[slides]'") from None
        from PIL.Image import DecompressionBombError

        self.path, self._error = Path(path), openslide.OpenSlideError
        try:
            self._slide: Any = openslide.open_slide(str(path))
        except (openslide.OpenSlideError, DecompressionBombError, OSError) as error:
            raise ValueError(f"{path}: not a slide that OpenSlide reads ({error})") from None

    def __enter__(self) -> SlideImage:
        return self

    def __exit__(self, *error: object) -> None:
        self._slide.close()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0 in pixels."""
        return self._slide.dimensions

    @cached_property
    def mpp(self) -> float | None:
        """Micrometres per pixel of level 0, where the file says so."""
        stated = [self._slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        return None if None in stated else sum(map(float, stated)) / 2

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """Corner of what was scanned, in level-0 pixels: QuPath counts from there where a file (MIRAX) says it."""
        x, y = (self._slide.properties.get(f"openslide.bounds-{axis}", 0) for axis in "xy")
        return int(x), int(y)

    def picture(self, shape: tuple[int, int]) -> np.ndarray:
        """The whole slide as uint8 ``(*shape, 3)``, scaled down smoothly.

        Read in bands from the coarsest level that is fine enough, in bounded memory.

        Args:
            shape: height and width.
        """
        from PIL import Image

        height, width = shape
        factor = min(self.size[0] / width, self.size[1] / height)
        level = self._slide.get_best_level_for_downsample(max(factor, 1.0))
        level_width, level_height = self._slide.level_dimensions[level]
        down = self._slide.level_downsamples[level]
        step = level_height / height
        rows = max(int(_BAND_BYTES / (4 * level_width * step)), 1)
        result = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            # With the rows around it that the filter reaches, so that bands leave no seams.
            first, last = max(int((top - 2) * step) - 1, 0), min(int((bottom + 2) * step) + 2, level_height)
            band = self._read(0, round(first * down), level, (level_width, last - first))
            box = (0, top * step - first, level_width, min(bottom * step, level_height) - first)
            resized = Image.fromarray(band).resize((width, bottom - top), Image.Resampling.BILINEAR, box)
            result[top:bottom] = np.asarray(resized)
        return result

    def patch(self, x: float, y: float, size: float, side: int = 128) -> np.ndarray:
        """uint8 ``(h, w, 3)``: the square of ``size`` level-0 pixels at ``(x, y)``, in about ``side`` pixels."""
        level = self._slide.get_best_level_for_downsample(max(size / side, 1.0))
        pixels = max(round(size / self._slide.level_downsamples[level]), 1)
        return self._read(round(x), round(y), level, (pixels, pixels))

    def _read(self, x: int, y: int, level: int, size: tuple[int, int]) -> np.ndarray:
        """Part of a level as RGB, on white where the slide has no pixels."""
        from PIL import Image

        try:
            region = self._slide.read_region((x, y), level, size)
        except self._error as error:
            raise ValueError(
                f"{self.path}: cannot be read at ({x}, {y}), level {level} ({error}): copy it again"
            ) from None
        white = Image.new("RGB", region.size, "white")
        white.paste(region, mask=region.getchannel("A"))
        return np.asarray(white)


def find_slides(folder: str | Path, names: Iterable[str]) -> dict[str, Path]:
    """The file of each slide below ``folder``, by its name without folders and extensions.

    Raises:
        ValueError: no such folder, a slide without a file, or one with several.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of slides; check --slides")
    wanted = {bare_name(name): name for name in names}
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        name = wanted.get(bare_name(path.name)) if path.suffix.lower() in _IMAGES else None
        if name is None or not path.is_file():
            continue
        if name in found:
            raise ValueError(f"{found[name]} and {path}: two files of slide {name!r}; remove one of them")
        found[name] = path
    missing = [name for name in wanted.values() if name not in found]
    if missing:
        listed = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{root}: has no image of {len(missing)} of {len(wanted)} slides ({listed}); add them, named like the "
            "features, or leave --slides out for heatmaps without the slide behind"
        )
    return found
