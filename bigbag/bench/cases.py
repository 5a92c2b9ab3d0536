"""Per operator: inputs of a given size, what bigbag runs, what one would write without it, and the work they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import Segments
from bigbag.bench import baselines
from bigbag.graphs import build_adjacency

ATTENTION_DIM = 128
BRANCHES = ([1024, 4096], [1, 2])  # segment lengths and dilations
HEADS, LANDMARKS, STEPS, TERMS, TOPK, DRAWS = 8, 256, 10, 4, 8, 16
KERNEL = 7
NODES = 41 * 64  # of the sums of expected_attention


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        leaves: named float32 inputs; bfloat16 contenders get them rounded (``stored`` alone where that is given).
        ours: variant ("" where there is one only) -> function of leaves and implementation.
        baseline: function of the leaves, and its name.
        num_bytes: what a forward pass can't avoid to read and write in float32, and the same of a backward pass.
        num_flops: the arithmetic of a forward and of a backward pass.
        baseline_fits: False where the baseline's memory or time would be out of reach.
        stored: the leaves that bfloat16 is about, the rest computing under autocast.
    """

    leaves: Mapping[str, Tensor]
    ours: Mapping[str, Callable[[Mapping[str, Tensor], str], Tensor]]
    baseline: tuple[str, Callable[[Mapping[str, Tensor]], Tensor]]
    num_bytes: tuple[float, float]
    num_flops: tuple[float, float]
    baseline_fits: bool = True
    stored: tuple[str, ...] = field(default=())


