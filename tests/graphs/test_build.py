"""Graphs from coordinates, against brute force, a KD-tree and torchmil."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bigbag.adjacency import Adjacency
from bigbag.graphs import build_adjacency, permute
from bigbag.graphs.radius import cell_keys, largest_square, lattice_graph, radius_graph_by_tree

RADII = [0.5, 1.0, 2**0.5, 3**0.5, 2.0, 2.5]


def dense(adj: Adjacency) -> np.ndarray:
    """Dense matrix, after checking that it is a proper CSR with ascending, different columns."""
    crow, col = adj.crow.numpy(), adj.col.numpy()
    assert (crow.dtype, col.dtype) == (np.int64, np.int32) and crow[0] == 0 and crow[-1] == len(col)
    weight = np.ones(len(col)) if adj.weight is None else adj.weight.double().numpy()
    matrix = np.zeros((adj.num_nodes, adj.num_nodes))
    for i in range(adj.num_nodes):
        row = col[crow[i] : crow[i + 1]]
        assert (np.diff(row) > 0).all()
        matrix[i, row] = weight[crow[i] : crow[i + 1]]
    return matrix


def distances(coords: np.ndarray) -> np.ndarray:
    points = coords.astype(np.float64)
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))


def brute_force(coords: np.ndarray, radius: float) -> np.ndarray:
    return ((distances(coords) <= radius) & ~np.eye(len(coords), dtype=bool)).astype(float)


def torchmil_matrix(coords, features, radius, self_loops, normalized) -> np.ndarray:
    from torchmil.utils import build_adj, normalize_adj

    index, weight = build_adj(coords, features, dist_thr=radius, add_self_loops=self_loops)
    if normalized:
        weight = normalize_adj(index, weight, n_nodes=len(coords))
    matrix = np.zeros((len(coords), len(coords)))
    np.add.at(matrix, tuple(index.astype(int)), weight)
    return matrix


@st.composite
def small_points(draw):
    count, axes = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["lattice", "float", "int8", "uint16"]))
    if kind == "float":
        span = draw(st.sampled_from([1.0, 30.0, 1e6]))
        values = st.floats(-span, span, width=32)
        return draw(arrays(np.float32, (count, axes), elements=values))
    low, high, dtype = {"lattice": (-4, 4, np.int64), "int8": (-128, 127, np.int8), "uint16": (0, 5, np.uint16)}[kind]
    return draw(arrays(dtype, (count, axes), elements=st.integers(low, high)))


@settings(max_examples=150, deadline=None)
@given(small_points(), st.sampled_from([*RADII, 40.0]))
def test_radius_equals_brute_force(coords, radius):
    adj = build_adjacency(coords, radius=radius)
    assert adj.symmetric and adj.weight is None
    np.testing.assert_array_equal(dense(adj), brute_force(coords, radius))


@settings(max_examples=100, deadline=None)
@given(small_points(), st.integers(1, 6))
def test_knn_equals_brute_force_with_ties_to_the_lowest_index(coords, k):
    expected = np.zeros((len(coords), len(coords)))
    distance = distances(coords)
    for i in range(len(coords)):
        others = sorted((distance[i, j], j) for j in range(len(coords)) if j != i)[:k]
        expected[i, [j for _, j in others]] = 1
    adj = build_adjacency(coords, knn=k)
    assert not adj.symmetric
    np.testing.assert_array_equal(dense(adj), expected)
    for mode, combined in (("union", np.maximum), ("mutual", np.minimum)):
        either = build_adjacency(coords, knn=k, symmetrize=mode)
        assert either.symmetric
        np.testing.assert_array_equal(dense(either), combined(expected, expected.T))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=5),
    st.sampled_from([{"radius": 1.5}, {"knn": 3}]),
    st.integers(0, 2**32 - 1),
)
def test_pack_equals_its_bags_alone(sizes, how, seed):
    rng = np.random.default_rng(seed)
    coords = rng.integers(-2, 3, (sum(sizes), 2))
    features = rng.normal(size=(len(coords), 3)).astype(np.float32)
    options = {**how, "self_loops": True, "normalize": "symmetric"}
    pack = build_adjacency(coords, features=features, sizes=sizes, **options)
    ends = np.cumsum([0, *sizes])
    parts = [build_adjacency(coords[a:b], features=features[a:b], **options) for a, b in zip(ends, ends[1:])]
    alone = Adjacency.block_diagonal(parts) if parts else build_adjacency(coords, **options)
    assert torch.equal(pack.crow, alone.crow) and torch.equal(pack.col, alone.col)
    assert pack.num_edges == 0 or torch.equal(pack.weight, alone.weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "symmetric", "row"]))
def test_permuted_coordinates_give_the_permuted_graph(seed, normalize):
    rng = np.random.default_rng(seed)
    coords = rng.integers(0, 8, (50, 2))
    features = rng.normal(size=(50, 5)).astype(np.float32)
    order = rng.permutation(50)
    options = {"radius": 1.5, "self_loops": True, "normalize": normalize}
    there = permute(build_adjacency(coords, features=features, **options), order)
    here = build_adjacency(coords[order], features=features[order], **options)
    assert torch.equal(there.crow, here.crow) and torch.equal(there.col, here.col)
    torch.testing.assert_close(there.weight, here.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("radius", [1.0, 2**0.5, 2.0])
def test_equals_torchmil(radius, self_loops, weighted):
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2)
    coords = lattice[rng.permutation(len(lattice))[:500]]
    features = rng.normal(size=(500, 16)).astype(np.float32) if weighted else None
    for normalize in ("none", "symmetric"):
        adj = build_adjacency(coords, radius=radius, features=features, self_loops=self_loops, normalize=normalize)
        expected = torchmil_matrix(coords, features, radius, self_loops, normalize == "symmetric")
        assert np.array_equal(dense(adj) != 0, expected != 0)
        np.testing.assert_allclose(dense(adj), expected, rtol=3e-6)


def test_equals_torchmil_on_a_million_lattice_points():
    """Rows of random nodes against torchmil's KD-tree query on the whole set, and torchmil itself on a window."""
    from scipy.spatial import KDTree

    rng = np.random.default_rng(1)
    coords = np.stack(np.meshgrid(np.arange(1000), np.arange(1000)), -1).reshape(-1, 2)
    coords = coords[rng.permutation(len(coords))]
    adj = build_adjacency(coords, radius=2**0.5)
    assert adj.num_edges == 8 * 998**2 + 5 * 4 * 998 + 3 * 4
    crow, col, tree = adj.crow.numpy(), adj.col.numpy(), KDTree(coords)
    for i in rng.integers(0, len(coords), 500):
        expected = [j for j in sorted(tree.query_ball_point(coords[i], 2**0.5)) if j != i]
        assert col[crow[i] : crow[i + 1]].tolist() == expected
    window = np.nonzero(((coords >= 300) & (coords < 320)).all(1))[0]
    inside = build_adjacency(coords[window], radius=2**0.5)
    np.testing.assert_array_equal(dense(inside), torchmil_matrix(coords[window], None, 2**0.5, False, False))


