"""``run_ranks``: results in order, errors with their traceback, nothing left running."""

from __future__ import annotations

import os
import time

import pytest
import torch

from bigbag.testing import run_ranks


def _sum_of_ranks(factor: int) -> tuple[int, float, int]:
    value = torch.tensor([float(torch.distributed.get_rank() * factor)])
    torch.distributed.all_reduce(value)
    return int(os.environ["RANK"]), value.item(), torch.get_num_threads()


def _one_fails_the_others_wait() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("the cause")
    time.sleep(300)


def _die() -> None:
    os._exit(7)


def _sleep() -> None:
    time.sleep(300)


@pytest.mark.slow
def test_ranks_communicate_and_answer_in_order() -> None:
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 10.0, 1), (1, 10.0, 1)]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_carries_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*_one_fails.*KeyError: 'the cause'"):
        run_ranks(_one_fails_the_others_wait, 2)
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_is_reported() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(_die, 1)
    with pytest.raises(RuntimeError, match=r"ranks \[0\] did not finish within 4 s"):
        run_ranks(_sleep, 1, timeout_s=4)
