"""Vectors in compiled code: what is left of a row is read and written to its end, and not beyond it."""

from __future__ import annotations

import pytest
import torch

from bigbag.kernels.cpu.segments import _jit, array
from bigbag.kernels.cpu.vectors import broadcast, fits, lanes, load, multiply_add, repeat, store, tail


@_jit
def _doubled(x, like, out):
    zero = like.dtype.type(0)
    wide, rest = broadcast(zero, 8), tail(zero, 8)
    c = 0
    while fits(wide, c, x.shape[2]):
        store(multiply_add(load(wide, x, 1, 0, c), 1, load(wide, x, 1, 0, c)), out, 1, 0, c)
        c += lanes(wide)
    while fits(rest, c, x.shape[2]):
        store(multiply_add(load(rest, x, 1, 0, c), 1, load(rest, x, 1, 0, c)), out, 1, 0, c)
        c += lanes(rest)


@pytest.mark.parametrize(
    ("stored", "summed"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 23])
def test_a_tail_ends_where_its_row_ends(stored: torch.dtype, summed: torch.dtype, width: int) -> None:
    x = torch.arange(3 * width, dtype=stored).view(3, 1, width)
    # The neighbours of what is read are not numbers, those of what is written must stay as they are.
    x[0], x[2] = torch.nan, torch.nan
    out = torch.full((3, 1, width), -1.0, dtype=summed if summed == torch.float64 else stored)
    _doubled(array(x), torch.zeros(1, dtype=summed).numpy(), array(out))
    assert torch.equal(out[1], 2 * x[1].to(out.dtype))
    assert bool((out[0] == -1).all() and (out[2] == -1).all())


@_jit
def _repeated(x, like, out):
    zero = like.dtype.type(0)
    store(repeat(broadcast(zero, 8), load(broadcast(zero, 4), x, 0, 0, 1)), out, 0, 0, 0)


def test_a_vector_is_repeated_in_its_order() -> None:
    x, out = torch.arange(6.0).view(1, 1, 6), torch.zeros(1, 1, 8)
    _repeated(array(x), torch.zeros(1).numpy(), array(out))
    assert out.flatten().tolist() == [1, 2, 3, 4] * 2
