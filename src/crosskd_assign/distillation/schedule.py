"""The weight of distillation over a run."""

from __future__ import annotations

import math
from typing import Literal

from ..validation import validate_choice, validate_option

__all__ = ["Decay", "fade"]

Decay = Literal["none", "linear", "cosine"]


def fade(progress: float, *, warmup: float = 0.0, decay: Decay = "none", floor: float = 0.01) -> float:
    """Compute the weight of distillation at a point of a run, for ``Distiller.distillation_weight``.

    Args:
        progress: Share of the run that is done, 0…1.
        warmup: Share of the run over which the weight rises linearly from 0; 0 for none.
        decay: How it falls to ``floor`` over the whole run: "none", "linear" or "cosine". With an inheriting student
            and a larger teacher, "cosine" was ahead of "none" on three sets of four (docs/results.md).
        floor: Least factor of the decay, 0…1. Above 0, because a term that is exactly 0 looks like a fault.

    Raises:
        OptionError: A number is out of range, or ``decay`` is unknown.

    Example:
        >>> [round(fade(progress, decay="cosine"), 2) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.01]
    """
    validate_option("progress", progress, low=0, high=1)
    validate_option("warmup", warmup, low=0, high=1)
    validate_option("floor", floor, low=0, high=1)
    validate_choice("decay", decay, ("none", "linear", "cosine"))
    risen = min(1.0, progress / warmup) if warmup > 0 else 1.0
    left = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return risen * max(floor, left[decay])
