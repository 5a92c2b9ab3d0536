"""What one writes without bigbag, operator by operator: padded torch like torchmil, loops over bags, torch.sparse.

Every function computes what the operator computes (``tests/ops/test_bench.py`` checks it), in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from bigbag.bags import Segments


def attention_pool(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, wg: Tensor, bg: Tensor) -> Tensor:
    """Gated attention pooling of one padded bag as torchmil and the papers' code write it."""
    x = x[None]
    hidden = torch.tanh(linear(x, w1, b1)) * torch.sigmoid(linear(x, wg, bg))
    return torch.bmm(x.transpose(1, 2), linear(hidden, w2).softmax(1)).squeeze(2)


def attention_scores(h: Tensor, bias: Tensor, w2: Tensor) -> Tensor:
    return torch.tanh(h + bias) @ w2.t()


def segment(op: str, x: Tensor, segments: Segments) -> Tensor:
    """``segment_{sum,mean,max,softmax}`` by index_add and scatter_reduce over the bag of each instance."""
    bag = segments.bag_of_instance
    index, shape = bag[:, None].expand_as(x), (segments.num_bags, x.shape[1])
    total = x.new_zeros(shape)
    if op == "segment_sum":
        return total.index_add(0, bag, x)
    if op == "segment_mean":
        return total.index_add(0, bag, x) / segments.offsets.diff()[:, None]
    top = total.scatter_reduce(0, index, x, "amax", include_self=False)
    if op == "segment_max":
        return top
    e = (x - top.detach()[bag]).exp()
    return e / total.index_add(0, bag, e)[bag]


def topk(x: Tensor, segments: Segments, k: int) -> Tensor:
    """``torch.topk`` bag by bag."""
    return torch.stack([part.topk(k, dim=0).values for part in x.split(segments.sizes)])


def logsumexp(x: Tensor, segments: Segments) -> Tensor:
    return torch.stack([part.logsumexp(0) for part in x.split(segments.sizes)])


def segment_pool(weights: Tensor, x: Tensor, segments: Segments) -> Tensor:
    parts = zip(weights.split(segments.sizes), x.split(segments.sizes))
    return torch.stack([weight.t() @ part for weight, part in parts])


def segment_dots(x: Tensor, y: Tensor, segments: Segments) -> Tensor:
    return torch.cat([part @ vectors.t() for part, vectors in zip(x.split(segments.sizes), y)])


def dot_attention_pool(x: Tensor, y: Tensor, segments: Segments) -> Tensor:
    parts = zip(x.split(segments.sizes), y)
    return torch.stack([(part @ vectors.t()).softmax(0).t() @ part for part, vectors in parts])


def spmm(coo: Tensor, x: Tensor) -> Tensor:
    """torchmil's product with a batch of one COO matrix."""
    return torch.bmm(coo[None], x[None])[0]


def smooth(coo: Tensor, f: Tensor, alpha: float, num_steps: int) -> Tensor:
    """The steps of torchmil's ApproxSm."""
    g = f
    for _ in range(num_steps):
        g = (1 - alpha) * f + alpha * spmm(coo, g)
    return g


def smooth_exact(coo: Tensor, f: Tensor, gamma: float) -> Tensor:
    """torchmil's ExactSm: a dense N x N matrix, solved."""
    eye = torch.eye(f.shape[0], device=f.device)
    return torch.linalg.solve((1 + gamma) * eye - gamma * coo.to_dense(), f)


def chebyshev(coo: Tensor, x: Tensor, num_terms: int, lambda_max: float) -> Tensor:
    """The recursion over a COO matrix of the scaled Laplacian 2 L / lambda_max - 1."""
    degree = torch.sparse.sum(coo, 1).to_dense()[:, None]

    def scaled(v: Tensor) -> Tensor:
        return 2 / (lambda_max + 1e-6) * (degree * v - spmm(coo, v)) - v

    terms = [x, scaled(x)]
    while len(terms) < num_terms:
        terms.append(2 * scaled(terms[-1]) - terms[-2])
    return torch.stack(terms[:num_terms])


