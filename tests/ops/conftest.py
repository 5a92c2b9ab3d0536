"""What the tests of operators share: implementations as fixtures."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bigbag.ops.registry import INTERPRETED

_TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not (INTERPRETED or torch.cuda.is_available()),
            reason="no CUDA device here (tests/kernels/test_interpreter.py runs these kernels interpreted)",
        ),
    ],
)


def _patch_language_once() -> None:
    """Triton's interpreter patches its language at every launch, and again at every call of a helper within the kernel,
    which took half of the time; what a helper's first call patches lasts. Each operation looks for NumPy's dtypes in a
    table that it makes anew."""
    from triton.runtime import interpreter

    look_up, look_up_once = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (look_up if dtype.scalar.is_ptr() else look_up_once)(dtype.scalar)

    patch_language = cache(interpreter._patch_lang)

    def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch_language(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_helper


if INTERPRETED:
    _patch_language_once()


@pytest.fixture(params=["cpu", _TRITON])
def impl(request: Any) -> str:
    """An implementation with kernels of its own."""
    return request.param


@pytest.fixture(params=["reference", "cpu", _TRITON])
def any_impl(request: Any) -> str:
    """The same, and the reference."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the implementation under test runs."""
    name = "impl" if "impl" in request.fixturenames else "any_impl"
    on_gpu = request.getfixturevalue(name) == "triton" and not INTERPRETED
    return "cuda" if on_gpu else "cpu"
