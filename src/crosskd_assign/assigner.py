"""The one positive point of every object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from .candidates import Floats, Ints, grid_candidates, grid_pairs, nearest_free_point, point_pairs
from .errors import OptionError, problem
from .functional import task_aware_metric
from .matching import match_exact, match_greedy
from .structures import Assignment, DensePredictions, Target
from .validation import check_option, check_target_values

__all__ = ["TaskAwareOneToOneAssigner"]

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
    def balanced(cls, *, center_radius: float = 1.5, solver: Solver = "exact") -> Self:
        """(0.5, 0.5): class and localisation weigh the same; leaves fewer duplicates. Source: docs/results.md."""
        return cls(0.5, 0.5, center_radius, solver)

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
        check = partial(check_target_values, image=image, target=target, num_classes=predictions.logits.shape[-1])
        look = _on_host if _is_host(device) else _on_accelerator
        found = look(predictions, boxes.detach(), labels, image, self.center_radius, check)
        point, metric = self._rate(found)

        # A fixed order of the boxes makes the outcome independent of the order they came in.
        rank = np.argsort(np.lexsort((found.labels, *found.boxes.T[::-1], image)))
        chosen, value, fallback = self._match(
            np.nan_to_num(metric, nan=-1.0), point, found.boxes, image, rank, predictions
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

    def _rate(self, found: _Found) -> tuple[Ints, Floats]:
        """The metric of all pairs, on the host.

        It is little work on little data that decides what to do next, and the same arithmetic gives the same assignment
        wherever the predictions were made. Powers are taken in float64, then rounded: vectorised float32 powers differ
        in the last bit with their place in memory, which would break ties at random.

        Returns:
            The pairs as a table of a row for each box: ``point (B, K)``, −1 in free places, and its ``metric (B, K)``,
            −1 in free places and NaN where the prediction is not finite.
        """
        value = task_aware_metric(
            torch.from_numpy(found.logits).double(),
            torch.from_numpy(found.predicted),
            torch.from_numpy(found.boxes.take(found.box, axis=0)),
            alpha=self.alpha,
            beta=self.beta,
        )
        finite = np.isfinite(found.logits) & np.isfinite(found.predicted).all(axis=1)
        counts = np.bincount(found.box, minlength=len(found.boxes))
        shape = (len(counts), max(1, int(counts.max())))
        begin = np.arange(shape[0]) * shape[1] - (counts.cumsum() - counts)
        place = np.arange(len(found.box)) + np.repeat(begin, counts)
        points, metric = np.full(shape, -1), np.full(shape, -1.0, dtype=np.float32)
        points.ravel()[place] = found.point
        metric.ravel()[place] = np.where(finite, value.float().numpy(), np.nan)
        return points, metric

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


def _host_points(predictions: DensePredictions) -> Floats:
    """The points ``(A, 2)`` on the host; of grids they are made there, which spares a transfer."""
    levels = predictions.levels
    points = predictions.points.cpu() if levels is None else torch.cat([level.points() for level in levels])
    return points.double().numpy()


# --- what the predictions say of the candidates, brought to the host --------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The boxes of a batch, its P pairs of a box and a candidate point, and what is predicted there."""

    boxes: Floats  # (B, 4)
    labels: Ints  # (B,)
    box: Ints  # (P,), ascending
    point: Ints  # (P,)
    logits: Floats  # (P,), of the box's class
    predicted: Floats  # (P, 4)


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _on_host(
    predictions: DensePredictions, boxes: Tensor, labels: Tensor, image: Ints, radius: float, check: Callable[..., None]
) -> _Found:
    check(boxes.numpy(), labels.numpy())
    if predictions.levels is not None:
        box, point = grid_pairs(boxes.numpy(), predictions.levels, radius)
    else:
        pairs = point_pairs(boxes, predictions.points, predictions.strides, radius)
        box, point = (x.numpy() for x in pairs)
    place = image.take(box) * len(predictions.points) + point
    logits = _taken(predictions.logits.flatten(0, 1), place, labels.numpy().take(box))
    return _Found(boxes.numpy(), labels.numpy(), box, point, logits, _taken(predictions.boxes.flatten(0, 1), place))


def _taken(table: Tensor, row: Ints, column: Ints | None = None) -> Floats:
    """``table[row]`` or ``table[row, column]`` as float32. Reading scattered places is most of the assigner's time."""
    table = table.detach()
    if table.is_contiguous() and table.dtype in (torch.float32, torch.float64):
        array = table.numpy()  # whose `take` is several times faster than an index
        found = array.take(row, axis=0) if column is None else array.ravel().take(row * array.shape[1] + column)
    else:
        at = torch.from_numpy(row) if column is None else (torch.from_numpy(row), torch.from_numpy(column))
        found = table[at].float().numpy()
    return np.asarray(found, dtype=np.float32)


def _on_accelerator(
    predictions: DensePredictions, boxes: Tensor, labels: Tensor, image: Ints, radius: float, check: Callable[..., None]
) -> _Found:
    n = torch.from_numpy(image).to(boxes.device)  # (B,)
    # Labels are checked on the host afterwards; until then an index must not run out of bounds.
    channel = labels.clamp(0, predictions.logits.shape[-1] - 1)
    if predictions.levels is not None:
        point, valid = grid_candidates(boxes, predictions.levels, radius)  # (B, K)
        row = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(point)
    else:
        row, point = point_pairs(boxes, predictions.points, predictions.strides, radius)  # (P,)
        valid = torch.ones_like(row, dtype=torch.bool)
    logits = predictions.logits[n[row], point, channel[row]].float()
    predicted = predictions.boxes[n[row], point].float()
    # To list the valid pairs would take a transfer of its own; so all go, the others marked.
    box = torch.where(valid, row, -1)
    at_host = _packed(labels.long(), boxes, box.int(), point.int(), logits, predicted)
    host_labels, host_boxes, host_box, host_point, host_logits, host_predicted = at_host
    check(host_boxes, host_labels)
    keep = np.flatnonzero(host_box >= 0)
    return _Found(
        host_boxes,
        host_labels,
        host_box.take(keep).astype(np.int64),
        host_point.take(keep).astype(np.int64),
        host_logits.take(keep),
        host_predicted.reshape(-1, 4).take(keep, axis=0),
    )


_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}


def _packed(*tensors: Tensor) -> list[NDArray[Any]]:
    """Tensors of four or eight bytes an element on the host, bit by bit in a single transfer."""
    words = [x.contiguous().view(torch.int32).flatten() for x in tensors]
    parts = torch.split(torch.cat(words).cpu(), [len(x) for x in words])
    return [p.numpy().view(_NUMPY[x.dtype]).reshape(x.shape) for p, x in zip(parts, tensors, strict=True)]
