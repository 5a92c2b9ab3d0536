"""GeoJSON for QuPath: the schema of RFC 7946, valid polygons, regions that cover what they should."""

import json
import tracemalloc

import numpy as np
import pytest

from bigbag.visualize.geojson import instance_features, region_features, write_geojson
from bigbag.visualize.placement import Placement
from bigbag.visualize.regions import find_regions

POSITION = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
RING = {"type": "array", "items": POSITION, "minItems": 4}
RINGS = {"type": "array", "items": RING}
COLOUR = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 3, "maxItems": 3}


def geometry(name, coordinates):
    properties = {"type": {"const": name}, "coordinates": coordinates}
    return {
        "type": "object",
        "required": ["type", "coordinates"],
        "properties": properties,
        "additionalProperties": False,
    }


SCHEMA = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "geometry": {
                        "oneOf": [geometry("Point", POSITION), geometry("Polygon", {"type": "array", "items": RING})]
                    },
                    # What QuPath's reader takes.
                    "properties": {
                        "type": "object",
                        "required": ["objectType"],
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "tile"]},
                            "name": {"type": "string"},
                            "color": COLOUR,
                            "classification": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {"name": {"type": "string"}, "color": COLOUR},
                                "additionalProperties": False,
                            },
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                        "additionalProperties": False,
                    },
                },
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}
"""The part of the GeoJSON schema (https://geojson.org/schema/FeatureCollection.json) that QuPath's objects need."""


def read(path):
    collection = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    pytest.importorskip("jsonschema").validate(collection, SCHEMA)
    return collection["features"]


def shapes(features):
    """The geometries as shapely's, each closed, valid and turning as RFC 7946 asks."""
    shapely = pytest.importorskip("shapely")
    found = []
    for feature in features:
        for ring in feature["geometry"]["coordinates"] if feature["geometry"]["type"] == "Polygon" else ():
            assert ring[0] == ring[-1]
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid, shapely.is_valid_reason(shape)
        if shape.geom_type == "Polygon":
            assert shape.exterior.is_ccw and not any(hole.is_ccw for hole in shape.interiors)
        found.append(shape)
    return found


def lattice(mask, stride=64.0, size=64.0):
    row, column = np.nonzero(np.ones_like(mask))
    return Placement(np.stack([column, row], 1) * stride + [100.0, 7.0], size, stride)


@pytest.mark.parametrize("stride, size", [(64.0, 64.0), (51.2, 70.0)])
def test_regions_are_the_cells_above_the_threshold(stride, size):
    shapely = pytest.importorskip("shapely")
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    with_holes = 0
    for _ in range(60):
        mask = rng.random(rng.integers(1, 13, 2)) < rng.uniform(0.2, 0.95)
        placement = lattice(mask, stride, size)
        regions = find_regions(placement, mask.reshape(-1).astype(float), 0.5)
        assert len(regions) == ndimage.label(mask)[1]
        assert sum(region.num_instances for region in regions) == mask.sum()
        polygons = [shapely.Polygon(region.shell, region.holes) for region in regions]
        for polygon in polygons:
            assert polygon.is_valid, shapely.is_valid_reason(polygon)
            assert polygon.exterior.is_ccw and not any(hole.is_ccw for hole in polygon.interiors)
        with_holes += sum(len(region.holes) for region in regions)
        centres = placement.centres[mask.reshape(-1)]
        cells = shapely.box(*(centres - stride / 2).T, *(centres + stride / 2).T)
        # Overlapping patches: a cell is the middle of a patch, so that cells touch.
        assert shapely.union_all(polygons).symmetric_difference(shapely.union_all(cells)).area < 1e-3
    assert with_holes > 20


def test_region_numbers_and_threshold():
    values = np.array([[0.9, 0.9, 0.1], [0.2, 0.1, 0.7]])
    regions = find_regions(lattice(values), values.reshape(-1), 0.7)
    assert [(r.num_instances, r.mean, r.maximum) for r in regions] == [(2, pytest.approx(0.9), 0.9), (1, 0.7, 0.7)]
    assert regions[0].shell.tolist() == [[100, 7], [228, 7], [228, 71], [100, 71], [100, 7]]
    (large,) = find_regions(lattice(values), values.reshape(-1), 0.7, min_instances=2)
    assert large.num_instances == 2
    assert find_regions(lattice(values), values.reshape(-1), 0.95) == []
    assert find_regions(Placement(np.empty((0, 2)), 1.0, 1.0), np.empty(0), 0.5) == []


