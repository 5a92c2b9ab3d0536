"""The choice of implementation: strict on request, announced when free."""

from __future__ import annotations

import logging

import pytest
import torch

from bigbag import Segments, ops
from bigbag.ops import registry

X = torch.tensor([[1.0, 5.0], [3.0, -1.0], [2.0, 2.0]])
SEGMENTS = Segments.from_sizes((2, 1))


def test_sums_by_hand() -> None:
    for impl in ("reference", "cpu"):
        assert ops.segment_sum(X, SEGMENTS, impl=impl).tolist() == [[4, 4], [2, 2]]
        assert ops.segment_mean(X, SEGMENTS, impl=impl).tolist() == [[2, 2], [2, 2]]
        assert ops.segment_max(X, SEGMENTS, impl=impl).tolist() == [[3, 5], [2, 2]]
        assert ops.segment_softmax(torch.tensor([0.0, 0.0, 7.0]), SEGMENTS, impl=impl).tolist() == [0.5, 0.5, 1]


def test_attention_pool_by_hand() -> None:
    """Identity projection, relu: scores are x . w2, here 1 and 3 in the first bag."""
    for impl in ("reference", "cpu"):
        w2 = torch.tensor([[1.0, 0.0]])
        z, scores = ops.attention_pool(X, SEGMENTS, torch.eye(2), None, w2, act="relu", impl=impl)
        assert scores[:, 0].tolist() == [1, 3, 2]
        weight = 1 / (1 + torch.e**-2)
        torch.testing.assert_close(z[0, 0], (1 - weight) * X[0] + weight * X[1])
        assert torch.equal(z[1, 0], X[2])


@pytest.mark.skipif(torch.cuda.is_available() or registry.INTERPRETED, reason="Triton can run here")
def test_an_explicit_request_that_can_not_run_raises_and_says_why() -> None:
    with pytest.raises(ValueError, match=r"segment_sum: implementation 'triton' can't run: it needs a CUDA device"):
        ops.segment_sum(X, SEGMENTS, impl="triton")
    with pytest.raises(ValueError, match="no such implementation; there are triton, cpu, reference"):
        ops.segment_sum(X, SEGMENTS, impl="fast")


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {"triton": (torch.float32,), "cpu": (torch.float32,)}
    assert registry.why_not(dtypes, "cpu", "cpu", torch.float32) is None
    assert "needs tensors on the CPU" in str(registry.why_not(dtypes, "cpu", "cuda", torch.float32))
    assert "takes float32, got float64" in str(registry.why_not(dtypes, "triton", "cuda", torch.float64))
    monkeypatch.setattr(registry, "_HAS_NUMBA", False)
    assert registry.why_not(dtypes, "cpu", "cpu", torch.float32) == "numba is not installed"
    with pytest.raises(ValueError, match="no implementation can run: cpu: numba is not installed"):
        registry.choose("segment_sum", {"cpu": (torch.float32,)}, None, "cpu", torch.float32)


def test_a_choice_is_announced_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    with caplog.at_level(logging.INFO, logger="bigbag.ops"):
        ops.segment_sum(X, SEGMENTS)
        ops.segment_sum(X, SEGMENTS)
    lines = [record.getMessage() for record in caplog.records if record.name == "bigbag.ops"]
    assert lines == ["segment_sum on cpu with float32: cpu"]


def test_use_impl_holds_for_a_block_or_for_the_run() -> None:
    with ops.use_impl({"segment_sum": "reference"}):
        assert "requested by use_impl" in ops.explain("cpu")
        with pytest.raises(ValueError, match="no such implementation"), ops.use_impl({"segment_sum": "nothing"}):
            ops.segment_sum(X, SEGMENTS)
    assert "requested" not in ops.explain("cpu")
    setting = ops.use_impl({"segment_max": "reference"})
    assert "requested by use_impl" in ops.explain("cpu")
    setting.__exit__()
    assert "requested" not in ops.explain("cpu")


