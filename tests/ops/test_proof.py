"""Every operator x implementation x sample x dtype against the float64 reference, and the promises of the contract.

Under TRITON_INTERPRET=1 the Triton kernels run here too; ``tests/kernels/test_interpreter.py`` starts that run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from bigbag import Segments, ops, testing
from bigbag.ops import _OPERATORS
from bigbag.ops.registry import INTERPRETED, Operator
from bigbag.testing import Sample, check, poisoned_empty, run, samples

# The interpreter is slow, and to it float16 and bfloat16 are one path.
DTYPES = (torch.float32, torch.bfloat16)
DTYPES += () if INTERPRETED else (torch.float64, torch.float16)
DEVICE = {"cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda"}
IMPLS = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "triton",
        id="triton",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not (INTERPRETED or torch.cuda.is_available()),
                reason="no CUDA device here (tests/kernels/test_interpreter.py runs these kernels interpreted)",
            ),
        ],
    ),
]
ALL = [pytest.param(sample, id=str(sample)) for op in _OPERATORS for sample in samples(op.name)]
NAMED = {str(sample): sample for op in _OPERATORS for sample in samples(op.name)}
BY_NAME = {op.name: op for op in _OPERATORS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The samples are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def takes(sample: Sample, impl: str, dtype: torch.dtype) -> bool:
    if INTERPRETED and dtype != torch.float32 and sample.name not in ("several", "empty bags", "gated gelu, kept"):
        return False
    return dtype in BY_NAME[sample.op].dtypes[impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sample", ALL)
def test_error_is_within_twice_that_of_the_reference(sample: Sample, impl: str) -> None:
    for dtype in DTYPES:
        if takes(sample, impl, dtype):
            check(sample, impl, dtype, DEVICE[impl])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["several", "kept", "non-contiguous"])
def test_attention_pool_on_features_stored_narrower_than_the_weights(name: str, stored: torch.dtype, impl: str) -> None:
    check(NAMED[f"attention_pool, {name}"], impl, torch.float32, DEVICE[impl], stored=stored)


@pytest.mark.parametrize("sample", ALL)
def test_reference_passes_gradcheck(sample: Sample) -> None:
    if sum(sample.sizes) > 60 and sample.op == "attention_pool":
        pytest.skip("numerical differences cost T x P evaluations: the smaller samples cover it")
    if sum(sample.sizes) == 0 or "1e4" in sample.name or sum(sample.sizes) > 400:
        pytest.skip("no gradient, or none that differences resolve")
    tensors = sample.tensors(torch.float64)
    names = list(tensors)
    segments = Segments.from_sizes(sample.sizes)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return sample.call(dict(zip(names, values)), "reference")

    assert segments.num_instances == next(iter(tensors.values())).shape[0]
    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("op", [op.name for op in _OPERATORS])
def test_packed_equals_each_bag_alone(op: str, impl: str) -> None:
    sample = NAMED[f"{op}, several"]
    device = DEVICE.get(impl, "cpu")
    tensors = sample.tensors(torch.float32, device)
    first, *rest = [tensor.detach() for tensor in tensors.values()]
    together = sample.call({name: t.detach() for name, t in tensors.items()}, impl)
    starts = Segments.from_sizes(sample.sizes).starts
    for bag, (start, end) in enumerate(zip(starts, starts[1:])):
        names = list(tensors)
        alone = Sample(op, "alone", (end - start,), sample.make, sample.options)
        results = alone.call(dict(zip(names, [first[start:end], *rest])), impl)
        for whole, single in zip(together, results):
            part = whole[bag : bag + 1] if whole.shape[0] == len(sample.sizes) else whole[start:end]
            torch.testing.assert_close(part, single, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", _OPERATORS, ids=lambda op: op.name)
def test_two_runs_give_the_same_bits(op: Operator, impl: str) -> None:
    if not op.deterministic:
        pytest.skip("the operator does not promise it")
    sample = NAMED[f"{op.name}, off the block"]
    tensors = sample.tensors(torch.float32, DEVICE[impl])
    first, second = run(sample, tensors, impl), run(sample, tensors, impl)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_cpu_segments_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 16, generator=generator)
    segments = Segments.from_sizes((50_001, 9_999))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.cat([ops.segment_sum(x, segments), ops.segment_max(x, segments)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_attention_pool_on_worker_threads_is_right_and_repeats_itself() -> None:
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["several", "empty bags", "kept", "act gelu", "no bag has instances"])
def test_nothing_is_read_before_it_is_written(name: str, impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with poisoned_empty():
            check(NAMED[f"attention_pool, {name}"], impl, dtype, DEVICE[impl])
            for op in ("segment_softmax", "segment_sum", "segment_max"):
                check(NAMED[f"{op}, empty bags"], impl, dtype, DEVICE[impl])


def test_poison_is_seen() -> None:
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.int64)) == torch.iinfo(torch.int64).max).all()


def test_check_notices_an_implementation_that_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = NAMED["segment_sum, several"]
    from bigbag.ops import segments as module

    right = module._OPS["sum", "cpu"]
    monkeypatch.setitem(module._OPS, ("sum", "cpu"), lambda x, offsets: right(x, offsets) * (1 + 1e-4))
    with pytest.raises(AssertionError, match="output 0 errs"):
        check(sample, "cpu", torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_that_saturate_give_an_exact_choice(impl: str) -> None:
    """One instance scores 1e4 above the rest: z is that instance, and its scores get no gradient through z."""
    x = torch.zeros(70, 3, device=DEVICE[impl])
    x[41] = torch.tensor([1.0, 2.0, 3.0])
    w1, w2 = torch.eye(3, device=DEVICE[impl]), torch.full((1, 3), 1e4, device=DEVICE[impl], requires_grad=True)
    z, scores = ops.attention_pool(x, Segments.from_sizes((70,), DEVICE[impl]), w1, None, w2, act="relu", impl=impl)
    assert torch.equal(z[0, 0], x[41]) and float(scores[41].detach()) == 6e4
    z.sum().backward()
    assert torch.equal(w2.grad, torch.zeros_like(w2))


@pytest.mark.parametrize("impl", IMPLS)
def test_maximum_takes_the_first_of_equals_and_keeps_nan(impl: str) -> None:
    x = torch.tensor([[1.0], [7.0], [7.0], [float("nan")], [2.0]], device=DEVICE[impl], requires_grad=True)
    segments = Segments.from_sizes((3, 0, 2), DEVICE[impl])
    out = ops.segment_max(x, segments, impl=impl)
    assert out[0, 0] == 7 and out[1, 0] == 0 and out[2, 0].isnan()
    out[:2].sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("need_x", [False, True])
def test_attention_pool_passes_opcheck(impl: str, keep: bool, need_x: bool) -> None:
    device = DEVICE[impl]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 7, generator=generator).to(device).requires_grad_(need_x)
    weight = torch.randn(10, 7, generator=generator).to(device).requires_grad_()
    bias = torch.randn(10, generator=generator).to(device).requires_grad_()
    w2 = torch.randn(2, 5, generator=generator).to(device).requires_grad_()
    offsets = Segments.from_sizes((9, 0, 14), device).offsets
    op = getattr(torch.ops.bigbag, f"attention_pool_{impl}").default
    opcheck(op, (x, offsets, weight, bias, w2, "tanh", True, keep))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["sum_rows", "max_rows", "softmax"])
def test_segments_pass_opcheck(impl: str, name: str) -> None:
    x = torch.randn(23, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE[impl]).requires_grad_()
    offsets = Segments.from_sizes((9, 0, 14), DEVICE[impl]).offsets
    opcheck(getattr(torch.ops.bigbag, f"segment_{name}_{impl}").default, (x, offsets))


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


class _Peak:
    """Most bytes of tensors that were alive at once on the CPU, counted by the profiler's allocation records."""

    def __enter__(self) -> _Peak:
        gc.collect()
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, record_shapes=False
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        live = peak = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        self.bytes = peak


