"""Pictures of predicted slides: heatmap, pyramid, GeoJSON and the patches of the highest scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bigbag.data.names import file_name
from bigbag.engine.predict import SlideScores, read_scores
from bigbag.files import read_json, write_json
from bigbag.visualize.figures import colours
from bigbag.visualize.geojson import ObjectType, instance_features, region_features, write_geojson
from bigbag.visualize.heatmap import (
    COLOUR_MAP,
    OPACITY,
    Heatmap,
    Scale,
    ScaleName,
    blend,
    gallery,
    picture_shape,
    scaled,
    with_colour_bar,
    write_png,
)
from bigbag.visualize.placement import Box, Placement, place
from bigbag.visualize.pyramid import square_pixels, write_deepzoom
from bigbag.visualize.regions import find_regions
from bigbag.visualize.slide_image import SlideImage

_PIXELS_PER_PATCH = 16
_PIXELS_PER_POINT = 4
_PYRAMID_SIDE = 16_384
_SETTINGS = "pictures.json"
_MAX_OUTSIDE = 0.01


@dataclass(frozen=True)
class Pictures:
    """What is drawn of every slide.

    Attributes:
        heatmaps: ``heatmaps/<slide>.png``, with a colour bar to its right, and ``<slide>.overlay.png``, transparent, of
            the same geometry.
        deepzoom: ``heatmaps/<slide>.dzi``.
        geojson: ``geojson/<slide>.instances.geojson`` and ``<slide>.regions.geojson``.
        top_k: instances of ``geojson/<slide>.top.geojson`` and, where the slide is at hand, ``top/<slide>.png``.
        scale: how scores become colours (:func:`bigbag.visualize.heatmap.scaled`).
        limits: scores of both ends of a linear scale.
        threshold: of regions, on the scale from 0 to 1.
        min_instances: smaller regions are left out.
        opacity: of heatmaps over slides.
        max_side: longer side of a heatmap in pixels.
        colour_map: a name that matplotlib knows.
        patch_size: side of a patch in the unit of the coordinates, over what the files say.
        mpp: micrometres of a level-0 pixel, over what the slide says.
    """

    heatmaps: bool = False
    deepzoom: bool = False
    geojson: bool = False
    top_k: int = 0
    scale: ScaleName = "rank"
    limits: Sequence[float] | None = None
    threshold: float = 0.9
    min_instances: int = 1
    opacity: float = OPACITY
    max_side: int = 2000
    colour_map: str = COLOUR_MAP
    patch_size: float | None = None
    mpp: float | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("threshold", self.threshold, 0, 1),
            ("opacity", self.opacity, 0, 1),
            ("top_k", self.top_k, 0, 100_000),
            ("max_side", self.max_side, 16, 20_000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        scaled(np.empty(0), self.scale, self.limits)
        try:
            colours(self.colour_map)
        except KeyError:
            raise ValueError(f"colour_map is {self.colour_map!r}, expected a name that matplotlib knows") from None

    @property
    def any(self) -> bool:
        """Whether anything is drawn at all."""
        return self.heatmaps or self.deepzoom or self.geojson or self.top_k > 0

    def files(self, name: str, with_slide: bool) -> list[str]:
        """The files of a slide, below the folder of the results."""
        wanted = [f"heatmaps/{name}.png", f"heatmaps/{name}.overlay.png"] if self.heatmaps else []
        wanted += [f"heatmaps/{name}.dzi"] if self.deepzoom else []
        wanted += [f"geojson/{name}.instances.geojson", f"geojson/{name}.regions.geojson"] if self.geojson else []
        wanted += [f"geojson/{name}.top.geojson"] if self.top_k else []
        return wanted + ([f"top/{name}.png"] if self.top_k and with_slide else [])


_FILES_OF = {
    "heatmaps": ("heatmaps/*.png",),
    "deepzoom": ("heatmaps/*.dzi",),
    "geojson": ("geojson/*.instances.geojson", "geojson/*.regions.geojson"),
    "top_k": ("geojson/*.top.geojson", "top/*.png"),
}


def settle(out: Path, pictures: Pictures, with_slides: bool) -> None:
    """Remove pictures of the wanted kinds that are in ``out`` and were drawn otherwise, and note how they are drawn."""
    path = out / _SETTINGS
    noted = read_json(path, "remove it, and the pictures are drawn again") if path.is_file() else {}
    look = {**asdict(pictures), "slides": with_slides}
    look = json.loads(
        json.dumps({key: value for key, value in look.items() if key not in ("heatmaps", "deepzoom", "geojson")})
    )
    for kind, patterns in _FILES_OF.items():
        if getattr(pictures, kind) and noted.get(kind) != look:
            for file in (file for pattern in patterns for file in out.glob(pattern)):
                file.unlink()
            noted[kind] = look
    write_json(path, noted)


def draw(scores_file: Path, out: Path, pictures: Pictures, locate: Callable[[str], Path] | None) -> list[Path]:
    """Draw one slide, unless all its pictures are there and newer than its scores.

    Args:
        scores_file: ``scores/<slide>.npz``.
        out: folder of the results.
        pictures: what to draw.
        locate: gives the file of a slide by its name; None: there are only features.

    Returns:
        the pictures.

    Raises:
        ValueError: there are no positions to draw at, or the slide cannot be read; the message names the slide.
    """
    paths = [out / path for path in pictures.files(scores_file.name[: -len(".npz")], locate is not None)]
    made = scores_file.stat().st_mtime_ns
    if all(path.is_file() and path.stat().st_mtime_ns >= made for path in paths):
        return paths
    found = read_scores(scores_file)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        scale = scaled(found.scores, pictures.scale, pictures.limits)
        if found.coords is not None and found.coords.ndim == 2 and found.coords.shape[1] in (1, 3):
            return _draw_volume(found, scale, out, pictures)
        if found.coords is None:
            raise ValueError("it has no coordinates, without which there is no place to draw its scores at")
        if locate is None:
            _draw_slide(found, scale, out, pictures, None)
        else:
            with SlideImage(locate(found.slide)) as slide:
                _draw_slide(found, scale, out, pictures, slide)
    except ValueError as error:
        raise ValueError(f"slide {found.slide!r}: {error}") from error
    return paths


def _draw_slide(found: SlideScores, scale: Scale, out: Path, pictures: Pictures, slide: SlideImage | None) -> None:
    assert found.coords is not None
    mpp = pictures.mpp or (None if slide is None else slide.mpp)
    in_pixels = slide is not None or pictures.geojson or pictures.top_k > 0
    # A heatmap alone needs no pixels: it may be in micrometres.
    mpp = mpp if mpp or in_pixels else 1.0
    placement = place(found.coords, found.stride, found.attributes, pictures.patch_size, mpp)
    if slide is not None:
        _check_lies_on(placement, slide)
    heatmap = Heatmap(placement, scale, pictures.colour_map)
    name, box = file_name(found.slide), _box(found, placement, slide)
    if pictures.heatmaps:
        _draw_heatmap(heatmap, box, out / "heatmaps" / name, pictures, slide)
    if pictures.deepzoom:
        shape = picture_shape(box, _PYRAMID_SIDE, _finest(placement))
        write_deepzoom(out / "heatmaps" / f"{name}.dzi", heatmap.render, *square_pixels(box, shape))
    # QuPath counts from the corner of what was scanned.
    origin = (0, 0) if slide is None else slide.bounds
    moved = placement.moved(-origin[0], -origin[1]) if origin != (0, 0) else placement
    if pictures.geojson:
        _write_geojson(found, moved, scale, out / "geojson" / name, pictures)
    if pictures.top_k:
        top = np.argsort(-found.scores, kind="stable")[: pictures.top_k]
        features = _instances(found, moved, scale, pictures, top, "annotation")
        write_geojson(out / "geojson" / f"{name}.top.geojson", features)
        if slide is not None:
            patches = [slide.patch(x, y, placement.size) for x, y in placement.corners[top].tolist()]
            captions = [f"{i}: {score:.3g}" for i, score in enumerate(found.scores[top].tolist(), 1)]
            write_png(out / "top" / f"{name}.png", gallery(patches, captions))


def _check_lies_on(placement: Placement, slide: SlideImage) -> None:
    """Refuse coordinates that cannot be level-0 pixels of the slide."""
    if placement.size <= 1 and len(placement) > 1:
        raise ValueError(
            "its coordinates count patches, so that their place on the slide is not known: predict from files with "
            "level-0 coordinates, or leave --slides out"
        )
    beyond = (placement.corners >= np.array(slide.size)) | (placement.corners + placement.size <= 0)
    outside = np.logical_or(beyond[:, 0], beyond[:, 1])
    if outside.mean() > _MAX_OUTSIDE:
        width, height = slide.size
        raise ValueError(
            f"{int(outside.sum())} of {len(placement)} instances lie outside {slide.path} ({width} x {height} pixels): "
            "its coordinates are not level-0 pixels of that slide; give the slide that the features are of, or leave "
            "--slides out"
        )


def _draw_heatmap(heatmap: Heatmap, box: Box, path: Path, pictures: Pictures, slide: SlideImage | None) -> None:
    finest = 1.0 if slide is not None else _finest(heatmap.placement)
    shape = picture_shape(box, pictures.max_side, finest)
    overlay = heatmap.render(box, shape)
    if slide is None:
        picture = blend(np.full((*shape, 3), 255, np.uint8), overlay, 1.0)
    else:
        picture = blend(slide.picture(shape), overlay, pictures.opacity)
    write_png(path.with_name(f"{path.name}.overlay.png"), overlay)
    write_png(path.with_name(f"{path.name}.png"), with_colour_bar(picture, heatmap.scale, heatmap.colour_map))


def _write_geojson(found: SlideScores, placement: Placement, scale: Scale, path: Path, pictures: Pictures) -> None:
    every = np.arange(len(placement))
    features = _instances(found, placement, scale, pictures, every, "detection")
    write_geojson(path.with_name(f"{path.name}.instances.geojson"), features)
    regions = find_regions(placement, scale.values, pictures.threshold, pictures.min_instances)
    red, green, blue, _ = colours(pictures.colour_map)[round(255 * pictures.threshold)].tolist()
    text = f"{scale.name} >= {pictures.threshold:g}"
    described = region_features(regions, classification=text, colour=(red, green, blue), measure=scale.name)
    write_geojson(path.with_name(f"{path.name}.regions.geojson"), described)


def _instances(
    found: SlideScores, placement: Placement, scale: Scale, pictures: Pictures, index: np.ndarray, kind: ObjectType
) -> Iterator[str]:
    values = scale.values[index]
    return instance_features(
        placement.take(index),
        {"score": found.scores[index], scale.name: values},
        classification="instance" if kind == "detection" else "highest scores",
        colours=colours(pictures.colour_map)[np.rint(values * 255).astype(int), :3],
        names=None if kind == "detection" else [str(i) for i in range(1, len(index) + 1)],
        object_type=kind,
    )


def _draw_volume(found: SlideScores, scale: Scale, out: Path, pictures: Pictures) -> list[Path]:
    """A volume by slices, which the last coordinate counts: a colour for each, or its instances by their x and y."""
    if pictures.geojson or pictures.deepzoom or pictures.top_k:
        raise ValueError("it is a volume: GeoJSON, pyramids and patches are of slides; heatmaps can be drawn")
    coords = np.asarray(found.coords, np.float64)
    tiles, captions, side = [], [], max(pictures.max_side // 16, 16)
    flat = coords.shape[1] == 1
    placement = None if flat else place(coords[:, :2], found.stride, found.attributes, pictures.patch_size)
    for number in np.unique(coords[:, -1]).tolist():
        of_slice = np.flatnonzero(coords[:, -1] == number)
        part = replace(scale, values=scale.values[of_slice])
        captions.append(f"{number:g}")
        if placement is None:
            colour = colours(pictures.colour_map)[round(255 * float(part.values.mean())), :3]
            tiles.append(np.broadcast_to(colour, (side, side, 3)))
            continue
        left, top, right, bottom = placement.box
        longer = max(right - left, bottom - top)
        overlay = Heatmap(placement.take(of_slice), part, pictures.colour_map).render(
            (left, top, left + longer, top + longer), (side, side)
        )
        tiles.append(blend(np.full((side, side, 3), 255, np.uint8), overlay, 1.0))
    path = out / "heatmaps" / f"{file_name(found.slide)}.png"
    write_png(path, with_colour_bar(gallery(tiles, captions, 12, side), scale, pictures.colour_map))
    return [path]


def _box(found: SlideScores, placement: Placement, slide: SlideImage | None) -> Box:
    """All of the slide, where its size is known, else what the instances cover."""
    width, height = (found.attributes.get(f"level0_{side}") for side in ("width", "height"))
    if slide is not None:
        width, height = slide.size
    if isinstance(width, int | float) and isinstance(height, int | float) and width > 0 and height > 0:
        return (0.0, 0.0, float(width), float(height))
    return placement.box


def _finest(placement: Placement) -> float:
    """Level-0 pixels of a pixel below which a picture shows no more."""
    return placement.size / (_PIXELS_PER_POINT if placement.stride is None else _PIXELS_PER_PATCH)
