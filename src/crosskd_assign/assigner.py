"""The one positive point of every object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from .errors import OptionError, problem
from .functional import task_aware_metric
from .matching import Floats, Ints, grid_candidates, match_exact, match_greedy, nearest_free_point, point_candidates
from .structures import Assignment, DensePredictions, Target
from .validation import check_option, check_target_values

__all__ = ["TaskAwareOneToOneAssigner"]

Solver = Literal["exact", "greedy"]

_BOXES_AT_ONCE = 128


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
    """

    alpha: float = 0.2
    beta: float = 0.8
    center_radius: float = 1.5
    solver: Solver = "exact"

    def __post_init__(self) -> None:
        check_option("alpha", self.alpha, low=0)
        check_option("beta", self.beta, low=0)
        check_option("center_radius", self.center_radius, low=0)
        if self.solver not in ("exact", "greedy"):
            raise OptionError(
                problem('solver "exact" or "greedy"', repr(self.solver), "constructor argument", "choose one")
            )

    @classmethod
    def poto(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """(0.2, 0.8), the default. Source: POTO, Wang et al., CVPR 2021."""
        return cls(0.2, 0.8, center_radius, solver)

    @classmethod
    def task_aligned(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """(1, 6). Source: TOOD, Feng et al., ICCV 2021."""
        return cls(1.0, 6.0, center_radius, solver)

    @classmethod
    def yolo(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """(0.5, 6). Source: the task-aligned assigner of YOLOv8 and YOLOv10."""
        return cls(0.5, 6.0, center_radius, solver)

    @torch.no_grad()
    def __call__(self, predictions: DensePredictions, targets: Sequence[Target]) -> Assignment:
        """Match the boxes of a batch.

        Args:
            predictions: Of N images.
            targets: N targets, boxes in pixels of the batch image.

        Returns:
            The matched pairs, on the device of the predictions.

        Raises:
            TargetError: A box is inverted, empty or not finite, or a label has no class channel.
        """
        device = predictions.boxes.device
        counts = [len(target["boxes"]) for target in targets]
        if sum(counts) == 0:
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            return Assignment(nothing, nothing, nothing, nothing.float(), nothing.bool())

        image = np.repeat(np.arange(len(counts)), counts)  # (B,), known without asking the device
        target = np.concatenate([np.arange(count) for count in counts])  # (B,)
        boxes = torch.cat([target["boxes"] for target in targets]).float()
        labels = torch.cat([target["labels"] for target in targets])
        parts = [
            self._rate(predictions, boxes[part], labels[part], torch.from_numpy(image[part]).to(device))
            for part in _parts(len(boxes), device, predictions)
        ]
        point, metric, host_boxes, host_labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        check_target_values(host_boxes, host_labels, image, target, predictions.logits.shape[-1])

        # A fixed order of the boxes makes the outcome independent of the order they came in.
        rank = np.argsort(np.lexsort((host_labels, *host_boxes.T[::-1], image)))
        chosen, value, fallback = self._match(
            np.nan_to_num(metric, nan=-1.0), point, host_boxes, image, rank, predictions
        )
        matched = chosen >= 0
        pairs = np.stack([image, chosen, target, fallback, value])[:, matched]
        packed = torch.from_numpy(pairs).to(device)
        image_index, point_index, target_index, is_fallback = packed[:4].long()
        return Assignment(
            image_index,
            point_index,
            target_index,
            packed[4].float(),
            is_fallback.bool(),
            unmatched=int((~matched).sum()),
            non_finite=int(np.isnan(metric).sum()),
        )

    def _rate(
        self, predictions: DensePredictions, boxes: Tensor, labels: Tensor, image: Tensor
    ) -> tuple[Ints, Floats, Floats, Ints]:
        """What the matching needs, on the host.

        Returns:
            ``point (B, K)``, −1 outside the prior; its ``metric (B, K)``, −1 outside the prior and NaN where the
            prediction is not finite; ``boxes (B, 4)``; ``labels (B,)``.
        """
        if predictions.levels is not None:
            point, valid = grid_candidates(boxes, predictions.levels, self.center_radius)
        else:
            point, valid = point_candidates(boxes, predictions.points, predictions.strides, self.center_radius)
        # Labels are checked on the host afterwards; until then an index must not run out of bounds.
        channel = labels.clamp(0, predictions.logits.shape[-1] - 1)
        row, slot = _pairs(valid)
        chosen = point[row, slot]
        logits = predictions.logits[image[row], chosen, channel[row]].float()
        predicted = predictions.boxes[image[row], chosen].float()

        # From here on the host, after the only transfer: matching is a little work on little data that decides what to
        # do next, and the same arithmetic gives the same assignment wherever the predictions were made. Powers are
        # taken in float64, then rounded: vectorised float32 powers differ in the last bit with their place in memory,
        # which would break ties at random.
        point = torch.where(valid, point, -1)
        point, logits, predicted, boxes, labels, row, slot = _to_host(
            point, logits, predicted, boxes, labels, row, slot
        )
        value = task_aware_metric(logits.double(), predicted, boxes[row], alpha=self.alpha, beta=self.beta).float()
        finite = logits.isfinite() & predicted.isfinite().all(dim=-1)
        metric = torch.full(point.shape, -1.0)
        metric[row, slot] = value.masked_fill_(~finite, torch.nan)
        metric.masked_fill_(point < 0, -1.0)
        return point.numpy(), metric.numpy(), boxes.numpy(), labels.numpy()

    def _match(
        self, metric: Floats, point: Ints, boxes: Floats, image: Ints, rank: Ints, predictions: DensePredictions
    ) -> tuple[Ints, Floats, Ints]:
        """Point (−1 if none), metric and fallback flag of each of B boxes."""
        num_points = len(predictions.points)
        column = point + image[:, None] * num_points
        choice = (match_exact if self.solver == "exact" else match_greedy)(metric, column, rank)
        rows = np.arange(len(boxes))
        chosen = np.where(choice >= 0, point[rows, choice], -1)
        value = np.where(choice >= 0, metric[rows, choice], 0.0)
        fallback = np.zeros(len(boxes), dtype=np.int64)
        left_over = np.flatnonzero(choice < 0)
        if len(left_over) > 0:
            positions = _host_points(predictions)
            for n in np.unique(image[left_over]):
                mine = left_over[image[left_over] == n]
                taken = set(chosen[(image == n) & (choice >= 0)].tolist())
                for b in mine[np.argsort(rank[mine])]:
                    # Points inside the prior that predict no overlap yet are still better than points outside it.
                    free = [p for p in point[b, metric[b] == 0].tolist() if p not in taken]
                    if free:
                        chosen[b] = free[0]
                    else:
                        center = (boxes[b, :2] + boxes[b, 2:]) / 2
                        chosen[b] = nearest_free_point(positions, center, np.fromiter(taken, dtype=np.int64))
                        fallback[b] = chosen[b] >= 0
                    taken.add(int(chosen[b]))
        return chosen, value, fallback


def _parts(boxes: int, device: torch.device, predictions: DensePredictions) -> list[slice]:
    """Boxes rated at once: on a CPU few enough for its cache, on an accelerator all, for a single transfer."""
    whole = device.type != "cpu" or predictions.levels is None  # arbitrary points bound their memory themselves
    size = boxes if whole else _BOXES_AT_ONCE
    return [slice(start, start + size) for start in range(0, boxes, size)]


def _host_points(predictions: DensePredictions) -> Floats:
    """The points ``(A, 2)`` on the host; of grids they are made there, which spares a transfer."""
    levels = predictions.levels
    points = predictions.points.cpu() if levels is None else torch.cat([level.points() for level in levels])
    return points.double().numpy()


def _pairs(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column ``(P,)`` of the entries of ``valid (B, K)`` to look at."""
    if valid.device.type == "cpu":
        row, slot = valid.nonzero(as_tuple=True)  # about half of them
        return row, slot
    return _all_pairs(valid)  # to count the valid ones would take a transfer of its own


def _all_pairs(valid: Tensor) -> tuple[Tensor, Tensor]:
    boxes, candidates = valid.shape
    row = torch.arange(boxes, device=valid.device).repeat_interleave(candidates)
    return row, torch.arange(candidates, device=valid.device).repeat(boxes)


def _to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the CPU, of the same shapes and kinds, in a single transfer."""
    return tensors if tensors[0].device.type == "cpu" else _packed(*tensors)


def _packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    # float64 holds float32 values and all indices exactly.
    host = torch.cat([x.flatten().double() for x in tensors]).cpu()
    parts = torch.split(host, [x.numel() for x in tensors])
    return tuple(part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True))
