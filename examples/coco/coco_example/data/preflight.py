"""Judge the data of a run before its first step: what cannot work is an error, what is likely wrong a warning."""

from __future__ import annotations

import os
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coco_example.data.annotations import Annotations
from coco_example.data.augmentation import THIN
from coco_example.data.pictures import check_pictures
from coco_example.data.reader import CocoIndex
from coco_example.errors import DataError

__all__ = ["judge_boxes", "judge_pictures", "judge_splits", "judge_unlabelled"]

_FAR = 1e12  # pixels, beyond any picture
_LARGE = 0.1  # share of boxes from which on something is likely wrong


def judge_splits(train: CocoIndex, val: CocoIndex, *, size: int, short_side: int = 0, top_k: int = 100) -> list[str]:
    """Judge both splits of a run, without opening a picture.

    Args:
        train: Images to train on.
        val: Images to evaluate on.
        size: Longer side of the resized images in pixels.
        short_side: Bound of their shorter side; 0 for none.
        top_k: Detections of an image.

    Returns:
        Warnings.

    Raises:
        DataError: A split has no images, no categories or no box to use.
    """
    return [
        *judge_boxes(train, "training", top_k=top_k),
        *_vanishing(train, size, short_side),
        *judge_boxes(val, "validation", top_k=top_k),
        *_shared(train, val),
    ]


def judge_boxes(index: CocoIndex, split: str, *, top_k: int = 100) -> list[str]:
    """Judge the boxes of one split.

    Returns:
        Warnings.

    Raises:
        DataError: It has no images, no categories or no box to use.
    """
    # 1. There has to be something of everything.
    content, report = index.annotations, index.report
    crowds, boxes = int(content.crowd.sum()), len(content.crowd)
    dropped = report.degenerate_dropped + report.outside_dropped
    causes = _causes(index)
    suspicion = _suspicion(content)
    for name, count in (("images", report.images), ("categories", len(index.categories)), ("boxes", report.boxes)):
        if count == 0:
            left = f" of {boxes:,} that can be used, {crowds:,} crowds, {causes}" if name == "boxes" and boxes else ""
            raise DataError(
                expected=f"{split} {name}",
                got="; ".join(filter(None, (f"none{left}", suspicion))),
                where=str(content.file),
                fix="see that it is the right file, and that bbox is [x, y, width, height] in pixels of the picture",
            )

    # 2. Boxes that are likely wrong, or not found for sure.
    warnings = []
    if dropped >= _LARGE * (boxes - crowds):
        warnings.append(f"{_share(dropped, boxes - crowds)} are dropped: {causes}")
    if suspicion:
        warnings.append(suspicion)
    if content.unknown:
        lost = int((content.label > len(content.categories)).sum())
        names = ", ".join(map(str, content.unknown[:5])) + (", …" if len(content.unknown) > 5 else "")
        warnings.append(f"{_share(lost, boxes)} are of classes that the run does not know and count as missed: {names}")
    objects = np.bincount(content.owner[~content.crowd], minlength=report.images)
    if (objects > top_k).any():
        warnings.append(
            f"{_count(int((objects > top_k).sum()), 'image')} with more than {top_k} objects, at most {objects.max()}: "
            f"those beyond are never found; raise --top-k"
        )
    return [f"{split} data: {warning} ({content.file})" for warning in warnings]


def _causes(index: CocoIndex) -> str:
    """Count why boxes were dropped, and show the first of them."""
    report, first = index.report, index.first_dropped
    thin = f"{report.degenerate_dropped:,} thinner than a pixel or of negative size"
    counts = f"{thin}, {report.outside_dropped:,} outside their picture"
    if first is None:
        return counts
    numbers = ", ".join(f"{number:.6g}" for number in index.annotations.xywh[first])
    return f"{counts}; the first in annotations[{first}]: [{numbers}]"


def judge_pictures(index: CocoIndex, *, decode: bool = False, limit: int | None = None) -> None:
    """Check that the pictures of an index have their annotated sizes, and whether they can be decoded.

    Raises:
        DataError: One is something else.
    """
    records = index.records[:limit]
    sizes = [(record.width, record.height) for record in records]
    check_pictures([record.path for record in records], sizes, decode=decode)


