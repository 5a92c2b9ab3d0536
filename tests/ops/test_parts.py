"""Operators on bags that several ranks share: the results and gradients of the whole bags."""

import random
import warnings
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist

from bigbag import Adjacency, PackedBags, ops
from bigbag.bags import Segments
from bigbag.ops.join import join_parts
from bigbag.parts import Parts
from bigbag.testing import run_ranks

DIM = 6


def make_graph(sizes, symmetric: bool) -> Adjacency:
    """Random weights, rows that sum to at most one, chords across the bag as well as neighbours."""
    torch.manual_seed(sum(sizes))
    blocks = []
    for size in sizes:
        near = (torch.arange(size)[:, None] - torch.arange(size)).abs() <= 2
        dense = torch.rand(size, size, dtype=torch.float64) * (near | (torch.rand(size, size) < 0.05))
        dense = dense + dense.T if symmetric else dense
        blocks.append(dense / dense.sum(1).max().clamp_min(1) if size else dense)
    row, col = torch.nonzero(torch.block_diag(*blocks), as_tuple=True)
    weight = torch.block_diag(*blocks)[row, col]
    return Adjacency.from_edges(row, col, weight, sum(sizes), symmetric)


def cut_rows(whole, parts: Parts):
    """This rank's rows of a tensor over the whole pack."""
    return whole[torch.from_numpy(parts.rows())]


def cut_graph(adj: Adjacency, totals, parts: Parts) -> Adjacency:
    starts = [0, *accumulate(totals)]
    pieces = [
        adj.part(start + before, start + before + size)
        for start, before, size in zip(starts, parts.before, parts.sizes[parts.rank])
    ]
    weight = torch.cat([piece.weight for piece in pieces])
    own = [0, *accumulate(parts.sizes[parts.rank])]
    edges = [0, *accumulate(piece.num_edges for piece in pieces)]
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), *(p.crow[1:] + first for p, first in zip(pieces, edges))])
    col = torch.cat([piece.col + first for piece, first in zip(pieces, own)])
    local = Adjacency(crow, col, weight, adj.symmetric)
    x = torch.zeros(own[-1], 1)
    offsets = torch.tensor(own)
    pack = PackedBags(x, offsets, parts.sizes[parts.rank], adj=local, parts=parts)
    return join_parts(pack).adj


def uneven(totals, num_ranks: int, rank: int, seed: int) -> Parts:
    """Random shares, among them none."""
    numbers, sizes = random.Random(seed), [[0] * len(totals) for _ in range(num_ranks)]
    for bag, total in enumerate(totals):
        cuts = [0, *sorted(numbers.randint(0, total) for _ in range(num_ranks - 1)), total]
        for r in range(num_ranks):
            sizes[r][bag] = cuts[r + 1] - cuts[r]
    return Parts(tuple(map(tuple, sizes)), rank)


def smoothed(adj, segments, x, c):
    return ops.smooth(adj, x, c, 4) + ops.smooth(ops.transpose(adj), x, c, 3)


def exact(adj, segments, x, c):
    return torch.cat([ops.smooth_exact(adj, x, c, laplacian=name) for name in ("normalized", "combinatorial")], 1)


def convolved(adj, segments, x, c):
    wide, thin = (torch.linspace(-1, 1, rows * 3 * DIM, dtype=x.dtype).view(rows, 3 * DIM) for rows in (8, 2))
    scale = ops.lambda_max(adj, segments) if adj.symmetric else 2.0
    y = ops.chebyshev_conv(adj, x, wide * c, scale, segments)
    return torch.cat([y, ops.chebyshev_conv(adj, x, thin, scale, segments)], 1)