def test_three_axes_reach_the_corners_that_torchmil_misses():
    coords = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    middle = int(np.nonzero((coords == 1).all(1))[0][0])
    adj = build_adjacency(coords, radius=3**0.5)
    assert int(adj.crow[middle + 1] - adj.crow[middle]) == 26
    assert torchmil_matrix(coords, None, 3**0.5, False, False)[middle].sum() == 18


@pytest.mark.parametrize("radius", [*RADII, 0.1, 1e-3, 725.0773])
def test_largest_square_separates_distances(radius):
    square = largest_square(radius)
    assert np.sqrt(square) <= radius < np.sqrt(np.nextafter(square, np.inf))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_tree_and_cells_agree(axes):
    rng = np.random.default_rng(axes)
    clusters = rng.normal(scale=100, size=(8, axes))
    points = clusters[rng.integers(0, 8, 3000)] + rng.normal(size=(3000, axes))
    sizes = (1000, 0, 1, 1999)
    assert cell_keys(points, 0.3, sizes) is not None
    crow, col = radius_graph_by_tree(points, 0.3, sizes)
    adj = build_adjacency(points, radius=0.3, sizes=sizes)
    assert len(col) > 1000
    np.testing.assert_array_equal(adj.crow, crow)
    np.testing.assert_array_equal(adj.col, col)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.sampled_from([1, 3, 256]),
    st.sampled_from(["rows", "columns", "random"]),
    st.floats(0.5, 8.0),
)
def test_tree_and_lattice_agree(seed, axes, step, order, radius):
    """Random parts of lattices, some places twice, in a pack of three bags; radii up to the most steps."""
    rng = np.random.default_rng(seed)
    bags = []
    for size in (int(rng.integers(1, 400)), 0, int(rng.integers(1, 50))):
        bag = rng.integers(0, 300 if axes == 1 else 15, (size, axes))
        bags.append({"rows": bag[np.lexsort(bag.T[::-1])], "columns": bag[np.lexsort(bag.T)], "random": bag}[order])
    points = np.concatenate(bags) * float(step) - 77
    sizes = tuple(len(bag) for bag in bags)
    for limit in (radius * step, float(round(radius) * step)):
        graph = lattice_graph(points, largest_square(limit), sizes)
        assert graph is not None
        for found, expected in zip(graph, radius_graph_by_tree(points, limit, sizes)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("place", [[0.5, 3], [7, 1]], ids=["not whole", "between the steps"])
def test_one_point_off_the_lattice(place):
    points = np.stack(np.meshgrid(np.arange(80.0), np.arange(80.0)), -1).reshape(-1, 2) * 2
    assert lattice_graph(points, 9.0, (len(points),)) is not None
    points[-1] = place
    assert lattice_graph(points, 9.0, (len(points),)) is None
    np.testing.assert_array_equal(dense(build_adjacency(points, radius=3)), brute_force(points, 3))


def test_long_rows_are_sorted():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 2))
    adj = build_adjacency(points, radius=1.0)
    assert int(adj.crow.diff().max()) > 100
    np.testing.assert_array_equal(dense(adj), brute_force(points, 1.0))


