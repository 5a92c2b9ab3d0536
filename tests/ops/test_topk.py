"""segment_topk, segment_logsumexp, segment_pool: against Python. The proof of the contract is in test_proof.py."""

from __future__ import annotations

import pytest
import torch

from bigbag import Segments
from bigbag.ops.topk import segment_logsumexp, segment_pool, segment_topk
from bigbag.samples.topk import SAMPLES

NAMED = {str(sample): sample for sample in SAMPLES}


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_takes_the_rows_that_sorting_by_score_and_row_puts_first(
    any_impl: str, device: str, largest: bool, dtype: torch.dtype
) -> None:
    """Against Python's sort, with ties, negative numbers, both zeros, infinities and NaN; every row in its place."""
    choices = torch.tensor([-3.0, -1.5, -0.0, 0.0, 1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    sizes, k = (3, 0, 120, 40), 17
    generator = torch.Generator().manual_seed(0)
    scores = choices[torch.randint(0, len(choices), (sum(sizes), 2), generator=generator)].to(dtype)
    segments = Segments.from_sizes(sizes, device)
    values, index, count = segment_topk(scores.to(device), segments, k, largest=largest, impl=any_impl)
    assert count.tolist() == [3, 0, 17, 17] and index.shape == values.shape == (4, k, 2)

    def place(row: int, column: int) -> tuple[bool, float, int]:
        value = float(scores[row, column])
        is_nan = value != value
        number = 0.0 if is_nan else value
        return (not is_nan, -number, row) if largest else (is_nan, number, row)

    start = 0
    for bag, size in enumerate(sizes):
        for column in range(2):
            expected = sorted(range(start, start + size), key=lambda row: place(row, column))[:k]
            assert index[bag, :, column].tolist() == expected + [-1] * (k - len(expected))
            torch.testing.assert_close(
                values[bag, : len(expected), column].cpu(), scores[expected, column], equal_nan=True
            )
            assert values[bag, len(expected) :, column].eq(0).all()
        start += size


def test_gradient_of_topk_goes_to_the_rows_taken(any_impl: str, device: str) -> None:
    scores = torch.tensor([3.0, 9.0, 9.0, 1.0, 4.0, 5.0], device=device, requires_grad=True)
    values, index, count = segment_topk(scores, Segments.from_sizes((4, 0, 2), device), 3, impl=any_impl)
    assert index.tolist() == [[1, 2, 0], [-1, -1, -1], [5, 4, -1]] and count.tolist() == [3, 0, 2]
    assert values.tolist() == [[9, 9, 3], [0, 0, 0], [5, 4, 0]]
    factor = torch.tensor([[1.0, 2.0, 3.0], [7.0, 7.0, 7.0], [4.0, 5.0, 7.0]], device=device)
    (values * factor).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [3, 1, 2, 0, 5, 4]


def test_topk_of_many_columns_agrees_with_a_stable_sort() -> None:
    x = torch.randn(5000, 70, generator=torch.Generator().manual_seed(0))
    values, index, _ = segment_topk(x, Segments.from_sizes((5000,)), 300, impl="cpu")
    expected = x.sort(dim=0, descending=True, stable=True)
    assert torch.equal(values[0], expected.values[:300]) and torch.equal(index[0], expected.indices[:300])


def test_topk_in_the_worst_order() -> None:
    """Ascending scores: every row enters the heap."""
    x = torch.arange(20_000.0)
    _, index, _ = segment_topk(x, Segments.from_sizes((20_000,)), 5, impl="cpu")
    assert index.tolist() == [[19999, 19998, 19997, 19996, 19995]]


def test_logsumexp_of_infinities(any_impl: str, device: str) -> None:
    inf = float("inf")
    x = torch.tensor([-inf, -inf, 1.0, -inf, inf, 2.0], device=device)
    out = segment_logsumexp(x, Segments.from_sizes((2, 0, 2, 2), device), impl=any_impl)
    assert out.tolist() == [-inf, -inf, 1.0, inf]


def test_pool_of_features_stored_narrower_than_the_weights(impl: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, 4, generator=generator).to(device).requires_grad_()
    x = torch.randn(50, 6, generator=generator).half().to(device)
    segments = Segments.from_sizes((30, 20), device)
    out = segment_pool(weights, x, segments, impl=impl)
    assert out.dtype == torch.float32
    expected = torch.stack([weights[s:e].T @ x[s:e].float() for s, e in ((0, 30), (30, 50))])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(z.square().sum(), weights)[0] for z in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_errors_name_what_does_not_fit() -> None:
    x, segments = torch.randn(5, 2), Segments.from_sizes((5,))
    with pytest.raises(ValueError, match="k must be at least 1"):
        segment_topk(x, segments, 0)
    with pytest.raises(ValueError, match=r"segment_topk: expected floating \(T,\) or \(T, C\)"):
        segment_topk(x[:, :, None], segments, 1)
    with pytest.raises(ValueError, match="segment_pool: expected floating"):
        segment_pool(x[:4], x, segments)
    with pytest.raises(ValueError, match="segment_logsumexp: expected floating"):
        segment_logsumexp(x.long(), segments)


@pytest.mark.parametrize("largest", [True, False])
def test_long_bags_are_chosen_from_twice(
    largest: bool, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From splits of 32 rows, then from what those gave: the same rows, of equal scores the first, or fewer than k."""
    if impl == "triton":
        monkeypatch.setattr("bigbag.kernels.gpu.topk.SPLIT_ROWS", 32)
    sizes = (100, 0, 3, 32, 65)
    scores = torch.randint(0, 12, (200, 2), generator=torch.Generator().manual_seed(0)).float().to(device)
    segments = Segments.from_sizes(sizes, device)
    found = segment_topk(scores, segments, 7, largest=largest, impl=impl)
    for one, other in zip(found, segment_topk(scores, segments, 7, largest=largest, impl="reference")):
        assert torch.equal(one, other)
