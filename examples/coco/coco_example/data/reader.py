"""Read COCO-format annotations and name the entry that is wrong with them.

Boxes are ``xyxy`` float32 pixels of the stored image. Labels run from 1 to K in ascending category id order; 0 is
the background, as in torchvision. G is the number of boxes of one image, N the number of boxes in the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coco_example.errors import DataError

_MIN_SIDE = 1.0  # pixels; what is thinner than a pixel of its own picture cannot be learnt


@dataclass(frozen=True)
class Category:
    """A class of objects, with the id and the name of the annotation file."""

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image and its objects: ``boxes`` (G, 4) float32 xyxy pixels, ``labels`` (G,) int64 in 1..K."""

    id: int
    path: Path
    width: int
    height: int
    boxes: Tensor
    labels: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to a worker process as a tensor, each would take a file descriptor, and COCO has 236,000 of them.
        return _record, (self.id, self.path, self.width, self.height, self.boxes.numpy(), self.labels.numpy())


def _record(*fields: Any) -> ImageRecord:
    return ImageRecord(*fields[:4], *map(torch.from_numpy, fields[4:]))


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
    """Contents of an annotation file: records in the order of the file, categories by ascending id."""

    records: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    report: ScanReport
    annotations: Path

    @property
    def label_to_category(self) -> dict[int, int]:
        """Map the labels 1..K to category ids of the file."""
        return {label: category.id for label, category in enumerate(self.categories, start=1)}

    @property
    def num_classes(self) -> int:
        """Return K + 1: torchvision's detectors count the background."""
        return len(self.categories) + 1


def locate_split(root: Path, split: Literal["train", "val"], annotations: str | None = None) -> tuple[Path, Path]:
    """Find a split's image folder and annotation file below ``root``, with or without the year 2017 in their names.

    ``annotations`` names a file in ``root/annotations`` to use in place of ``instances_*.json``.

    Raises:
        DataError: If neither layout is there; lists the paths that were tried.
    """
    tried = []
    for folder in (root / f"{split}2017", root / split):
        file = root / "annotations" / (annotations or f"instances_{folder.name}.json")
        if folder.is_dir() and file.is_file():
            return folder, file
        tried += [f"{path}{'' if path.exists() else ' (missing)'}" for path in (folder, file)]
    raise DataError(
        expected="an image folder and its annotation file",
        got="{} with {}, and {} with {}".format(*tried),
        where=f"{split} split",
        fix="name the folder that holds both",
    )


def read_coco(images: Path, annotations: Path) -> CocoIndex:
    """Read a COCO instances file and check that every image is on disk, without opening any.

    Crowd regions, boxes thinner than a pixel or not finite, and boxes outside their image are dropped and counted;
    boxes that stick out are clipped and counted. Images without boxes stay.

    Args:
        images: The folder that the file's ``file_name`` entries are relative to.
        annotations: The JSON file.

    Raises:
        DataError: If the file is malformed or contradicts itself, or an image is missing or outside ``images``.
    """
    # 1. Parse the file.
    try:
        document = json.loads(annotations.read_bytes())
    except (OSError, ValueError) as error:  # a JSONDecodeError names line and column
        fix = "check the path, or export it again"
        raise DataError(expected="readable JSON", got=str(error), where=str(annotations), fix=fix) from error

    # 2. Number the categories 1..K by ascending id, and list the images.
    categories = _read_categories(document, annotations)
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    position, paths, sizes = _read_images(document, annotations, images)
    _check_present(paths, images)

    # 3. Collect the boxes: index of the image, label, xywh, crowd flag.
    rows = _read_boxes(document, annotations, position, label_of)
    crowd = np.array([bool(entry.get("iscrowd")) for entry in document["annotations"]], dtype=bool)  # (N,)
    owner = np.array([position[row[0]] for row in rows], dtype=np.int64)  # (N,)
    label = np.array([label_of[row[1]] for row in rows], dtype=np.int64)  # (N,)
    xywh = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4)  # (N, 4)
    limit = np.array(sizes, dtype=np.float64).reshape(-1, 2)[owner]  # (N, 2)

    # 4. Clip the boxes to their images and mark those that are used.
    with np.errstate(invalid="ignore"):  # NaN and Infinity do occur in files
        start, extent, stop = xywh[:, :2], xywh[:, 2:], xywh[:, :2] + xywh[:, 2:]
        low, high = np.clip(start, 0, limit), np.clip(stop, 0, limit)
        sound = ~crowd & (np.isfinite(start) & np.isfinite(stop) & (extent >= _MIN_SIDE)).all(axis=1)
        inside = sound & (high - low >= _MIN_SIDE).all(axis=1)
        moved = inside & (np.maximum(low - start, stop - high) > 1e-3).any(axis=1)  # beyond rounding

    # 5. Group them by image, in the order of the file.
    order = np.argsort(owner, kind="stable")
    order = order[inside[order]]
    counts = np.bincount(owner[order], minlength=len(paths)).tolist()
    boxes = torch.split(torch.from_numpy(np.hstack([low, high])[order].astype(np.float32)), counts)
    labels = torch.split(torch.from_numpy(label[order]), counts)

    # 6. Count what was dropped and clipped.
    tallies = [int(mask.sum()) for mask in (crowd, ~crowd & ~sound, sound & ~inside, moved)]
    report = ScanReport(len(paths), counts.count(0), len(order), *tallies)
    records = tuple(map(ImageRecord, position, paths, *zip(*sizes, strict=True), boxes, labels))
    return CocoIndex(records, tuple(categories), report, annotations)


