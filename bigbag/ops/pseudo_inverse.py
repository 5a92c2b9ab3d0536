"""The small middle factor of Nystrom attention: pinv(softmax(ql kl^T)) times a matrix, for the landmarks of every bag.

    A = softmax(ql kl^T);   Z_0 = A^T / (max row sum * max column sum);   P = A Z_n
    Z_{n+1} = Z_n (13 I - P (15 I - P (7 I - P))) / 4;   result = Z_num_iterations other

The two maxima are over the heads of a bag. A bag with c < M landmarks has zeros beyond the c-th row and column of A,
which stay zeros in every Z; bags with about as many landmarks are therefore computed together, a few at a time.
The last step goes from right to left over the columns of ``other``, which are fewer than M, and forms no P.
Nothing of size M x M is kept for backward, which runs the iteration again and then its adjoint. Plain PyTorch, so
that it runs on every device; wrapped as a custom operator since autograd is not at hand inside of one.

(P is a polynomial of the P before, two products instead of four. But an iteration that never looks at A Z again does
not correct its rounding: in float32 it came out a hundred times less accurate where A is well conditioned.)

FLOPs per bag: 2 H (4 (n - 1) M^3 + 7 M^2 dv) forward, 2 H (12 (n - 1) M^3 + 21 M^2 dv) backward, n iterations. Bytes
kept: none. Working memory: a constant number of H M^2 floats per bag of a batch forward, about 4 n + 6 backward; a
batch has as many bags as fit ``BATCH_ELEMENTS``, or one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbag.ops.custom import CustomOp
from bigbag.segments import on_device

BATCH_ELEMENTS = 1 << 19
_SMALLEST_BUCKET = 16
_COEFFICIENTS = (7, 15, 13)


def landmark_softmax(queries: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """A: queries, keys (B, H, M, d), counts (B,) -> (B, H, M, M), zero beyond the first ``counts`` rows and columns."""
    valid = torch.arange(queries.shape[2], device=queries.device) < counts[:, None]
    scores = (queries @ keys.mT).masked_fill(~valid[:, None, None, :], torch.finfo(queries.dtype).min)
    return scores.softmax(3) * (valid[:, None, :, None] & valid[:, None, None, :])


def initial_inverse(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z_0 (B, H, M, M), the product of the maxima (B, 1, 1, 1), and the column sums (B, H, 1, M)."""
    columns = a.sum(2, keepdim=True)
    norm = a.sum(3).amax((1, 2)).view(-1, 1, 1, 1) * columns.amax((1, 2, 3), keepdim=True)
    norm = torch.where(norm > 0, norm, 1)  # a bag without instances
    return a.mT / norm, norm, columns


class _Step(NamedTuple):
    """What a step of the iteration computes; Z_{n+1} = Z_n W / 4."""

    z: Tensor
    """Z_n, (B H, M, M) as all of these."""
    p: Tensor
    """A Z_n."""
    v: Tensor
    """15 I - P (7 I - P)."""
    w: Tensor
    """13 I - P V."""


def _step(a: Tensor, z: Tensor) -> _Step:
    p = a @ z
    v = _less(15, p @ _less(7, p.clone()))
    return _Step(z, p, v, _less(13, p @ v))


def _less(diagonal: float, matrix: Tensor) -> Tensor:
    """diagonal I - matrix, in its place."""
    matrix.neg_().diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return matrix


def _step_backward(grad: Tensor, a: Tensor, step: _Step, grad_a: Tensor) -> Tensor:
    """The gradient of Z_n, from that of Z_{n+1}; that of a is added to ``grad_a``."""
    grad_w = (step.z.mT @ grad).div_(4)
    less_grad_v = step.p.mT @ grad_w
    grad_p = less_grad_v @ _less(7, step.p.clone()).mT
    grad_p.baddbmm_(grad_w, step.v.mT, alpha=-1).baddbmm_(step.p.mT, less_grad_v, alpha=-1)
    grad_a.baddbmm_(grad_p, step.z.mT)
    return (grad @ step.w.mT).baddbmm_(a.mT, grad_p, beta=0.25)


def times(a: Tensor, z: Tensor, other: Tensor, num_iterations: int) -> Tensor:
    """Z_num_iterations other: a and Z_0 (B, H, M, M), other (B, H, M, dv) -> (B, H, M, dv).

    Of the transposes of a and Z_0, the transpose of Z_num_iterations comes out.
    """
    a, z, right = (tensor.flatten(0, 1) for tensor in (a, z, other))
    for _ in range(num_iterations - 1):
        z = (z @ _step(a, z).w).div_(4)
    return _last_times(a, z, right, num_iterations)[-1].view(other.shape)


def _last_times(a: Tensor, z: Tensor, other: Tensor, num_iterations: int) -> list[Tensor]:
    """The last step applied to ``other``, without its matrices: h_0, Z h_0, h_1, ..., Z h_3, the last being the result.

    h_0 = other / 4, h_i = c_i other / 4 - A Z h_{i-1}; without any iteration there are other and Z other alone.
    """
    if num_iterations == 0:
        return [other, z @ other]
    quarter = other / 4
    found = [quarter, z @ quarter]
    for coefficient in _COEFFICIENTS:
        found.append(torch.baddbmm(quarter, a, found[-1], beta=coefficient, alpha=-1))
        found.append(z @ found[-1])
    return found