@pytest.mark.parametrize(
    "coords",
    [
        np.array([[2**62, -(2**62)], [2**62 + 1, -(2**62)], [2**62 + 3, -(2**62)]]),
        np.array([[2**64 - 1, 0], [2**64 - 2, 0], [2**64 - 4, 0]], dtype=np.uint64),
        np.array([[1e15, 0], [1e15 + 1, 0], [-1e15, 0]]),
        np.array([[1e100, 0, 0], [1e100, 1, 0], [-1e100, 0, 0]]),
        torch.tensor([[5, 5], [5, 6], [9, 9]], dtype=torch.int32),
    ],
    ids=["int64", "uint64", "far apart", "too many cells", "tensor"],
)
def test_huge_coordinates(coords):
    np.testing.assert_array_equal(dense(build_adjacency(coords, radius=1)), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_level0_pixels_need_no_grid():
    """Positions 512 px apart with an offset give the graph of the grid."""
    rng = np.random.default_rng(0)
    grid = np.unique(rng.integers(0, 30, (400, 2)), axis=0)
    here = build_adjacency(grid * 512 + 137, radius=512 * 2**0.5, normalize="row")
    there = build_adjacency(grid, radius=2**0.5, normalize="row")
    assert torch.equal(here.col, there.col) and torch.equal(here.weight, there.weight)


@pytest.mark.parametrize("how", [{"radius": 1.0}, {"knn": 3}])
@pytest.mark.parametrize("normalize", ["none", "symmetric", "row"])
def test_no_instance_and_one(how, normalize):
    empty = build_adjacency(np.empty((0, 2)), normalize=normalize, **how)
    assert (empty.num_nodes, empty.num_edges) == (0, 0)
    alone = build_adjacency(np.zeros((1, 2)), normalize=normalize, **how)
    assert (alone.num_nodes, alone.num_edges) == (1, 0)
    looped = build_adjacency(np.zeros((1, 2)), normalize=normalize, self_loops=True, **how)
    np.testing.assert_array_equal(dense(looped), [[1]])


def test_duplicates_are_neighbours():
    coords = np.array([[3, 3], [3, 3], [9, 9], [3, 3]])
    assert dense(build_adjacency(coords, radius=1)).sum(1).tolist() == [2, 2, 0, 2]
    many = build_adjacency(np.zeros((300, 2)), knn=2)
    assert many.col.view(300, 2)[[0, 1, 2, 299]].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_feature_weights(dtype):
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 10, (80, 2))
    features = torch.from_numpy(rng.normal(size=(80, 37))).to(dtype)
    adj = build_adjacency(coords, radius=1.5, features=features)
    wide = features.double().numpy()
    expected = np.exp(-np.linalg.norm(wide[:, None] - wide[None], axis=-1) / 37) * brute_force(coords, 1.5)
    np.testing.assert_allclose(dense(adj), expected, rtol=1e-6)
    assert adj.weight.dtype == torch.float32
    matrix = adj.to_coo().to_dense()
    assert torch.equal(matrix, matrix.T)


