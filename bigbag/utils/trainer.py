"""torchmil's trainer: a model, an optimiser and the user's own loaders.

The main way to train is ``bigbag train`` (:mod:`bigbag.engine`), which packs bags, shares them out over ranks and
resumes. This one runs a torchmil script as it stands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from bigbag.engine.annealing import AnnealingScheduler
from bigbag.engine.step import total_loss
from bigbag.models import MILModelWrapper

_TITLES = {"train": "Train", "val": "Validation", "test": "Test"}


class Trainer:
    """Trains a model on batches of padded bags, with torchmil's arguments.

    Where torchmil differs: validation and test run in eval mode and without gradients; metrics are copied, so that no
    two trainers share them, and live on ``device``; loaders need no length; batches may be plain dicts.

    Args:
        model: computes logits and losses of a batch: ``model.compute_loss`` gets those entries that it has arguments
            for.
        optimizer: of the model's parameters.
        metrics_dict: name to metric (``reset``, ``update(Y_pred, Y)``, ``compute``), such as those of torchmetrics.
            None: ``{"accuracy": torchmetrics.Accuracy(task="binary")}``.
        obj_metric: the metric, or the loss, on validation batches that picks the best model.
        obj_metric_mode: "max" or "min".
        lr_scheduler: stepped once per epoch.
        annealing_scheduler_dict: name of a loss to the schedule of its coefficient, stepped once per training batch.
        device: where to train.
        logger: gets every epoch's metrics by ``logger.log(dict)``.
        early_stop_patience: epochs without a better ``obj_metric`` after which training stops; None: never.
        disable_pbar: show no progress bar.
        verbose: print the best and the present ``obj_metric`` after every epoch, and for how many it was not better.

    Raises:
        ValueError: another ``obj_metric_mode``.
        ImportError: no ``metrics_dict``, and torchmetrics is not installed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        metrics_dict: Mapping[str, Any] | None = None,
        obj_metric: str = "accuracy",
        obj_metric_mode: str = "max",
        lr_scheduler: Any = None,
        annealing_scheduler_dict: Mapping[str, AnnealingScheduler] | None = None,
        device: str | torch.device = "cuda",
        logger: Any = None,
        early_stop_patience: int | None = None,
        disable_pbar: bool = False,
        verbose: bool = True,
    ) -> None:
        if obj_metric_mode not in ("max", "min"):
            raise ValueError(f"obj_metric_mode is {obj_metric_mode!r}, expected 'max' or 'min'")
        self.device = device
        self.model = MILModelWrapper(model).to(device)
        self.optimizer = optimizer
        metrics = _default_metrics() if metrics_dict is None else metrics_dict
        self.metrics_dict = {name: _on_device(deepcopy(metric), device) for name, metric in metrics.items()}
        self.obj_metric_name, self.obj_metric_mode = obj_metric, obj_metric_mode
        self.lr_scheduler = lr_scheduler
        self.annealing_scheduler_dict = dict(annealing_scheduler_dict or {})
        self.logger = logger
        self.early_stop_patience = float("inf") if early_stop_patience is None else early_stop_patience
        self.disable_pbar, self.verbose = disable_pbar, verbose
        self.best_model_state_dict: dict[str, Tensor] | None = None
        self.best_obj_metric = float("-inf" if obj_metric_mode == "max" else "inf")

    def train(
        self,
        max_epochs: int,
        train_dataloader: Iterable[Mapping[str, Tensor]],
        val_dataloader: Iterable[Mapping[str, Tensor]] | None = None,
        test_dataloader: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Train for at most ``max_epochs``.

        Args:
            max_epochs: most passes over ``train_dataloader``.
            train_dataloader: batches with at least ``Y`` and what the model takes.
            val_dataloader: batches for ``obj_metric``; None: those of ``train_dataloader``.
            test_dataloader: batches whose metrics are logged; None: none.

        Raises:
            ValueError: a loader without batches, or an ``obj_metric`` that is neither a metric nor a loss.
        """
        loaders = {"train": train_dataloader, "val": train_dataloader if val_dataloader is None else val_dataloader}
        if test_dataloader is not None:
            loaders["test"] = test_dataloader
        if self.best_model_state_dict is None:
            self.best_model_state_dict = self.get_model_state_dict()
        stale_epochs = 0
        for epoch in range(1, max_epochs + 1):
            results: dict[str, float] = {}
            for mode, loader in loaders.items():
                metrics = self._run_epoch(loader, epoch, mode)
                if self.logger is not None:
                    self.logger.log(metrics)
                results |= metrics
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            stale_epochs = 0 if self._keep_if_better(results) else stale_epochs + 1
            if stale_epochs:
                self._print(f"Early stopping count: {stale_epochs}")
            if stale_epochs >= self.early_stop_patience:
                self._print("Reached early stopping condition")
                break

    def get_model_state_dict(self) -> dict[str, Tensor]:
        """A copy of the model's state dict."""
        return deepcopy(self.model.model.state_dict())

    def get_best_model_state_dict(self) -> dict[str, Tensor] | None:
        """The state dict of the best model so far, at first of the untrained one; None before :meth:`train`."""
        return self.best_model_state_dict

    def get_best_model(self) -> torch.nn.Module:
        """The model itself, with its best weights."""
        if self.best_model_state_dict is None:
            raise ValueError("there is no best model yet; call train() first")
        self.model.model.load_state_dict(self.best_model_state_dict)
        return self.model.model

    def _run_epoch(self, loader: Iterable[Mapping[str, Tensor]], epoch: int, mode: str) -> dict[str, float]:
        """One pass; the mean over the batches of each loss, and the metrics, by ``mode/name``."""
        from tqdm import tqdm

        self.model.train(mode == "train")
        for metric in self.metrics_dict.values():
            metric.reset()
        losses: dict[str, list[Tensor]] = defaultdict(list)
        title = f"[Epoch {epoch}] {_TITLES[mode]} "
        with tqdm(loader, title, total=_length(loader), disable=self.disable_pbar) as bar:
            for batch in bar:
                with torch.set_grad_enabled(mode == "train"):
                    for name, value in self._run_batch(batch, mode == "train").items():
                        losses[name].append(value)
                if not self.disable_pbar:
                    bar.set_postfix({f"{mode}/{name}": values[-1].item() for name, values in losses.items()})
        if not losses:
            raise ValueError(f"the {_TITLES[mode].lower()} loader gave no batch")
        means = {f"{mode}/{name}": torch.stack(values).mean().item() for name, values in losses.items()}
        metrics = {f"{mode}/{name}": float(metric.compute()) for name, metric in self.metrics_dict.items()}
        return {**means, **metrics}

    def _run_batch(self, batch: Mapping[str, Tensor], train: bool) -> dict[str, Tensor]:
        """Losses of a batch, the weighted sum as "loss"; one optimiser step if ``train``."""
        if isinstance(batch, dict):
            batch = {name: value.to(self.device) if hasattr(value, "to") else value for name, value in batch.items()}
        else:
            batch = batch.to(self.device)  # type: ignore[attr-defined]  # a TensorDict
        Y_pred, losses = self.model.compute_loss(batch)
        total = total_loss(losses, {name: scheduler() for name, scheduler in self.annealing_scheduler_dict.items()})
        if train:
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
            after_step = getattr(self.model.model, "after_step", None)
            if after_step is not None:
                with torch.no_grad():
                    after_step()
            for scheduler in self.annealing_scheduler_dict.values():
                scheduler.step()
        for metric in self.metrics_dict.values():
            metric.update(Y_pred.detach(), batch["Y"])
        return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}

    def _keep_if_better(self, results: Mapping[str, float]) -> bool:
        """Remember the weights if the validation is the best so far."""
        name = f"val/{self.obj_metric_name}"
        if name not in results:
            known = [key.removeprefix("val/") for key in results if key.startswith("val/")]
            raise ValueError(f"obj_metric is {self.obj_metric_name!r}, expected one of {', '.join(known)}")
        value, best = results[name], self.best_obj_metric
        self._print(f"Best {self.obj_metric_name}: {best}, Current {self.obj_metric_name}: {value}")
        # A value that is not a number is never better.
        better = value > best if self.obj_metric_mode == "max" else value < best
        if better:
            self.best_obj_metric, self.best_model_state_dict = value, self.get_model_state_dict()
        return better

    def _print(self, message: str) -> None:
        if self.verbose:
            print(message)


def _default_metrics() -> dict[str, Any]:
    try:
        import torchmetrics
    except ImportError:
        raise ImportError(
            "Trainer: the default metrics come from torchmetrics; install bigbag[torchmil], or pass metrics_dict"
        ) from None
    return {"accuracy": torchmetrics.Accuracy(task="binary")}


def _on_device(metric: Any, device: str | torch.device) -> Any:
    return metric.to(device) if hasattr(metric, "to") else metric


def _length(loader: Any) -> int | None:
    """Number of batches, None where a loader does not know it."""
    try:
        return len(loader)
    except TypeError:  # no length, or a DataLoader over an iterable data set
        return None
