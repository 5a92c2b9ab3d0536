"""The optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch

from bigbag.config import OptimConfig


def build_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices with weight decay, vectors (biases, norms) without."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas)


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of a global step.

    Linear from ``lr / W`` at step 0 to ``lr`` after W warm-up steps, then
    ``lr (f + (1 - f) (1 + cos(pi t)) / 2)`` with t from 0 to 1 over the remaining steps and f = ``final_lr_fraction``.

    Args:
        optim: the settings.
        step: number of optimiser steps done before this one, over all epochs.
        steps_per_epoch: optimiser steps of one epoch.
        epochs: epochs of the run.
    """
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warmup) / max(1, steps_per_epoch * epochs - warmup)
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * (1 + math.cos(math.pi * progress)) / 2)
