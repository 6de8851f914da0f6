"""Optimiser, learning rate and average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coco_example.options import TrainingOptions

__all__ = ["build_optimizer", "ramped_average", "relative_rate"]


def build_optimizer(module: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """Build an optimiser of all trainable parameters; norms and biases get no weight decay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)


def relative_rate(step: int, total_steps: int, options: TrainingOptions) -> float:
    """Compute the learning rate of a step, relative to the peak."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_steps))
    done = step / max(1, total_steps)
    if options.schedule == "cosine":
        return warm * (0.5 * (1 + math.cos(math.pi * done)) * 0.99 + 0.01)
    return warm * (1.0 if done < 2 / 3 else 0.1 if done < 8 / 9 else 0.01)


def ramped_average(decay: float) -> Any:
    """Make the function of an exponential average that forgets its first steps, when weights still move fast."""

    def average(averaged: Any, current: Any, count: Any) -> None:
        steps = int(count)
        one_step = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))  # type: ignore[no-untyped-call]
        one_step(averaged, current, count)

    return average
