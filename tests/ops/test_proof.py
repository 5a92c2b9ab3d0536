"""Every operator x implementation x sample x dtype against the float64 reference, and the promises of the contract.

What only one operator promises is in a file of its own. Under TRITON_INTERPRET=1 the Triton kernels run here too;
``tests/kernels/test_interpreter.py`` starts that run. BIGBAG_TEST_SEED=1 and so on draw other numbers.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

from bigbag import ops
from bigbag.ops import _OPERATORS
from bigbag.ops.registry import INTERPRETED, Operator
from bigbag.testing import Sample, check, fixed_random, poisoned_empty, run, samples

# The interpreter is slow, and to it float16 and bfloat16 are one path.
DTYPES = (torch.float32, torch.bfloat16)
DTYPES += () if INTERPRETED else (torch.float64, torch.float16)
SEED = int(os.environ.get("BIGBAG_TEST_SEED", "0"))
SAMPLES = [replace(sample, seed=SEED) for op in _OPERATORS for sample in samples(op.name)]
# Where values are of order 1, so that differences resolve gradients and sums keep their digits.
SMALL = [s for s in SAMPLES if 0 < sum(s.sizes) < 400 and "1e4" not in s.name]
NAMED = {str(sample): sample for sample in SAMPLES}
BY_NAME = {op.name: op for op in _OPERATORS}
EACH = [pytest.param(op, id=op.name) for op in _OPERATORS]


def takes(sample: Sample, impl: str, dtype: torch.dtype) -> bool:
    if INTERPRETED and dtype != torch.float32:
        # One sample of each operator; and the interpreter truncates to bfloat16 where hardware rounds: long recursions
        # show it.
        return sample.name == "empty bags" and sample.op not in ("chebyshev", "smooth_exact")
    return dtype in BY_NAME[sample.op].dtypes[impl]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_error_is_within_twice_that_of_the_reference(sample: Sample, impl: str, device: str) -> None:
    """And nothing is read before it is written: what ``torch.empty`` gives is NaN."""
    for dtype in DTYPES:
        if takes(sample, impl, dtype):
            with poisoned_empty():
                check(sample, impl, dtype, device)


@pytest.mark.parametrize("sample", [s for s in SMALL if "ties" not in s.name], ids=str)
def test_reference_passes_gradcheck(sample: Sample) -> None:
    tensors = sample.tensors(torch.float64)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return sample.call(dict(zip(tensors, values)), "reference")

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("op", EACH)
def test_packed_equals_each_bag_alone(op: Operator, any_impl: str, device: str) -> None:
    """Outputs and gradients; what the bags share gets the sum of what each bag gives."""
    wide = torch.float64 in op.dtypes[any_impl]
    dtype, tolerance = (torch.float64, 1e-11) if wide else (torch.float32, 1e-5)
    # Dropout is a function of the row in the pack.
    found = [s for s in SMALL if s.op == op.name and "dropout" not in s.options]
    for sample in [NAMED[f"{op.name}, several"]] if INTERPRETED else found:
        tensors = sample.tensors(dtype, device)
        weights = fixed_random(sample.call(tensors, any_impl))
        apart = []
        for bag in range(len(sample.sizes)):
            parts = {name: sample.part(name, t.detach(), bag).requires_grad_() for name, t in tensors.items()}
            own_weights = [sample.part(f"output {i}", weight, bag) for i, weight in enumerate(weights)]
            apart.append(run(sample.alone(bag), parts, any_impl, own_weights))
        for name, together in run(sample, tensors, any_impl, weights).items():
            of_bags = [results[name] for results in apart]
            joined = torch.cat(of_bags) if name.removeprefix("gradient of ") in sample.cut else sum(of_bags)
            close = {"rtol": 0.0, "atol": tolerance * float(together.abs().max()) if together.numel() else 0.0}
            torch.testing.assert_close(joined, together, **close, msg=lambda m, n=name, s=sample: f"{s}, {n}: {m}")


def _by_columns(x: Tensor) -> Tensor:
    """The same values, the first dimension contiguous: what a transposed tensor is."""
    return x.detach().transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("op", EACH)
def test_rows_or_columns_in_memory_give_the_same(op: Operator, impl: str, device: str) -> None:
    """Of tensors, and of the gradients that come in."""
    sample = NAMED[f"{op.name}, several"]
    tensors = sample.tensors(torch.float32, device)
    columns = {name: _by_columns(t).requires_grad_() for name, t in tensors.items()}
    results = []
    for given, layout in ((tensors, torch.Tensor.contiguous), (columns, _by_columns)):
        outputs = [out for out in sample.call(given, impl) if out.requires_grad]
        weights = [layout(w.to(out.dtype)) for out, w in zip(outputs, fixed_random(outputs))]
        results.append([*outputs, *torch.autograd.grad(outputs, list(given.values()), weights)])
    for by_rows, by_columns in zip(*results):
        atol = 1e-5 * float(by_rows.detach().abs().max())
        torch.testing.assert_close(by_columns, by_rows, rtol=0.0, atol=atol)


@pytest.mark.parametrize("op", EACH)
def test_two_runs_give_the_same_bits(op: Operator, impl: str, device: str) -> None:
    if not op.deterministic:
        pytest.skip("the operator does not promise it")
    sample = NAMED[f"{op.name}, {'empty bags' if INTERPRETED else 'off the block'}"]
    tensors = sample.tensors(torch.float32, device)
    first, second = run(sample, tensors, impl), run(sample, tensors, impl)
    for name in first:
        assert torch.equal(first[name], second[name]), name


class _Calls(TorchFunctionMode):
    """The calls of custom operators of bigbag within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, ...]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "bigbag":
            self.found.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def _kind(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides how a custom operator is traced: which arguments are missing, and the settings."""
    return tuple(a if a is None or isinstance(a, bool | str) else "" for a in args)


@pytest.mark.parametrize("op", EACH)
def test_custom_operators_pass_opcheck(op: Operator, impl: str, device: str) -> None:
    """As the operator calls them: schema, fake tensors, autograd, and tracing through AOTAutograd."""
    checked = set()
    for sample in sorted(samples(op.name), key=lambda sample: sum(sample.sizes)):
        if not 0 < sum(sample.sizes) < 400:
            continue
        with _Calls() as calls:
            sample.call(sample.tensors(torch.float32, device), impl)
        for func, args in calls.found.items():
            # Interpreted, one call of each.
            kind = (func, () if INTERPRETED else _kind(args))
            if kind not in checked:
                checked.add(kind)
                leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
                opcheck(func, tuple(leaves))
        if checked and INTERPRETED:
            return
    assert checked


def compiled_and_not(op: Operator, impl: str, device: str, backend: str) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients, each compiled to one graph and as they are."""
    sample = NAMED[f"{op.name}, several"]
    tensors, structure = sample.tensors(torch.float32, device), sample.structure(device)
    names = list(tensors)

    def step(*values: Tensor) -> Any:
        return sample.apply(dict(zip(names, values)), structure, impl)

    def results(step: Any) -> list[Tensor]:
        out = step(*tensors.values())
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]
        loss = sum((o * w).sum() for o, w in zip(out, fixed_random(out)))
        return [*out, *torch.autograd.grad(loss, list(tensors.values()))]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    return list(zip(results(compiled), results(step), strict=True))


