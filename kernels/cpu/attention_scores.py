"""Attention scores of projected rows on CPU, with Numba.

    hidden = act(h + bias) [* sigmoid of h's right half + bias],  scores = hidden w2^T

One pass over the rows each way, whose intermediate values are one row long. They are cut into pieces of ``PIECE_ROWS``
(see ``segments``); backward, each piece has sums for bias and w2 of its own, which are added in order. What works on a
row is shared with ``attention_pool``, which makes the projected rows a chunk at a time.

Bytes: h once each way, its gradient once. FLOPs: 2 T H D forward, 4 T H D backward, and an activation per number of h
each way. Working memory: D' + H D floats per piece.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from bigbag.kernels.cpu.activations import gelu, gelu_slope, sigmoid, tanh
from bigbag.kernels.cpu.half import _narrow, _wide
from bigbag.kernels.cpu.memory import huge_pages
from bigbag.kernels.cpu.segments import _BLOCK_ROWS, Pieces, _jit, _launch, array

_ACTIVATIONS = {"tanh": 0, "relu": 1, "gelu": 2}


# Inlined by force, of few arrays and few loops, and without calls that take arrays in turn: only in such functions
# Numba's compiler sees that it need not count references, which at each row would take longer than the arithmetic.
_row = numba.njit(
    cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", forceinline=True
)


@_row
def _add_bias(projected, i, first, bias, v):
    """Pre-activations of row i, those from unit ``first`` on."""
    for d in range(len(v)):
        v[d] = _wide(projected[i, first + d]) + bias[first + d]


@_row
def _activate(act, v, value):
    """value = act(v)"""
    zero = v.dtype.type(0)
    if act == 0:
        for d in range(len(v)):
            value[d] = tanh(v[d])
    elif act == 1:
        for d in range(len(v)):
            value[d] = zero if v[d] < zero else v[d]
    else:
        for d in range(len(v)):
            value[d] = gelu(v[d])


@_row
def _to_slope(act, value, v):
    """v = act'(v), where value = act(v)."""
    zero, one = v.dtype.type(0), v.dtype.type(1)
    if act == 0:
        for d in range(len(v)):
            v[d] = one - value[d] * value[d]
    elif act == 1:
        for d in range(len(v)):
            v[d] = one if value[d] > zero else zero
    else:
        for d in range(len(v)):
            v[d] = gelu_slope(v[d])


@_row
def _multiply(factor, out):
    for d in range(len(out)):
        out[d] *= factor[d]


@_row
def _pass_gate(value, gate, hidden):
    """gate = sigmoid(gate), hidden = value * gate; nothing where there is no gate."""
    for d in range(len(gate)):
        gate[d] = sigmoid(gate[d])
    for d in range(len(gate)):
        hidden[d] = value[d] * gate[d]


@_row
def _pass_gate_backward(hidden, gate, grad, of_gate):
    """From the gradient of hidden, in ``grad``, that of value, in its place, and of the gate's pre-activation."""
    one = hidden.dtype.type(1)
    for d in range(len(gate)):
        # Of a sigmoid: g (1 - g).
        of_gate[d] = grad[d] * hidden[d] * (one - gate[d])
        grad[d] *= gate[d]


@_row
def _score(hidden, w2, i, scores):
    for h in range(len(w2)):
        total = hidden.dtype.type(0)
        for d in range(len(hidden)):
            total += w2[h, d] * hidden[d]
        scores[i, h] = total


@_row
def _score_backward(ds, i, hidden, w2, grad, part_w2):
    """The gradient of hidden; adds to that of w2."""
    for d in range(len(grad)):
        grad[d] = 0
    for h in range(len(w2)):
        factor = ds[i, h]
        for d in range(len(grad)):
            grad[d] += factor * w2[h, d]
        for d in range(len(grad)):
            part_w2[h, d] += factor * hidden[d]


@_row
def _write(grad, out, i, first, part):
    """A row of gradients, as they are stored, and added to their sum."""
    for d in range(len(grad)):
        out[i, first + d] = _narrow(grad[d], out[i, first + d])
        part[first + d] += grad[d]


