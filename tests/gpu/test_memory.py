"""Peak memory on the device, forward and backward, against what each operator promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bigbag import Segments, ops
from bigbag.memory import peak_bytes
from tests.gpu.device import DEVICE, IMPL
from tests.ops.test_graphs_memory import LINEAR, normalised_lattice

BIG = DEVICE == "cuda"


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()


def peak(function: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Beyond the leaves, with the output and the gradients."""

    def step() -> None:
        out = function()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return peak_bytes(step, DEVICE)


@pytest.mark.parametrize("keep", [False, True])
def test_attention_pool(keep: bool) -> None:
    """Chunks, two floats for each instance and head on its way, and what is kept: no (T, D) of its own."""
    rows, width, dim = (400_000, 1024, 128) if BIG else (60_000, 64, 128)
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    w1, wg, w2 = leaf(dim, width), leaf(dim, width), leaf(1, dim)
    segments = Segments.from_sizes((rows - 1000, 1000), DEVICE)

    def pooled() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return ops.attention_pool(x, segments, w1, None, w2, wg, None, keep_preactivations=keep, impl=IMPL)[0]

    kept = rows * 2 * dim * 2 if keep else 0
    chunk = 65536 * (2 * dim + width) * 2
    assert kept < peak(pooled, [w1, wg, w2]) < kept + chunk + 16 * 4 * rows + (64 << 20)


@pytest.mark.parametrize("name", LINEAR)
def test_graph_operators_stay_within_three_times_inputs_and_outputs(name: str) -> None:
    nodes = 40_000 if BIG else 3000
    adj, x, scalar = normalised_lattice(nodes).to(DEVICE), leaf(nodes, 256), torch.tensor(0.5, device=DEVICE)
    scalar.requires_grad_()
    with ops.use_impl(dict.fromkeys(("spmm", "smooth", "smooth_exact", "chebyshev"), IMPL)):
        found = peak(lambda: LINEAR[name](adj, x, scalar), [x, scalar] if "alpha" in name else [x])
    own = sum(t.nbytes for t in (x, adj.crow, adj.col, adj.weight))
    outputs = x.nbytes * (3 if name == "chebyshev" else 1)
    assert found + own <= 3 * (own + outputs)


@pytest.mark.parametrize("name", ["masked", "nystrom", "class token"])
def test_attention_holds_no_matrix(name: str) -> None:
    """A few tensors like q, and no matrix of rows by rows or by landmarks."""
    rows, heads, dim = (16_384, 8, 64) if BIG else (4096, 2, 16)
    q, k, v = (leaf(rows, heads, dim, dtype=torch.bfloat16) for _ in range(3))
    segments = Segments.from_sizes((rows,), DEVICE)
    functions: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "masked": (lambda: ops.masked_attention(q, k, v, segments, impl=IMPL), [q, k, v]),
        "nystrom": (lambda: ops.nystrom_attention(q, k, v, segments, num_landmarks=256, impl=IMPL), [q, k, v]),
        "class token": (lambda: ops.class_token_attention(q[:1], k, segments, impl=IMPL), [q, k]),
    }
    function, leaves = functions[name]
    # The square roots of the landmarks' matrices (heads x 256 x 256 float32, a dozen of them) do not grow with rows.
    landmarks = 24 * heads * 256 * 256 * 4 if name == "nystrom" else 0
    assert peak(function, leaves) < 12 * q.nbytes + landmarks + (16 << 20)


def test_draws_are_not_kept() -> None:
    rows, draws = (200_000, 1000) if BIG else (20_000, 1000)
    mu, log_var, values = leaf(rows), leaf(rows), leaf(rows, 1)
    segments = Segments.from_sizes((rows,), DEVICE)
    found = peak(lambda: ops.sampled_attention(mu, log_var, values, segments, draws, 0, impl=IMPL), [mu, log_var])
    assert found < rows * draws * 4 / 8


def test_levels_are_not_kept() -> None:
    rows = 200_000 if BIG else 20_000
    mu, log_var = leaf(rows), leaf(rows)
    segments = Segments.from_sizes((rows,), DEVICE)
    # About 240 levels for each: what is kept is levels for each block of 16 rows.
    found = peak(lambda: ops.expected_attention(mu, log_var, segments, impl=IMPL), [mu, log_var])
    assert found < 4 * rows * 240 / 4
