"""GTP: a graph convolution, min-cut pooling to a few clusters, and a transformer over the clusters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbag import ops
from bigbag.adjacency import Adjacency
from bigbag.bags import PackedBags, Segments
from bigbag.models.base import GraphMILModel, required_feature_dim, squeeze_single_output
from bigbag.nn.graph import GCNConv
from bigbag.nn.mincut import mincut_losses
from bigbag.nn.relprop import TransformerEncoder
from bigbag.ops.registry import compute_dtype

_ROWS = {"cpu": 2048, "cuda": 65_536}
_COLUMNS = 256
# Of so many chunks one is kept where the others are computed again, which takes 2 D (D + C) FLOP per row beside the
# 4 D^2 + 12 D C of a step: a step takes 1.3 times as long, not 1.4.
_KEPT_OF = 4
_BAGS = 64


class GTP(GraphMILModel):
    r"""Graph-transformer (Zheng et al. 2022, IEEE TMI, arXiv 2205.09671).

    ``H = relu(W (A X + X) + b)`` with ``X = feat_ext(X)``; ``S = softmax(W_c H + b_c)`` assigns the instances to
    clusters; ``Z = Transformer([cls; S^T H])``; the logits are a linear map of the first row of Z. The loss is the sum
    of the criterion, "MinCutLoss" and "OrthoLoss" (:func:`bigbag.nn.mincut.mincut_losses`).

    The instance scores are the paper's GraphCAM ``S c``: c is how much each cluster speaks for the logit, or for the
    largest of several (:meth:`bigbag.nn.relprop.TransformerEncoder.class_attribution`). They are not negative, computed
    in float64 without dropout, and carry no gradient.

    Linear in the instances and the edges: beside the bag, ``A X + X``, H and S are kept; with
    ``activation_checkpointing`` three quarters of H are computed again. Differs from torchmil, whose CAM multiplies by
    the scores before the softmax (which a constant added to a row changes, though it changes nothing in the model),
    weighs relevance without the gradient, multiplies the layers entry by entry, drops the relevance of the attention
    below the last layer, and depends on the other bags of the batch; where edges to padding count in the cut; and where
    a bag without edges has the loss NaN.

    Args:
        in_shape: shape of one instance.
        att_dim: width of the transformer; ``n_heads`` must divide it.
        n_clusters: C.
        n_layers: layers of the transformer.
        n_heads: heads of the transformer.
        use_mlp: whether its layers have MLPs.
        dropout: of the transformer.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        att_dim: int = 512,
        n_clusters: int = 100,
        n_layers: int = 1,
        n_heads: int = 8,
        use_mlp: bool = True,
        dropout: float = 0.0,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        width = required_feature_dim(self, in_shape)
        self.gcn_conv = GCNConv(width, width, add_self_loops=True, learn_weights=True, activation=torch.nn.ReLU())
        self.cluster_proj = torch.nn.Linear(width, n_clusters)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_encoder = TransformerEncoder(width, width, att_dim, n_heads, n_layers, use_mlp, dropout)
        self.classifier = torch.nn.Linear(width, out_dim)

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        Y_pred, tokens, s = self._through(bags)
        return (Y_pred, self._cam(tokens, s, Y_pred, bags.segments)) if return_att else Y_pred

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_cam: bool = False,
        return_loss: bool = False,
        return_att: bool = False,
    ) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)``, or a pack, which brings its own graph.
            adj: ``(B, N, N)``, dense or sparse COO.
            mask: ``(B, N)``, zero where there is no instance.
            return_cam: also return the instance scores, as does ``return_att``.
            return_loss: also return the losses of the pooling.

        Returns:
            Y_pred: ``(B,)`` or ``(B, out_dim)``.
            cam: ``(B, N)``, or ``(T,)`` for a pack.
            losses: "MinCutLoss" and "OrthoLoss", each the mean over the bags.
        """
        bags = self.pack(X, mask, adj)
        Y_pred, tokens, s = self._through(bags)
        outputs: list[Any] = [Y_pred]
        if return_cam or return_att:
            cam = self._cam(tokens, s, Y_pred, bags.segments)
            outputs.append(cam if isinstance(X, PackedBags) else bags.to_padded(cam))
        if return_loss:
            outputs.append(self._pooling_losses(s, bags))
        return tuple(outputs) if len(outputs) > 1 else Y_pred

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, adj: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`, with the losses of the pooling."""
        Y_pred, losses = self.forward(X, adj, mask, return_loss=True)
        return Y_pred, {type(self.criterion).__name__: self.bag_loss(Y_pred, Y), **losses}

    def _through(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, tokens ``(B, 1 + C, D)``, assignments ``(T, C)``."""
        assert bags.adj is not None
        s, clusters = self._assign(self.encode(self.feat_ext, bags.x), bags.adj, bags.segments)
        cls_token = self.cls_token.to(clusters.dtype).expand(bags.num_bags, -1, -1)
        tokens = torch.cat([cls_token, clusters], dim=1)
        if self.activation_checkpointing and torch.is_grad_enabled():
            z = checkpoint(self.transformer_encoder, tokens, use_reentrant=False)
        else:
            z = self.transformer_encoder(tokens)
        return squeeze_single_output(self.classifier(z[:, 0])), tokens, s

    def _assign(self, x: Tensor, adj: Adjacency, segments: Segments) -> tuple[Tensor, Tensor]:
        """Assignments ``(T, C)`` and the features of the clusters ``(B, C, D)``, chunk by chunk of the rows of H."""
        mixed = _add_neighbors(x, adj, compute_dtype(self.cluster_proj.weight))
        chunks, first_bags = _cut(segments, _ROWS.get(x.device.type, _ROWS["cuda"]))
        found = []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, rows in enumerate(mixed.split([chunk.num_instances for chunk in chunks])):
            chunk = chunks[i]
            if recompute and (i + 1) % _KEPT_OF:
                found.append(checkpoint(self._assign_rows, rows, chunk, use_reentrant=False))
            else:
                found.append(self._assign_rows(rows, chunk))
        s, sums = (torch.cat(values) for values in zip(*found))
        if len(sums) == segments.num_bags:
            return s, sums
        # The chunks of a bag follow each other.
        chunks_of_bag = [0] * segments.num_bags
        for chunk, first in zip(chunks, first_bags):
            for bag in range(first, first + chunk.num_bags):
                chunks_of_bag[bag] += 1
        return s, ops.segment_sum(sums, Segments.from_sizes(chunks_of_bag, x.device))

    def _assign_rows(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        h = self.gcn_conv.finish(self.gcn_conv.fc(x))
        scores = self.cluster_proj(h)
        s = torch.softmax(scores if scores.dtype == torch.float64 else scores.float(), dim=-1)
        # One product per bag, in the precision of h.
        pairs = zip(_split(s.to(h.dtype), segments), _split(h, segments))
        sums = [part.t() @ rows for part, rows in pairs]
        return s, (torch.stack(sums) if sums else h.new_zeros(0, s.shape[1], h.shape[1])).to(s.dtype)

    def _pooling_losses(self, s: Tensor, bags: PackedBags) -> dict[str, Tensor]:
        assert bags.adj is not None
        cut, ortho = mincut_losses(s, bags.adj, bags.segments)
        return {"MinCutLoss": cut.mean(), "OrthoLoss": ortho.mean()}

    def _cam(self, tokens: Tensor, s: Tensor, Y_pred: Tensor, segments: Segments) -> Tensor:
        """``(T,)`` instance scores. Ratios of small numbers: in float64, for a few bags at a time."""
        # Tensors made in inference mode would not be differentiated.
        with torch.inference_mode(False), torch.autocast(tokens.device.type, enabled=False):
            encoder = copy.deepcopy(self.transformer_encoder).double().eval()
            classifier = copy.deepcopy(self.classifier).double()
            tokens = tokens.detach().to(torch.float64, copy=True)
            outputs = Y_pred.detach().reshape(segments.num_bags, -1).argmax(1)
            parts = zip(tokens.split(_BAGS), outputs.split(_BAGS))
            cams = torch.cat([encoder.class_attribution(part, classifier, output) for part, output in parts])
        return ops.segment_dots(s.detach(), cams[:, None].to(s.dtype), segments).squeeze(1)


def _add_neighbors(x: Tensor, adj: Adjacency, dtype: torch.dtype) -> Tensor:
    """``A X + X`` in ``dtype``; x stored in another is converted a few columns at a time."""
    if x.dtype == dtype:
        return ops.spmm(adj, x).add_(x)
    mixed = torch.empty(x.shape, dtype=dtype, device=x.device)
    for start in range(0, x.shape[1], _COLUMNS):
        columns = x[:, start : start + _COLUMNS].to(dtype)
        mixed[:, start : start + _COLUMNS] = ops.spmm(adj, columns).add_(columns)
    return mixed


def _split(x: Tensor, segments: Segments) -> Sequence[Tensor]:
    # The gradient of a split is a copy.
    return [x] if segments.num_bags == 1 else x.split(segments.sizes)


def _cut(segments: Segments, rows: int) -> tuple[list[Segments], list[int]]:
    """Chunks of at most ``rows`` rows, cut into the parts of bags that they hold; and the first bag of each."""
    sizes: list[list[int]] = [[]]
    first_bags, room = [0], rows
    for bag, size in enumerate(segments.sizes):
        while size > room:
            if room:
                sizes[-1].append(room)
            size -= room
            sizes.append([])
            first_bags.append(bag)
            room = rows
        sizes[-1].append(size)
        room -= size
    return [Segments.from_sizes(part, segments.offsets.device) for part in sizes], first_bags
