"""The base class of all models: packs at entry, unpads at exit, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigbag.bags import PackedBags
from bigbag.nn import get_feat_dim
from bigbag.nn.encoded import Encoded, refuse_batch_statistics

_REGRESSION = (torch.nn.MSELoss, torch.nn.L1Loss, torch.nn.SmoothL1Loss, torch.nn.HuberLoss)
_REMEDIES = {
    "adj": "pass the adjacency of the batch, or pack the bags with a graph (data.graph in the config)",
    "coords": "pass the coordinates of the batch, or pack bags that have coordinates",
}


class MILModel(torch.nn.Module):
    """A model of bags.

    A subclass defines :meth:`forward_bags`, which computes on a pack, and a ``forward`` with torchmil's arguments that
    calls :meth:`run`. So a bag gives the same result alone, padded in a batch, or packed with others.

    Attributes:
        criterion: loss of the bag logits against the labels.
        activation_checkpointing: recompute activations in the backward pass instead of storing them.
        chunk_instances: instances that go through ``feat_ext`` together where they do so in chunks; None: as many as
            2048 (GPU: 16,384) rows of 1024 numbers hold.
        in_parts: whether bags may be shared out over several ranks (``parallel.bag``).
        needs: fields of a pack that the model cannot do without, beside ``x``: "adj", "coords".
        hard_labels: True where a loss of the model takes labels for classes, so that they can't be mixed.
    """

    criterion: torch.nn.Module
    activation_checkpointing: bool = False
    chunk_instances: int | None = None
    needs: ClassVar[tuple[str, ...]] = ()
    in_parts: ClassVar[bool] = False
    hard_labels: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward_bags(self, bags: PackedBags, return_att: bool = False) -> Any:
        """Compute on a pack.

        Args:
            bags: B bags of T instances in all.
            return_att: also return a value per instance.

        Returns:
            Y_pred: ``(B,)`` logits, or ``(B, out_dim)`` where ``out_dim > 1``.
            att: ``(T,)`` attention or instance scores, if ``return_att``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward_bags(bags, return_att)")

    def forward(self, X: Tensor | PackedBags, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """Bag logits of a padded batch or of a pack.

        Args:
            X: ``(B, N, ...)`` padded bags, or a :class:`~bigbag.PackedBags`.
            mask: ``(B, N)``, zero where there is no instance; None: everywhere is one.
            return_att: also return a value per instance.

        Returns:
            Y_pred: ``(B,)`` logits, or ``(B, out_dim)``.
            att: ``(B, N)``, or ``(T,)`` for a pack; only if ``return_att``.
        """
        return self.run(X, mask, return_att=return_att)

    def run(
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        adj: Tensor | None = None,
        coords: Tensor | None = None,
        return_att: bool = False,
    ) -> Any:
        """:meth:`forward_bags` on a pack or, packed at entry and unpadded at exit, on a padded batch."""
        bags = self.pack(X, mask, adj, coords)
        if isinstance(X, PackedBags) or not return_att:
            return self.forward_bags(bags, return_att)
        Y_pred, att = self.forward_bags(bags, True)
        return Y_pred, bags.to_padded(att)

    def pack(
        self,
        X: Tensor | PackedBags,
        mask: Tensor | None = None,
        adj: Tensor | None = None,
        coords: Tensor | None = None,
    ) -> PackedBags:
        """The pack of a padded batch, or the pack itself; with everything that the model :attr:`needs`.

        Raises:
            ValueError: a field that the model needs is missing, or bags shared out over ranks, which it can't take.
        """
        bags = X if isinstance(X, PackedBags) else PackedBags.from_padded(X, mask, adj=adj, coords=coords)
        self.check_parts(bags)
        for name in self.needs:
            if getattr(bags, name) is None:
                raise ValueError(f"{type(self).__name__} needs {name}: {_REMEDIES[name]}")
        return bags

    def check_parts(self, bags: PackedBags) -> None:
        """Refuse bags shared out over ranks where the model can't take them."""
        if bags.parts is not None and not self.in_parts:
            raise ValueError(
                f"{type(self).__name__} computes on whole bags, but these are shared out over {bags.parts.num_ranks} "
                "ranks: set parallel.bag to 1, or take a model that has in_parts, such as ABMIL or CLAM_SB"
            )
        if bags.parts is not None:
            refuse_batch_statistics(self)

    def compute_loss(self, Y: Tensor, X: Tensor | PackedBags, *args: Any, **kwargs: Any) -> Any:
        """Logits and losses, each the mean over the bags.

        Args:
            Y: ``(B,)`` labels, or ``(B, out_dim)``.
            X: as in :meth:`forward`, as are the arguments after it.

        Returns:
            Y_pred: ``(B,)`` or ``(B, out_dim)`` logits.
            losses: name to scalar; their sum is what training minimises. Empty for a model without a ``criterion``.
        """
        Y_pred = self.forward(X, *args, **kwargs)
        if getattr(self, "criterion", None) is None:
            return Y_pred, {}
        return Y_pred, {type(self.criterion).__name__: self.bag_loss(Y_pred, Y)}

    def predict(self, X: Tensor | PackedBags, mask: Tensor | None = None, return_inst_pred: bool = True) -> Any:
        """Bag logits and, if ``return_inst_pred``, instance scores; arguments and shapes as in :meth:`forward`."""
        return self.forward(X, mask, return_att=return_inst_pred)

    def after_step(self) -> None:
        """Called by the training loop after every optimiser step; for state that is not learned by gradients.

        The loop calls it on every rank, with the updated weights, outside of autograd's graph, and once per step
        however many packs the step had. A model may rely on having run ``compute_loss`` in training mode at least once
        since the last call, and may use collectives: all ranks are in it. What it changes must come out equal on all
        ranks, and belongs in buffers, so that a checkpoint holds it. The default does nothing.
        """

    def bag_loss(self, Y_pred: Tensor, Y: Tensor) -> Tensor:
        """The criterion in fp32 (fp64 for fp64), with labels in the dtype it asks for: class indices or floats."""
        wants_indices = isinstance(self.criterion, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss)
        wide = Y_pred if Y_pred.dtype == torch.float64 else Y_pred.float()
        return self.criterion(wide, Y.long() if wants_indices else Y.to(wide.dtype))

    def encode(self, feat_ext: torch.nn.Module, x: Tensor) -> Tensor:
        """Apply a row-wise feature extractor to the instances of a pack.

        Instances stored narrower than the weights are widened here, or, where there is no feature extractor, by the
        operators chunk by chunk. With ``activation_checkpointing``, and without gradients, the rows go through in
        chunks of which only the inputs are kept.

        Raises:
            ValueError: chunks, and batch normalisation in training mode.
        """
        features = self.features(feat_ext, x)
        return features if isinstance(features, Tensor) else features.materialize()

    def features(self, feat_ext: torch.nn.Module, x: Tensor) -> Tensor | Encoded:
        """As :meth:`encode`, for models that can do without the features of all rows: computed when they are needed."""
        if isinstance(feat_ext, torch.nn.Identity):
            return x
        if self.activation_checkpointing or not torch.is_grad_enabled():
            refuse_batch_statistics(feat_ext)
            return Encoded(x, feat_ext, self.chunk_instances)
        dtype = next((p.dtype for p in feat_ext.parameters()), x.dtype)
        return feat_ext(x.to(dtype))


class GraphMILModel(MILModel):
    """A model that computes on a graph over the instances, with torchmil's order of arguments: X, adj, mask."""

    needs = ("adj",)

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_att: bool = False,
    ) -> Any:
        """As :meth:`MILModel.forward`, with ``adj`` ``(B, N, N)``, dense or sparse COO; a pack brings its own."""
        return self.run(X, mask, adj=adj, return_att=return_att)

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, adj: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """As :meth:`MILModel.compute_loss`."""
        return super().compute_loss(Y, X, adj, mask)

    def predict(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        adj: Tensor | None = None,
        mask: Tensor | None = None,
        return_inst_pred: bool = True,
    ) -> Any:
        """As :meth:`MILModel.predict`."""
        return self.forward(X, adj, mask, return_att=return_inst_pred)