def judge_unlabelled(unlabelled: CocoIndex, train: CocoIndex, val: CocoIndex) -> list[str]:
    """Judge how many pictures without labels are in a split, too: the same bytes, wherever they are.

    Returns:
        Warnings.
    """
    # 1. Only files of one size can have one content.
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for record in unlabelled.records:
        sizes[record.path.stat().st_size].append(record.path)

    # 2. Compare these.
    digests: dict[int, set[str]] = {}
    warnings = []
    for name, split in (("validation", val), ("training", train)):
        both = 0
        for path in (record.path for record in split.records):
            size = path.stat().st_size
            if size in sizes:
                if size not in digests:
                    digests[size] = set(map(_digest, sizes[size]))
                both += _digest(path) in digests[size]
        if both:
            harm = "scores say less about others" if name == "validation" else "they have labels there"
            warnings.append(f"pictures without labels: {both:,} are {name} pictures, too; {harm}")
    return warnings


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _suspicion(content: Annotations) -> str:
    """Name the likely cause of boxes that do not fit their pictures, if there is one."""
    # 1. Boxes and pictures that can be judged.
    usable = ~content.crowd & (np.abs(content.xywh) < _FAR).all(axis=1)
    boxes = content.xywh[usable]  # (F, 4)
    sizes = np.array([[image.width, image.height] for image in content.images], dtype=np.float64).reshape(-1, 2)
    limit = sizes[content.owner[usable]]  # (F, 2)
    if len(boxes) == 0:
        return ""

    # 2. Fractions of the picture, two corners, or pixels of another picture.
    fractions = (boxes < 1.5).all(axis=1) & (limit > 1.5).any(axis=1)
    out = (boxes[:, :2] + boxes[:, 2:] > 1.01 * limit + 2).any(axis=1)  # by more than rounding
    corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= limit + 1).all(axis=1)
    if fractions.mean() >= _LARGE:
        seen = "look like fractions of the picture, where pixels are expected; multiply by its width and height"
        return f"{_share(fractions.sum(), len(boxes))} {seen}"
    if out.mean() >= _LARGE and corners.mean() > 1 - _LARGE:
        seen = "look like x1, y1, x2, y2, where x, y, width, height are expected"
        return f"{_share(corners.sum(), len(boxes))} {seen}; write [x, y, width, height]: [x1, y1, x2 - x1, y2 - y1]"
    if out.mean() >= _LARGE:
        return f"{_share(out.sum(), len(boxes))} reach out of their picture, as after resizing pictures without boxes"
    return ""


def _vanishing(index: CocoIndex, size: int, short_side: int) -> list[str]:
    """Judge how many boxes are too thin to train on once the images are resized."""
    records = [(record.width, record.height, record.boxes) for record in index.records]
    sides = torch.tensor([sides for *sides, _ in records])  # (images, 2)
    longer, shorter = sides.amax(dim=1), sides.amin(dim=1)
    factor = size / longer if short_side == 0 else torch.minimum(size / longer, short_side / shorter)
    factor = factor.repeat_interleave(torch.tensor([len(boxes) for *_, boxes in records]))
    corners = torch.cat([boxes for *_, boxes in records])
    lost = int(((corners[:, 2:] - corners[:, :2]) * factor[:, None] < THIN).any(dim=1).sum())
    file, boxes = index.annotations.file, index.report.boxes
    if lost == boxes:
        raise DataError(
            expected=f"boxes of at least {THIN} pixels once the images are resized",
            got=f"none of {boxes:,}",
            where=f"--size {size}, {file}",
            fix="raise --size",
        )
    if lost < _LARGE * boxes:
        return []
    reason = f"thinner than {THIN} pixels at --size {size} and not trained on; raise --size"
    return [f"training data: {_share(lost, boxes)} are {reason} ({file})"]


def _shared(train: CocoIndex, val: CocoIndex) -> list[str]:
    """Judge how many pictures are in both splits."""
    places = [[os.path.split(record.path) for record in split.records] for split in (train, val)]
    folders = {folder: os.path.realpath(folder) for split in places for folder in {folder for folder, _ in split}}
    seen, again = ([(folders[folder], name) for folder, name in split] for split in places)
    both = len(set(seen) & set(again))
    if both == 0:
        return []
    return [f"validation data: {both:,} of {len(again):,} pictures are trained on, too; scores say little about others"]


def _share(part: int | np.integer[Any], whole: int) -> str:
    return f"{part:,} of {_count(whole, 'box', 'boxes')} ({part / max(1, whole):.1%})"


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
