"""One-to-many assignment by the same metric, for auxiliary heads: the best points of every object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..structures import Assignment, DensePredictions, Target
from ..validation import validate_option
from .lookup import host_points, look_up, pack, rate
from .matching import fill_left_over

__all__ = ["TaskAwareOneToManyAssigner"]


@dataclass(frozen=True)
class TaskAwareOneToManyAssigner:
    """Assigns to every box its best points: ``assigner(predictions, targets) -> Assignment``, a pair for each point.

    A point is worth m = σ(z)[class]^alpha · IoU(predicted box, box)^beta, as for `TaskAwareOneToOneAssigner`. Each box
    asks for the ``positives`` best points inside its prior; a point that several boxes ask for goes to the one with the
    greatest m. A box that is left without any takes the nearest free point and is marked as ``fallback``.

    Attributes:
        positives: Points of a box at most, at least 1; 10 as in YOLOv10's one-to-many branch.
        alpha: Exponent of the class score, at least 0.
        beta: Exponent of the IoU, at least 0.
        center_radius: Reach of the spatial prior, in strides of each level.

    Raises:
        OptionError: A number is out of range.

    Example:
        >>> from crosskd_assign import DensePredictions, GridLevel
        >>> levels = [GridLevel.of(torch.zeros(1, 8, 8, 8), stride=8)]
        >>> predictions = DensePredictions.from_sides(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), levels)
        >>> target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([2])}
        >>> len(TaskAwareOneToManyAssigner(positives=3)(predictions, [target]))
        3
    """

    positives: int = 10
    alpha: float = 0.2
    beta: float = 0.8
    center_radius: float = 1.5

    def __post_init__(self) -> None:
        validate_option("positives", self.positives, low=1)
        for name in ("alpha", "beta", "center_radius"):
            validate_option(name, getattr(self, name), low=0)

    @torch.no_grad()
    def __call__(self, predictions: DensePredictions, targets: Sequence[Target]) -> Assignment:
        """Assign the boxes of a batch.

        Args:
            predictions: Predictions of N images.
            targets: N targets, boxes in pixels of the batch image.

        Returns:
            The pairs, ordered by image, then by target, then by point, on the device of the predictions.

        Raises:
            TargetError: A box is inverted, empty or not finite, or a label has no class channel.
        """
        # 1. Candidate points of every box, and their metric, on the host.
        if not any(len(target["boxes"]) for target in targets):
            return Assignment.empty(predictions.boxes.device)
        candidates = look_up(predictions, targets, self.center_radius)()
        point, metric = rate(candidates, self.alpha, self.beta)  # (B, K)
        finite = np.nan_to_num(metric, nan=-1.0)

        # 2. The best of every box.
        order = np.argsort(-finite, axis=1, kind="stable")[:, : self.positives]
        rows = np.arange(len(finite))[:, None]
        box, place = np.nonzero(finite[rows, order] > 0)
        wanted, value = point[box, order[box, place]], finite[box, order[box, place]]

        # 3. One that several boxes ask for goes to the greatest metric.
        image, rank = candidates.image, candidates.rank
        best_first = np.lexsort((rank[box], -value, wanted, image[box]))
        box, wanted, value = box[best_first], wanted[best_first], value[best_first]
        repeated = np.zeros(len(box), dtype=bool)
        repeated[1:] = (wanted[1:] == wanted[:-1]) & (image[box[1:]] == image[box[:-1]])
        box, wanted, value = box[~repeated], wanted[~repeated], value[~repeated]

        # 4. A point for boxes that are left without any.
        fallback = np.zeros(len(box), dtype=bool)
        left_over = np.setdiff1d(np.arange(len(image)), box)
        if len(left_over) > 0:
            used = set(zip(image[box].tolist(), wanted.tolist(), strict=True))
            positions = host_points(predictions)
            filled, metrics, outside = fill_left_over(left_over, used, candidates, point, finite, positions)
            found = filled >= 0
            box = np.concatenate([box, left_over[found]])
            wanted = np.concatenate([wanted, filled[found]])
            value = np.concatenate([value, metrics[found]])
            fallback = np.concatenate([fallback, outside[found]])

        # 5. Back to the device, in order.
        in_order = np.lexsort((wanted, box))
        box = box[in_order]
        return pack(
            predictions.boxes.device,
            image[box],
            wanted[in_order],
            candidates.target[box],
            value[in_order],
            fallback[in_order],
            unmatched=len(image) - len(np.unique(box)),
            non_finite=int(np.isnan(metric).sum()),
        )
