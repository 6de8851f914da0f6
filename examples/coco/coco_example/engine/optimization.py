"""Optimiser, learning rate and average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from coco_example.options import TrainingOptions

__all__ = ["Optimization", "build_optimizer", "ramped_average", "relative_rate"]


class Optimization:
    """What every step moves: optimiser, learning rate, scale of float16's gradients, average of the weights.

    Args:
        method: What is trained.
        model: The detector in it whose weights are averaged, if any are.
        options: The loop's.
        total_steps: Steps of the run.
        device: Where it computes.

    Attributes:
        average: The detector of averaged weights; None without an average.
    """

    def __init__(
        self, method: nn.Module, model: nn.Module, options: TrainingOptions, total_steps: int, device: torch.device
    ) -> None:
        self._options, self._device, self._model = options, device, model
        self.rate = partial(relative_rate, total_steps=total_steps, options=options)
        self.optimizer = build_optimizer(method, options)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "float16")
        self.average: AveragedModel | None = None
        if options.ema > 0:
            self.average = AveragedModel(model, multi_avg_fn=ramped_average(options.ema), use_buffers=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision within a block."""
        name = self._options.precision
        return nullcontext() if name == "float32" else torch.autocast(self._device.type, getattr(torch, name))

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradients of the sum of losses to those that are there."""
        total = torch.stack(list(losses.values())).sum()
        self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def update(self) -> None:
        """Move weights by the gradients, which are then gone, and with them learning rate and average."""
        # 1. Clip.
        if self._options.max_grad_norm > 0:
            self._scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._options.max_grad_norm)

        # 2. Weights, learning rate, average.
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self._model)

    def parts(self) -> dict[str, Any]:
        """Name the parts whose state is in a checkpoint."""
        parts = {"optimizer": self.optimizer, "scheduler": self._scheduler, "scaler": self._scaler}
        return parts if self.average is None else {**parts, "average": self.average}


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
