"""attention_pool: what only it promises. The proof of the contract is in test_proof.py."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bigbag import Segments, ops
from bigbag.memory import peak_bytes
from bigbag.testing import check, run, samples

NAMED = {str(sample): sample for sample in samples("attention_pool")}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["several", "kept", "non-contiguous"])
def test_on_features_stored_narrower_than_the_weights(name: str, stored: torch.dtype, impl: str, device: str) -> None:
    check(NAMED[f"attention_pool, {name}"], impl, torch.float32, device, stored=stored)


def test_scores_that_saturate_give_an_exact_choice(impl: str, device: str) -> None:
    """One instance scores 1e4 above the rest: z is that instance, and its scores get no gradient through z."""
    x = torch.zeros(70, 3, device=device)
    x[41] = torch.tensor([1.0, 2.0, 3.0])
    w1, w2 = torch.eye(3, device=device), torch.full((1, 3), 1e4, device=device, requires_grad=True)
    z, scores = ops.attention_pool(x, Segments.from_sizes((70,), device), w1, None, w2, act="relu", impl=impl)
    assert torch.equal(z[0, 0], x[41]) and float(scores[41].detach()) == 6e4
    z.sum().backward()
    assert torch.equal(w2.grad, torch.zeros_like(w2))


@pytest.mark.parametrize("name", ["dropout", "several", "kept"])
def test_chunks_cut_through_bags(name: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows, the fewest."""
    monkeypatch.setattr(f"bigbag.kernels.{'gpu' if impl == 'triton' else impl}.attention_pool.CHUNK_BYTES", 1)
    sample = NAMED[f"attention_pool, {name}"]
    assert max(sample.sizes) > 140 and len(sample.sizes) > 1
    check(sample, impl, torch.float32, device)


@pytest.mark.parametrize("keep", [False, True])
def test_passes_opcheck_with_features_that_need_no_gradient(impl: str, device: str, keep: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 7, generator=generator).to(device)
    weight = torch.randn(10, 7, generator=generator).to(device).requires_grad_()
    bias = torch.randn(10, generator=generator).to(device).requires_grad_()
    w2 = torch.randn(2, 5, generator=generator).to(device).requires_grad_()
    offsets = Segments.from_sizes((9, 0, 14), device).offsets
    op = getattr(torch.ops.bigbag, f"attention_pool_{impl}").default
    factors = torch.rand(23, 2, generator=generator).to(device) if keep else None
    opcheck(op, (x, offsets, weight, bias, w2, factors, "tanh", True, keep))


def test_on_worker_threads_is_right_and_repeats_itself() -> None:
    from bigbag.kernels.cpu import attention_pool

    sample = NAMED["attention_pool, long bag"]
    exact = run(sample, sample.tensors(torch.float64), "reference")
    tensors = sample.tensors(torch.float32)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        first, second = run(sample, tensors, "cpu"), run(sample, tensors, "cpu")
        assert torch.get_num_threads() == threads
        pool = attention_pool._pool(os.getpid(), threads, 1)
        # An operation that asks for the number of threads must not change it.
        assert pool.submit(lambda: (torch.zeros(1 << 17).exp_(), torch.get_num_threads())[1]).result() == 1
        for name, value in exact.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
        with torch.inference_mode():
            scores = sample.call({name: t.detach() for name, t in tensors.items()}, "cpu")[1]
        assert torch.equal(scores.double(), first["output 1"])


@pytest.mark.slow
def test_compiles_to_one_graph_that_does_not_depend_on_the_cut() -> None:
    tensors = NAMED["attention_pool, three heads"].tensors(torch.float32)

    def step(offsets: Tensor, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        x, *weights = tensors
        segments = Segments(offsets, sizes)
        z, scores = ops.attention_pool(x, segments, *weights)
        a, mean = ops.segment_softmax(scores, segments), ops.segment_mean(scores, segments)
        return z.sum() + (a * mean.sum()).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    first = Segments.from_sizes((100, 287))
    for cut in (first, Segments.from_sizes((17, 370))):
        loss = compiled(cut.offsets, first.sizes, *tensors.values())
        expected = step(cut.offsets, cut.sizes, *tensors.values())
        torch.testing.assert_close(loss, expected)
        for found, wanted in zip(
            torch.autograd.grad(loss, list(tensors.values())), torch.autograd.grad(expected, list(tensors.values()))
        ):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("keep", [False, True])
def test_memory_is_what_it_promises(keep: bool) -> None:
    """64 MiB beyond inputs, outputs and weight gradients, whatever the number of instances."""
    rows, width, dim = 60_000, 64, 128
    x = torch.zeros(rows, width, dtype=torch.float16)
    w1, wg = (torch.zeros(dim, width, requires_grad=True) for _ in range(2))
    w2 = torch.zeros(1, dim, requires_grad=True)
    segments = Segments.from_sizes((40_000, 20_000))

    def step(impl: str = "cpu") -> None:
        z, scores = ops.attention_pool(x, segments, w1, None, w2, wg, None, keep_preactivations=keep, impl=impl)
        (z.sum() + scores.sum()).backward()

    kept = rows * 2 * dim * 4 if keep else 0
    assert kept < peak_bytes(step) < kept + (64 << 20)
    # The same operations in plain PyTorch hold several (T, D) activations: the measure sees them.
    assert peak_bytes(lambda: step("reference")) > rows * 4 * (3 * dim + width)


def test_dropout_scales_what_it_keeps_and_repeats_itself_by_its_seed(impl: str, device: str) -> None:
    """Scores are 0, so that the weights are equal, and x is 1 where its row is and 0 elsewhere: z shows the weights."""
    rows, x = 400, torch.eye(400, device=device)
    zeros = [torch.zeros(*shape, device=device) for shape in ((8, rows), (8,), (2, 8))]
    segments = Segments.from_sizes((300, 0, 100), device)

    def pooled(**options: Any) -> Tensor:
        return ops.attention_pool(x, segments, *zeros, impl=impl, **options)[0]

    whole, dropped = pooled(), pooled(dropout=0.25, seed=3)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, whole / 0.75, 0))
    share = kept[0, :, :300].double().mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 600) ** 0.5
    assert (kept[0, 0, :300] != kept[0, 1, :300]).any()
    assert torch.equal(dropped, pooled(dropout=0.25, seed=3))
    assert not torch.equal(dropped, pooled(dropout=0.25, seed=4))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        pooled(dropout=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_leaves_scores_in_float32(dtype: torch.dtype, any_impl: str, device: str) -> None:
    """Also of weights in float16, which autocast to bfloat16 doesn't concatenate on a CPU."""
    x, weight = torch.randn(9, 3, device=device), torch.randn(2, 3, device=device, dtype=dtype)
    w2 = torch.randn(1, 2, device=device, dtype=dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        z, scores = ops.attention_pool(x, Segments.from_sizes((9,), device), weight, None, w2, weight, impl=any_impl)
    expected = (torch.tanh(x @ weight.float().t()) * torch.sigmoid(x @ weight.float().t())) @ w2.float().t()
    assert z.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05)


def test_dropout_of_a_pack_without_instances(any_impl: str, device: str) -> None:
    x, weight = torch.zeros(0, 3, device=device), torch.ones(2, 3, device=device)
    w2 = torch.ones(1, 2, device=device)
    z, scores = ops.attention_pool(
        x, Segments.from_sizes((0, 0), device), weight, None, w2, dropout=0.25, impl=any_impl
    )
    assert torch.equal(z, z.new_zeros(2, 1, 3)) and scores.shape == (0, 1)
