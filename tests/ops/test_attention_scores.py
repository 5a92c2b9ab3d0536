"""attention_scores: what only it promises. The proof of the contract is in test_proof.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bigbag import Segments, ops
from bigbag.memory import peak_bytes
from bigbag.ops.registry import INTERPRETED
from bigbag.testing import check, samples

# Triton's interpreter truncates to bfloat16 where hardware rounds.
NARROW = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
NAMED = {str(sample): sample for sample in samples("attention_scores")}


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("name", ["several", "act gelu", "no bias", "non-contiguous"])
def test_on_rows_stored_narrower_than_the_weights(name: str, stored: torch.dtype, impl: str, device: str) -> None:
    check(NAMED[f"attention_scores, {name}"], impl, torch.float32, device, stored=stored)


def test_by_hand(any_impl: str, device: str) -> None:
    h, bias = torch.tensor([[1.0, -3.0], [2.0, 5.0]], device=device), torch.tensor([0.0, 1.0], device=device)
    w2 = torch.tensor([[1.0, 10.0], [0.0, -1.0]], device=device)
    assert ops.attention_scores(h, bias, w2, act="relu", impl=any_impl).tolist() == [[1, 0], [62, -6]]
    assert ops.attention_scores(h, None, w2, act="relu", impl=any_impl).tolist() == [[1, 0], [52, -5]]
    # The right half is the gate: sigmoid(-3 + 3) and sigmoid(5 + 3).
    gate = torch.tensor([0.0, 3.0], device=device)
    found = ops.attention_scores(h, gate, w2[:1, :1], act="relu", gated=True, impl=any_impl)
    torch.testing.assert_close(found.cpu(), torch.tensor([[0.5], [2 / (1 + torch.e**-8)]]))


def test_is_what_attention_pool_calls_scores(impl: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w1, wg, w2 = (torch.randn(*s, generator=generator).to(device) for s in ((50, 7), (6, 7), (6, 7), (3, 6)))
    b1, bg = (torch.randn(6, generator=generator).to(device) for _ in range(2))
    _, expected = ops.attention_pool(x, Segments.from_sizes((20, 30), device), w1, b1, w2, wg, bg, impl=impl)
    h, bias = x @ torch.cat([w1, wg]).t(), torch.cat([b1, bg])
    torch.testing.assert_close(ops.attention_scores(h, bias, w2, gated=True, impl=impl), expected, rtol=1e-4, atol=1e-4)


def test_the_slope_of_gelu_far_from_0(any_impl: str, device: str) -> None:
    h = torch.tensor([[50.0], [-50.0], [1e34], [-1e34], [3e38], [-3e38]], device=device, requires_grad=True)
    scores = ops.attention_scores(h, None, torch.ones(1, 1, device=device), act="gelu", impl=any_impl)
    (slope,) = torch.autograd.grad(scores.sum(), h)
    torch.testing.assert_close(slope[:, 0].cpu(), torch.tensor([1.0, 0, 1, 0, 1, 0]), rtol=0, atol=1e-6)


def test_autocast_changes_nothing(any_impl: str, device: str) -> None:
    sample = NAMED["attention_scores, several"]
    tensors = sample.tensors(torch.float32, device)

    def results(autocast: bool) -> list[Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            (scores,) = sample.call(tensors, any_impl)
        return [scores, *torch.autograd.grad(scores.sum(), list(tensors.values()))]

    assert all(torch.equal(a, b) for a, b in zip(results(True), results(False), strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    # Enough numbers that work is dealt to threads, and pieces that are not a multiple of their number.
    h = torch.randn(11_000, 30, generator=generator, requires_grad=True)
    bias, w2 = (torch.randn(*s, generator=generator).requires_grad_() for s in ((30,), (2, 30)))
    incoming = torch.randn(11_000, 2, generator=generator)

    def step(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        scores = ops.attention_scores(h, bias, w2, act="gelu", impl="cpu")
        return [scores, *torch.autograd.grad(scores, [h, bias, w2], incoming)]

    alone = step(1)
    for other in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, step(other), strict=True))


def test_holds_nothing_but_the_gradient_of_its_rows() -> None:
    rows, dim = 50_000, 128
    h = torch.zeros(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    bias, w2 = torch.zeros(dim, requires_grad=True), torch.zeros(1, dim, requires_grad=True)

    def step(impl: str = "cpu") -> None:
        ops.attention_scores(h, bias, w2, impl=impl).sum().backward()
        h.grad = bias.grad = w2.grad = None

    assert rows * dim * 2 < peak_bytes(step) < rows * dim * 2 + (4 << 20)
    # The same operations in plain PyTorch hold several (T, D) activations in float32: the measure sees them.
    assert peak_bytes(lambda: step("reference")) > 2 * rows * dim * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3, 5)}, r"expected h \(T, D\) and w2 \(H, D\), got \(3, 5\) and \(1, 4\)"),
        ({"gated": True}, r"expected h \(T, 2D\)"),
        ({"w2": torch.zeros(4)}, r"got \(3, 4\) and \(4,\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(4,\)"),
        ({"act": "elu"}, "act must be one of tanh, relu, gelu, got 'elu'"),
        ({"h": torch.zeros(3, 4, dtype=torch.int64)}, "h must be floating on cpu, got torch.int64"),
        ({"w2": torch.zeros(1, 4, device="meta")}, "w2 must be floating on cpu, got torch.float32 on meta"),
        ({"impl": "triton", "w2": torch.zeros(1, 4, dtype=torch.float64)}, "'triton' can't run"),
    ],
)
def test_says_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {"h": torch.zeros(3, 4), "bias": None, "w2": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=message):
        ops.attention_scores(**(arguments | change))


def test_one_argument_in_float64_makes_all_of_it_so() -> None:
    h = torch.full((1, 1), 2.0)
    scores = ops.attention_scores(h, None, torch.ones(1, 1, dtype=torch.float64))
    assert scores.dtype == torch.float64 and float(scores) == float(torch.tanh(h.double()))