def attended(adj, segments, x, c):
    q = x.view(-1, 2, DIM // 2)
    soft = ops.neighbor_attention(q, q * c, q.square(), adj).flatten(1)
    linear = ops.neighbor_attention(q, q * c, q.square(), adj, softmax=False).flatten(1)
    return torch.cat([soft, linear, ops.neighbor_scores(x, x.sin(), adj)[:, None]], 1)


def varied(adj, segments, x, c):
    of_bags = ops.quadratic_form(adj, x * c, segments) + ops.dirichlet_energy(adj, x, segments)
    return x * 0 + of_bags.sum() + ops.quadratic_form(adj, x) * c


def fully_attended(adj, segments, x, c):
    q = x.view(-1, 2, DIM // 2)
    return ops.masked_attention(q, q * c, torch.cat([q.square(), q], 2), segments).flatten(1)


def drawn(adj, segments, x, c):
    args = (segments, DIM, [1, 2, 3, 4])
    pooled = ops.sampled_attention(x[:, 0], x[:, 1] * c, x[:, 2:], *args)
    return ops.attention_draws(x[:, 0] * c, x[:, 1], *args) + pooled.square().sum()


def averaged(adj, segments, x, c):
    return ops.expected_attention(x[:, 0], x[:, 1] * c, segments)[:, None] * x


def averaged_by_kernels(adj, segments, x, c):
    return averaged(adj, segments, x.float(), c.float()).to(x.dtype)


CASES = {
    "expected_attention": (averaged, (False,)),
    "expected_attention in float32": (averaged_by_kernels, (False,)),
    "masked_attention": (fully_attended, (False,)),
    "quadratic_form": (varied, (False,)),
    "sampled_attention": (drawn, (False,)),
    "spmm": (lambda adj, segments, x, c: ops.spmm(adj, x * c), (True, False)),
    "degrees": (lambda adj, segments, x, c: x * c * ops.degrees(adj)[:, None], (False,)),
    "transpose": (lambda adj, segments, x, c: ops.spmm(ops.transpose(adj), x * c), (True, False)),
    "smooth": (smoothed, (True, False)),
    "smooth_exact": (exact, (True,)),
    "smooth_exact_directed": (lambda adj, segments, x, c: ops.smooth_exact_directed(adj, x, c), (False,)),
    "chebyshev_conv": (convolved, (True, False)),
    "neighbor_attention": (attended, (False,)),
}


def run_case(function, adj, segments, x):
    x, c = x.clone().requires_grad_(), torch.tensor(0.4, dtype=x.dtype, requires_grad=True)
    out = function(adj, segments, x, c)
    torch.manual_seed(1)
    weights = torch.randn(sum(segments.totals), out.shape[1], dtype=out.dtype)
    (out * (weights if segments.parts is None else cut_rows(weights, segments.parts))).sum().backward()
    return out.detach(), x.grad, c.grad


def all_errors(seeds):
    rank, num_ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for name, (function, kinds) in CASES.items():
        for symmetric in kinds:
            for seed in seeds:
                totals = [random.Random(seed).randint(8, 30), 1, 0, random.Random(seed + 9).randint(2, 12)]
                parts, adj = uneven(totals, num_ranks, rank, seed), make_graph(totals, symmetric)
                x = torch.randn(sum(totals), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                whole = run_case(function, adj, Segments.from_sizes(totals), x)
                shared = cut_graph(adj, totals, parts)
                assert ops.marked_symmetric(replace(shared, symmetric=False)).symmetric == symmetric
                segments = Segments.from_sizes(parts.sizes[rank], parts=parts)
                out, grad, grad_c = run_case(function, shared, segments, cut_rows(x, parts))
                dist.all_reduce(grad_c)
                pairs = [(out, cut_rows(whole[0], parts)), (grad, cut_rows(whole[1], parts)), (grad_c, whole[2])]
                scale = [float(value.abs().max()) for value in whole]
                errors = [float((a - b).abs().max()) / s if a.numel() else 0.0 for (a, b), s in zip(pairs, scale)]
                found[f"{name}, symmetric {symmetric}, seed {seed}"] = errors
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_graphs_shared_by_ranks(num_ranks):
    for found in run_ranks(all_errors, num_ranks, (num_ranks,), timeout_s=300):
        assert len(found) == sum(len(kinds) for _, kinds in CASES.values())
        for key, errors in found.items():
            tolerance = 2e-6 if "float32" in key else 1e-9
            assert all(error <= tolerance for error in errors), f"{key}: {errors}"


def warnings_of_shuffled(sizes):
    found = []
    for size in sizes:
        torch.manual_seed(0)
        place = torch.randperm(size)
        row, col = torch.cat([place[:-1], place[1:]]), torch.cat([place[1:], place[:-1]])
        adj = Adjacency.from_edges(row, col, torch.ones(len(row)), size, True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            halo = cut_graph(adj, [size], Parts.even([size], dist.get_world_size(), dist.get_rank())).halo
        assert halo.num_rows > size / 3
        found.append(any("spatial order" in str(warning.message) for warning in caught))
    return found


def test_instances_in_no_spatial_order_are_pointed_out():
    assert run_ranks(warnings_of_shuffled, 3, (4800, 480)) == [[True, False]] * 3
