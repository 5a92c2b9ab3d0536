"""depthwise_conv: what only it promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbag import ops
from bigbag.bags import Segments
from bigbag.memory import peak_bytes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEGMENTS, WIDTHS = Segments.from_sizes((1, 60, 0, 9, 3)), [0, 12, 5, 3, 1]


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_and_weights_keep_their_dtypes(dtype: torch.dtype, kept: torch.dtype, impl: str, device: str) -> None:
    """Whatever autocast says; sums are rounded once, at the end."""
    segments = Segments.from_sizes(SEGMENTS.sizes, device)
    x, weight, bias = randn(73, 6), randn(3, 1, 5, 3, seed=1), randn(6, seed=2)
    given = [x.to(device, dtype), weight.to(device, kept), bias.to(device, kept)]
    leaves = [value.requires_grad_() for value in given]
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="got float64"):
            ops.depthwise_conv(leaves[0], segments, WIDTHS, *leaves[1:], impl=impl)
        return
    with torch.autocast(device, torch.bfloat16):
        out = ops.depthwise_conv(leaves[0], segments, WIDTHS, *leaves[1:], impl=impl)
    grads = torch.autograd.grad(out.double().square().sum(), leaves)
    exact = [value.detach().double().requires_grad_() for value in leaves]
    truth = ops.depthwise_conv(exact[0], segments, WIDTHS, *exact[1:], impl="reference")
    wanted = torch.autograd.grad(((2 * out.detach().double()) * truth).sum(), exact)
    assert [out.dtype, *(grad.dtype for grad in grads)] == [dtype, dtype, kept, kept]
    for found, expected, stored in zip((out, *grads), (truth, *wanted), (dtype, dtype, kept, kept)):
        # What comes out is rounded to what it is stored in, and so is what goes in: the gradient of y, to x's dtype.
        eps = max(torch.finfo(kind).eps for kind in (stored, dtype, torch.float32 if dtype != torch.float64 else dtype))
        atol = 4 * eps * float(expected.detach().abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=atol)


def test_a_grid_equals_torchs_convolution() -> None:
    """Written out, independently of the reference: a kernel for two channels each, one bag of 4 x 5."""
    x, weight, bias = randn(20, 4), randn(2, 1, 3, 5, seed=1), randn(4, seed=2)
    found = ops.depthwise_conv(x, Segments.from_sizes((20,)), [5], weight, bias, impl="cpu")
    padded = F.pad(x.view(4, 5, 4), (0, 0, 2, 2, 1, 1))
    expected = torch.empty(4, 5, 4)
    for c in range(4):
        for i in range(4):
            for j in range(5):
                expected[i, j, c] = bias[c] + (weight[c // 2, 0] * padded[i : i + 3, j : j + 5, c]).sum()
    torch.testing.assert_close(found.view(4, 5, 4), expected)


@pytest.mark.parametrize(("sizes", "widths", "kernel"), [((9000, 40), [90, 0], (7, 7)), ((20000,), [1], (33, 1))])
def test_results_do_not_depend_on_the_number_of_threads(
    sizes: tuple[int, ...], widths: list[int], kernel: tuple[int, int]
) -> None:
    segments, threads, results = Segments.from_sizes(sizes), torch.get_num_threads(), []
    leaves = [randn(sum(sizes), 80), randn(80, 1, *kernel, seed=1), randn(80, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = ops.depthwise_conv(leaves[0], segments, widths, *leaves[1:], impl="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0]))


def test_rows_of_no_grid_stay_as_they_are() -> None:
    x, weight = randn(10, 3).requires_grad_(), randn(3, 1, 3, 3, seed=1).requires_grad_()
    out = ops.depthwise_conv(x, Segments.from_sizes((4, 6)), [0, 0], weight, impl="cpu")
    grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert torch.equal(out, x) and (grad_x == 1).all() and (grad_weight == 0).all()


def test_no_copy_of_rows_is_made() -> None:
    """Of rows in 16 bits, forward and backward: y, its gradient and that of x, and no float32 of any of them."""
    x, weight = randn(128 * 128, 128).bfloat16().requires_grad_(), randn(128, 1, 7, 7).requires_grad_()
    segments = Segments.from_sizes((128 * 128,))

    def step() -> None:
        out = ops.depthwise_conv(x, segments, [128], weight, impl="cpu")
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))

    step()
    assert 3 * x.nbytes <= peak_bytes(step) < 3 * x.nbytes + (1 << 20)


def test_only_what_is_needed_gets_gradients() -> None:
    segments, values = Segments.from_sizes((12,)), [randn(12, 2), randn(2, 1, 3, 3, seed=1), randn(2, seed=2)]
    every = [value.clone().requires_grad_() for value in values]
    ops.depthwise_conv(every[0], segments, [4], *every[1:], impl="cpu").square().sum().backward()
    for number in range(3):
        some = [value.clone().requires_grad_(i == number) for i, value in enumerate(values)]
        ops.depthwise_conv(some[0], segments, [4], *some[1:], impl="cpu").square().sum().backward()
        assert torch.equal(some[number].grad, every[number].grad)
        assert all(value.grad is None for i, value in enumerate(some) if i != number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": randn(11, 4)}, r"expected x \(T, C\)"),
        ({"weight": randn(4, 1, 2, 3)}, "odd kh and kw"),
        ({"weight": randn(4, 2, 3, 3)}, r"weight \(G, 1, kh, kw\)"),
        ({"weight": randn(3, 1, 3, 3)}, "3 kernels do not divide 4 channels"),
        ({"bias": randn(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"widths": [5]}, r"widths \[5\] do not divide bags of \(12,\) rows"),
        ({"widths": [4, 4]}, "expected 1 widths"),
        ({"widths": [-4]}, "not negative"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | list[int]], message: str) -> None:
    given = {"x": randn(12, 4), "widths": [4], "weight": randn(4, 1, 3, 3), "bias": randn(4)} | change
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv(segments=Segments.from_sizes((12,)), **given)
