"""GeoJSON that QuPath opens: instances with their scores, the highest of them, and regions of high score.

RFC 7946 in level-0 pixels, x to the right and y downwards, as QuPath has it: rings are closed, shells run
counterclockwise and holes clockwise in these coordinates. Measurements are an object, as in QuPath 0.4 and later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from bigbag.files import open_atomically
from bigbag.visualize.placement import Placement
from bigbag.visualize.regions import Region, Ring

ObjectType = Literal["annotation", "detection", "tile"]
Colour = Sequence[int]
_CHUNK = 8192


def write_geojson(path: str | Path, features: Iterable[str]) -> int:
    """Write a FeatureCollection, one feature a line; atomically, and with one feature in memory at a time.

    Args:
        path: the file.
        features: JSON texts, such as of :func:`instance_features` and :func:`region_features`.

    Returns:
        the number of features.
    """
    num = 0
    with open_atomically(Path(path)) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for num, feature in enumerate(features, 1):
            file.write(b"\n" if num == 1 else b",\n")
            file.write(feature.encode())
        file.write(b"\n]}\n")
    return num


def instance_features(
    placement: Placement,
    measurements: Mapping[str, np.ndarray],
    *,
    classification: str | None = None,
    colours: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    object_type: ObjectType = "detection",
) -> Iterator[str]:
    """One feature for each instance: the square of a patch, or the point of an instance on no lattice.

    Args:
        placement: where the instances are.
        measurements: ``(N,)`` finite numbers by name.
        classification: QuPath's class of the objects.
        colours: ``(N, 3)`` uint8, colour of each object.
        names: name of each object.
        object_type: what QuPath makes of them.

    Raises:
        ValueError: a measurement that is not finite, or of another length.
    """
    for name, values in measurements.items():
        if np.shape(values) != (len(placement),) or not np.isfinite(values).all():
            raise ValueError(
                f"measurement {name!r} has shape {np.shape(values)}, expected {len(placement)} finite numbers"
            )
    labels = [json.dumps(name) + ": " for name in measurements]
    head = '{"type": "Feature", "geometry": {"type": '
    fixed = f'"objectType": "{object_type}"'
    fixed += "" if classification is None else f', "classification": {{"name": {json.dumps(classification)}}}'
    for start in range(0, len(placement), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(placement)))
        columns = [
            [f"{label}{value:.7g}" for value in np.asarray(values)[part].tolist()]
            for label, values in zip(labels, measurements.values())
        ]
        measured = map(", ".join, zip(*columns)) if columns else iter([""] * (part.stop - part.start))
        painted = [""] * (part.stop - part.start)
        if colours is not None:
            painted = [f', "color": [{r}, {g}, {b}]' for r, g, b in np.asarray(colours)[part].tolist()]
        named = [""] * len(painted) if names is None else [f', "name": {json.dumps(name)}' for name in names[part]]
        for geometry, numbers, colour, name in zip(_geometries(placement, part), measured, painted, named):
            yield f'{head}{geometry}}}, "properties": {{{fixed}{name}{colour}, "measurements": {{{numbers}}}}}}}'


def region_features(
    regions: Iterable[Region],
    *,
    classification: str,
    colour: Colour,
    measure: str = "value",
    object_type: ObjectType = "annotation",
) -> Iterator[str]:
    """One polygon with its holes for each region, with its number of instances, mean and highest ``measure``."""
    for region in regions:
        rings = ", ".join(f"[{_ring(ring)}]" for ring in (region.shell, *region.holes))
        properties = {
            "objectType": object_type,
            "classification": {"name": classification, "color": list(colour)},
            "measurements": {
                "instances": region.num_instances,
                f"mean {measure}": round(region.mean, 7),
                f"max {measure}": round(region.maximum, 7),
            },
        }
        geometry = f'{{"type": "Polygon", "coordinates": [{rings}]}}'
        yield f'{{"type": "Feature", "geometry": {geometry}, "properties": {json.dumps(properties)}}}'


def _geometries(placement: Placement, part: slice) -> Iterator[str]:
    """Type and coordinates of the instances ``part``, without the braces around them."""
    if placement.stride is None:
        for x, y in _plain(placement.centres[part]):
            yield f'"Point", "coordinates": [{x}, {y}]'
        return
    corners = placement.corners[part]
    for (a, b), (c, d) in zip(_plain(corners), _plain(corners + placement.size)):
        yield f'"Polygon", "coordinates": [[[{a}, {b}], [{c}, {b}], [{c}, {d}], [{a}, {d}], [{a}, {b}]]]'


def _ring(ring: Ring) -> str:
    return ", ".join(f"[{x}, {y}]" for x, y in _plain(ring))


def _plain(points: np.ndarray) -> Iterable[list[float] | list[int]]:
    """Points with two decimals, or none where all are whole."""
    whole = np.rint(points)
    return (whole.astype(np.int64) if np.array_equal(whole, points) else np.round(points, 2)).tolist()
