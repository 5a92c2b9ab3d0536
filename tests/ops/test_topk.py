"""segment_topk, segment_logsumexp, segment_pool: the proof of the contract. Interpreted Triton: see test_nystrom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bigbag import Segments
from bigbag.ops.registry import INTERPRETED
from bigbag.ops.topk import segment_logsumexp, segment_pool, segment_topk
from bigbag.samples.topk import SAMPLES
from bigbag.testing import Sample, check, poisoned_empty, run

DEVICE = {"cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda", "reference": "cpu"}
NO_GPU = not (INTERPRETED or torch.cuda.is_available())
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(NO_GPU, reason="no CUDA device (test_nystrom interprets these kernels)"),
    ],
)
IMPLS = ["cpu", TRITON]
NAMED = {str(sample): sample for sample in SAMPLES}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_error_is_within_twice_that_of_the_reference(sample: Sample, impl: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if (
        INTERPRETED
    ):  # the interpreter's time is that of the operations: one dtype, the cheaper one where there are many bags
        dtypes = (torch.bfloat16,) if len(sample.sizes) > 5 else (torch.float32,)
    for dtype in dtypes if impl == "triton" else (torch.float64, *dtypes):
        check(sample, impl, dtype, DEVICE[impl])


@pytest.mark.parametrize("sample", [s for s in SAMPLES if 0 < sum(s.sizes) < 400 and "1e4" not in s.name], ids=str)
def test_reference_passes_gradcheck(sample: Sample) -> None:
    if "ties" in sample.name:
        pytest.skip("a selection among equals has no derivative")
    tensors = sample.tensors(torch.float64)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return sample.call(dict(zip(tensors, values)), "reference")

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_takes_the_rows_that_sorting_by_score_and_row_puts_first(
    impl: str, largest: bool, dtype: torch.dtype
) -> None:
    """Against Python's sort, with ties, negative numbers, both zeros, infinities and NaN; every row in its place."""
    choices = torch.tensor([-3.0, -1.5, -0.0, 0.0, 1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    sizes, k = (3, 0, 120, 40), 17
    generator = torch.Generator().manual_seed(0)
    scores = choices[torch.randint(0, len(choices), (sum(sizes), 2), generator=generator)].to(dtype)
    segments = Segments.from_sizes(sizes, DEVICE[impl])
    values, index, count = segment_topk(scores.to(DEVICE[impl]), segments, k, largest=largest, impl=impl)
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


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_gradient_of_topk_goes_to_the_rows_taken(impl: str) -> None:
    scores = torch.tensor([3.0, 9.0, 9.0, 1.0, 4.0, 5.0], device=DEVICE[impl], requires_grad=True)
    values, index, count = segment_topk(scores, Segments.from_sizes((4, 0, 2), DEVICE[impl]), 3, impl=impl)
    assert index.tolist() == [[1, 2, 0], [-1, -1, -1], [5, 4, -1]] and count.tolist() == [3, 0, 2]
    assert values.tolist() == [[9, 9, 3], [0, 0, 0], [5, 4, 0]]
    factor = torch.tensor([[1.0, 2.0, 3.0], [7.0, 7.0, 7.0], [4.0, 5.0, 7.0]], device=DEVICE[impl])
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


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_logsumexp_of_infinities(impl: str) -> None:
    inf = float("inf")
    x = torch.tensor([-inf, -inf, 1.0, -inf, inf, 2.0], device=DEVICE[impl])
    out = segment_logsumexp(x, Segments.from_sizes((2, 0, 2, 2), DEVICE[impl]), impl=impl)
    assert out.tolist() == [-inf, -inf, 1.0, inf]


@pytest.mark.parametrize("impl", IMPLS)
def test_pool_of_features_stored_narrower_than_the_weights(impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, 4, generator=generator).to(DEVICE[impl]).requires_grad_()
    x = torch.randn(50, 6, generator=generator).half().to(DEVICE[impl])
    segments = Segments.from_sizes((30, 20), DEVICE[impl])
    out = segment_pool(weights, x, segments, impl=impl)
    assert out.dtype == torch.float32
    expected = torch.stack([weights[s:e].T @ x[s:e].float() for s, e in ((0, 30), (30, 50))])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(z.square().sum(), weights)[0] for z in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_packed_equals_each_bag_alone(impl: str) -> None:
    sizes, device = (5, 40, 17), DEVICE[impl]
    x = torch.randn(62, 3, generator=torch.Generator().manual_seed(0)).to(device)
    segments = Segments.from_sizes(sizes, device)
    pooled, total = segment_pool(x.exp(), x, segments, impl=impl), segment_logsumexp(x, segments, impl=impl)
    index = segment_topk(x, segments, 6, impl=impl)[1]
    for bag, (start, end) in enumerate(zip(segments.starts, segments.starts[1:])):
        part, alone = x[start:end], Segments.from_sizes((end - start,), device)
        torch.testing.assert_close(
            pooled[bag], segment_pool(part.exp(), part, alone, impl=impl)[0], rtol=2e-6, atol=2e-6
        )
        torch.testing.assert_close(total[bag], segment_logsumexp(part, alone, impl=impl)[0], rtol=2e-6, atol=2e-6)
        single = segment_topk(part, alone, 6, impl=impl)[1][0]
        assert torch.equal(index[bag], torch.where(single < 0, -1, single + start))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["segment_topk", "segment_logsumexp", "segment_pool"])
def test_nothing_is_read_before_it_is_written_and_two_runs_agree(op: str, impl: str) -> None:
    with poisoned_empty():
        check(NAMED[f"{op}, empty bags"], impl, torch.float32, DEVICE[impl])
        check(NAMED[f"{op}, no bag has instances"], impl, torch.bfloat16, DEVICE[impl])
    sample = NAMED[f"{op}, off the block"]
    tensors = sample.tensors(torch.float32, DEVICE[impl])
    first, second = run(sample, tensors, impl), run(sample, tensors, impl)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_pass_opcheck(impl: str) -> None:
    x = torch.randn(23, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE[impl]).requires_grad_()
    weights = torch.randn(23, 4, device=DEVICE[impl]).requires_grad_()
    offsets = Segments.from_sizes((9, 0, 14), DEVICE[impl]).offsets
    opcheck(getattr(torch.ops.bigbag, f"segment_topk_{impl}").default, (x.detach(), offsets, 3, True))
    # An empty bag's -inf has no gradient that differences could check.
    opcheck(getattr(torch.ops.bigbag, f"segment_logsumexp_{impl}").default, (x, offsets[[0, 1, 3]]))
    opcheck(getattr(torch.ops.bigbag, f"segment_pool_{impl}").default, (weights, x, offsets))


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
