"""Choose the score thresholds of the best F1 as COCO judges detections, and show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from coco_example.data.annotations import Annotations
from coco_example.data.values import Identifier, key_of
from crosskd_assign.diagnostics import Threshold, Thresholds, best_thresholds
from crosskd_assign.structures import Detection, Target

__all__ = ["F1_IOU", "choose_thresholds", "describe_thresholds", "threshold_table"]

F1_IOU = 0.5


def choose_thresholds(
    detections: Sequence[Detection],
    annotations: Annotations,
    image_ids: Sequence[Identifier],
    label_to_category: Mapping[int, Identifier],
) -> Thresholds:
    """Find the thresholds of the best F1 for a detector's own labels.

    Objects are the annotation file's, as for AP: what lies in a crowd is neither right nor wrong, and boxes of classes
    that the detector lacks are missed. Labels without a category of the file do not count.

    Args:
        detections: One detection an image.
        annotations: The ground truth.
        image_ids: The file's id of each of those images.
        label_to_category: The category id of each label.
    """
    # 1. The objects of each image, as labels of the detector; of what it lacks, labels below 0.
    labels = {key_of(category): label for label, category in label_to_category.items()}
    classes = (*annotations.categories, *annotations.unknown)
    known = {key_of(category.id) for category in classes}
    table = np.array([-1, *(labels.get(key_of(category.id), -2 - n) for n, category in enumerate(classes))])
    corners = np.concatenate([annotations.xywh[:, :2], annotations.xywh[:, :2] + annotations.xywh[:, 2:]], axis=1)
    finite = np.isfinite(corners).all(axis=1)
    place = {key_of(image.id): n for n, image in enumerate(annotations.images)}
    order = np.argsort(annotations.owner, kind="stable")
    starts = np.searchsorted(annotations.owner[order], np.arange(len(annotations.images) + 1))

    def boxes(n: int, *, crowd: bool) -> Target:
        own = order[starts[n] : starts[n + 1]]
        own = own[finite[own] & (annotations.crowd[own] == crowd)]
        return Target(boxes=torch.from_numpy(corners[own]), labels=torch.from_numpy(table[annotations.label[own]]))

    # 2. The thresholds.
    places = [place[key_of(identifier)] for identifier in image_ids]
    counted = {label for label, category in label_to_category.items() if key_of(category) in known}
    thresholds = best_thresholds(
        [_of_labels(detection, counted) for detection in detections],
        [boxes(n, crowd=False) for n in places],
        iou_threshold=F1_IOU,
        ignored=[boxes(n, crowd=True) for n in places],
    )
    return Thresholds(thresholds.overall, {label: x for label, x in thresholds.per_class.items() if label >= 0})


def _of_labels(detection: Detection, labels: set[int]) -> Detection:
    keep = torch.tensor([label in labels for label in detection["labels"].tolist()], dtype=torch.bool)
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def describe_thresholds(
    thresholds: Thresholds, names: Mapping[int, str], *, chosen_on: str, with_nms: bool
) -> dict[str, Any]:
    """List thresholds and what they give by class name, as ``summary.json`` has them."""
    each = {names.get(label, str(label)): vars(x) for label, x in thresholds.per_class.items()}
    origin = {"chosen_on": chosen_on, "iou": F1_IOU, "with_nms": with_nms}
    return {**origin, "overall": vars(thresholds.overall), "per_class": each}


def threshold_table(thresholds: Thresholds, names: Mapping[int, str], *, chosen_on: str, with_nms: bool) -> str:
    """Write a table of the thresholds of the best F1, with precision and recall there, overall and by class."""
    rows: list[tuple[str, Threshold]] = [("all classes", thresholds.overall)]
    rows += [(names.get(label, str(label)), x) for label, x in thresholds.per_class.items()]
    width = max(len(name) for name, _ in rows)
    nms = "with" if with_nms else "without"
    lines = [
        f"score thresholds of the best F1 at IoU {F1_IOU}, {nms} NMS, chosen on {chosen_on}:",
        f"{'':{width}}  threshold     F1  precision  recall  objects",
    ]
    lines += [
        f"{name:{width}}  {x.score:9.3f}  {x.f1:5.3f}  {x.precision:9.3f}  {x.recall:6.3f}  {x.objects:7,}"
        for name, x in rows
    ]
    return "\n".join(lines).replace("   nan", "     –")
