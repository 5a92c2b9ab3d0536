"""Packs of more than 2^31 numbers: the last, small bag gives what it gives alone.

A long bag of zeros comes before it, so that everything about the small one lies beyond what 32 bits can count: where an
offset overflowed, its numbers would be others, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bigbag import Segments, ops
from bigbag.adjacency import Adjacency
from tests.gpu.device import DEVICE, IMPL

ELEMENTS = 2**31 if DEVICE == "cuda" else 2**14
TAIL = 333
pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        DEVICE == "cuda"
        and (not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 75 << 30),
        reason="needs a CUDA device of 80 GB",
    ),
]


def tail(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(TAIL, *shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, torch.bfloat16)


def behind_zeros(values: Tensor, rows: int) -> Tensor:
    """``values`` as the last of so many rows, the others zeros."""
    out = values.new_zeros(rows, *values.shape[1:])
    out[-len(values) :] = values
    return out


def path_graph(nodes: int) -> Adjacency:
    """Each node joined to the next within the small bag, and within the long one."""
    node = torch.arange(nodes, device=DEVICE)
    cut = nodes - TAIL
    right = (node != nodes - 1) & (node != cut - 1)
    left = (node != 0) & (node != cut)
    crow = torch.cat([node.new_zeros(1), (left.long() + right.long()).cumsum(0)])
    col = torch.stack([node - 1, node + 1], 1)[torch.stack([left, right], 1)].int()
    return Adjacency(crow, col, torch.full((len(col),), 0.5, device=DEVICE), True)


@dataclass(frozen=True)
class Given:
    """What an operator takes beside its tensors of instances: how they are cut, a graph, and a vector for each bag."""

    segments: Segments
    large: bool

    def graph(self) -> Adjacency:
        return path_graph(self.segments.num_instances)

    def vectors(self, *shape: int) -> Tensor:
        own = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, torch.bfloat16)
        return torch.cat([torch.zeros_like(own), own]) if self.large else own


Call = Callable[[Sequence[Tensor], Given], Tensor]
_ROWS, _HEADS = (1024,), (8, 64)
SEGMENTS: dict[str, tuple[int, Call]] = {
    name: (1, lambda t, given, op=name: getattr(ops, op)(t[0], given.segments, impl=IMPL))
    for name in ("segment_sum", "segment_mean", "segment_max", "segment_softmax", "segment_logsumexp")
}
"""Name -> how many tensors of instances it takes, and the call."""
OTHERS: dict[str, tuple[int, Call]] = {
    "segment_topk": (1, lambda t, given: ops.segment_topk(t[0], given.segments, 5, impl=IMPL)[0]),
    "segment_pool": (1, lambda t, given: ops.segment_pool(t[0][:, :8].clone(), t[0], given.segments, impl=IMPL)),
    "segment_dots": (1, lambda t, given: ops.segment_dots(t[0], given.vectors(2, 1024), given.segments, impl=IMPL)),
    "dot_attention_pool": (
        1,
        lambda t, given: ops.dot_attention_pool(t[0], given.vectors(2, 1024) / 32, given.segments, impl=IMPL)[0],
    ),
    "depthwise_conv": (
        1,
        lambda t, given: ops.depthwise_conv(
            t[0],
            given.segments,
            [1] * given.segments.num_bags,
            given.vectors(3, 1024)[-1].t()[:, None, :, None],
            impl=IMPL,
        ),
    ),
    "spmm": (1, lambda t, given: ops.spmm(given.graph(), t[0], impl=IMPL)),
    "smooth": (1, lambda t, given: ops.smooth(given.graph(), t[0], 0.5, 3, impl=IMPL)),
    "chebyshev": (1, lambda t, given: ops.chebyshev(given.graph(), t[0], 3, 2.0, impl=IMPL).transpose(0, 1)),
    "neighbor_scores": (2, lambda t, given: ops.neighbor_scores(*t, given.graph(), impl=IMPL)),
    "neighbor_attention": (3, lambda t, given: ops.neighbor_attention(*t, given.graph(), impl=IMPL)),
}
HEADS: dict[str, tuple[int, Call]] = {
    "nystrom_attention": (
        3,
        lambda t, given: ops.nystrom_attention(*t, given.segments, num_landmarks=16, impl=IMPL),
    ),
    "class_token_attention": (
        1,
        lambda t, given: ops.class_token_attention(given.vectors(8, 64), t[0], given.segments, impl=IMPL),
    ),
    "dilated_attention": (
        3,
        lambda t, given: ops.dilated_attention(
            *t, given.segments, ops.dilated_branches(given.segments, 8, [64, 256], [1, 2]), impl=IMPL
        ),
    ),
}
CASES = {
    name: (shape, *case)
    for shape, group in ((_ROWS, SEGMENTS | OTHERS), (_HEADS, HEADS))
    for name, case in group.items()
}


def results(name: str, large: bool) -> list[Tensor]:
    """Of the small bag, alone or behind a long one: what the operator gives it, and the gradients of its rows."""
    shape, count, call = CASES[name]
    rows = ELEMENTS // tail(*shape)[0].numel() + TAIL if large else TAIL
    leaves = [behind_zeros(tail(*shape, seed=i), rows).requires_grad_() for i in range(count)]
    segments = Segments.from_sizes((rows - TAIL, TAIL) if large else (TAIL,), DEVICE)
    out = call(leaves, Given(segments, large))
    part = out[-TAIL:] if len(out) == rows else out[-1:]
    weight = torch.randn(part.shape, generator=torch.Generator().manual_seed(9)).to(part)
    grads = torch.autograd.grad(part, leaves, weight)
    return [part.detach().clone(), *(grad[-TAIL:].clone() for grad in grads)]


@pytest.mark.parametrize("name", CASES)
def test_the_last_bag_of_a_large_pack_is_as_alone(name: str) -> None:
    for found, expected in zip(results(name, True), results(name, False), strict=True):
        assert expected.abs().max() > 0
        atol = 4 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def test_attention_pool() -> None:
    """Weights have gradients of both bags: the long one's is left out by the gradient that comes in."""
    w1, wg, w2 = (torch.randn(*shape, device=DEVICE) / 32 for shape in ((64, 1024), (64, 1024), (1, 64)))

    def run(large: bool) -> list[Tensor]:
        x = tail(1024)
        x = (behind_zeros(x, ELEMENTS // 1024 + TAIL) if large else x).requires_grad_()
        weights = [w.clone().requires_grad_() for w in (w1, wg, w2)]
        segments = Segments.from_sizes((len(x) - TAIL, TAIL) if large else (TAIL,), DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            z, _ = ops.attention_pool(x, segments, weights[0], None, weights[2], weights[1], None, impl=IMPL)
        grads = torch.autograd.grad(z[-1].float().square().sum(), [x, *weights])
        return [z[-1].detach(), grads[0][-TAIL:].clone(), *grads[1:]]

    for found, expected in zip(run(True), run(False), strict=True):
        atol = 8 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def test_masked_attention_over_many_bags() -> None:
    """Quadratic in a bag, so that the numbers come from many bags of 64."""
    qkv = [tail(8, 64, seed=i) for i in range(3)]

    def run(large: bool) -> list[Tensor]:
        leaves = [(behind_zeros(t, ELEMENTS // 512 + TAIL) if large else t).requires_grad_() for t in qkv]
        before = len(leaves[0]) - TAIL
        segments = Segments.from_sizes([64] * (before // 64) + [before % 64, TAIL], DEVICE)
        out = ops.masked_attention(*leaves, segments, impl=IMPL)[-TAIL:]
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return [out.detach(), *(grad[-TAIL:].clone() for grad in grads)]

    for found, expected in zip(run(True), run(False), strict=True):
        atol = 4 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def test_draws_are_written_beyond_32_bits() -> None:
    draws = 1024
    rows = ELEMENTS // draws + TAIL
    mu = torch.linspace(-1, 1, rows, device=DEVICE)
    segments = Segments.from_sizes((rows,), DEVICE)
    out = ops.attention_draws(mu, torch.zeros_like(mu), segments, draws, 0, impl=IMPL)
    for first in (0, rows - TAIL):
        noise = out[first : first + TAIL] - mu[first : first + TAIL, None]
        # A third of a million normals: standard errors of 0.002 and 0.0012.
        assert abs(float(noise.mean())) < 0.012 and abs(float(noise.std()) - 1) < 0.01
