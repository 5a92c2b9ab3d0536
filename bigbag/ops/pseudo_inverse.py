"""The small middle factor of Nystrom attention: pinv(softmax(ql kl^T)) times a matrix, for the landmarks of every bag.

    A = softmax(ql kl^T);   Z_0 = A^T / (max row sum * max column sum);   P = A Z_n
    Z_{n+1} = Z_n (13 I - P (15 I - P (7 I - P))) / 4;   result = Z_num_iterations other

The two maxima are over the heads of a bag. A bag with c < M landmarks has zeros beyond the c-th row and column of A,
which stay zeros in every Z; bags with about as many landmarks are therefore computed together, a few at a time.
Nothing of size M x M is kept for backward, which runs the iteration again and then its adjoint. Plain PyTorch, so
that it runs on every device; wrapped as a custom operator since autograd is not at hand inside of one.

FLOPs per bag: 2 H M^3 (4 n) forward, 2 H M^3 (15 n) backward, n iterations. Bytes kept: none. Working memory: (n + 8)
H M^2 floats per bag of a batch, of which there are so many as fit ``BATCH_ELEMENTS``, or one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH_ELEMENTS = 1 << 20
_SMALLEST_BUCKET = 16


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


def iterate(a: Tensor, z: Tensor, num_iterations: int) -> list[Tensor]:
    """[Z_0, ..., Z_num_iterations]."""
    found = [z]
    for _ in range(num_iterations):
        p = a @ found[-1]
        found.append(found[-1] @ _less(13, p @ _less(15, p @ _less(7, p))) / 4)
    return found


def _less(diagonal: float, matrix: Tensor) -> Tensor:
    """diagonal I - matrix."""
    out = -matrix
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def _iterate_backward(grad: Tensor, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and of Z_n, from that of Z_{n+1}."""
    p = a @ z
    u = _less(7, p)
    v = _less(15, p @ u)
    w = _less(13, p @ v)
    grad_w = z.mT @ grad / 4
    grad_v = -(p.mT @ grad_w)
    grad_u = -(p.mT @ grad_v)
    grad_p = -(grad_w @ v.mT) - grad_v @ u.mT - grad_u
    return grad_p @ z.mT, grad @ w.mT / 4 + a.mT @ grad_p


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
        bags = torch.tensor(batch, device=out.device)
        q, k, right = (tensor[bags, :, :size] for tensor in (queries, keys, other))
        a = landmark_softmax(q, k, counts[bags])
        z = initial_inverse(a)[0]
        out[bags, :, :size] = iterate(a, z, num_iterations)[-1] @ right
    return out


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, other: Tensor, counts: Tensor, groups: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(tensor) for tensor in (queries, keys, other)]
    for batch, size in batches(queries.shape[1], queries.shape[2], groups):
        bags = torch.tensor(batch, device=grad.device)
        q, k, right, grad_out = (tensor[bags, :, :size] for tensor in (queries, keys, other, grad))
        a = landmark_softmax(q, k, counts[bags])
        z, norm, columns = initial_inverse(a)
        inverses = iterate(a, z, num_iterations)
        grad_other, grad_z = inverses[-1].mT @ grad_out, grad_out @ right.mT
        grad_a = torch.zeros_like(a)
        for inverse in reversed(inverses[:-1]):
            more, grad_z = _iterate_backward(grad_z, a, inverse)
            grad_a += more
        grad_scores = _softmax_backward(grad_a, a, grad_z, norm, columns)
        for out, value in zip(grads, (grad_scores @ k, grad_scores.mT @ q, grad_other)):
            out[bags, :, :size] = value
    return grads[0], grads[1], grads[2]


_ARGS = "Tensor queries, Tensor keys, Tensor other, Tensor counts, Tensor groups, int num_iterations"
inverse_times = torch.library.custom_op(
    "bigbag::nystrom_inverse_times", _forward, mutates_args=(), schema=f"({_ARGS}) -> Tensor"
)
_inverse_times_backward = torch.library.custom_op(
    "bigbag::nystrom_inverse_times_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)",
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