def test_features_read_only_integer_or_half_on_the_host(tmp_path):
    coords, features = np.array([[0, 0], [0, 1]]), np.array([[0, 3], [4, 0]])
    np.save(tmp_path / "x.npy", features.astype(np.float16))
    for x in (features, np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(features)):
        weight = build_adjacency(coords, radius=1, features=x).weight
        torch.testing.assert_close(weight, torch.tensor([np.exp(-2.5)] * 2, dtype=torch.float32))


def test_number_of_threads_changes_nothing():
    coords = np.random.default_rng(0).normal(size=(20000, 2)) * 50
    before = torch.get_num_threads()
    graphs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            graphs.append(build_adjacency(coords, radius=1.5, features=coords, normalize="symmetric"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(graphs[0].col, graphs[1].col) and torch.equal(graphs[0].weight, graphs[1].weight)


def test_threads_of_torch_stay_as_the_user_set_them():
    """In a new process, since only Numba's first call would change them."""
    code = """
import numpy as np, torch
from bigbag.graphs import build_adjacency
torch.set_num_threads(1)
build_adjacency(np.zeros((3, 2)), radius=1)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


POINTS = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coords": POINTS}, "exactly one"),
        ({"coords": POINTS, "radius": 1, "knn": 2}, "exactly one"),
        ({"coords": POINTS, "radius": 0}, "positive"),
        ({"coords": POINTS, "radius": float("nan")}, "positive"),
        ({"coords": POINTS, "knn": 0}, "1 or more"),
        ({"coords": POINTS, "knn": 1.5}, "1 or more"),
        ({"coords": POINTS, "radius": 1, "normalize": "sym"}, "none, symmetric, row"),
        ({"coords": POINTS, "radius": 1, "symmetrize": "union"}, "symmetric already"),
        ({"coords": POINTS, "knn": 1, "symmetrize": "both"}, "mutual"),
        ({"coords": POINTS, "radius": 1, "sizes": [1, 1]}, "sum to"),
        ({"coords": POINTS, "radius": 1, "sizes": [4, -1]}, "sum to"),
        ({"coords": POINTS, "radius": 1, "features": np.zeros((2, 4))}, r"expected \(3, P\)"),
        ({"coords": POINTS, "radius": 1, "features": np.full((3, 4), np.nan)}, "instance 0 or of a neighbour"),
        ({"coords": np.zeros(3), "radius": 1}, r"expected \(N, c\)"),
        ({"coords": np.zeros((3, 2), complex), "radius": 1}, "complex"),
        ({"coords": np.array([[0, 0], [np.inf, 0]]), "radius": 1}, "instance 1"),
        ({"coords": np.array([[0], [2**60]]), "radius": 1}, "span"),
        ({"coords": np.array([[-1e300], [1e300]]), "radius": 1}, "span"),
    ],
)
def test_refusals_say_what_is_wrong(arguments, message):
    coords = arguments.pop("coords")
    with pytest.raises(ValueError, match=message):
        build_adjacency(coords, **arguments)
