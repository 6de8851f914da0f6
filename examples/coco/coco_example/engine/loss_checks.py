"""Checks of the loss terms of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coco_example.errors import DeadLossError, NonFiniteLossError

__all__ = ["DEAD_CHECKS", "LossChecks", "check_weights"]

DEAD_CHECKS = 50
_DIVERGED = (
    "lower --lr, clip harder with --max-grad-norm, or train in --precision bfloat16; the last checkpoint is good"
)


class LossChecks:
    """Refuse losses that are not finite, and terms that stay exactly 0.

    Args:
        image_ids: The annotation file's id of each image that targets may name.
    """

    def __init__(self, image_ids: Sequence[object]) -> None:
        self._image_ids = image_ids
        self._zeros: Counter[str] = Counter()  # checks in a row at which a term was exactly 0

    def __call__(
        self, losses: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor] | None], step: int
    ) -> dict[str, float]:
        """Read the losses of a step, which waits for an accelerator.

        Returns:
            The losses as Python floats.

        Raises:
            NonFiniteLossError: One is NaN or infinite.
            DeadLossError: One has been exactly 0 for many checks.
        """
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not all(map(math.isfinite, values.values())):
            images = [
                "one without labels" if target is None else self._image_ids[int(target["image_id"])]
                for target in targets
            ]
            raise NonFiniteLossError(
                expected="finite losses", got=f"{values}", where=f"step {step}, images {images}", fix=_DIVERGED
            )
        # A term that lost its way, as under DDP, is 0 although there are objects.
        if any(target is not None and len(target["boxes"]) > 0 for target in targets):
            self._count_zeros(values, step)
        return values

    def _count_zeros(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._zeros[name] = self._zeros[name] + 1 if value == 0 else 0
            if self._zeros[name] >= DEAD_CHECKS:
                raise DeadLossError(
                    expected="every loss term to be alive",
                    got=f"exactly 0 at {DEAD_CHECKS} checks in a row",
                    where=f"{name}, step {step}",
                    fix="see that its weight is not 0, and that teacher and student are not the same",
                )


def check_weights(method: nn.Module, step: int) -> None:
    """See that all weights are finite.

    Raises:
        NonFiniteLossError: One is not, as after a finite loss with a gradient that is not.
    """
    if not torch.stack([value.isfinite().all() for value in method.state_dict().values()]).all():
        raise NonFiniteLossError(expected="finite weights", got="NaN or infinity", where=f"step {step}", fix=_DIVERGED)