def _last_times_backward(grad: Tensor, a: Tensor, z: Tensor, found: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, of Z and of ``other``, from that of the product and what :func:`_last_times` found."""
    grad_a, grad_z = torch.zeros_like(a), grad @ found[-2].mT
    grad_h = z.mT @ grad
    if len(found) == 2:
        return grad_a, grad_z, grad_h
    grad_quarter = torch.zeros_like(grad_h)
    for i, coefficient in reversed(list(enumerate(_COEFFICIENTS))):
        h, zh = found[2 * i : 2 * i + 2]
        grad_quarter.add_(grad_h, alpha=coefficient)
        grad_a.baddbmm_(grad_h, zh.mT, alpha=-1)
        grad_zh = (a.mT @ grad_h).neg_()
        grad_z.baddbmm_(grad_zh, h.mT)
        grad_h = z.mT @ grad_zh
    return grad_a, grad_z, grad_quarter.add_(grad_h).div_(4)


def _times_backward(
    grad: Tensor, a: Tensor, z: Tensor, other: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, of Z_0 and of ``other`` from that of :func:`times`."""
    shapes = a.shape, z.shape, other.shape
    grad, a, z, right = (tensor.flatten(0, 1) for tensor in (grad, a, z, other))
    steps = []
    for _ in range(num_iterations - 1):
        steps.append(_step(a, z))
        z = (z @ steps[-1].w).div_(4)
    found = _last_times(a, z, right, num_iterations)
    grad_a, grad_z, grad_other = _last_times_backward(grad, a, z, found)
    while steps:
        grad_z = _step_backward(grad_z, a, steps.pop(), grad_a)
    grad_a, grad_z, grad_other = (x.view(shape) for x, shape in zip((grad_a, grad_z, grad_other), shapes))
    return grad_a, grad_z, grad_other


def _softmax_backward(grad: Tensor, a: Tensor, z: Tensor, norm: Tensor, columns: Tensor) -> Tensor:
    """Gradient of the scores ql kl^T, from those of a and of Z_0 = a^T / norm."""
    first, grad_z = grad, z
    grad = first + grad_z.mT / norm
    # norm = (max row sum) (max column sum). A row of a softmax sums to one whatever the scores: no gradient.
    grad_norm = -(grad_z * a.mT).sum((1, 2, 3), keepdim=True) / norm.square()
    top = columns.amax((1, 2, 3), keepdim=True)
    hit = (columns == top).to(a.dtype)
    grad = grad + grad_norm * (norm / top.clamp_min(torch.finfo(a.dtype).tiny)) * hit / hit.sum((1, 2, 3), keepdim=True)
    return a * (grad - (grad * a).sum(3, keepdim=True))


def batches(heads: int, landmarks: int, groups: Tensor) -> Iterator[tuple[list[int], int]]:
    """Bags to compute together, and how many landmarks to compute for them.

    ``groups`` (B,) are numbers of landmarks on the host.
    """
    buckets: dict[int, list[int]] = {}
    for bag, count in enumerate(groups.tolist()):
        bucket = max(_SMALLEST_BUCKET, 1 << max(0, count - 1).bit_length())
        buckets.setdefault(min(landmarks, bucket), []).append(bag)
    for bucket, bags in sorted(buckets.items()):
        step = max(1, BATCH_ELEMENTS // (heads * bucket**2))
        for first in range(0, len(bags), step):
            yield bags[first : first + step], bucket


def _forward(
    queries: Tensor, keys: Tensor, other: Tensor, counts: Tensor, groups: Tensor, num_iterations: int
) -> Tensor:
    out = torch.zeros_like(other)
    for batch, size in batches(queries.shape[1], queries.shape[2], groups):
        bags = on_device(batch, out.device)
        q, k, right = (tensor[bags, :, :size] for tensor in (queries, keys, other))
        a = landmark_softmax(q, k, counts[bags])
        out[bags, :, :size] = times(a, initial_inverse(a)[0], right, num_iterations)
    return out


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, other: Tensor, counts: Tensor, groups: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(tensor) for tensor in (queries, keys, other)]
    for batch, size in batches(queries.shape[1], queries.shape[2], groups):
        bags = on_device(batch, grad.device)
        q, k, right, grad_out = (tensor[bags, :, :size] for tensor in (queries, keys, other, grad))
        a = landmark_softmax(q, k, counts[bags])
        z, norm, columns = initial_inverse(a)
        grad_a, grad_z, grad_other = _times_backward(grad_out, a, z, right, num_iterations)
        grad_scores = _softmax_backward(grad_a, a, grad_z, norm, columns)
        for out, value in zip(grads, (grad_scores @ k, grad_scores.mT @ q, grad_other)):
            out[bags, :, :size] = value
    return grads[0], grads[1], grads[2]


def _backward_in_full(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A backward pass may be begun under autocast, in 16 bits of which the iteration would lose its way."""
    with torch.autocast(grad.device.type, enabled=False):
        return _backward(grad, *args)


_ARGS = "Tensor queries, Tensor keys, Tensor other, Tensor counts, Tensor groups, int num_iterations"
inverse_times = CustomOp("nystrom_inverse_times", f"({_ARGS}) -> Tensor", _forward)
_inverse_times_backward = CustomOp(
    "nystrom_inverse_times_backward", f"(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)", _backward_in_full
)
inverse_times.register_fake(lambda queries, keys, other, counts, groups, num_iterations: torch.empty_like(other))
_inverse_times_backward.register_fake(
    lambda grad, queries, keys, other, *_: (torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(other))
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.num_iterations = inputs[5]


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *_inverse_times_backward(grad, *ctx.saved_tensors, ctx.num_iterations), None, None, None


inverse_times.register_autograd(_differentiate, setup_context=_setup)