@pytest.mark.parametrize("op", EACH)
def test_compiles_to_one_graph(op: Operator) -> None:
    for found, expected in compiled_and_not(op, "cpu", "cpu", "aot_eager"):
        torch.testing.assert_close(found, expected)


def test_poison_is_seen() -> None:
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.int64)) == torch.iinfo(torch.int64).max).all()


def _by_1e5th(kernel: Any) -> Any:
    return lambda *args: kernel(*args) * (1 + 1e-5)


def _by_a_hundredth(kernel: Any) -> Any:
    return lambda *args: kernel(*args) * 1.01


def _without_an_edge(kernel: Any) -> Any:
    def errs(crow: Tensor, col: Tensor, weight: Tensor, *args: Any) -> Tensor:
        kept = torch.arange(len(weight)) != 100
        return kernel(crow, col, weight * kept[:, None], *args)

    return errs


def _lse_in_bfloat16(kernel: Any) -> Any:
    def errs(*args: Any) -> Any:
        out, lse = kernel(*args)
        return out, lse.bfloat16().float()

    return errs


@pytest.mark.parametrize(
    ("sample", "kernel", "defect", "dtype", "where"),
    [
        ("segment_sum, several", "segments.sum_rows", _by_1e5th, torch.float32, "output 0"),
        # Its largest sums overflow, the others must not hide behind them.
        ("segment_sum, values at 1e4", "segments.sum_rows", _by_a_hundredth, torch.float16, "output 0"),
        ("spmm, off the block", "spmm.spmm", _without_an_edge, torch.float32, "output 0"),
        (
            "masked_attention, several",
            "masked_attention._attend_fast",
            _lse_in_bfloat16,
            torch.float32,
            "gradient of q",
        ),
    ],
)
def test_check_notices_a_kernel_that_errs(
    sample: str, kernel: str, defect: Any, dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"bigbag.kernels.cpu.{kernel}"
    monkeypatch.setattr(target, defect(pkgutil.resolve_name(target)))
    with pytest.raises(AssertionError, match=f"{where} errs"):
        check(NAMED[sample], "cpu", dtype)


def test_a_draw_on_which_the_reference_hardly_errs_is_not_all_that_counts() -> None:
    """Of gradients that are a single number."""
    for name in ("attention_scores, one unit, not gated", "smooth, bags of one", "smooth, wide lattice"):
        for seed in range(9):
            for dtype in (torch.float32, torch.float64):
                check(replace(NAMED[name], seed=seed), "cpu", dtype)


def test_every_operator_has_samples_and_names_its_function() -> None:
    with pytest.raises(ValueError, match="no samples"):
        samples("nothing")
    for op in _OPERATORS:
        assert samples(op.name) and getattr(ops, op.name) is op.function
    functions = {name: f for name in ops.__all__ if inspect.isfunction(f := getattr(ops, name))}
    taking = {name for name, function in functions.items() if "impl" in inspect.signature(function).parameters}
    made_of_others = {"degrees", "lambda_max", "smooth_exact_directed", "chebyshev_conv"}
    made_of_others |= {"landmark_means", "nystrom_class_token_attention", "nystrom_token_attention"}
    assert taking - made_of_others == {op.name for op in _OPERATORS}
