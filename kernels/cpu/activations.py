"""Activations in Numba that LLVM makes vectors of: float32 by polynomials, float64 by the C library, number by number.

    exp       2^n e^r, r below 0.35 by its Taylor series; what is beyond +-80 counts as that
    sigmoid   1 / (1 + e^-v)
    tanh      (1 - e^-2|v|) / (1 + e^-2|v|), with the sign of v
    cdf       of the standard normal: e^(-v^2 / 2) times a polynomial in 1 / (1 + 0.3275911 |v| / sqrt 2)
              (Abramowitz and Stegun, Handbook of mathematical functions, 7.1.26)

In float32 they err by one or two roundings of 1. What is not a number stays what it is.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import types
from numba.extending import overload

_U, _F, _I = np.uint32, np.float32, np.int32
_LN2_HIGH, _LN2_LOW, _LOG2_E = _F(0.693359375), _F(-2.12194440e-4), _F(1.44269504)
_LIMIT = _F(80)
_ROOT_HALF, _DENSITY = _F(math.sqrt(0.5)), _F(1 / math.sqrt(2 * math.pi))

_inline = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


@_inline
def clipped(f, limit):
    return -limit if f < -limit else (limit if f > limit else f)


@_inline
def exp32(x):
    """Of |x| < 87."""
    n = np.floor(x * _LOG2_E + _F(0.5))
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = _F(1 / 720) * r + _F(1 / 120)
    y = (y * r + _F(1 / 24)) * r + _F(1 / 6)
    y = ((y * r + _F(1 / 2)) * r + _F(1)) * r + _F(1)
    return y * _U((_I(n) + _I(127)) << _I(23)).view(_F)


@_inline
def _sigmoid32(v):
    return _F(1) / (_F(1) + exp32(clipped(-v, _LIMIT)))


@_inline
def _tanh32(v):
    e = exp32(clipped(_F(-2) * abs(v), _LIMIT))
    return np.copysign((_F(1) - e) / (_F(1) + e), v)


@_inline
def _bell32(v):
    # Further out it is nothing, also times v, which may be of any size.
    return _F(0) if abs(v) > _F(12.5) else exp32(_F(-0.5) * v * v)


@_inline
def _cdf32(v, bell):
    t = _F(1) / (_F(1) + _F(0.3275911) * _ROOT_HALF * abs(v))
    y = (_F(1.061405429) * t + _F(-1.453152027)) * t + _F(1.421413741)
    tail = _F(0.5) * (((y * t + _F(-0.284496736)) * t + _F(0.254829592)) * t) * bell
    return tail if v < _F(0) else _F(1) - tail


@_inline
def _gelu32(v):
    return v * _cdf32(v, _bell32(v))


@_inline
def _gelu_slope32(v):
    bell = _bell32(v)
    return _cdf32(v, bell) + v * _DENSITY * bell


@_inline
def _exp32(v):
    return exp32(clipped(v, _LIMIT))


def _exp64(v):
    return math.exp(v)


def _sigmoid64(v):
    return 1 / (1 + math.exp(-v))


def _tanh64(v):
    return math.tanh(v)


def _gelu64(v):
    return v * 0.5 * math.erfc(-v * math.sqrt(0.5))


def _gelu_slope64(v):
    return 0.5 * math.erfc(-v * math.sqrt(0.5)) + v * math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


def _by_width(single, double):
    """A function of compiled code: ``single`` of float32, ``double`` of float64."""

    def function(v):
        raise NotImplementedError("compiled code only")

    double = _inline(double)

    @overload(function)
    def _(v):
        return (lambda v: single(v)) if v == types.float32 else (lambda v: double(v))

    return function


exp = _by_width(_exp32, _exp64)
sigmoid = _by_width(_sigmoid32, _sigmoid64)
tanh = _by_width(_tanh32, _tanh64)
gelu = _by_width(_gelu32, _gelu64)
gelu_slope = _by_width(_gelu_slope32, _gelu_slope64)
