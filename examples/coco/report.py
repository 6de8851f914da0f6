"""Pictures of a finished run: loss curves, predictions beside the ground truth, and which point each box was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from arms import Arm
from coco_data import CocoDataset
from evaluate import on_cpu
from logbook import read_metrics
from pictures import AssignmentView, draw_assignments, draw_curves, draw_predictions
from torch import Tensor

from crosskd_assign import DensePredictions, Detection, GridLevel, Target, TaskAwareOneToOneAssigner
from crosskd_assign.diagnostics import one_to_many_detections
from crosskd_assign.functional import task_aware_metric

__all__ = ["assignment_views", "draw_report"]


@torch.no_grad()
def draw_report(
    folder: Path,
    arm: Arm,
    dataset: CocoDataset,
    names: dict[int, str],
    teacher: Arm | None,
    *,
    assigner: TaskAwareOneToOneAssigner,
    images: int = 4,
) -> list[Path]:
    """Draw ``curves.png``, ``predictions.png`` and, of a one-to-one detector, ``assignments.png`` into a run's folder.

    Args:
        folder: The run's folder.
        arm: The detector, in evaluation mode.
        dataset: Images to show.
        names: Name of each label.
        teacher: One-to-many detector to show beside it, if its labels are the same.
        assigner: What a one-to-one detector was trained with.
        images: How many images to show.
    """
    device = next(arm.adapter.parameters()).device
    # The fullest of the first images show more than an average one.
    chosen = sorted(range(min(100, len(dataset))), key=lambda i: -len(dataset.index.records[i].boxes))[:images]
    samples = [dataset[i] for i in chosen]
    pixels = [image.to(device) for image, _ in samples]
    targets: list[Target] = [{"boxes": t["boxes"].to(device), "labels": t["labels"].to(device)} for _, t in samples]
    columns: list[tuple[str, Sequence[Detection | Target]]] = [
        ("ground truth", [Target(boxes=t["boxes"], labels=t["labels"]) for _, t in samples])
    ]
    if teacher is not None:
        columns += [("teacher, with NMS", _detect(teacher, pixels, 0.6))]
    kind = "one-to-many" if arm.one_to_many else "student"
    columns += [(f"{kind}, without NMS", _detect(arm, pixels, None))]
    originals = [image for image, _ in samples]
    paths = [
        draw_curves(read_metrics(folder), folder / "curves.png"),
        draw_predictions(folder / "predictions.png", originals, columns, names),
    ]
    if not arm.one_to_many:
        views = assignment_views(arm, pixels, targets, assigner)
        paths.append(draw_assignments(folder / "assignments.png", originals, views, names))
    return paths


def _detect(arm: Arm, images: Sequence[Tensor], nms_threshold: float | None) -> list[Detection]:
    predictions, batch = arm.predict(images)
    found = one_to_many_detections(arm.adapter, predictions, batch, nms_threshold=nms_threshold)
    return [on_cpu(detection) for detection in found]


@torch.no_grad()
def assignment_views(
    arm: Arm, images: Sequence[Tensor], targets: Sequence[Target], assigner: TaskAwareOneToOneAssigner
) -> list[AssignmentView]:
    """Which point each box would be given now, and the metric that decides it, in pixels of the original images."""
    batch, moved = arm.adapter.preprocess(images, targets)
    predictions = arm.adapter.head(arm.adapter.features(batch), batch)
    assignment = assigner(predictions, moved or [])
    views = []
    for i, (image, target, resized) in enumerate(zip(images, targets, moved or [], strict=True)):
        height, width = batch.sizes[i]
        original = (image.shape[-2], image.shape[-1])
        heat = _heat(predictions, i, resized, assigner, batch.images.shape[-2:])[:height, :width]
        mine = assignment.image == i
        points = predictions.points[assignment.point[mine]]
        views.append(
            AssignmentView(
                boxes=target["boxes"].cpu(),
                labels=target["labels"].cpu(),
                points=(points * points.new_tensor([original[1] / width, original[0] / height])).cpu(),
                strides=predictions.strides[assignment.point[mine]].cpu(),
                targets=assignment.target[mine].cpu(),
                fallback=assignment.fallback[mine].cpu(),
                heat=F.interpolate(heat[None, None], original, mode="bilinear", align_corners=False)[0, 0].cpu(),
            )
        )
    return views


def _heat(
    predictions: DensePredictions, image: int, target: Target, assigner: TaskAwareOneToOneAssigner, size: Sequence[int]
) -> Tensor:
    """Best metric over boxes, anchors and levels at every pixel of the batch image, ``(H, W)``."""
    heat = torch.zeros(tuple(size), device=predictions.boxes.device)
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
    """Where each pixel of a picture lies on a level's grid, ``(1, H, W, 2)`` as `grid_sample` counts: -1 to 1."""
    axes = []
    for pixels, origin, step, size in zip(
        picture.shape[::-1], level.origin, level.step, (level.width, level.height), strict=True
    ):
        position = (torch.arange(pixels, device=picture.device) + 0.5 - origin) / step
        axes.append(2 * position.clamp(0, size - 1) / max(1, size - 1) - (1 if size > 1 else 0))
    x, y = torch.meshgrid(axes[0], axes[1], indexing="xy")
    return torch.stack([x, y], dim=-1)[None]
