"""DTFD-MIL: pseudo-bags, features distilled from each of them, and a second tier over those."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bigbag import ops
from bigbag.bags import PackedBags, Segments
from bigbag.models.base import MILModel, feature_dim, squeeze_single_output
from bigbag.nn import AttentionPool, LazyLinear
from bigbag.nn.encoded import Encoded, take_rows, weighted_sum
from bigbag.nn.linear import readable
from bigbag.ops import distributed
from bigbag.segments import on_device

_MODES = ("maxmin", "max", "afs")
_HASH_ROWS = 512


class DTFDMIL(MILModel):
    r"""Double-tier feature distillation MIL (Zhang et al. 2022, arXiv 2203.12081).

    A bag of N instances is cut at random into M = min(n_groups, N) pseudo-bags of about equal size, which inherit its
    label. With ``a`` the attention within the pseudo-bag of K instances:

        tier 1    z_m = sum_k a_k x_k,   pseudo logits W z_m + b
        scores    K a_k W x_k            class activation of instance k: their mean is the logit but for b
        distill   "maxmin": the instances with the largest and the smallest score of each pseudo-bag (for each output)
                  "max": those with the largest;   "afs": the vectors z_m themselves
        tier 2    attention pooling of what was distilled, and a linear layer: the logits

    The losses are the criterion on the pseudo-bags, averaged over those of a bag, as ``_t1``, and on the bags as
    ``_t2``. The instance scores are the class activations, the largest where there are several outputs.

    In training, pseudo-bags come from torch's random numbers, in the same way however bags are packed. In eval the
    order that cuts a bag is a hash of its instances: always the same, whatever the order of the instances.

    Nothing is gathered but the few distilled instances: the attention values are permuted, not the features.

    Differs from torchmil, which distils *all* instances, raises without a mask, lets padding into tier 2, draws new
    pseudo-bags at every prediction, has no attention in its scores (``W x_k``), and calls the losses the other way
    round.

    Args:
        in_shape: shape of one instance; None learns it from the first input.
        att_dim: width of the attention spaces.
        n_groups: pseudo-bags of a bag.
        distill_mode: "maxmin", "max" or "afs".
        feat_ext: module applied to each instance; None for none.
        criterion: loss of the logits; None for binary cross-entropy.
        out_dim: logits per bag.

    Raises:
        ValueError: an unknown mode, n_groups < 1.
    """

    in_parts = True

    def __init__(
        self,
        in_shape: tuple[int, ...] | None = None,
        att_dim: int = 128,
        n_groups: int = 8,
        distill_mode: str = "maxmin",
        feat_ext: torch.nn.Module | None = None,
        criterion: torch.nn.Module | None = None,
        out_dim: int = 1,
    ) -> None:
        super().__init__()
        if distill_mode not in _MODES:
            raise ValueError(f"DTFDMIL: distill_mode {distill_mode!r}; expected one of {list(_MODES)}")
        if n_groups < 1:
            raise ValueError(f"DTFDMIL: n_groups must be at least 1, got {n_groups}")
        self.criterion = criterion if criterion is not None else torch.nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext if feat_ext is not None else torch.nn.Identity()
        self.n_groups = n_groups
        self.distill_mode = distill_mode
        feat_dim = feature_dim(self.feat_ext, in_shape)
        self.attention_pool = AttentionPool(in_dim=feat_dim, att_dim=att_dim)
        self.classifier = LazyLinear(feat_dim, out_dim)
        self.u_attention_pool = AttentionPool(in_dim=feat_dim, att_dim=att_dim)
        self.u_classifier = LazyLinear(feat_dim, out_dim)

    def _tiers(self, bags: PackedBags) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, C), pseudo logits (B, G, C) with zeros for groups that a bag lacks, class activations (T, C)."""
        x, segments = self.features(self.feat_ext, bags.x), bags.segments
        # In torchmil's order, and before pseudo-bags are drawn: so a seed gives its weights.
        for layer in (self.attention_pool.fc1, self.classifier, self.u_attention_pool.fc1, self.u_classifier):
            layer.materialize(x.shape[-1])
        classifier = readable(self.classifier.module)
        for pool in (self.attention_pool, self.u_attention_pool):
            pool.recompute = self.activation_checkpointing
        groups = _Groups(bags, self.n_groups, self.training)
        if isinstance(x, Encoded):
            scoring = [self.attention_pool, classifier]
            f, activations = x.map(self._score, modules=scoring)
        else:
            _, f = self.attention_pool.pool(x, segments)
            per_class = classifier.weight.expand(segments.num_bags, -1, -1)
            activations = ops.segment_dots(x, per_class, segments)
        a = ops.segment_softmax(f[groups.order], groups.segments)[groups.place]
        z = weighted_sum(a.new_zeros(len(a), groups.most).scatter(1, groups.slot[:, None], a[:, None]), x, segments)
        z = z.to(classifier.weight.dtype)
        pseudo = classifier(z) * groups.exists[..., None]
        cam = activations * (a * groups.size_of_instance)[:, None]
        if self.distill_mode == "afs":
            distilled, per_group = z.flatten(0, 1)[groups.exists.flatten()], 1
        else:
            places = self._extremes(cam.detach()[groups.order], groups.segments)
            rows = ops.take_rows(groups.order[:, None] + 1, places).squeeze(-1) - 1
            distilled, per_group = take_rows(x, rows.flatten(), segments), rows.shape[1]
        sizes = [count * per_group for count in groups.counts]
        pooled, _ = self.u_attention_pool.pool(distilled, Segments.from_sizes(sizes, x.device))
        return self.u_classifier(pooled.to(classifier.weight.dtype)), pseudo, cam

    def _score(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Attention values ``(n,)`` and products with the classifier ``(n, C)``."""
        return self.attention_pool.score(rows).squeeze(1), rows @ readable(self.classifier.module).weight.t()

    def _extremes(self, cam: Tensor, groups: Segments) -> Tensor:
        """(number of groups, C or 2 C) places with the extreme scores of each group and output; no group is empty."""
        ends = (True, False) if self.distill_mode == "maxmin" else (True,)
        return torch.cat([ops.segment_topk(cam, groups, 1, largest=end)[1].squeeze(1) for end in ends], 1)

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        return_pseudo_pred: bool = False,
        return_inst_cam: bool = False,
        return_att: bool = False,
    ) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)`` padded bags, or a :class:`~bigbag.PackedBags`.
            mask: ``(B, N)``, zero where there is no instance.
            return_pseudo_pred: also return the logits of the pseudo-bags.
            return_inst_cam: also return the instance scores; ``return_att`` is another name for it.

        Returns:
            Y_pred: ``(B,)`` logits, or ``(B, out_dim)``.
            pseudo_pred: ``(B, n_groups)``, or ``(B, n_groups, out_dim)``, zeros for pseudo-bags that a small bag lacks.
            inst_cam: ``(B, N)``; for a pack ``(T,)``.
        """
        bags = self.pack(X, mask)
        logits, pseudo, cam = self._tiers(bags)
        extras = [squeeze_single_output(pseudo)] if return_pseudo_pred else []
        if return_inst_cam or return_att:
            scores = cam.amax(-1)
            extras.append(scores if isinstance(X, PackedBags) else bags.to_padded(scores))
        Y_pred = squeeze_single_output(logits)
        return (Y_pred, *extras) if extras else Y_pred

    def compute_loss(self, Y: Tensor, X: Tensor | PackedBags, mask: Tensor | None = None) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`; ``_t1`` is the loss of the pseudo-bags, ``_t2`` that of the bags."""
        bags = self.pack(X, mask)
        logits, pseudo, _ = self._tiers(bags)
        Y_pred, name = squeeze_single_output(logits), type(self.criterion).__name__
        return Y_pred, {f"{name}_t1": self._pseudo_loss(pseudo, Y, bags), f"{name}_t2": self.bag_loss(Y_pred, Y)}

    def _pseudo_loss(self, pseudo: Tensor, Y: Tensor, bags: PackedBags) -> Tensor:
        """Mean over the bags of the mean over their pseudo-bags: one call of the criterion per number of them.

        A criterion that compares bags with each other (``spans_step``) sees all pseudo-bags in one call.
        """
        counts = [min(size, self.n_groups) for size in bags.segments.totals]
        together = getattr(self.criterion, "spans_step", False)
        loss = pseudo.sum() * 0.0
        for count in [None] if together else sorted(set(counts) - {0}):
            chosen = [bag for bag, other in enumerate(counts) if other and count in (None, other)]
            pairs = [(bag, slot) for bag in chosen for slot in range(counts[bag])]
            bag, slot = on_device(pairs, Y.device, torch.int64).view(-1, 2).unbind(1)
            of_groups = self.bag_loss(squeeze_single_output(pseudo[bag, slot]), Y[bag])
            loss = loss + of_groups * (1.0 if together else len(chosen) / bags.num_bags)
        return loss

    def predict(self, X: Tensor | PackedBags, mask: Tensor | None = None, return_inst_pred: bool = True) -> Any:
        """Bag logits and, if ``return_inst_pred``, instance scores ``(B, N)`` or ``(T,)``."""
        return self.forward(X, mask, return_inst_cam=return_inst_pred)


class _Groups:
    """Pseudo-bags: an order of the pack's instances, and how it is cut, finer than into bags.

    Attributes:
        order: (T,) row of each place in the order.
        place: (T,) place of each row.
        segments: the pseudo-bags, as cuts of the order.
        counts: pseudo-bags of each bag; ``most`` is the largest of them (at least 1).
        exists: (B, most) which pseudo-bags there are.
        slot: (T,) number of each row's pseudo-bag within its bag.
        size_of_instance: (T,) size of each row's pseudo-bag.
    """

    def __init__(self, bags: PackedBags, n_groups: int, shuffle: bool) -> None:
        device, totals = bags.device, bags.segments.totals
        orders = _random_orders(bags) if shuffle else _orders_by_content(bags)
        self.counts = [min(size, n_groups) for size in totals]
        self.most = max(1, *self.counts)
        self.exists = torch.arange(self.most, device=device) < on_device(self.counts, device)[:, None]
        # Of each bag, those on other ranks included: the number of every row's pseudo-bag.
        slots = [_slots(order, max(1, count)) for order, count in zip(orders, self.counts)]
        cuts = [0] * len(totals) if bags.parts is None else bags.parts.before
        own = [slot[first : first + size] for slot, first, size in zip(slots, cuts, bags.sizes)]
        self.slot = torch.cat(own).to(device, non_blocking=True)
        first_group = on_device([0, *accumulate(self.counts)], device)
        group = first_group[bags.segments.bag_of_instance] + self.slot
        self.order = group.argsort(stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(self.order), device=device)
        self.segments = _cut(bags, slots, self.counts)
        self.size_of_instance = self.segments.bag_sizes[group]


def _slots(order: Tensor, count: int) -> Tensor:
    """(N,) number of each row's pseudo-bag: the order cut into ``count`` runs of equal size, the first ones longer."""
    slots = torch.empty_like(order)
    runs = on_device(_run_sizes(len(order), count), order.device)
    slots[order] = torch.repeat_interleave(torch.arange(count, device=order.device), runs, output_size=len(order))
    return slots


def _run_sizes(size: int, count: int) -> list[int]:
    """Sizes of ``count`` runs, as equal as can be, the first ones longer."""
    each, longer = divmod(size, count)
    return [each + (i < longer) for i in range(count)]


def _cut(bags: PackedBags, slots: list[Tensor], counts: list[int]) -> Segments:
    """The pseudo-bags of all bags as segments, of this rank's rows where bags are shared out over ranks."""
    if bags.parts is None:
        runs = [run for size, count in zip(bags.sizes, counts) if count for run in _run_sizes(size, count)]
        return Segments.from_sizes(runs, bags.device)
    firsts, sizes = [0] * len(counts), []
    for of_rank in bags.parts.sizes:
        parts = [slot[first : first + size] for slot, first, size in zip(slots, firsts, of_rank)]
        sizes.append(
            [n for part, count in zip(parts, counts) if count for n in part.bincount(minlength=count).tolist()]
        )
        firsts = [first + size for first, size in zip(firsts, of_rank)]
    return Segments.from_sizes(sizes[bags.parts.rank], bags.device, bags.parts.with_sizes(sizes))


def _random_orders(bags: PackedBags) -> list[Tensor]:
    """A random order of the instances of each bag. One seed for all bags: alone, a bag is shuffled as in any pack."""
    seed = torch.randint(2**62, ())
    if bags.parts is not None:
        seed = distributed.all_max(seed.to(bags.device), bags.parts)
    return [torch.randperm(size, generator=torch.Generator().manual_seed(int(seed))) for size in bags.segments.totals]


@torch.no_grad()
def _orders_by_content(bags: PackedBags) -> list[Tensor]:
    """Instances of each bag ordered by a hash of their features as stored, so by chance but always the same."""
    x = bags.x.flatten(1)
    factors = torch.randint(2**31, (x.shape[1],), generator=torch.Generator().manual_seed(0), dtype=torch.int32) | 1
    factors = factors.to(x.device, non_blocking=True)
    keys = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), _HASH_ROWS):
        bits = x[start : start + _HASH_ROWS].float().view(torch.int32)
        # Products wrap around. Stored in 16 bits, the low bits of a float are zeros: fill them from the high ones.
        keys[start : start + _HASH_ROWS] = ((bits ^ (bits >> 15)) * factors).sum(1, dtype=torch.int64)
    if bags.parts is None:
        return [part.argsort(stable=True) for part in keys.split(bags.sizes)]
    longest = max(sum(sizes) for sizes in bags.parts.sizes)
    every = distributed.all_stack(torch.nn.functional.pad(keys, (0, longest - len(keys))), bags.parts)
    of_ranks = [own[: sum(sizes)].split(sizes) for own, sizes in zip(every, bags.parts.sizes)]
    return [torch.cat(parts).argsort(stable=True) for parts in zip(*of_ranks)]
