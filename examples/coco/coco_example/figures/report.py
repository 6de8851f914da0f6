"""Figures of a finished run: loss curves, predictions beside the ground truth, and points that boxes are assigned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coco_example.data.dataset import CocoDataset
from coco_example.engine.metrics_log import read_metrics
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, on_cpu
from coco_example.figures.draw import AssignmentView, draw_assignments, draw_curves, draw_predictions
from crosskd_assign import DensePredictions, GridLevel, TaskAwareOneToOneAssigner
from crosskd_assign.detectors.probing import evaluation_mode
from crosskd_assign.functional import task_aware_metric
from crosskd_assign.structures import Assignment, Batch, Detection, Target

__all__ = ["assignment_views", "draw_report"]


def draw_report(
    folder: Path,
    detector: Detector,
    dataset: CocoDataset,
    names: dict[int, str],
    teacher: Detector | None,
    *,
    assigner: TaskAwareOneToOneAssigner | None,
    images: int = 4,
) -> list[Path]:
    """Draw ``curves.png``, ``predictions.png`` and, of a one-to-one detector, ``assignments.png`` into a run's folder.

    Args:
        folder: The run's folder.
        detector: The detector.
        dataset: Images to show.
        names: Name of each label.
        teacher: One-to-many detector to show beside it, if its labels are the same.
        assigner: What a one-to-one detector was trained with; None for a one-to-many detector.
        images: How many images to show.
    """
    # 1. The fullest of the first images show more than an average one.
    chosen = sorted(range(min(100, len(dataset))), key=lambda i: -len(dataset.index.records[i].boxes))[:images]
    samples = [dataset[i] for i in chosen]
    originals = [image for image, _ in samples]
    truth = [Target(boxes=target["boxes"], labels=target["labels"]) for _, target in samples]

    # 2. Curves, and predictions beside the ground truth.
    columns: list[tuple[str, Sequence[Detection | Target]]] = [("ground truth", truth)]
    if teacher is not None:
        columns += [("teacher, with NMS", _detect(teacher, originals, NMS_THRESHOLD))]
    kind = "one-to-many" if assigner is None else "student"
    columns += [(f"{kind}, without NMS", _detect(detector, originals, None))]
    paths = [
        draw_curves(read_metrics(folder), folder / "curves.png"),
        draw_predictions(folder / "predictions.png", originals, columns, names),
    ]

    # 3. Points that are assigned.
    if assigner is not None:
        views = assignment_views(detector, originals, truth, assigner)
        paths.append(draw_assignments(folder / "assignments.png", originals, views, names))
    return paths


def _detect(detector: Detector, images: Sequence[Tensor], nms_threshold: float | None) -> list[Detection]:
    pixels = [image.to(detector.device) for image in images]
    with evaluation_mode(detector.adapter):
        return [on_cpu(detection) for detection in detector.detect(pixels, nms_threshold=nms_threshold)]


def assignment_views(
    detector: Detector, images: Sequence[Tensor], targets: Sequence[Target], assigner: TaskAwareOneToOneAssigner
) -> list[AssignmentView]:
    """Show the point that each box would be assigned now, and the metric that decides, in pixels of the images."""
    # 1. Predict and assign, on the detector's device.
    device, adapter = detector.device, detector.adapter
    pixels = [image.to(device) for image in images]
    given = [Target(boxes=target["boxes"].to(device), labels=target["labels"].to(device)) for target in targets]
    with evaluation_mode(adapter):
        batch, moved = adapter.preprocess(pixels, given)
        predictions = detector.predict_on(batch)
        resized = [target for target in moved if target is not None]  # none is missing
        assignment = assigner(predictions, resized)

        # 2. Draw back to the images that came in.
        heats = [_heat(predictions, i, target, assigner, batch.image_size) for i, target in enumerate(resized)]
    return [_view(i, target, batch, predictions, assignment, heats[i]) for i, target in enumerate(targets)]


def _view(
    image: int, target: Target, batch: Batch, predictions: DensePredictions, assignment: Assignment, heat: Tensor
) -> AssignmentView:
    (height, width), original = batch.sizes[image], batch.original_sizes[image]
    pairs = assignment.image == image
    points = predictions.points[assignment.point[pairs]]
    heat = heat[None, None, :height, :width]
    return AssignmentView(
        boxes=target["boxes"].cpu(),
        labels=target["labels"].cpu(),
        points=(points * points.new_tensor([original[1] / width, original[0] / height])).cpu(),
        strides=predictions.strides[assignment.point[pairs]].cpu(),
        targets=assignment.target[pairs].cpu(),
        fallback=assignment.fallback[pairs].cpu(),
        heat=F.interpolate(heat, original, mode="bilinear", align_corners=False)[0, 0].cpu(),
    )


def _heat(
    predictions: DensePredictions,
    image: int,
    target: Target,
    assigner: TaskAwareOneToOneAssigner,
    size: tuple[int, int],
) -> Tensor:
    """Compute the best metric over boxes, anchors and levels at every pixel of the batch image, ``(H, W)``."""
    heat = torch.zeros(size, device=predictions.boxes.device)
    if len(target["boxes"]) == 0 or predictions.levels is None:
        return heat
    metric = task_aware_metric(
        predictions.logits[image].float()[:, target["labels"]],  # (A, G)
        predictions.boxes[image].float()[:, None],
        target["boxes"][None],
        alpha=assigner.alpha,
        beta=assigner.beta,
    ).amax(dim=1)  # (A,)
    start = 0
    for level in predictions.levels:
        cells = metric[start : start + len(level)].view(1, 1, level.height, level.width, level.anchors).amax(dim=-1)
        heat = torch.maximum(heat, F.grid_sample(cells, _sampling_grid(level, heat), align_corners=True)[0, 0])
        start += len(level)
    return heat


def _sampling_grid(level: GridLevel, picture: Tensor) -> Tensor:
    """Compute where each pixel of a picture lies on a level's grid, ``(1, H, W, 2)`` in `grid_sample`'s -1 to 1."""
    axes = []
    for pixels, origin, step, size in zip(
        picture.shape[::-1], level.origin, level.step, (level.width, level.height), strict=True
    ):
        position = (torch.arange(pixels, device=picture.device) + 0.5 - origin) / step
        axes.append(2 * position.clamp(0, size - 1) / max(1, size - 1) - (1 if size > 1 else 0))
    x, y = torch.meshgrid(axes[0], axes[1], indexing="xy")
    return torch.stack([x, y], dim=-1)[None]