@pytest.mark.parametrize(
    "stride, shift", [(64.0, (37, 11)), (64.0, (64 * 30, 5)), (51.2, (20.0, 1000.0)), (64.0, (0, 0))]
)
def test_regions_of_pieces_whose_lattices_are_not_aligned(stride, shift):
    """CLAM and TRIDENT start the lattice of each piece of tissue at its own corner."""
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(0)
    cells = np.stack(np.divmod(rng.permutation(400)[:250], 20), 1)
    pieces = [np.floor(cells * stride), np.floor(cells * stride) + np.array([2000.0, 0.0]) + shift]
    corners = np.concatenate(pieces) + 8.0
    values = rng.random(500)
    regions = find_regions(Placement(corners, stride, stride), values, 0.4)
    polygons = shapely.union_all([shapely.Polygon(region.shell, region.holes) for region in regions])
    high = corners[values >= 0.4]
    patches = shapely.union_all(shapely.box(*high.T, *(high + stride).T))
    off = 0 if stride == 64 else 2.0 * patches.length  # corners of another stride were cut to whole pixels
    assert polygons.symmetric_difference(patches).area <= off < 0.2 * patches.area
    assert sum(region.num_instances for region in regions) == len(high)


def test_instances_on_no_lattice_have_regions_too():
    rng = np.random.default_rng(0)
    points = rng.random((3000, 2)) * 1000
    values = (np.hypot(*(points - 500).T) < 250) * 1.0
    placement = Placement(points - 20, 40.0, None)
    largest = find_regions(placement, values, 0.5)[0]
    shapely = pytest.importorskip("shapely")
    disc = shapely.Point(500, 500).buffer(250)
    polygon = shapely.Polygon(largest.shell, largest.holes)
    assert polygon.intersection(disc).area / polygon.union(disc).area > 0.85


def test_patches_as_qupath_objects(tmp_path):
    placement = Placement(np.array([[0.0, 128.0], [64.5, 128.0]]), 64.0, 64.0)
    scores = {"score": np.array([0.25, -3.0]), "rank": np.array([1.0, 0.0])}
    colours = np.array([[255, 0, 1], [2, 3, 4]], np.uint8)
    features = instance_features(placement, scores, classification='a "b"', colours=colours, names=["1", "2"])
    assert write_geojson(tmp_path / "p.geojson", features) == 2
    first, second = read(tmp_path / "p.geojson")
    assert first["properties"] == {
        "objectType": "detection",
        "classification": {"name": 'a "b"'},
        "name": "1",
        "color": [255, 0, 1],
        "measurements": {"score": 0.25, "rank": 1},
    }
    assert [shape.bounds for shape in shapes([first, second])] == [(0, 128, 64, 192), (64.5, 128, 128.5, 192)]


def test_points_and_regions_as_qupath_objects(tmp_path):
    placement = Placement(np.array([[-5.0, 5.0], [20.0, 5.0]]), 10.0, None)
    write_geojson(tmp_path / "i.geojson", instance_features(placement, {}, object_type="annotation"))
    assert [(s.x, s.y) for s in shapes(read(tmp_path / "i.geojson"))] == [(0, 10), (25, 10)]
    ring = np.ones((3, 3))
    ring[1, 1] = 0
    regions = find_regions(lattice(ring), ring.reshape(-1), 0.5)
    write_geojson(tmp_path / "r.geojson", region_features(regions, classification="high", colour=(214, 39, 40)))
    (feature,) = read(tmp_path / "r.geojson")
    (shape,) = shapes([feature])
    assert shape.area == 8 * 64**2 and len(shape.interiors) == 1
    assert feature["properties"]["measurements"] == {"instances": 8, "mean value": 1, "max value": 1}
    assert write_geojson(tmp_path / "none.geojson", []) == 0 and read(tmp_path / "none.geojson") == []


def test_many_instances_take_little_memory(tmp_path):
    """60,000 features, 12 MB of text, in less than 6 MB beyond the arrays; an error leaves no file."""
    num = 60_000
    placement = Placement(np.arange(2.0 * num).reshape(-1, 2), 10.0, None)
    scores = np.random.default_rng(0).random(num)
    tracemalloc.start()
    write_geojson(tmp_path / "many.geojson", instance_features(placement, {"score": scores}, classification="nucleus"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "many.geojson").stat().st_size > 8e6 and peak < 6e6
    with pytest.raises(ValueError, match="'score'"):
        write_geojson(tmp_path / "bad.geojson", instance_features(placement, {"score": scores * np.nan}))
    assert [path.name for path in tmp_path.iterdir()] == ["many.geojson"]