def test_fused_kernels_of_others_need_cuda_and_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {"varlen": registry.HALF, "xformers": (*registry.HALF, torch.float32), "triton": registry.HALF}
    assert registry.why_not(dtypes, "varlen", "cpu", torch.bfloat16) == "it needs a CUDA device, got cpu"
    missing = {"varlen": None, "xformers": "xformers is not installed"}
    monkeypatch.setattr(registry.fused_attention, "unavailable", missing.get)
    assert registry.why_not(dtypes, "varlen", "cuda", torch.bfloat16) is None
    assert registry.why_not(dtypes, "varlen", "cuda", torch.float32) == "it takes float16, bfloat16, got float32"
    assert registry.why_not(dtypes, "xformers", "cuda", torch.float32) == "xformers is not installed"


def test_what_a_gpu_would_run_is_known_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"varlen": None, "xformers": "xformers is not installed"}
    monkeypatch.setattr(registry.fused_attention, "unavailable", missing.get)
    monkeypatch.setattr(registry, "_HAS_TRITON", True)
    assert set(ops.chosen("cuda").values()) == {"triton"}
    half = ops.chosen("cuda", torch.bfloat16)
    assert half["masked_attention"] == "varlen" and set(half.values()) == {"varlen", "triton"}
    (line,) = [line for line in ops.explain("cuda", torch.bfloat16).splitlines() if "varlen  " in line]
    assert line.endswith("yes     first that can run (not with a bias, dropout, or head dimensions over 256)")


def test_a_request_for_an_operator_made_of_another_is_strict() -> None:
    q, k = torch.ones(2, 1, 2), torch.ones(3, 1, 2)
    with (
        pytest.raises(ValueError, match="class_token_attention: .*'nothing'"),
        ops.use_impl({"class_token_attention": "nothing"}),
    ):
        ops.class_token_attention(q, k, SEGMENTS)


def test_explain_names_every_operator_and_one_choice_for_each() -> None:
    lines = [line.split() for line in ops.explain("cpu").splitlines()[1:]]
    chosen = [line[0] for line in lines if line[2] == "yes"]
    assert chosen == [op.name for op in ops._OPERATORS]
    assert {line[1] for line in lines if line[2] == "yes"} == {"cpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": torch.zeros(1, 3)}, r"w2 has shape \(1, 3\), expected \(1, 2\)"),
        ({"w1": torch.zeros(2, 3)}, r"w1 has shape \(2, 3\), expected \(2, 2\)"),
        ({"b1": torch.zeros(5)}, r"b1 has shape \(5,\), expected \(2,\)"),
        ({"bg": torch.zeros(2)}, "bg without wg"),
        ({"act": "elu"}, "act must be one of tanh, relu, gelu, got 'elu'"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, "x must be"),
        ({"segments": Segments.from_sizes((2,))}, "x has 3 rows, but segments has 2 instances"),
        ({"w2": torch.zeros(1, 2, dtype=torch.int64)}, "w2 must be floating"),
    ],
)
def test_attention_pool_says_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {"x": X, "segments": SEGMENTS, "w1": torch.eye(2), "b1": None, "w2": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=message):
        ops.attention_pool(**(arguments | change))


def test_segment_operators_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"segment_max: expected floating \(T, ...\) with T = 3"):
        ops.segment_max(torch.zeros(4), SEGMENTS)


def test_autocast_sets_the_dtype_of_the_computation_except_for_float64() -> None:
    w1, w2 = torch.eye(2), torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, scores = ops.attention_pool(X, SEGMENTS, w1, None, w2)
        assert z.dtype == torch.bfloat16 and scores.dtype == torch.float32
        z, scores = ops.attention_pool(X.double(), SEGMENTS, w1.double(), None, w2.double())
        assert z.dtype == torch.float64 and scores.dtype == torch.float64
    assert ops.attention_pool(X.half(), SEGMENTS, w1, None, w2)[0].dtype == torch.float32