@pytest.mark.parametrize("keep", [False, True])
def test_memory_of_attention_pool_is_what_it_promises(keep: bool) -> None:
    """64 MiB beyond inputs, outputs and weight gradients, whatever the number of instances."""
    rows, width, dim = 60_000, 64, 128
    x = torch.zeros(rows, width, dtype=torch.float16)
    w1, wg = (torch.zeros(dim, width, requires_grad=True) for _ in range(2))
    w2 = torch.zeros(1, dim, requires_grad=True)
    segments = Segments.from_sizes((40_000, 20_000))

    def step() -> None:
        z, scores = ops.attention_pool(x, segments, w1, None, w2, wg, None, keep_preactivations=keep, impl="cpu")
        (z.sum() + scores.sum()).backward()

    step()
    with _Peak() as peak:
        step()
    kept = rows * 2 * dim * 4 if keep else 0
    assert kept < peak.bytes < kept + (64 << 20)
    # The same operations in plain PyTorch hold several (T, D) activations: the measure sees them.
    with _Peak() as eager:
        z, scores = ops.attention_pool(x, segments, w1, None, w2, wg, None, impl="reference")
        (z.sum() + scores.sum()).backward()
    assert eager.bytes > rows * 4 * (3 * dim + width)


def test_every_operator_has_samples_and_names_its_function() -> None:
    with pytest.raises(ValueError, match="no samples"):
        samples("nothing")
    for op in _OPERATORS:
        assert samples(op.name) and getattr(ops, op.name) is op.function
    assert testing.__doc__
