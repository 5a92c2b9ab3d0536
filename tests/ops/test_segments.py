"""Segment operators: what only they promise. The proof of the contract is in test_proof.py."""

from __future__ import annotations

import torch

from bigbag import Segments, ops


def test_maximum_takes_the_first_of_equals_and_keeps_nan(impl: str, device: str) -> None:
    x = torch.tensor([[1.0], [7.0], [7.0], [float("nan")], [2.0]], device=device, requires_grad=True)
    segments = Segments.from_sizes((3, 0, 2), device)
    out = ops.segment_max(x, segments, impl=impl)
    assert out[0, 0] == 7 and out[1, 0] == 0 and out[2, 0].isnan()
    out[:2].sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [0, 1, 0, 0, 0]


def test_cpu_segments_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 16, generator=generator)
    segments = Segments.from_sizes((50_001, 9_999))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.cat([ops.segment_sum(x, segments), ops.segment_max(x, segments)]))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_columns_that_are_not_there(any_impl: str, device: str) -> None:
    x, segments = torch.zeros(5, 4, device=device), Segments.from_sizes((3, 0, 2), device)
    none = x[:, :0]
    for name in ("segment_sum", "segment_mean", "segment_max", "segment_logsumexp"):
        assert getattr(ops, name)(none, segments, impl=any_impl).shape == (3, 0)
    assert ops.segment_pool(none, x, segments, impl=any_impl).shape == (3, 0, 4)
    assert ops.dot_attention_pool(x, x.new_zeros(3, 0, 4), segments, impl=any_impl)[0].shape == (3, 0, 4)