class CoordsMILModel(MILModel):
    """A model that computes with positions; arguments as torchmil's X, coords, and last the mask, which it lacks."""

    needs = ("coords",)

    def forward(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        coords: Tensor | None = None,
        return_att: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """As :meth:`MILModel.forward`, with ``coords`` ``(B, N, 2)``; a pack brings its own."""
        return self.run(X, mask, coords=coords, return_att=return_att)

    def compute_loss(
        self, Y: Tensor, X: Tensor | PackedBags, coords: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        """As :meth:`MILModel.compute_loss`."""
        return super().compute_loss(Y, X, coords, mask=mask)

    def predict(  # type: ignore[override]
        self,
        X: Tensor | PackedBags,
        coords: Tensor | None = None,
        return_inst_pred: bool = True,
        mask: Tensor | None = None,
    ) -> Any:
        """As :meth:`MILModel.predict`."""
        return self.forward(X, coords, return_inst_pred, mask)


class MILModelWrapper(MILModel):
    """Calls a model with those entries of a bag that it takes, so that all models have one interface.

    Args:
        model: the model to wrap.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, bag: Mapping[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """``model.forward`` on the entries of ``bag`` that it has arguments for."""
        return self.model(**_entries_for(self.model.forward, bag), **kwargs)

    def compute_loss(self, bag: Mapping[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """``model.compute_loss`` on the entries of ``bag`` that it has arguments for."""
        entries = _entries_for(self.model.compute_loss, bag, self.model.forward)
        return self.model.compute_loss(**entries, **kwargs)  # type: ignore[operator]

    def predict(self, bag: Mapping[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """``model.predict`` on the entries of ``bag`` that it has arguments for."""
        entries = _entries_for(self.model.predict, bag, self.model.forward)
        return self.model.predict(**entries, **kwargs)  # type: ignore[operator]


def _entries_for(function: Any, bag: Mapping[str, Any], passes_to: Any = None) -> dict[str, Any]:
    """The entries of ``bag`` that ``function`` has arguments for, or ``passes_to``, if it passes keywords on."""
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    if passes_to is not None and any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        names |= set(inspect.signature(passes_to).parameters)
    return {name: bag[name] for name in bag.keys() if name in names}  # noqa: SIM118  (TensorDict iterates over rows)


def feature_dim(feat_ext: torch.nn.Module, in_shape: tuple[int, ...] | None) -> int | None:
    """Width that ``feat_ext`` makes of instances of ``in_shape``, or None where that shape is not given."""
    return None if in_shape is None else get_feat_dim(feat_ext, tuple(in_shape))


def required_feature_dim(model: Any, in_shape: tuple[int, ...] | None) -> int:
    """As :func:`feature_dim` of ``model.feat_ext``, for models that cannot learn the width from their first input."""
    if in_shape is None:
        raise ValueError(f"{type(model).__name__} needs in_shape, the shape of one instance, such as (1024,)")
    return get_feat_dim(model.feat_ext, tuple(in_shape))


def squeeze_single_output(logits: Tensor) -> Tensor:
    """``(B, 1)`` to ``(B,)``; other widths stay."""
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits


def bag_classes(criterion: torch.nn.Module, Y: Tensor, num_classes: int) -> Tensor | None:
    """``(B, num_classes)`` bool, the classes of each bag: one or, multi-label, any number.

    None where the labels are no classes: those of a regression loss, or several per bag that are not multi-label.
    """
    if Y.dim() > 1 and Y.shape[-1] > 1:
        return Y > 0.5 if isinstance(criterion, torch.nn.BCEWithLogitsLoss) else None
    if isinstance(criterion, _REGRESSION):
        return None
    return Y.reshape(-1, 1).long() == torch.arange(num_classes, device=Y.device)