def chebyshev_conv(coo: Tensor, x: Tensor, weight: Tensor, lambda_max: float) -> Tensor:
    """The polynomials side by side, times one matrix."""
    terms = chebyshev(coo, x, weight.shape[1] // x.shape[1], lambda_max)
    return torch.cat(list(terms), 1) @ weight.t()


def sampled_attention(mu: Tensor, log_var: Tensor, noise: Tensor, values: Tensor) -> Tensor:
    """One bag as torchmil pools it: every draw kept, softmax, product."""
    draws = (mu[:, None] + (log_var / 2).exp()[:, None] * noise).clamp(-20, 20)
    return draws.softmax(0).t() @ values


def expected_attention(mu: Tensor, log_var: Tensor, levels: int = 64, nodes: int = 41) -> Tensor:
    """The two integrals of one bag as sums over all (T, levels, nodes) at once, differentiated by autograd."""
    sigma, eps = (log_var / 2).exp(), torch.linspace(-6, 6, nodes, dtype=mu.dtype, device=mu.device)
    values = (mu[:, None] + sigma[:, None] * eps).clamp(-20, 20)
    low = -16 - (mu + sigma.square() / 2).logsumexp(0).detach()
    r = torch.linspace(0, 1, levels, dtype=mu.dtype, device=mu.device) * (3 - values.detach().min() - low) + low
    exponent = -(r[None, :, None] + values[:, None, :]).exp()
    weight = torch.softmax(-eps.square() / 2, 0)
    phi = (exponent.exp() @ weight).clamp_min(1e-20)
    slope = (-exponent * exponent.exp()) @ weight
    a = (slope / phi * phi.log().sum(0).exp()).sum(1)
    return a / a.sum()


def neighbor_attention(q: Tensor, k: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Gathered rows of every edge, softmax by scatter_reduce and index_add, as graph libraries do it."""
    scores = (q[row] * k[col]).sum(1) / q.shape[1] ** 0.5
    top = scores.new_zeros(len(q)).scatter_reduce(0, row, scores.detach(), "amax", include_self=False)
    e = (scores - top[row]).exp()
    a = e / e.new_zeros(len(q)).index_add(0, row, e)[row]
    return torch.zeros_like(v).index_add(0, row, a[:, None] * v[col])


def neighbor_scores(q: Tensor, k: Tensor, weight: Tensor, row: Tensor, col: Tensor) -> Tensor:
    scores = weight * (q[row] * k[col]).sum(1) / q.shape[1] ** 0.5
    return q.new_zeros(len(q)).index_add(0, row, scores)


def quadratic_form(coo: Tensor, x: Tensor) -> Tensor:
    """trace(x^T A x)."""
    return (x * spmm(coo, x)).sum()


def dirichlet_energy(coo: Tensor, x: Tensor) -> Tensor:
    """trace(x^T (D - A) x)."""
    degree = torch.sparse.sum(coo, 1).to_dense()[:, None]
    return (x * (degree * x - spmm(coo, x))).sum()


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own fused attention of one bag."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dilations: list[int]) -> Tensor:
    """LongNet's: each branch by products of strided views, then the branches weighed by their softmax denominators.
    One bag, its length a multiple of the segments'."""
    outs, denominators = [], []
    for length, dilation in zip(lengths, dilations):
        cut = (-1, min(length, len(q)))
        out, lse = torch.zeros_like(v), q.new_full(q.shape[:2], -float("inf"))
        for first in range(dilation):
            part = (slice(None), slice(first, None, dilation), slice(first, None, dilation))
            queries, keys, values = (t.unflatten(0, cut)[part].transpose(1, 2) for t in (q, k, v))
            scores = queries @ keys.mT / q.shape[2] ** 0.5
            out.unflatten(0, cut)[part] = (scores.softmax(-1) @ values).transpose(1, 2)
            lse.unflatten(0, cut)[part] = scores.logsumexp(-1).transpose(1, 2)
        outs.append(out)
        denominators.append(lse)
    weights = torch.stack(denominators).softmax(0)
    return (weights[..., None] * torch.stack(outs)).sum(0)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, width: int) -> Tensor:
    """torch's own convolution of one grid, channels last."""
    grid = x.view(1, -1, width, x.shape[1]).permute(0, 3, 1, 2)
    out = conv2d(grid, weight, bias, padding="same", groups=len(weight))
    return out.permute(0, 2, 3, 1).reshape(x.shape)


def class_token_attention(q_cls: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("hd,thd->th", q_cls[0], k) / k.shape[2] ** 0.5).softmax(0)


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, num_landmarks: int, num_iterations: int = 6) -> Tensor:
    """One bag, its length a multiple of the landmarks, by torchmil's operations: three softmaxes, kept for backward."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    ql, kl = (t.unflatten(2, (num_landmarks, -1)).mean(3) for t in (q, k))
    first, middle, last = (left @ right.mT for left, right in ((q, kl), (ql, kl), (ql, k)))
    first, middle, last = (scores.softmax(-1) for scores in (first, middle, last))
    z = middle.mT / (middle.abs().sum(-1).max() * middle.abs().sum(-2).max())
    eye = torch.eye(num_landmarks, device=q.device)
    for _ in range(num_iterations):
        az = middle @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return ((first @ z) @ (last @ v))[0].transpose(0, 1)
