"""Compile what of a training method may be compiled, in place: names of weights stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from coco_example.errors import RunError, first_line

__all__ = ["compile_backbones"]

_OLDEST = (2, 6)  # older ones cannot trace torchvision's detectors as a whole, and were not tried on parts
_BACKEND = "inductor"


def compile_backbones(*models: nn.Module | None) -> None:
    """Compile backbone and neck of each model with torch.compile, which happens at their first batches.

    Heads, losses and assignment stay as they are: their sizes depend on the objects of a batch.

    Args:
        models: Detectors; those without a ``backbone`` are left alone, but not the first.

    Raises:
        RunError: torch is too old, no compiler works here, or the first model has no backbone.
    """
    # 1. Is there anything to compile, and with?
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        raise RunError(
            expected=f"torch {'.'.join(map(str, _OLDEST))} or newer",
            got=torch.__version__,
            where="--compile",
            fix="leave it out",
        )
    backbones = [getattr(model, "backbone", None) for model in models]
    if not isinstance(backbones[0], nn.Module):
        raise RunError(
            expected="a detector with a module backbone",
            got=type(models[0]).__name__,
            where="--compile",
            fix="leave it out",
        )

    # 2. A compiler that does not work would be found at the first step, with a traceback.
    device = next(backbones[0].parameters()).device
    try:
        torch.compile(_small, backend=_BACKEND)(torch.zeros(4, device=device))
    except Exception as error:  # the compilers of all platforms have errors of their own
        raise RunError(
            expected="a compiler that torch can use",
            got=first_line(error),
            where="--compile",
            fix="install one, or leave it out",
        ) from error

    # 3. Compile.
    for backbone in backbones:
        if isinstance(backbone, nn.Module):
            backbone.compile(backend=_BACKEND)


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.relu() + 1
