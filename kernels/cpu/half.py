"""16-bit floats in Numba, which knows neither: int16 stands for bfloat16, uint16 for float16."""

from __future__ import annotations

import warnings

import numba
import numpy as np
from numba.core.errors import NumbaIRAssumptionWarning
from numba.extending import overload

# Inlining the choices in from_half makes Numba ask users to report names that it made up itself, once for each kernel.
warnings.filterwarnings("ignore", "variable '_widen_overload", NumbaIRAssumptionWarning)


def _widen(value):
    raise NotImplementedError("compiled code only")


@overload(_widen, inline="always")
def _widen_overload(value):
    """float32 of a 16-bit float; anything else as it is."""
    if value == numba.types.int16:
        return lambda value: np.uint32(np.uint32(np.uint16(value)) << np.uint32(16)).view(np.float32)
    if value == numba.types.uint16:

        def from_half(value):
            bits = np.uint32(value)
            magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
            small = np.float32(magnitude.view(np.float32) * np.float32(2.0**112))
            special = np.uint32(magnitude | np.uint32(0x7F800000)).view(np.float32)
            wide = special if magnitude >= np.uint32(0x0F800000) else small
            return -wide if bits >> np.uint32(15) else wide

        return from_half
    return lambda value: value


def _narrow(value, like):
    raise NotImplementedError("compiled code only")


@overload(_narrow)
def _narrow_overload(value, like):
    """``value`` rounded to nearest even in the format of ``like``."""
    if like == numba.types.int16:

        def to_bfloat(value, like):
            bits = np.float32(value).view(np.uint32)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            isnan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.int16((np.uint32(0x7FC00000) if isnan else rounded) >> np.uint32(16))

        return to_bfloat
    if like == numba.types.uint16:

        def to_half(value, like):
            bits = np.float32(value).view(np.uint32)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            normal = np.uint32(magnitude - np.uint32(0x38000000))
            normal = np.uint32(normal + np.uint32(0xFFF) + ((normal >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
            # Adding 0.5 aligns the last bit of a number below 2^-14 with the last bit of a float16 subnormal.
            small = np.uint32(
                np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
            )
            half = small if magnitude < np.uint32(0x38800000) else normal
            half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
            half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
            return np.uint16(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))

        return to_half
    return lambda value, like: value


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _wide(value):
    # A call, since Numba's own inlining of the same expression twice in a function confuses its scopes.
    return _widen(value)