def _randn(*shape: int, device: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Drawn where it is used: billions of numbers take a CPU minutes."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device) * scale


def _segments(rows: int, device: str) -> Segments:
    """Four bags."""
    return Segments.from_sizes([rows // 4] * 3 + [rows - 3 * (rows // 4)], device)


def _lattice(rows: int, device: str, normalize: str = "symmetric") -> Adjacency:
    """Eight neighbours on a square, normalised."""
    side = max(1, round(rows**0.5))
    index = torch.arange(rows)
    coords = torch.stack([index // side, index % side], 1)
    return build_adjacency(coords.float(), radius=1.5, normalize=normalize).to(device)


def _attention_pool(op: str, rows: int, width: int, device: str) -> Case:
    def parameter(seed: int, *shape: int) -> Tensor:
        return _randn(*shape, scale=shape[-1] ** -0.5, seed=seed, device=device)

    dim, segments = ATTENTION_DIM, Segments.from_sizes((rows,), device)
    leaves = {"x": _randn(rows, width, device=device), "w1": parameter(1, dim, width), "b1": parameter(2, dim)}
    leaves |= {"w2": parameter(3, 1, dim), "wg": parameter(4, dim, width), "bg": parameter(5, dim)}

    def ours(keep: bool) -> Callable[[Mapping[str, Tensor], str], Tensor]:
        def run(t: Mapping[str, Tensor], impl: str) -> Tensor:
            x, *weights = t.values()
            return ops.attention_pool(x, segments, *weights, keep_preactivations=keep, impl=impl)[0]

        return run

    variants = {"recompute": ours(False), "keep": ours(True)}
    baseline = ("torchmil's operations", lambda t: baselines.attention_pool(**t))
    size, flops = 4.0 * rows * width, 4.0 * rows * width * dim
    return Case(leaves, variants, baseline, (size, size), (flops, flops), True, ("x",))


def _attention_scores(op: str, rows: int, width: int, device: str) -> Case:
    leaves = {"h": _randn(rows, width, device=device), "bias": _randn(width, seed=1, device=device)}
    leaves |= {"w2": _randn(1, width, scale=width**-0.5, seed=2, device=device)}
    ours = {"": lambda t, impl: ops.attention_scores(**t, impl=impl)}
    baseline = ("torch's operations", lambda t: baselines.attention_scores(**t))
    size = 4.0 * rows * width
    return Case(leaves, ours, baseline, (size, 2 * size), (size / 2, size), True, ("h",))


def _segment(op: str, rows: int, width: int, device: str) -> Case:
    segments, leaves = _segments(rows, device), {"x": _randn(rows, width, device=device)}
    function = getattr(ops, op)
    known: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], Tensor]]] = {
        "segment_topk": ("torch.topk per bag", lambda t: baselines.topk(t["x"], segments, TOPK)),
        "segment_logsumexp": ("logsumexp per bag", lambda t: baselines.logsumexp(t["x"], segments)),
    }
    baseline = known.get(op, ("index_add, scatter_reduce", lambda t: baselines.segment(op, t["x"], segments)))

    def ours(t: Mapping[str, Tensor], impl: str) -> Tensor:
        if op == "segment_topk":
            return function(t["x"], segments, TOPK, impl=impl)[0]
        return function(t["x"], segments, impl=impl)

    size = 4.0 * rows * width
    moved = (2 * size, 3 * size) if op == "segment_softmax" else (size, size)
    return Case(leaves, {"": ours}, baseline, moved, (size / 4, size / 4))


def _segment_pool(op: str, rows: int, width: int, device: str) -> Case:
    segments = _segments(rows, device)
    leaves = {"weights": _randn(rows, DRAWS, seed=1, device=device), "x": _randn(rows, width, device=device)}
    flops, size = 2.0 * rows * width * DRAWS, 4.0 * rows * (width + DRAWS)
    baseline = ("matmul per bag", lambda t: baselines.segment_pool(t["weights"], t["x"], segments))
    run = lambda t, impl: ops.segment_pool(t["weights"], t["x"], segments, impl=impl)  # noqa: E731
    return Case(leaves, {"": run}, baseline, (size, 2 * size), (flops, 2 * flops))


def _segment_dots(op: str, rows: int, width: int, device: str) -> Case:
    segments = _segments(rows, device)
    leaves = {"x": _randn(rows, width, device=device), "y": _randn(4, DRAWS, width, seed=1, device=device)}
    flops, size = 2.0 * rows * width * DRAWS, 4.0 * rows * (width + DRAWS)
    baseline = ("matmul per bag", lambda t: baselines.segment_dots(t["x"], t["y"], segments))
    run = lambda t, impl: ops.segment_dots(t["x"], t["y"], segments, impl=impl)  # noqa: E731
    return Case(leaves, {"": run}, baseline, (size, 2 * size), (flops, 2 * flops))


def _dot_attention_pool(op: str, rows: int, width: int, device: str) -> Case:
    segments = _segments(rows, device)
    leaves = {
        "x": _randn(rows, width, device=device),
        "y": _randn(4, 1, width, seed=1, scale=width**-0.5, device=device),
    }
    flops, size = 4.0 * rows * width, 4.0 * rows * width
    baseline = ("matmul per bag", lambda t: baselines.dot_attention_pool(t["x"], t["y"], segments))
    run = lambda t, impl: ops.dot_attention_pool(t["x"], t["y"], segments, impl=impl)[0]  # noqa: E731
    return Case(leaves, {"": run}, baseline, (size, 2 * size), (flops, 2 * flops))


def _graph(op: str, rows: int, width: int, device: str) -> Case:
    adj = _lattice(rows, device)
    coo, edges = adj.to_coo(), adj.num_edges
    leaves = {"x": _randn(rows, width, device=device)}
    if op in ("neighbor_attention", "neighbor_scores"):
        leaves = {"q": leaves["x"], "k": _randn(rows, width, seed=1, device=device)}
        leaves |= {"v": _randn(rows, width, seed=2, device=device)} if op == "neighbor_attention" else {}
    row, col, weight = adj.rows(), adj.col.long(), adj.weight
    assert weight is not None
    size, product = 4.0 * rows * width, 2.0 * edges * width
    # Name -> ours, baseline and its name, reads and writes of (T, D) forward and backward, products along edges.
    table: dict[str, Any] = {
        "spmm": (lambda t, i: ops.spmm(adj, t["x"], impl=i), lambda t: baselines.spmm(coo, t["x"]), (2, 2), (1, 1)),
        "smooth": (
            lambda t, i: ops.smooth(adj, t["x"], 0.5, STEPS, impl=i),
            lambda t: baselines.smooth(coo, t["x"], 0.5, STEPS),
            (3 * STEPS, 3 * STEPS), (STEPS, STEPS),
        ),
        "smooth_exact": (
            lambda t, i: ops.smooth_exact(adj, t["x"], 1.0, impl=i),
            lambda t: baselines.smooth_exact(coo, t["x"], 1.0),
            (2, 2), (1, 1),
        ),
        "chebyshev": (
            lambda t, i: ops.chebyshev(adj, t["x"], TERMS, 2.0, impl=i),
            lambda t: baselines.chebyshev(coo, t["x"], TERMS, 2.0),
            (2 * TERMS, 2 * TERMS), (TERMS - 1, TERMS - 1),
        ),
        "neighbor_attention": (
            lambda t, i: ops.neighbor_attention(t["q"], t["k"], t["v"], adj, impl=i),
            lambda t: baselines.neighbor_attention(t["q"], t["k"], t["v"], row, col),
            (4, 7), (2, 4),
        ),
        "neighbor_scores": (
            lambda t, i: ops.neighbor_scores(t["q"], t["k"], adj, impl=i),
            lambda t: baselines.neighbor_scores(t["q"], t["k"], weight, row, col),
            (2, 4), (1, 2),
        ),
        "quadratic_form": (
            lambda t, i: ops.quadratic_form(adj, t["x"], impl=i),
            lambda t: baselines.quadratic_form(coo, t["x"]), (1, 2), (1, 2),
        ),
        "dirichlet_energy": (
            lambda t, i: ops.dirichlet_energy(adj, t["x"], impl=i),
            lambda t: baselines.dirichlet_energy(coo, t["x"]), (1, 2), (1.5, 1.5),
        ),
    }  # fmt: skip
    ours, theirs, moved, products = table[op]
    name = {"smooth_exact": "dense solve"}.get(op, "gather" if op.startswith("neighbor") else "COO bmm")
    num_bytes, num_flops = (moved[0] * size, moved[1] * size), (products[0] * product, products[1] * product)
    fits = op != "smooth_exact" or rows <= 5000
    return Case(leaves, {"": ours}, (name, theirs), num_bytes, num_flops, fits)


def _chebyshev_conv(op: str, rows: int, width: int, device: str) -> Case:
    adj, dim = _lattice(rows, device), ATTENTION_DIM
    coo = adj.to_coo()
    matrices = _randn(dim, TERMS * width, scale=width**-0.5, seed=1, device=device)
    leaves = {"x": _randn(rows, width, device=device), "weight": matrices}
    size, thin = 4.0 * rows * width, 4.0 * rows * dim
    flops = 2.0 * rows * width * TERMS * dim + 2.0 * adj.num_edges * dim * (TERMS - 1)
    run = lambda t, impl: ops.chebyshev_conv(adj, t["x"], t["weight"], 2.0, impl=impl)  # noqa: E731
    baseline = ("COO bmm, linear", lambda t: baselines.chebyshev_conv(coo, t["x"], t["weight"], 2.0))
    moved = size + 2 * TERMS * thin
    return Case(leaves, {"": run}, baseline, (moved, 2 * moved), (flops, 2 * flops))


def _smooth_exact_directed(op: str, rows: int, width: int, device: str) -> Case:
    adj = _lattice(rows, device, "row")
    coo, leaves, size = adj.to_coo(), {"x": _randn(rows, width, device=device)}, 4.0 * rows * width
    run = lambda t, impl: ops.smooth_exact_directed(adj, t["x"], 1.0, impl=impl)  # noqa: E731
    baseline = ("dense solve", lambda t: baselines.smooth_exact(coo, t["x"], 1.0))
    flops = 4.0 * adj.num_edges * width
    return Case(leaves, {"": run}, baseline, (2 * size, 2 * size), (flops, flops), rows <= 5000)


def _sampled_attention(op: str, rows: int, width: int, device: str) -> Case:
    """``width`` draws, as many as ProbSmoothABMIL takes, of one bag's attention on eight values."""
    segments = Segments.from_sizes((rows,), device)
    leaves = {"mu": _randn(rows, device=device), "log_var": _randn(rows, seed=1, device=device)}
    leaves |= {"values": _randn(rows, HEADS, seed=2, device=device)}

    def kept(t: Mapping[str, Tensor]) -> Tensor:
        # The same normals, drawn in every step as the operator does.
        zeros = torch.zeros_like(t["mu"]).detach()
        noise = ops.attention_draws(zeros, zeros, segments, width, seed=0)
        return baselines.sampled_attention(t["mu"], t["log_var"], noise, t["values"])[None]

    def run(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return ops.sampled_attention(t["mu"], t["log_var"], t["values"], segments, width, seed=0, impl=impl)

    size, flops = 4.0 * rows * (HEADS + 2), 2.0 * rows * width * (HEADS + 1)
    return Case(leaves, {"": run}, ("draws kept", kept), (size, 2 * size), (flops, 2 * flops), rows * width <= 1 << 28)


def _attention_draws(op: str, rows: int, width: int, device: str) -> Case:
    """``width`` draws of one bag's attention."""
    segments = Segments.from_sizes((rows,), device)
    leaves = {"mu": _randn(rows, device=device), "log_var": _randn(rows, seed=1, device=device)}
    run = lambda t, impl: ops.attention_draws(t["mu"], t["log_var"], segments, width, seed=0, impl=impl)  # noqa: E731
    baseline = ("its definition in torch", lambda t: run(t, "reference"))
    size = 4.0 * rows * width
    return Case(leaves, {"": run}, baseline, (size, size), (0.0, 4.0 * rows * width), rows * width <= 1 << 28)


def _expected_attention(op: str, rows: int, width: int, device: str) -> Case:
    """The exact mean of one bag's attention; ``width`` has no part in it."""
    segments = Segments.from_sizes((rows,), device)
    leaves = {"mu": _randn(rows, device=device), "log_var": _randn(rows, seed=1, device=device)}

    def run(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return ops.expected_attention(t["mu"], t["log_var"], segments, impl=impl)

    baseline = ("integrals kept", lambda t: baselines.expected_attention(**t))
    size, flops = 4.0 * rows, 2.0 * rows * NODES
    return Case(leaves, {"": run}, baseline, (3 * size, 5 * size), (flops, 2 * flops), rows <= 1 << 16)


def _depthwise_conv(op: str, rows: int, width: int, device: str) -> Case:
    """TransMIL's kernel over one bag laid out as the grid that is nearest to a square."""
    across = next(side for side in range(math.isqrt(rows), 0, -1) if rows % side == 0)
    segments = Segments.from_sizes((rows,), device)
    leaves = {"x": _randn(rows, width, device=device), "bias": _randn(width, seed=2, device=device)}
    leaves |= {"weight": _randn(width, 1, KERNEL, KERNEL, scale=1 / KERNEL, seed=1, device=device)}

    def run(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return ops.depthwise_conv(t["x"], segments, [across], t["weight"], t["bias"], impl=impl)

    baseline = ("conv2d", lambda t: baselines.depthwise_conv(**t, width=across))
    size, flops = 4.0 * rows * width, 2.0 * rows * width * KERNEL**2
    return Case(leaves, {"": run}, baseline, (2 * size, 3 * size), (flops, 2 * flops))


def _attention(op: str, rows: int, width: int, device: str) -> Case:
    shape, segments = (rows, HEADS, max(1, width // HEADS)), Segments.from_sizes((rows,), device)
    q, k, v = (_randn(*shape, seed=seed, device=device) for seed in range(3))
    size = 4.0 * rows * width
    if op == "class_token_attention":
        baseline = ("einsum and softmax", lambda t: baselines.class_token_attention(t["q_cls"], t["k"]))
        run = lambda t, impl: ops.class_token_attention(t["q_cls"], t["k"], segments, impl=impl)  # noqa: E731
        return Case({"q_cls": q[:1], "k": k}, {"": run}, baseline, (size, 2 * size), (size / 2, size))
    leaves = {"q": q, "k": k, "v": v}
    if op == "dilated_attention":
        return _dilated_attention(leaves, rows, width, segments)
    if op == "masked_attention":
        flops = 4.0 * rows * rows * width
        run = lambda t, impl: ops.masked_attention(t["q"], t["k"], t["v"], segments, impl=impl)  # noqa: E731
        baseline = ("SDPA", lambda t: baselines.masked_attention(**t))
        return Case(leaves, {"": run}, baseline, (4 * size, 8 * size), (flops, 2.5 * flops))

    def nystrom(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return ops.nystrom_attention(t["q"], t["k"], t["v"], segments, num_landmarks=LANDMARKS, impl=impl)

    # Two products with the landmarks' keys or queries and two with values, per instance.
    flops = 8.0 * rows * width * LANDMARKS
    baseline = ("torchmil's operations", lambda t: baselines.nystrom_attention(**t, num_landmarks=LANDMARKS))
    return Case(leaves, {"": nystrom}, baseline, (4 * size, 8 * size), (flops, 2.5 * flops), rows % LANDMARKS == 0)


def _dilated_attention(leaves: dict[str, Tensor], rows: int, width: int, segments: Segments) -> Case:
    lengths, dilations = BRANCHES
    branches = ops.dilated_branches(segments, HEADS, lengths, dilations)
    size = 4.0 * rows * width
    # Of the places of a segment, one in r is a query and one in r a key, for each head.
    flops = sum(4.0 * rows * width * min(w, rows) / r**2 for w, r in zip(lengths, dilations))

    def run(t: Mapping[str, Tensor], impl: str) -> Tensor:
        return ops.dilated_attention(t["q"], t["k"], t["v"], segments, branches, impl=impl)

    baseline = ("matmul per branch", lambda t: baselines.dilated_attention(**t, lengths=lengths, dilations=dilations))
    return Case(leaves, {"": run}, baseline, (4 * size, 8 * size), (flops, 2.5 * flops), rows <= 1 << 15)


_MAKERS: dict[str, tuple[Callable[[str, int, int, str], Case], int, int]] = {
    "attention_pool": (_attention_pool, 1024, 1 << 62),
    "attention_scores": (_attention_scores, ATTENTION_DIM, 1 << 62),
    "segment_pool": (_segment_pool, 512, 1 << 62),
    "segment_dots": (_segment_dots, 512, 1 << 62),
    "dot_attention_pool": (_dot_attention_pool, 1024, 1 << 62),
    **{f"segment_{name}": (_segment, 128, 1 << 62) for name in ("softmax", "sum", "mean", "max", "topk", "logsumexp")},
    **dict.fromkeys(("spmm", "smooth", "smooth_exact", "chebyshev"), (_graph, 512, 1 << 62)),
    **dict.fromkeys(("neighbor_attention", "neighbor_scores"), (_graph, 512, 1 << 62)),
    **dict.fromkeys(("quadratic_form", "dirichlet_energy"), (_graph, 512, 1 << 62)),
    # Quadratic in the size of a bag.
    "masked_attention": (_attention, 512, 1 << 15),
    "class_token_attention": (_attention, 512, 1 << 62),
    "dilated_attention": (_attention, 512, 1 << 62),
    "nystrom_attention": (_attention, 512, 1 << 62),
    "depthwise_conv": (_depthwise_conv, 512, 1 << 62),
    "sampled_attention": (_sampled_attention, 1000, 1 << 62),
    "attention_draws": (_attention_draws, 1000, 1 << 62),
    "expected_attention": (_expected_attention, 1, 1 << 62),
    # Made of operators, without rows in their table.
    "chebyshev_conv": (_chebyshev_conv, 512, 1 << 62),
    "smooth_exact_directed": (_smooth_exact_directed, 512, 1 << 62),
}
"""Function -> maker of its case, its usual width, and the largest bag that is measured on a CPU."""
MEASURED = tuple(_MAKERS)


def usual_width(op: str) -> int:
    return _MAKERS[op][1]


def too_large(op: str, rows: int, device: str) -> bool:
    return device == "cpu" and rows > _MAKERS[op][2]


def make_case(op: str, rows: int, width: int, device: str) -> Case:
    """The case of ``op`` with ``rows`` instances, or a few more where the baseline needs a multiple.

    Raises:
        ValueError: an operator without a case.
    """
    if op not in _MAKERS:
        raise ValueError(f"no benchmark for operator {op!r}: add a case to bigbag/bench/cases.py")
    multiple = {"nystrom_attention": LANDMARKS, "dilated_attention": min(rows, max(BRANCHES[0]))}.get(op, 1)
    return _MAKERS[op][0](op, -(-rows // multiple) * multiple, width, device)