@_jit
def _score_rows(projected, bias, w2, act, scores):
    dim = w2.shape[1]
    v, value, gate = np.empty(dim, bias.dtype), np.empty(dim, bias.dtype), np.empty(len(bias) - dim, bias.dtype)
    hidden = np.empty(dim, bias.dtype) if len(gate) > 0 else value
    for i in range(len(projected)):
        _add_bias(projected, i, 0, bias, v)
        _add_bias(projected, i, dim, bias, gate)
        _activate(act, v, value)
        _pass_gate(value, gate, hidden)
        _score(hidden, w2, i, scores)


@_jit
def _differentiate_rows(projected, bias, w2, act, ds, out, grad_bias, grad_w2):
    """Gradients of the pre-activations, into ``out``, which may be ``projected``; adds to those of bias and w2."""
    dim = w2.shape[1]
    v, value, gate = np.empty(dim, bias.dtype), np.empty(dim, bias.dtype), np.empty(len(bias) - dim, bias.dtype)
    hidden = np.empty(dim, bias.dtype) if len(gate) > 0 else value
    grad, of_gate = np.empty(dim, bias.dtype), np.empty_like(gate)
    part_bias, part_w2 = np.empty_like(bias), np.empty_like(w2)
    for block in range(0, len(projected), _BLOCK_ROWS):
        part_bias[:] = 0
        part_w2[:] = 0
        for i in range(block, min(block + _BLOCK_ROWS, len(projected))):
            _add_bias(projected, i, 0, bias, v)
            _add_bias(projected, i, dim, bias, gate)
            _activate(act, v, value)
            _pass_gate(value, gate, hidden)
            _score_backward(ds, i, hidden, w2, grad, part_w2)
            _pass_gate_backward(hidden, gate, grad, of_gate)
            _to_slope(act, value, v)
            _multiply(v, grad)
            _write(of_gate, out, i, dim, part_bias)
            _write(grad, out, i, 0, part_bias)
        grad_bias += part_bias
        grad_w2 += part_w2


@_jit
def _score_pieces(begin, end, starts, ends, h, bias, w2, act, scores):
    for i in range(begin, end):
        rows = slice(starts[i], ends[i])
        _score_rows(h[rows], bias, w2, act, scores[rows])


@_jit
def _differentiate_pieces(begin, end, starts, ends, h, bias, w2, act, ds, grad_h, grad_bias, grad_w2):
    for i in range(begin, end):
        rows = slice(starts[i], ends[i])
        _differentiate_rows(h[rows], bias, w2, act, ds[rows], grad_h[rows], grad_bias[i], grad_w2[i])


def _pieces(h: Tensor) -> Pieces:
    return Pieces.of(torch.tensor([0, h.shape[0]]))


def forward(h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> Tensor:
    """h (T, D') in any precision, bias (D',) and w2 (H, D) in an accumulation dtype -> (T, H) in that dtype."""
    pieces = _pieces(h)
    scores = huge_pages(w2.new_empty(h.shape[0], w2.shape[0]))
    given = (array(h), array(bias), array(w2), _ACTIVATIONS[act])
    _launch(_score_pieces, len(pieces), h.numel(), pieces.starts, pieces.ends, *given, scores.numpy())
    return scores


def backward(ds: Tensor, h: Tensor, bias: Tensor, w2: Tensor, act: str, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h (T, D') in its dtype, bias (D',) and w2 (H, D), from that of the scores (T, H)."""
    pieces = _pieces(h)
    grad_h = huge_pages(torch.empty(h.shape, dtype=h.dtype))
    bias_parts, w2_parts = bias.new_zeros(len(pieces), *bias.shape), w2.new_zeros(len(pieces), *w2.shape)
    given = (array(h), array(bias), array(w2), _ACTIVATIONS[act], array(ds))
    found = (array(grad_h), bias_parts.numpy(), w2_parts.numpy())
    _launch(_differentiate_pieces, len(pieces), h.numel(), pieces.starts, pieces.ends, *given, *found)
    return grad_h, pieces.add(bias_parts)[0], pieces.add(w2_parts.flatten(1)).view(w2.shape)
