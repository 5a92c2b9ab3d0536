"""A transformer over a few tokens whose decisions can be traced back to them: relevance propagation.

Relevance is a share of the output that is handed back through the layers (Chefer, Gur and Wolf 2021, arXiv 2012.09838):

- linear layer: in proportion to the positive products ``x_i w_ji > 0``;
- product of matrices: in proportion to the products, half to each factor;
- sum: in proportion to the entries, then scaled so that each branch gets its share of the total;
- normalisation, softmax, ReLU: unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigbag.nn.attention.base import head_width
from bigbag.nn.linear import readable
from bigbag.nn.transformers.encoder import layer_widths
from bigbag.nn.transformers.layer import linear_or_identity, mlp_of

_EPS = 1e-9


class LayerTrace(NamedTuple):
    """What a layer computed, from its input ``x`` ``(B, n, in_dim)`` to its output ``y`` ``(B, n, out_dim)``."""

    x: Tensor
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    att: Tensor
    mixed: Tensor
    skip: Tensor
    z: Tensor
    normed_z: Tensor
    hidden: Tensor
    update: Tensor
    w: Tensor
    y: Tensor


class MultiheadSelfAttention(torch.nn.Module):
    """``softmax(Q K^T / sqrt(d)) V`` for each head, over few tokens: the attention is a matrix per head.

    Args:
        in_dim: input width.
        att_dim: width of queries, keys, values and output; ``n_heads`` must divide it.
        n_heads: heads.
        dropout: probability of zeroing an attention weight in training.
    """

    def __init__(self, in_dim: int, att_dim: int = 512, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim, self.n_heads = head_width(type(self).__name__, att_dim, n_heads), n_heads
        self.qkv_nn = torch.nn.Linear(in_dim, 3 * att_dim, bias=False)
        self.dropout = torch.nn.Dropout(dropout)

    def split(self, X: Tensor) -> Tensor:
        """``(B, n, p * att_dim)`` to ``(p, B, H, n, d)``; :meth:`join` is the way back."""
        return X.unflatten(-1, (-1, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

    @staticmethod
    def join(heads: Tensor) -> Tensor:
        return heads.permute(1, 3, 0, 2, 4).flatten(2)

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        """``(B, H, n, n)`` weights."""
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


class TransformerLayer(torch.nn.Module):
    """``Z = X + Att(LayerNorm(X))``; ``Y = Z + MLP(LayerNorm(Z))``, with linear layers where widths differ.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width inside.
        n_heads: heads of the attention.
        use_mlp: whether there is an MLP. Without one, ``norm2`` takes no part and is not trained.
        dropout: of attention and MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = in_dim if out_dim is None else out_dim
        self.att_module = MultiheadSelfAttention(in_dim, att_dim, n_heads, dropout)
        self.in_proj = linear_or_identity(in_dim, att_dim)
        self.use_mlp = use_mlp
        if use_mlp:
            self.mlp_module = mlp_of(att_dim, torch.nn.ReLU(), dropout)
        self.out_proj = linear_or_identity(att_dim, out_dim)
        self.norm1 = torch.nn.LayerNorm(in_dim)
        self.norm2 = torch.nn.LayerNorm(att_dim).requires_grad_(use_mlp)

    def trace(self, x: Tensor) -> LayerTrace:
        """All steps on ``(B, n, in_dim)`` tokens."""
        normed = self.norm1(x)
        q, k, v = self.att_module.split(self.att_module.qkv_nn(normed))
        att = self.att_module.attend(q, k)
        mixed = self.att_module.join((self.att_module.dropout(att) @ v)[None])
        skip = self.in_proj(x)
        w = z = skip + mixed
        normed_z = hidden = update = z
        if self.use_mlp:
            normed_z = self.norm2(z)
            hidden = self.mlp_module[:3](normed_z)
            update = self.mlp_module[3:](hidden)
            w = z + update
        return LayerTrace(x, normed, q, k, v, att, mixed, skip, z, normed_z, hidden, update, w, self.out_proj(w))

    def forward(self, X: Tensor) -> Tensor:
        """``(B, n, in_dim)`` tokens to ``(B, n, out_dim)``."""
        return self.trace(X).y

    def relprop(self, t: LayerTrace, R: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance ``(B, n, out_dim)`` of the output to that of the input, and of the attention ``(B, H, n, n)``."""
        R = _through_linear(self.out_proj, t.w, R)
        if self.use_mlp:
            R, R_mlp = _through_sum(t.z, t.update, R)
            R_mlp = _through_linear(self.mlp_module[3], t.hidden, R_mlp)
            R = R + _through_linear(self.mlp_module[0], t.normed_z, R_mlp)
        R_skip, R_mixed = _through_sum(t.skip, t.mixed, R)
        R_att, R_v = _through_product(t.att, t.v, self.att_module.split(R_mixed)[0])
        R_q, R_k = _through_product(t.q, t.k.transpose(-1, -2), R_att)
        R_qkv = self.att_module.join(torch.stack([R_q, R_k.transpose(-1, -2), R_v]))
        R_normed = _through_linear(self.att_module.qkv_nn, t.normed, R_qkv)
        return _through_linear(self.in_proj, t.x, R_skip) + R_normed, R_att


class TransformerEncoder(torch.nn.Module):
    """A stack of :class:`TransformerLayer`, and a layer normalisation of its output; torchmil's ``nn.relprop``.

    Args:
        in_dim: input width.
        out_dim: output width; None: ``in_dim``.
        att_dim: width inside.
        n_heads: heads of the attentions.
        n_layers: layers.
        use_mlp: whether the layers have MLPs.
        dropout: of attentions and MLPs.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        att_dim: int = 512,
        n_heads: int = 4,
        n_layers: int = 4,
        use_mlp: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = in_dim if out_dim is None else out_dim
        self.layers = torch.nn.ModuleList(
            TransformerLayer(*widths, att_dim, n_heads, use_mlp, dropout)
            for widths in layer_widths(in_dim, att_dim, out_dim, n_layers)
        )
        self.norm = torch.nn.LayerNorm(out_dim)

    def forward(self, X: Tensor) -> Tensor:
        """``(B, n, in_dim)`` tokens to ``(B, n, out_dim)``."""
        for layer in self.layers:
            X = layer(X)
        return self.norm(X)

    def class_attribution(self, X: Tensor, classifier: torch.nn.Linear, output: Tensor) -> Tensor:
        r"""How much each token speaks for an output of ``classifier`` on the first token (Chefer et al. 2021).

        ``C = B_L ... B_1`` with ``B_l = I + mean_h max(0, dY / dA_l * R_l)``: A_l is the attention of layer l, R_l its
        relevance for the output Y. The result is the row of the first token, less its own column. For a module in
        eval mode, in the precision of its weights.

        Args:
            X: ``(B, n, in_dim)`` tokens.
            classifier: linear layer from ``out_dim`` to K logits.
            output: ``(B,)`` int64, the logit of each bag that is explained.

        Returns:
            ``(B, n - 1)``, not negative, without gradient.
        """
        with torch.enable_grad():
            traces, y = [], X.detach().requires_grad_()
            for layer in self.layers:
                traces.append(layer.trace(y))  # type: ignore[operator]
                y = traces[-1].y
            first = self.norm(y)[:, 0]
            chosen = classifier(first).gather(1, output[:, None])
            slopes = torch.autograd.grad(chosen.sum(), [trace.att for trace in traces])
        with torch.no_grad():
            one_hot = torch.nn.functional.one_hot(output, classifier.out_features).to(y.dtype)
            R = torch.zeros_like(y)
            R[:, 0] = _through_linear(classifier, first, one_hot)
            row = torch.eye(1, y.shape[1], dtype=y.dtype, device=y.device).expand(len(y), 1, -1)
            for layer, trace, slope in zip(reversed(self.layers), reversed(traces), reversed(slopes)):
                R, R_att = layer.relprop(trace, R)  # type: ignore[operator]
                row = row + row @ (slope * R_att).clamp_min(0).mean(1)
        return row[:, 0, 1:]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` kept away from zero; 0 where b is."""
    return torch.where(b == 0, 0, a / (b + _EPS * torch.where(b < 0, -1.0, 1.0)))


def _through_linear(layer: torch.nn.Module, x: Tensor, R: Tensor) -> Tensor:
    if isinstance(layer, torch.nn.Identity):
        return R
    weight = readable(layer).weight
    parts = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    share = _divide(R, sum(rows @ part.t() for rows, part in parts))
    return sum(rows * (share @ part) for rows, part in parts)


def _through_product(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    share = _divide(R, a @ b) / 2
    return a * (share @ b.transpose(-1, -2)), b * (a.transpose(-1, -2) @ share)


def _through_sum(a: Tensor, b: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Totals are those of a bag, so that its relevance does not depend on the batch."""
    share = _divide(R, a + b)
    parts = [a * share, b * share]
    totals = [part.sum((1, 2), keepdim=True) for part in parts]
    whole = _divide(R.sum((1, 2), keepdim=True), totals[0].abs() + totals[1].abs())
    R_a, R_b = (part * _divide(total.abs() * whole, total) for part, total in zip(parts, totals))
    return R_a, R_b
