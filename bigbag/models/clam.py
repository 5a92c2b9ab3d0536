"""CLAM: attention pooling with clustering constraints on the instances that the attention picks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.models.base import MILModel, bag_classes, feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, LazyLinear, SmoothTop1SVM
from bigbag.nn.encoded import Encoded, take_rows
from bigbag.nn.linear import readable

_INSTANCE_LOSSES: dict[str, Callable[[], torch.nn.Module]] = {
    "SmoothTop1SVM": partial(SmoothTop1SVM, n_classes=2),
    "BCEWithLogitsLoss": torch.nn.BCEWithLogitsLoss,
}


class CLAM_SB(MILModel):
    r"""Clustering-constrained attention MIL with a single attention branch (Lu et al. 2021, arXiv 2004.09666).

    The bag is that of ABMIL. For each class c an instance classifier ``c_c`` (D to 2) learns to tell the instances with
    the largest attention from those with the smallest, by the labels that the bag's class Y gives them:

        l_in  = mean over top k and bottom k of l(c_Y(x), 1 for the top, 0 for the bottom)
        l_out = mean over the other classes c and the top k of l(c_c(x), 0)
        loss  = criterion + l_in + l_out,  or  bag_weight criterion + (1 - bag_weight) (l_in + l_out)

    A bag of N < 2k instances is split in halves: the ceil(N / 2) with the largest attention count as top alone, the
    others as bottom alone, so that no instance gets both labels. A bag with several labels (multi-label) takes the
    mean of ``l_in`` over its classes. Labels that are no classes (those of a regression loss, or several per bag that
    are not multi-label) have no instance loss.

    Differs from torchmil: the instance loss honours the mask, is the mean over the bags, not their sum, and that of
    :class:`~bigbag.nn.SmoothTop1SVM`; 2k > N as above.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        att_dim: width of the attention space.
        att_act: "tanh", "relu" or "gelu".
        k_sample: k, instances taken at either end.
        gated: use gated attention.
        inst_loss_name: l, "SmoothTop1SVM" or "BCEWithLogitsLoss" (of either score against the class's one or zero).
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag; 1 stands for two classes.
        bag_weight: weight of the criterion against the instance loss, 0 to 1 (paper: 0.7); None adds them up.

    Raises:
        ValueError: an unknown instance loss, a ``bag_weight`` outside [0, 1], k < 1.
    """

    in_parts = True
    hard_labels = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        att_act: str = "tanh",
        k_sample: int = 10,
        gated: bool = False,
        inst_loss_name: str = "SmoothTop1SVM",
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        bag_weight: float | None = None,
    ) -> None:
        super().__init__()
        if inst_loss_name not in _INSTANCE_LOSSES:
            raise ValueError(
                f"{type(self).__name__}: inst_loss_name {inst_loss_name!r}; expected one of {list(_INSTANCE_LOSSES)}"
            )
        if bag_weight is not None and not 0 <= bag_weight <= 1:
            raise ValueError(f"{type(self).__name__}: bag_weight must be between 0 and 1, got {bag_weight}")
        if k_sample < 1:
            raise ValueError(f"{type(self).__name__}: k_sample must be at least 1, got {k_sample}")
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        self.k_sample = k_sample
        self.bag_weight = bag_weight
        self.subtyping = True
        self.num_classes = max(2, out_dim)
        feat_dim = feature_dim(self.feat_ext, in_shape)
        self._build_bag_classifier(feat_dim, att_dim, att_act, gated, out_dim)
        self.inst_classifiers = torch.nn.ModuleList(LazyLinear(feat_dim, 2) for _ in range(self.num_classes))
        self.inst_loss_fn = _INSTANCE_LOSSES[inst_loss_name]()

    def _build_bag_classifier(
        self, feat_dim: int | None, att_dim: int, att_act: str, gated: bool, out_dim: int
    ) -> None:
        self.pool = AttentionPool(in_dim=feat_dim, att_dim=att_dim, act=att_act, gated=gated)
        self.classifier = LazyLinear(feat_dim, out_dim)

    def _classify(self, z: Tensor) -> Tensor:
        return squeeze_single_output(self.classifier(z))

    def _instance_scores(self, f: Tensor, Y_pred: Tensor, segments: Segments) -> Tensor:
        """(T,) scores from the attention values ``f`` of the pool."""
        return f

    def _attend(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor | Encoded]:
        """Logits, attention values of the pool, features."""
        self.pool.recompute = self.activation_checkpointing
        x = self.features(self.feat_ext, bags.x)
        z, f = self.pool.pool(x, bags.segments)
        return self._classify(z), f, x

    def forward_bags(self, bags: PackedBags, return_att: bool = False):  # type: ignore[no-untyped-def]
        Y_pred, f, _ = self._attend(bags)
        return (Y_pred, self._instance_scores(f, Y_pred, bags.segments)) if return_att else Y_pred

    def forward(
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        return_att: bool = False,
        return_emb: bool = False,
    ) -> Any:
        """As :meth:`MILModel.forward`; ``return_emb`` also returns the features, ``(B, N, D)`` or ``(T, D)``, last."""
        if not return_emb:
            return self.run(X, mask, return_att=return_att)
        bags = self.pack(X, mask)
        Y_pred, f, x = self._attend(bags)
        x = x if isinstance(x, Tensor) else x.materialize()
        extras = (self._instance_scores(f, Y_pred, bags.segments), x) if return_att else (x,)
        return Y_pred, *(extras if isinstance(X, PackedBags) else (bags.to_padded(extra) for extra in extras))

    def compute_loss(self, Y: Tensor, X: Tensor | PackedBags, mask: Tensor | None = None) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`, with the instance loss as "InstLoss"."""
        bags = self.pack(X, mask)
        Y_pred, f, x = self._attend(bags)
        losses = {type(self.criterion).__name__: self.bag_loss(Y_pred, Y)}
        classes = bag_classes(self.criterion, Y, self.num_classes)
        if classes is not None:
            losses["InstLoss"] = self._instance_loss(f, x, bags.segments, classes)
            if self.bag_weight is not None:
                weights = (self.bag_weight, 1 - self.bag_weight)
                losses = {name: weight * loss for weight, (name, loss) in zip(weights, losses.items())}
        return Y_pred, losses

    def compute_inst_loss(self, att: Tensor, emb: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Instance loss of a padded batch: ``att (B, N)``, ``emb (B, N, D)``, class of each bag, ``mask (B, N)``."""
        bags = PackedBags.from_padded(emb, mask)
        classes = labels.long()[:, None] == torch.arange(self.num_classes, device=labels.device)
        return self._instance_loss(PackedBags.from_padded(att, mask).x, bags.x, bags.segments, classes)

    def inst_eval(
        self, att: Tensor, emb: Tensor, classifier: torch.nn.Module, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``l_in`` of one bag, ``att (N,)`` and ``emb (N, D)``, with the class's ``classifier``.

        Returns:
            loss: scalar.
            predictions: ``(2k, 1)`` and
            targets: ``(2k,)`` of the min(k, N) top and as many bottom instances; where 2k > N some are both, and the
            loss counts them once.
        """
        return self._eval_bag(att, emb, classifier, mask, bottom=True)

    def inst_eval_out(
        self, att: Tensor, emb: Tensor, classifier: torch.nn.Module, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``l_out`` of one bag, with the ``classifier`` of another class; as :meth:`inst_eval`, of the top alone."""
        return self._eval_bag(att, emb, classifier, mask, bottom=False)

    def _eval_bag(
        self, att: Tensor, emb: Tensor, classifier: torch.nn.Module, mask: Tensor | None, bottom: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = None if mask is None else mask[None]
        bags, k = PackedBags.from_padded(emb[None], mask), self.k_sample
        f = PackedBags.from_padded(att[None], mask).x
        logits, counts = (part[0] for part in self._select(f, bags.x, bags.segments, [classifier]))
        targets = (torch.arange(2 * k, device=emb.device) < k).long() * int(bottom)
        taken = [*range(min(k, bags.num_instances))]
        taken += [k + rank for rank in taken] if bottom else []
        losses = self._inst_losses(logits[:, 0], targets)[taken]
        loss = _masked_mean(losses[None], counts[None, taken])[0]
        return loss, logits[taken, 0].argmax(-1, keepdim=True), targets[taken]

    def _instance_loss(self, f: Tensor, x: Tensor | Encoded, segments: Segments, classes: Tensor) -> Tensor:
        """Mean over the bags of ``l_in + l_out``.

        Args:
            f: (T,), or (T, C) for an attention per class.
            x: (T, D) features.
            segments: how the instances are cut into B bags.
            classes: (B, C) bool, the classes of each bag.
        """
        k = self.k_sample
        logits, counts = self._select(f, x, segments, self.inst_classifiers)
        top = torch.arange(2 * k, device=x.device) < k
        of_class = _masked_mean(self._inst_losses(logits, top[:, None].expand(logits.shape[:-1])), counts)
        loss = _masked_mean(of_class, classes)
        if self.subtyping:
            none = torch.zeros_like(logits[:, :k, :, 0])
            loss = loss + _masked_mean(_masked_mean(self._inst_losses(logits[:, :k], none), counts[:, :k]), ~classes)
        return loss.sum() / max(1, segments.num_bags)

    def _select(self, f: Tensor, x: Tensor | Encoded, segments: Segments, classifiers: Any) -> tuple[Tensor, Tensor]:
        """Scores (B, 2k, C, 2) by C classifiers of the k top, then the k bottom instances; which count (B, 2k)."""
        f, k = (f if f.dim() > 1 else f[:, None]).detach(), self.k_sample
        ends = [ops.segment_topk(f, segments, k, largest=largest)[1] for largest in (True, False)]
        rows = take_rows(x, torch.cat(ends, 1), segments)
        layers = [layer.materialize(x.shape[-1]) if isinstance(layer, LazyLinear) else layer for layer in classifiers]
        layers = [readable(layer) for layer in layers]
        weight, bias = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        # One attention for all classes: h = 1, g = C. An attention per class: h = C, g = 1.
        weight = weight.view(f.shape[1], -1, *weight.shape[1:])
        logits = torch.einsum("bkhd,hgod->bkhgo", rows.to(weight.dtype), weight).flatten(2, 3) + bias
        sizes, rank = segments.bag_sizes[:, None], torch.arange(k, device=x.device)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide, torch.cat([rank < (sizes + 1) // 2, rank < sizes // 2], 1)

    def _inst_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(..., 2) scores and (...) targets 0 or 1 to (...) losses."""
        if isinstance(self.inst_loss_fn, SmoothTop1SVM):
            return self.inst_loss_fn.per_sample(logits, targets)
        one_hot = torch.nn.functional.one_hot(targets.long(), 2).to(logits.dtype)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").mean(-1)


class CLAM_MB(CLAM_SB):
    r"""CLAM with an attention branch and a bag classifier per class (Lu et al. 2021, arXiv 2004.09666).

    The branches share the hidden layer of the attention: ``z_c`` pools with the attention values ``f_c``, the logit of
    class c is ``w_c z_c + b_c``, and the instance loss of class c takes top and bottom by ``f_c``. With ``out_dim = 1``
    there are two branches, and the logit is that of class 1 less that of class 0. The instance scores are the attention
    values of class 1, or with ``out_dim > 1`` those of the class with the largest logit. torchmil has no such model.

    Args:
        in_shape, att_dim, att_act, k_sample, gated, inst_loss_name, feat_ext, criterion, out_dim, bag_weight: as in
            :class:`CLAM_SB`; here ``bag_weight`` is the paper's by default.
        subtyping: classes exclude each other, so that ``l_out`` counts too; otherwise the instance loss is ``l_in``.

    Raises:
        ValueError: as :class:`CLAM_SB`.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        att_act: str = "tanh",
        k_sample: int = 10,
        gated: bool = False,
        inst_loss_name: str = "SmoothTop1SVM",
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
        bag_weight: float | None = 0.7,
        subtyping: bool = False,
    ) -> None:
        super().__init__(
            in_shape, att_dim, att_act, k_sample, gated, inst_loss_name, feat_ext, criterion, out_dim, bag_weight
        )
        self.subtyping = subtyping

    def _build_bag_classifier(
        self, feat_dim: int | None, att_dim: int, att_act: str, gated: bool, out_dim: int
    ) -> None:
        self.pool = AttentionPool(feat_dim, att_dim, att_act, gated, n_heads=self.num_classes)
        self.classifiers = torch.nn.ModuleList(LazyLinear(feat_dim, 1) for _ in range(self.num_classes))
        self.out_dim = out_dim

    def _classify(self, z: Tensor) -> Tensor:
        logits = torch.cat([classifier(z[:, c]) for c, classifier in enumerate(self.classifiers)], 1)
        return logits[:, 1] - logits[:, 0] if self.out_dim == 1 else logits

    def _instance_scores(self, f: Tensor, Y_pred: Tensor, segments: Segments) -> Tensor:
        if self.out_dim == 1:
            return f[:, 1]
        return f.gather(1, Y_pred.argmax(1)[segments.bag_of_instance, None]).squeeze(1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over axis 1 of the places that ``mask`` (B, n) marks; 0 where there are none."""
    weights = mask.to(values.dtype).reshape(*mask.shape, *[1] * (values.dim() - 2))
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)
