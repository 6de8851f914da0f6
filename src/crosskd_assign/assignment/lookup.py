"""Lookup: what is predicted at the candidate points of a batch's boxes, to the host; and matched pairs, back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional import task_aware_metric
from ..structures import Assignment, DensePredictions, GridLevel, Target
from ..transfer import Transfer, send
from ..validation import validate_target_values
from .candidates import Floats, Ints, grid_candidates
from .lattices import grid_pairs
from .points import point_pairs

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


def look_up(predictions: DensePredictions, targets: Sequence[Target], radius: float) -> Callable[[], Candidates]:
    """List the candidate points of all boxes and look up what is predicted there.

    On an accelerator, that is queued and sent to the host, which does not wait for it: other work may be queued before
    the result is asked for.

    Args:
        predictions: Predictions of N images.
        targets: N targets with at least one box in all, in pixels of the batch image.
        radius: Reach of the spatial prior around the box centre, in strides.

    Returns:
        What waits for the candidates and returns them.

    Raises:
        TargetError: A box is inverted, empty or not finite, or a label has no class channel; here or from the result.
    """
    # 1. The boxes of the batch.
    counts = [len(target["boxes"]) for target in targets]
    boxes = _Boxes(
        torch.cat([target["boxes"] for target in targets]).float().detach(),
        torch.cat([target["labels"] for target in targets]),
        np.repeat(np.arange(len(counts)), counts),  # known without asking the device
        np.concatenate([np.arange(count) for count in counts]),
    )

    # 2. The host lists pairs one by one. An accelerator spares it to wait for the boxes, if it can do the arithmetic.
    device = boxes.corners.device
    if _is_host(device) or predictions.levels is None or not _has_float64(device):
        return _listed_on_host(predictions, boxes, radius)
    return _marked_on_device(predictions, boxes, predictions.levels, radius)


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
    """Send M matched pairs to a device, in a single transfer that the host does not wait for."""
    bits = metric.astype(np.float32).view(np.int32)  # so that one tensor of whole numbers holds them all
    pairs = send(torch.from_numpy(np.stack([image, point, target, fallback, bits])), device)
    images, points, targets, is_fallback, values = pairs.unbind()
    metrics = values.int().view(torch.float32)
    return Assignment(images, points, targets, metrics, is_fallback.bool(), unmatched, non_finite)


@dataclass(frozen=True)
class _Boxes:
    """The B boxes of a batch."""

    corners: Tensor  # (B, 4) float32
    labels: Tensor  # (B,)
    image: Ints  # (B,), image of each
    target: Ints  # (B,), index of each within its image

    def on_host(self, corners: Floats, labels: Ints, num_classes: int) -> tuple[Floats, Ints, Ints, Ints]:
        """Validate their values, and return all that is known of them."""
        validate_target_values(corners, labels, self.image, self.target, num_classes)
        return corners, labels, self.image, self.target


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


@cache
def _has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    try:
        torch.ones(1, device=device).double().add(1)
    except (TypeError, RuntimeError):
        return False
    return True


def _listed_on_host(predictions: DensePredictions, boxes: _Boxes, radius: float) -> Callable[[], Candidates]:
    # 1. Boxes and labels are here already, or are waited for: validate them first.
    corners, labels = boxes.corners.cpu().numpy(), boxes.labels.cpu().numpy()
    known = boxes.on_host(corners, labels, predictions.num_classes)

    # 2. The pairs, one by one.
    if predictions.levels is not None:
        box, point = grid_pairs(corners, predictions.levels, radius)
    else:
        box, point = point_pairs(corners, predictions.points.cpu(), predictions.strides.cpu(), radius)
    image, channel = boxes.image.take(box), labels.take(box)

    # 3. What is predicted there.
    device = predictions.boxes.device
    if _is_host(device):
        place = image * len(predictions.points) + point
        logits = _taken(predictions.logits.flatten(0, 1), place, channel)
        predicted = _taken(predictions.boxes.flatten(0, 1), place)
        return lambda: Candidates(*known, box, point, logits, predicted)
    n, p, c = send(torch.from_numpy(np.stack([image, point, channel])), device)
    sent = _sent(predictions.logits[n, p, c].float(), predictions.boxes[n, p].float())
    return lambda: Candidates(*known, box, point, *sent())


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


def _marked_on_device(
    predictions: DensePredictions, boxes: _Boxes, levels: Sequence[GridLevel], radius: float
) -> Callable[[], Candidates]:
    # 1. A window of points for each box, some of them outside the prior.
    corners, labels = boxes.corners, boxes.labels.long()
    n = send(torch.from_numpy(boxes.image), corners.device)[:, None]  # (B, 1)
    point, valid = grid_candidates(corners, levels, radius)  # (B, K)

    # 2. What is predicted there. Labels are validated on the host; until then an index must not run out of bounds.
    channel = labels.clamp(0, predictions.num_classes - 1)[:, None]
    logits = predictions.logits[n, point, channel].float()
    predicted = predictions.boxes[n, point].float()

    # 3. One transfer. To list the valid pairs would take another; so all go, the others marked.
    marked = torch.where(valid, point, -1).int()
    sent = _sent(labels, corners, marked, logits, predicted)

    def candidates() -> Candidates:
        host_labels, host_corners, host_point, host_logits, host_predicted = sent()
        known = boxes.on_host(host_corners, host_labels, predictions.num_classes)
        box, place = np.nonzero(host_point >= 0)
        point = host_point[box, place].astype(np.int64)
        return Candidates(*known, box, point, host_logits[box, place], host_predicted[box, place])

    return candidates


_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}


def _sent(*tensors: Tensor) -> Callable[[], list[NDArray[Any]]]:
    """Send tensors of four or eight bytes an element to the host, bit by bit in a single transfer."""
    words = [x.contiguous().view(torch.int32).flatten() for x in tensors]
    transfer = Transfer(torch.cat(words))

    def arrived() -> list[NDArray[Any]]:
        parts = torch.split(transfer.wait(), [len(x) for x in words])
        return [p.numpy().view(_NUMPY[x.dtype]).reshape(x.shape) for p, x in zip(parts, tensors, strict=True)]

    return arrived
