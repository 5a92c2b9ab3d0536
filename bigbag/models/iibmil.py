"""IIB-MIL: a transformer supervised by bags and, through prototypes of the classes, by instances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.models.base import MILModel, bag_classes, required_feature_dim, squeeze_single_output
from bigbag.nn import TransformerEncoder


class IIBMIL(MILModel):
    r"""Integrated instance-level and bag-level MIL (Ren et al. 2023, MICCAI, doi 10.1007/978-3-031-43987-2_54).

        H = encoder(feat_ext(X)),   y_n = w_inst h_n + b                  instance logits, and scores
        z = class token of decoder([c; H]),   logits = W z + b
        pseudo label of instance n: argmax_c p_c . h_n,   p_c prototype of class c
        loss = criterion(logits, Y) + cross-entropy of y_n against the pseudo labels, averaged over the bag

    After every optimiser step (:meth:`after_step`, called by the engine) the prototype of class c moves towards what
    bags of class c hold: ``p_c <- m p_c + (1 - m) mean over those bags of the mean of h_n over the tenth (at least one)
    of the instances that most likely are of class c``; the first time it is that mean. All ranks add up their bags.

    The decoder computes the class token alone, and attention is exact, in linear memory; the encoder's is quadratic in
    time. With ``out_dim = 1`` there are two classes. Labels that are no classes have no instance loss, as in CLAM.

    Differs from torchmil, where prototypes are updated by hand, each instance in turn, from all bags whatever their
    label, and class 0 gets the instances with the *largest* logits, so that the pseudo labels are the wrong way round.

    Args:
        in_shape: shape of one instance.
        att_dim: width of encoder and decoder.
        n_layers_encoder: layers of the encoder.
        n_layers_decoder: layers of the decoder.
        use_mlp_encoder: whether the encoder's layers have an MLP.
        use_mlp_decoder: whether the decoder's do.
        n_heads: heads of both.
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag and instance.
        proto_m: m, how much of a prototype stays at an update.

    Raises:
        ValueError: no ``in_shape``, ``proto_m`` outside [0, 1].
    """

    prototypes: Tensor
    _sums: Tensor
    _counts: Tensor

    hard_labels = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 256,
        n_layers_encoder: int = 1,
        n_layers_decoder: int = 1,
        use_mlp_encoder: bool = True,
        use_mlp_decoder: bool = False,
        n_heads: int = 4,
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        proto_m: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= proto_m <= 1:
            raise ValueError(f"IIBMIL: proto_m must be between 0 and 1, got {proto_m}")
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        feat_dim = required_feature_dim(self, in_shape)
        self.num_classes = max(2, out_dim)
        self.proto_m = proto_m
        self.register_buffer("prototypes", torch.zeros(self.num_classes, att_dim))
        self.register_buffer("_sums", torch.zeros(self.num_classes, att_dim), persistent=False)
        self.register_buffer("_counts", torch.zeros(self.num_classes), persistent=False)
        # Takes no part in torchmil either; kept for its checkpoints.
        self.feat_proj = torch.nn.Identity() if feat_dim == att_dim else torch.nn.Linear(feat_dim, att_dim)
        self.feat_proj.requires_grad_(False)
        self.encoder = TransformerEncoder(feat_dim, att_dim, att_dim, n_heads, n_layers_encoder, use_mlp_encoder)
        self.decoder = TransformerEncoder(att_dim, att_dim, att_dim, n_heads, n_layers_decoder, use_mlp_decoder)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, att_dim))
        self.inst_classifier = torch.nn.Linear(att_dim, out_dim)
        self.bag_classifier = torch.nn.Linear(att_dim, out_dim)

    def _levels(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
        """Bag logits (B, C), instance logits (T, C), encoded instances (T, att_dim)."""
        self.encoder.recompute = self.decoder.recompute = self.activation_checkpointing
        encoded = self.encoder.forward_packed(self.encode(self.feat_ext, bags.x), bags.segments)
        z = self.decoder.forward_first(*_with_token(self.cls_token[0], encoded, bags.segments))
        return self.bag_classifier(z), self.inst_classifier(encoded), encoded

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        return_inst_pred: bool = False,
        return_X_enc: bool = False,
        return_att: bool = False,
    ) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)`` padded bags, or a :class:`~bigbag.PackedBags`.
            mask: ``(B, N)``, zero where there is no instance.
            return_inst_pred: also return the instance logits; ``return_att`` is another name for it.
            return_X_enc: also return the encoded instances.

        Returns:
            Y_pred: ``(B,)`` logits, or ``(B, out_dim)``.
            y_inst_pred: ``(B, N)``, for a pack ``(T,)``; the largest where there are several outputs.
            X_enc: ``(B, N, att_dim)``; for a pack ``(T, att_dim)``.
        """
        bags = self.pack(X, mask)
        logits, y, encoded = self._levels(bags)
        extras = [y.amax(-1)] if return_inst_pred or return_att else []
        extras += [encoded] if return_X_enc else []
        if not isinstance(X, PackedBags):
            extras = [bags.to_padded(extra) for extra in extras]
        Y_pred = squeeze_single_output(logits)
        return (Y_pred, *extras) if extras else Y_pred

    def compute_loss(self, Y: Tensor, X: Tensor | PackedBags, mask: Tensor | None = None) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`, with the instance loss as "InstLoss".

        In training, its backward pass notes what :meth:`after_step` needs: a pack that only fills a rank's step, and
        gets no gradient, is left out.
        """
        bags = self.pack(X, mask)
        logits, y, encoded = self._levels(bags)
        Y_pred = squeeze_single_output(logits)
        losses = {type(self.criterion).__name__: self.bag_loss(Y_pred, Y)}
        classes = bag_classes(self.criterion, Y, self.num_classes)
        if classes is not None:
            losses["InstLoss"] = loss = self._inst_loss(encoded.detach(), y, bags.segments)
            if self.training and loss.requires_grad:
                sums, counts = self._class_means(encoded.detach(), y.detach(), bags.segments, classes)

                def note(grad: Tensor) -> None:
                    self._sums += sums * (grad != 0)
                    self._counts += counts * (grad != 0)

                loss.register_hook(note)
        return Y_pred, losses

    def _inst_loss(self, encoded: Tensor, y: Tensor, segments: Segments) -> Tensor:
        """Mean over the bags of the mean cross-entropy of the instances against the classes of their prototypes."""
        pseudo = (encoded.to(self.prototypes.dtype) @ self.prototypes.t()).argmax(1)
        y = y.float()
        if y.shape[1] == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(y[:, 0], pseudo.float(), reduction="none")
        else:
            loss = torch.nn.functional.cross_entropy(y, pseudo, reduction="none")
        return ops.segment_mean(loss, segments).sum() / max(1, segments.num_bags)

    @torch.no_grad()
    def _class_means(self, encoded: Tensor, y: Tensor, segments: Segments, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the bags of each class of the mean of their likeliest tenth (C, att_dim); number of bags (C,)."""
        scores = torch.cat([-y, y], 1) if y.shape[1] == 1 else torch.log_softmax(y.float(), 1)
        most = max(1, max(segments.sizes, default=0) // 10)
        _, index, _ = ops.segment_topk(scores, segments, most)
        share = (segments.offsets.diff() // 10).clamp_min(1)
        weights = (torch.arange(most, device=y.device) < share[:, None]) / share[:, None]
        # One row more takes what bags lack.
        chosen = scores.new_zeros(len(scores) + 1, self.num_classes, dtype=torch.float32)
        rows = torch.where(index < 0, len(scores), index).flatten(0, 1)
        chosen.scatter_(0, rows, weights[..., None].expand(index.shape).flatten(0, 1))
        means = ops.segment_pool(chosen[:-1], encoded, segments).float()
        used = (classes & (segments.offsets.diff() > 0)[:, None]).float()
        return torch.einsum("bc,bcd->cd", used, means), used.sum(0)

    @torch.no_grad()
    def update_prototypes(
        self, X: Tensor | PackedBags, mask: Tensor | None = None, proto_m: float = 0.9, Y: Tensor | None = None
    ) -> None:
        """Move the prototypes by the bags of a padded batch or of a pack; training does so by itself.

        Args:
            X: ``(B, N, ...)`` padded bags, or a pack.
            mask: ``(B, N)``, zero where there is no instance.
            proto_m: how much of a prototype stays.
            Y: labels of the bags; None takes every bag for every class.
        """
        bags = self.pack(X, mask)
        _, y, encoded = self._levels(bags)
        everything = torch.ones(bags.num_bags, self.num_classes, dtype=torch.bool, device=bags.device)
        classes = everything if Y is None else bag_classes(self.criterion, Y, self.num_classes)
        if classes is None:
            raise ValueError(f"IIBMIL.update_prototypes: labels for {type(self.criterion).__name__} are no classes")
        self._move(*self._class_means(encoded, y, bags.segments, classes), proto_m)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the prototypes by the bags of the step, those of all ranks together."""
        total = torch.cat([self._sums, self._counts[:, None]], 1)
        self._sums.zero_()
        self._counts.zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        self._move(total[:, :-1], total[:, -1], self.proto_m)

    def _move(self, sums: Tensor, counts: Tensor, proto_m: float) -> None:
        mean = sums / counts.clamp_min(1)[:, None]
        untouched = (self.prototypes == 0).all(1, keepdim=True)
        moved = torch.where(untouched, mean, proto_m * self.prototypes + (1 - proto_m) * mean)
        self.prototypes.copy_(torch.where(counts[:, None] > 0, moved, self.prototypes))


def _with_token(token: Tensor, x: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """Put the token (1, D) before the rows of every bag."""
    longer = Segments.from_sizes([size + 1 for size in segments.sizes], x.device)
    rows = torch.arange(len(x), device=x.device) + segments.bag_of_instance + 1
    out = x.new_empty(len(x) + segments.num_bags, x.shape[1])
    out = out.index_copy(0, longer.offsets[:-1], token.to(x.dtype).expand(segments.num_bags, -1))
    return out.index_copy(0, rows, x), longer
