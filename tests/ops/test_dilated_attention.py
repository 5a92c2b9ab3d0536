"""Dilated attention against the paper's formula: an attention per branch, weighed by the softmax denominators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bigbag import Segments, ops
from bigbag.ops.dilated_attention import OPERATORS


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], dilations: tuple[int, ...]) -> Tensor:
    """One bag, position by position, head by head."""
    rows, heads, dim = q.shape
    out = torch.zeros_like(v)
    for h in range(heads):
        outputs, denominators = [], []
        for length, dilation in zip(lengths, dilations):
            of_branch, sums = torch.zeros(rows, v.shape[2], dtype=v.dtype), torch.zeros(rows, dtype=v.dtype)
            for start in range(0, rows, length):
                kept = torch.arange(start + h % dilation, min(start + length, rows), dilation)
                weights = (q[kept, h] @ k[kept, h].T / dim**0.5).exp()
                sums[kept] = weights.sum(1)
                of_branch[kept] = weights @ v[kept, h] / weights.sum(1, keepdim=True)
            outputs.append(of_branch)
            denominators.append(sums)
        share = torch.stack(denominators) / torch.stack(denominators).sum(0)
        out[:, h] = (share.nan_to_num(0.0)[:, :, None] * torch.stack(outputs)).sum(0)
    return out


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("heads", "lengths", "dilations"),
    [(4, (8, 20, 64), (1, 2, 4)), (2, (10, 33), (1, 5)), (3, (7,), (3,)), (2, (100,), (1,))],
)
def test_is_the_paper_s(heads: int, lengths: tuple[int, ...], dilations: tuple[int, ...], impl: str) -> None:
    sizes = (41, 0, 9)
    segments = Segments.from_sizes(sizes)
    q, k, v = randn(50, heads, 6), randn(50, heads, 6, seed=1), randn(50, heads, 5, seed=2)
    branches = ops.dilated_branches(segments, heads, lengths, dilations)
    found = ops.dilated_attention(q, k, v, segments, branches, impl=impl)
    expected = torch.cat([paper(*(t[s:e] for t in (q, k, v)), lengths, dilations) for s, e in ((0, 41), (41, 50))])
    torch.testing.assert_close(found, expected)


def test_flops_are_those_of_the_pairs_that_attend() -> None:
    lengths, dilations = (8, 20, 64, 90), (1, 2, 4, 5)
    segments = Segments.from_sizes((41,))
    q, k, v = (randn(41, 4, dim).requires_grad_() for dim in (6, 6, 5))
    with FlopCounterMode(display=False) as naive:
        out = paper(q, k, v, lengths, dilations)
        forward = naive.get_total_flops()
        out.sum().backward()
    (operator,) = OPERATORS
    mapping = {getattr(torch.ops.bigbag, name): _get_raw(flops) for name, flops in operator.flops.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as own:
        branches = ops.dilated_branches(segments, 4, lengths, dilations)
        out = ops.dilated_attention(q, k, v, segments, branches, impl="cpu")
        assert own.get_total_flops() == forward
        out.sum().backward()
    # Scores are computed again in the backward pass: 6 of the 11 columns of both products.
    assert own.get_total_flops() == naive.get_total_flops() + forward * 6 // 11


def _get_raw(flops: Any) -> Any:
    """A formula that gets tensors, where the counter would give it their shapes."""

    def of_call(*args: Any, out_val: Any) -> int:
        return flops(*args)

    of_call._get_raw = True  # type: ignore[attr-defined]
    return of_call


def test_one_branch_over_everything_is_masked_attention() -> None:
    segments = Segments.from_sizes((30, 12))
    q, k, v = (randn(42, 2, 8, seed=seed).float() for seed in range(3))
    branches = ops.dilated_branches(segments, 2, (30,), (1,))
    torch.testing.assert_close(
        ops.dilated_attention(q, k, v, segments, branches), ops.masked_attention(q, k, v, segments)
    )


def test_errors_name_what_does_not_fit() -> None:
    segments = Segments.from_sizes((5,))
    with pytest.raises(ValueError, match="as many segment_lengths as dilations"):
        ops.dilated_branches(segments, 2, (4, 8), (1,))
    with pytest.raises(ValueError, match="divides the 4 heads"):
        ops.dilated_branches(segments, 4, (4,), (3,))
    with pytest.raises(ValueError, match=r"expected q, k \(T, H, d\)"):
        ops.dilated_attention(*(randn(4, 2, 3),) * 3, segments, ops.dilated_branches(segments, 2, (4,), (1,)))
