"""Functions without second derivatives say so to whoever asks for them; their first ones are as they were."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.utils.checkpoint import checkpoint

from bigbag import Segments, ops
from bigbag.graphs import build_adjacency
from bigbag.nn.linear import gelu_project, linear_error, project
from bigbag.nn.rows import by_rows
from bigbag.nn.take import take

SEGMENTS = Segments.from_sizes([5, 4])
GRAPH = build_adjacency(torch.arange(9.0)[:, None].numpy(), radius=1.5, normalize="row")


def through_rows(x: Tensor) -> Tensor:
    return by_rows(lambda rows: rows.sin(), x, chunk=3)


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "expected_attention": (lambda *of: ops.expected_attention(*of, SEGMENTS, impl="cpu"), [(9,), (9,)]),
    "smooth_exact_directed": (lambda f, gamma: ops.smooth_exact_directed(GRAPH, f, gamma.abs()), [(9, 3), ()]),
    "chebyshev_conv": (lambda x, w: ops.chebyshev_conv(GRAPH, x, w), [(9, 3), (2, 6)]),
    "project": (project, [(9, 3), (2, 3)]),
    "gelu_project": (gelu_project, [(9, 3), (2, 3), (2,)]),
    "linear_error": (linear_error, [(9, 3), (9, 2), (3, 2), (3,)]),
    "by_rows": (through_rows, [(9, 3)]),
}


def inputs_of(name: str) -> list[Tensor]:
    generator, shapes = torch.Generator().manual_seed(0), CASES[name][1]
    dtype = torch.float32 if name == "expected_attention" else torch.float64  # of which it has a kernel
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_also_to_one_input(name):
    function, inputs = CASES[name][0], inputs_of(name)
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, plain))
    squares = sum(grad.square().sum() for grad in first)
    for x in inputs:
        with pytest.raises(RuntimeError, match=r"bigbag\..*: gradients have no gradients here"):
            torch.autograd.grad(squares, x, retain_graph=True, allow_unused=True)


def test_a_graph_of_gradients_may_be_made_of_a_checkpoint():
    """It unpacks what was saved, once."""
    (x,) = inputs_of("by_rows")
    (found,) = torch.autograd.grad(checkpoint(through_rows, x, use_reentrant=False).sum(), x, create_graph=True)
    torch.testing.assert_close(found, x.cos())


def test_taking_rows_has_second_derivatives():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: [part.sin() for part in take(x, torch.tensor([0, 2]))], (x,))