def _read_categories(document: Any, file: Path) -> list[Category]:
    """List the categories by ascending id."""
    categories = [Category(*row) for row in _rows(document, "categories", file, id=int, name=str)]
    categories.sort(key=lambda category: category.id)
    if len({category.id for category in categories}) < len(categories):
        raise DataError(
            expected="unique category ids",
            got="one that repeats",
            where=str(file),
            fix="merge or renumber the categories",
        )
    return categories


def _read_images(document: Any, file: Path, folder: Path) -> tuple[dict[int, int], list[Path], list[list[int]]]:
    """List the images: position in the file by id, paths, and (width, height)."""
    position: dict[int, int] = {}
    paths, sizes = [], []
    rows = _rows(document, "images", file, id=int, file_name=str, width=int, height=int)
    for n, (key, name, *size) in enumerate(rows):
        # 1. Each id stands for one image.
        where = f"images[{n}] of {file}"
        if position.setdefault(key, n) != n:
            raise DataError(
                expected="unique image ids",
                got=f"{key} as in images[{position[key]}]",
                where=where,
                fix="remove one of the two",
            )
        # 2. No path leaves the folder.
        pure = PureWindowsPath(name)  # knows the separators of every system
        if pure.anchor or ".." in pure.parts:
            raise DataError(
                expected=f"file_name to stay inside {folder}",
                got=repr(name),
                where=where,
                fix="make it relative to that folder",
            )
        paths.append(folder / name)
        sizes.append(size)
    return position, paths, sizes


def _read_boxes(document: Any, file: Path, position: dict[int, int], label_of: dict[int, int]) -> list[list[Any]]:
    """List the boxes: id of the image, id of the category, xywh."""
    rows = _rows(document, "annotations", file, image_id=int, category_id=int, bbox=list)
    for n, (image, category, box) in enumerate(rows):
        # 1. The entry belongs to an image and a category of the file.
        where = f"annotations[{n}] of {file}"
        if image not in position or category not in label_of:
            raise DataError(
                expected="ids listed under images and categories",
                got=f"image_id {image} and category_id {category}",
                where=where,
                fix="add what is missing there",
            )
        # 2. Its box is four numbers.
        if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            raise DataError(
                expected="bbox to be [x, y, width, height]",
                got=str(box),
                where=where,
                fix="correct or remove the entry",
            )
    return rows


def _rows(document: Any, table: str, file: Path, **fields: type) -> list[list[Any]]:
    """List the named fields of every entry of a table, after checking that they are there and of the right type."""
    # 1. Check the table, then each field of each entry.
    entries = document.get(table) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise DataError(
            expected=f"a list under {table!r}", got=f"{entries!r:.60}", where=str(file), fix="export as COCO instances"
        )
    for n, entry in enumerate(entries):
        for name, kind in fields.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, kind):
                raise DataError(
                    expected=f"{name!r} to be of type {kind.__name__}",
                    got="nothing" if value is None else f"{value!r:.60}",
                    where=f"{table}[{n}] of {file}",
                    fix="complete or correct the entry",
                )
    # 2. Select the fields.
    return [[entry[name] for name in fields] for entry in entries]


def _check_present(paths: Sequence[Path], images: Path) -> None:
    """Raise unless every image is on disk."""
    folders = {path.parent for path in paths}  # a listing per folder is much faster than a look at every file
    present = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    missing = [str(path.relative_to(images)) for path in paths if path not in present]
    if missing:
        raise DataError(
            expected="every image to be on disk",
            got=f"{len(missing)} missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}",
            where=str(images),
            fix="complete the folder, or name the right one",
        )
