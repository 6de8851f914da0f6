"""Read a COCO annotation file and its folder of pictures.

Boxes are ``xyxy`` float32 pixels of the stored image. Labels run from 1 to K in ascending category id order, or in the
order of the run's classes; 0 is the background, as in torchvision. G is the number of boxes of one image, N the number
of boxes in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coco_example.data.annotations import Annotations, Category, read_annotations
from coco_example.data.layouts import find_pictures
from coco_example.data.records import ImageRecord, ImageRecords
from coco_example.data.values import Identifier

_MIN_SIDE = 1.0  # pixels; what is thinner than a pixel of its own picture cannot be learnt


@dataclass(frozen=True)
class ScanReport:
    """Counts of the images and boxes of a file, and of the boxes that were dropped or clipped."""

    images: int
    images_without_boxes: int
    boxes: int
    crowd_dropped: int
    degenerate_dropped: int
    outside_dropped: int
    clipped: int

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in vars(self).items())


@dataclass(frozen=True)
class CocoIndex:
    """Contents of an annotation file and its pictures: records in the order of the file, to train on and to show.

    ``annotations`` has what scoring needs besides: crowds, areas, and boxes as the file has them. ``first_dropped`` is
    the place there of the first box that was dropped and is no crowd, None where there is none.
    """

    records: Sequence[ImageRecord]
    report: ScanReport
    annotations: Annotations
    first_dropped: int | None = None

    @property
    def categories(self) -> tuple[Category, ...]:
        """Return the classes of the labels 1..K."""
        return self.annotations.categories

    @property
    def label_to_category(self) -> dict[int, Identifier]:
        """Map the labels 1..K to category ids of the file."""
        return {label: category.id for label, category in enumerate(self.categories, start=1)}

    @property
    def num_classes(self) -> int:
        """Return K + 1: torchvision's detectors count the background."""
        return len(self.categories) + 1


def read_coco(
    images: Path, annotations: Path, classes: Sequence[Category] | None = None, *, progress: bool = False
) -> CocoIndex:
    """Read a COCO instances file and check that every image is on disk, without opening any.

    Crowd regions, boxes thinner than a pixel or not finite, and boxes outside their image are dropped and counted;
    boxes that stick out are clipped and counted. Images without boxes stay.

    Args:
        images: The folder that the file's ``file_name`` entries are relative to.
        annotations: The JSON file.
        classes: Classes of the run, which the file must not contradict. Its own by default.
        progress: Whether to show a bar on a terminal while a large file is read.

    Raises:
        DataError: If the file is malformed or contradicts itself or ``classes``, or an image is missing or outside
            ``images``.
    """
    # 1. Read the file and find its pictures.
    content = read_annotations(annotations, classes, progress=progress)
    paths = find_pictures(images, [entry.file_name for entry in content.images], annotations)
    owner, label, xywh = content.owner, content.label, content.xywh
    limit = np.array([[entry.width, entry.height] for entry in content.images], dtype=np.float64)
    limit = limit.reshape(-1, 2)[owner]  # (N, 2)

    # 2. Clip the boxes to their images and mark those that are used.
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity do occur in files
        start, extent, stop = xywh[:, :2], xywh[:, 2:], xywh[:, :2] + xywh[:, 2:]
        low, high = np.clip(start, 0, limit), np.clip(stop, 0, limit)
        known = ~content.crowd & (label <= len(content.categories))
        sound = known & (np.isfinite(start) & np.isfinite(stop) & (extent >= _MIN_SIDE)).all(axis=1)
        inside = sound & (high - low >= _MIN_SIDE).all(axis=1)
        moved = inside & (np.maximum(low - start, stop - high) > 1e-3).any(axis=1)  # beyond rounding

    # 3. Group them by image, in the order of the file.
    order = np.argsort(owner, kind="stable")
    order = order[inside[order]]
    counts = np.bincount(owner[order], minlength=len(paths))
    boxes = np.hstack([low, high])[order].astype(np.float32)

    # 4. Count what was dropped and clipped.
    tallies = [int(mask.sum()) for mask in (content.crowd, known & ~sound, sound & ~inside, moved)]
    report = ScanReport(len(paths), int((counts == 0).sum()), len(order), *tallies)
    records = ImageRecords(
        [entry.id for entry in content.images],
        paths,
        [(entry.width, entry.height) for entry in content.images],
        counts.tolist(),
        boxes,
        label[order],
    )
    dropped = known & ~inside
    return CocoIndex(records, report, content, int(dropped.argmax()) if dropped.any() else None)
