"""One-to-one assignment: the one positive point of every object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from typing_extensions import Self

from ..structures import Assignment, DensePredictions, Target
from ..validation import validate_choice, validate_option
from .lookup import Candidates, host_points, look_up, pack, rate
from .matching import fill_left_over, match_exact, match_greedy

__all__ = ["Solver", "TaskAwareOneToOneAssigner"]

Solver = Literal["exact", "greedy"]


@dataclass(frozen=True)
class TaskAwareOneToOneAssigner:
    """Assigns to every box the one point that learns it: ``assigner(predictions, targets) -> Assignment``.

    A point is worth m = σ(z)[class]^alpha · IoU(predicted box, box)^beta. Only points inside the box and within
    ``center_radius`` strides of its centre compete, on every level. The result maximises Σ m over all one-to-one
    matchings of an image. A box that is left over, because no point lies there or a crowd has used them up, takes the
    nearest free point instead and is marked as ``fallback``: every box is matched while there are points.

    Of equal metrics the lower point index wins. The result does not depend on the order of the boxes, on the other
    images of the batch, or on the dtype of the predictions. Predictions that are not finite are passed over and
    counted.

    Attributes:
        alpha: Exponent of the class score, at least 0.
        beta: Exponent of the IoU, at least 0. For a single box only beta / alpha matters.
        center_radius: Reach of the spatial prior, in strides of each level. 1.5 is FCOS's and POTO's centre sampling.
        solver: "exact" maximises Σ m; "greedy" takes pairs in descending order of m.

    Raises:
        OptionError: A number is below 0, or the solver is unknown.

    Example:
        >>> from crosskd_assign import DensePredictions, GridLevel
        >>> levels = [GridLevel.of(torch.zeros(1, 8, 8, 8), stride=8)]
        >>> predictions = DensePredictions.from_sides(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), levels)
        >>> target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([2])}
        >>> assignment = TaskAwareOneToOneAssigner.balanced()(predictions, [target])
        >>> predictions.points[assignment.point].tolist()
        [[20.0, 20.0]]
    """

    alpha: float = 0.2
    beta: float = 0.8
    center_radius: float = 1.5
    solver: Solver = "exact"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "center_radius"):
            validate_option(name, getattr(self, name), low=0)
        validate_choice("solver", self.solver, ("exact", "greedy"))

    @classmethod
    def poto(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """Build the default, (0.2, 0.8). Source: POTO, Wang et al., CVPR 2021."""
        return cls(0.2, 0.8, center_radius, solver)

    @classmethod
    def balanced(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """Build (0.5, 0.5): class and localisation weigh the same; leaves fewer duplicates. Source: docs/results.md."""
        return cls(0.5, 0.5, center_radius, solver)

    @classmethod
    def task_aligned(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """Build (1, 6). Source: TOOD, Feng et al., ICCV 2021."""
        return cls(1.0, 6.0, center_radius, solver)

    @classmethod
    def yolo(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """Build (0.5, 6). Source: the task-aligned assigner of YOLOv8 and YOLOv10."""
        return cls(0.5, 6.0, center_radius, solver)

    def __call__(self, predictions: DensePredictions, targets: Sequence[Target]) -> Assignment:
        """Match the boxes of a batch.

        Args:
            predictions: Predictions of N images.
            targets: N targets, boxes in pixels of the batch image.

        Returns:
            The matched pairs, on the device of the predictions.

        Raises:
            TargetError: A box is inverted, empty or not finite, or a label has no class channel.
        """
        return self.begin(predictions, targets)()

    @torch.no_grad()
    def begin(self, predictions: DensePredictions, targets: Sequence[Target]) -> Callable[[], Assignment]:
        """Queue on an accelerator what the matching needs, without waiting for it.

        Arguments as for a call.

        Returns:
            What waits for it, matches and returns the assignment. Work that is queued before it is called runs while
            the host waits and matches.
        """
        if not any(len(target["boxes"]) for target in targets):
            return partial(Assignment.empty, predictions.boxes.device)
        return partial(self._match, predictions, look_up(predictions, targets, self.center_radius))

    @torch.no_grad()
    def _match(self, predictions: DensePredictions, looked_up: Callable[[], Candidates]) -> Assignment:
        # 1. Candidate points of every box, and what is predicted there, on the host.
        candidates = looked_up()

        # 2. Their metric.
        point, metric = rate(candidates, self.alpha, self.beta)  # (B, K)
        finite = np.nan_to_num(metric, nan=-1.0)

        # 3. The matching. A fixed order of the boxes makes it independent of the order they came in.
        rank = candidates.rank
        column = point + candidates.image[:, None] * len(predictions.points)
        choice = (match_exact if self.solver == "exact" else match_greedy)(finite, column, rank)
        rows = np.arange(len(choice))
        chosen = np.where(choice >= 0, point[rows, choice], -1)
        value = np.where(choice >= 0, finite[rows, choice], 0.0)

        # 4. A point for those that are left over.
        fallback = np.zeros(len(choice), dtype=bool)
        left_over = np.flatnonzero(chosen < 0)
        if len(left_over) > 0:
            used = set(zip(candidates.image[chosen >= 0].tolist(), chosen[chosen >= 0].tolist(), strict=True))
            positions = host_points(predictions)
            filled = fill_left_over(left_over, used, candidates, point, finite, positions)
            chosen[left_over], value[left_over], fallback[left_over] = filled

        # 5. Back to the device.
        matched = chosen >= 0
        return pack(
            predictions.boxes.device,
            candidates.image[matched],
            chosen[matched],
            candidates.target[matched],
            value[matched],
            fallback[matched],
            unmatched=int((~matched).sum()),
            non_finite=int(np.isnan(metric).sum()),
        )
