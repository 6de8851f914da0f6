"""Lookup: what is predicted at the candidate points of a batch's boxes, to the host; and matched pairs, back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import task_aware_metric
from ..structures import Assignment, DensePredictions, Target
from ..validation import validate_target_values
from .candidates import Floats, Ints, grid_candidates, grid_pairs, point_pairs

__all__ = ["Candidates", "host_points", "look_up", "pack", "rate"]


@dataclass(frozen=True)
class Candidates:
    """The boxes of a batch, its P pairs of a box and a candidate point, and what is predicted there."""

    boxes: Floats  # (B, 4)
    labels: Ints  # (B,)
    image: Ints  # (B,), image of each box
    target: Ints  # (B,), index of each box within its image
    box: Ints  # (P,), ascending
    point: Ints  # (P,)
    logits: Floats  # (P,), of the box's class
    predicted: Floats  # (P, 4)

    @property
    def rank(self) -> Ints:
        """Place of each box ``(B,)`` in an order that does not depend on the order in which boxes came in."""
        return np.argsort(np.lexsort((self.labels, *self.boxes.T[::-1], self.image)))


def look_up(predictions: DensePredictions, targets: Sequence[Target], radius: float) -> Candidates:
    """List the candidate points of all boxes and look up what is predicted there.

    Args:
        predictions: Predictions of N images.
        targets: N targets with at least one box in all, in pixels of the batch image.
        radius: Reach of the spatial prior around the box centre, in strides.

    Raises:
        TargetError: A box is inverted, empty or not finite, or a label has no class channel.
    """
    counts = [len(target["boxes"]) for target in targets]
    image = np.repeat(np.arange(len(counts)), counts)  # (B,), known without asking the device
    target = np.concatenate([np.arange(count) for count in counts])  # (B,)
    boxes = torch.cat([target["boxes"] for target in targets]).float().detach()
    labels = torch.cat([target["labels"] for target in targets])
    look = _on_host if _is_host(predictions.boxes.device) else _on_accelerator
    return look(predictions, boxes, labels, image, target, radius)


def rate(candidates: Candidates, alpha: float, beta: float) -> tuple[Ints, Floats]:
    """Compute the task-aware metric of all pairs, on the host.

    It is little work on little data that decides what to do next, and the same arithmetic gives the same assignment
    wherever the predictions were made. Powers are taken in float64, then rounded: vectorised float32 powers differ in
    the last bit with their place in memory, which would break ties at random.

    Returns:
        The pairs as a table of a row for each box: ``point (B, K)``, −1 in free places, and its ``metric (B, K)``, −1
        in free places and NaN where the prediction is not finite.
    """
    # 1. The metric of every pair.
    value = task_aware_metric(
        torch.from_numpy(candidates.logits).double(),
        torch.from_numpy(candidates.predicted),
        torch.from_numpy(candidates.boxes.take(candidates.box, axis=0)),
        alpha=alpha,
        beta=beta,
    )
    finite = np.isfinite(candidates.logits) & np.isfinite(candidates.predicted).all(axis=1)

    # 2. Where each pair stands in the table: the pairs of a box side by side, from the beginning of its row.
    counts = np.bincount(candidates.box, minlength=len(candidates.boxes))
    shape = (len(counts), max(1, int(counts.max())))
    begin = np.arange(shape[0]) * shape[1] - (counts.cumsum() - counts)
    place = np.arange(len(candidates.box)) + np.repeat(begin, counts)

    # 3. The table.
    points, metric = np.full(shape, -1), np.full(shape, -1.0, dtype=np.float32)
    points.ravel()[place] = candidates.point
    metric.ravel()[place] = np.where(finite, value.float().numpy(), np.nan)
    return points, metric


def host_points(predictions: DensePredictions) -> Floats:
    """Return the points ``(A, 2)`` on the host; those of grids are made there, which spares a transfer."""
    levels = predictions.levels
    points = predictions.points.cpu() if levels is None else torch.cat([level.points() for level in levels])
    return points.double().numpy()


def pack(
    device: torch.device,
    image: Ints,
    point: Ints,
    target: Ints,
    metric: Floats,
    fallback: NDArray[np.bool_],
    *,
    unmatched: int,
    non_finite: int,
) -> Assignment:
    """Send M matched pairs to a device, in a single transfer."""
    pairs = torch.from_numpy(np.stack([image, point, target, fallback, metric])).to(device)
    images, points, targets, is_fallback = pairs[:4].long()
    return Assignment(images, points, targets, pairs[4].float(), is_fallback.bool(), unmatched, non_finite)


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _on_host(
    predictions: DensePredictions, boxes: Tensor, labels: Tensor, image: Ints, target: Ints, radius: float
) -> Candidates:
    # 1. Boxes and labels are here already: validate them first.
    host_boxes, host_labels = boxes.numpy(), labels.numpy()
    validate_target_values(host_boxes, host_labels, image, target, predictions.num_classes)

    # 2. The pairs, one by one.
    if predictions.levels is not None:
        box, point = grid_pairs(host_boxes, predictions.levels, radius)
    else:
        pairs = point_pairs(boxes, predictions.points, predictions.strides, radius)
        box, point = (x.numpy() for x in pairs)

    # 3. What is predicted there.
    place = image.take(box) * len(predictions.points) + point
    logits = _taken(predictions.logits.flatten(0, 1), place, host_labels.take(box))
    predicted = _taken(predictions.boxes.flatten(0, 1), place)
    return Candidates(host_boxes, host_labels, image, target, box, point, logits, predicted)


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
    predictions: DensePredictions, boxes: Tensor, labels: Tensor, image: Ints, target: Ints, radius: float
) -> Candidates:
    # 1. A window of points for each box, some of them outside the prior.
    n = torch.from_numpy(image).to(boxes.device)  # (B,)
    if predictions.levels is not None:
        point, valid = grid_candidates(boxes, predictions.levels, radius)  # (B, K)
        row = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(point)
    else:
        row, point = point_pairs(boxes, predictions.points, predictions.strides, radius)  # (P,)
        valid = torch.ones_like(row, dtype=torch.bool)

    # 2. What is predicted there. Labels are validated on the host; until then an index must not run out of bounds.
    channel = labels.clamp(0, predictions.num_classes - 1)
    logits = predictions.logits[n[row], point, channel[row]].float()
    predicted = predictions.boxes[n[row], point].float()

    # 3. One transfer. To list the valid pairs would take another; so all go, the others marked.
    box = torch.where(valid, row, -1)
    at_host = _packed(labels.long(), boxes, box.int(), point.int(), logits, predicted)
    host_labels, host_boxes, host_box, host_point, host_logits, host_predicted = at_host

    # 4. On the host: validate, and drop what is marked.
    validate_target_values(host_boxes, host_labels, image, target, predictions.num_classes)
    keep = np.flatnonzero(host_box >= 0)
    return Candidates(
        host_boxes,
        host_labels,
        image,
        target,
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
