"""A reader of COCO-format annotations that says what is wrong with them.

Boxes are ``xyxy`` float32 pixels of the stored image. Labels run from 1 to K in ascending category id order; 0 is
the background, as in torchvision. G is the number of boxes of one image.
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

_MIN_SIDE = 1.0  # pixels; what is thinner than a pixel of its own picture cannot be learnt


class DatasetError(ValueError):
    """A dataset on disk is not what it should be."""


@dataclass(frozen=True)
class Category:
    """A class as the annotation file names it."""

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image and what is to be found in it: ``boxes`` (G, 4) float32 xyxy pixels, ``labels`` (G,) int64 in 1..K."""

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
    """How many images and boxes a file holds, and what became of boxes that are not used as they are."""

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
    """What `read_coco` read: records in the order of the file, categories by ascending id."""

    records: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    report: ScanReport
    annotations: Path

    @property
    def label_to_category(self) -> dict[int, int]:
        """Maps the labels 1..K to category ids of the file."""
        return {label: category.id for label, category in enumerate(self.categories, start=1)}

    @property
    def num_classes(self) -> int:
        """K + 1: torchvision's detectors count the background."""
        return len(self.categories) + 1


def locate_split(root: Path, split: Literal["train", "val"], annotations: str | None = None) -> tuple[Path, Path]:
    """Finds a split's image folder and annotation file below ``root``, with or without the year 2017 in their names.

    ``annotations`` names a file in ``root/annotations`` to use in place of ``instances_*.json``.

    Raises:
        DatasetError: Neither layout is there; says which paths were tried.
    """
    tried = []
    for folder in (root / f"{split}2017", root / split):
        file = root / "annotations" / (annotations or f"instances_{folder.name}.json")
        if folder.is_dir() and file.is_file():
            return folder, file
        tried += [f"{path}{'' if path.exists() else ' (missing)'}" for path in (folder, file)]
    got = "{} with {}, and {} with {}".format(*tried)
    raise problem("an image folder and its annotation file", got, f"{split} split", "name the folder that holds both")


def read_coco(images: Path, annotations: Path) -> CocoIndex:
    """Reads a COCO instances file and makes sure that every image is there, without opening any.

    Crowd regions, boxes thinner than a pixel or not finite, and boxes outside their image are dropped and counted;
    boxes that stick out are clipped and counted. Images without boxes stay.

    Args:
        images: The folder that the file's ``file_name`` entries are relative to.
        annotations: The JSON file.

    Raises:
        DatasetError: The file is malformed or contradicts itself, or an image is missing or outside ``images``.
    """
    try:
        document = json.loads(annotations.read_bytes())
    except (OSError, ValueError) as error:  # a JSONDecodeError names line and column
        raise problem("readable JSON", str(error), str(annotations), "check the path, or export it again") from error
    categories = [Category(*row) for row in _rows(document, "categories", annotations, id=int, name=str)]
    categories.sort(key=lambda category: category.id)
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    if len(label_of) < len(categories):
        raise problem("unique category ids", "one that repeats", str(annotations), "merge or renumber the categories")

    position: dict[int, int] = {}
    paths, sizes = [], []
    rows = _rows(document, "images", annotations, id=int, file_name=str, width=int, height=int)
    for n, (key, name, *size) in enumerate(rows):
        where = f"images[{n}] of {annotations}"
        if position.setdefault(key, n) != n:
            raise problem("unique image ids", f"{key} as in images[{position[key]}]", where, "remove one of the two")
        pure = PureWindowsPath(name)  # knows the separators of every system
        if pure.anchor or ".." in pure.parts:
            raise problem(f"file_name to stay inside {images}", repr(name), where, "make it relative to that folder")
        paths.append(images / name)
        sizes.append(size)
    _check_present(paths, images)

    rows = _rows(document, "annotations", annotations, image_id=int, category_id=int, bbox=list)
    for n, (image, category, box) in enumerate(rows):
        where = f"annotations[{n}] of {annotations}"
        if image not in position or category not in label_of:
            got = f"image_id {image} and category_id {category}"
            raise problem("ids listed under images and categories", got, where, "add what is missing there")
        if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            raise problem("bbox to be [x, y, width, height]", str(box), where, "correct or remove the entry")
    crowd = np.array([bool(entry.get("iscrowd")) for entry in document["annotations"]], dtype=bool)
    owner = np.array([position[row[0]] for row in rows], dtype=np.int64)
    label = np.array([label_of[row[1]] for row in rows], dtype=np.int64)
    xywh = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4)
    limit = np.array(sizes, dtype=np.float64).reshape(-1, 2)[owner]
    with np.errstate(invalid="ignore"):  # NaN and Infinity do occur in files
        start, extent, stop = xywh[:, :2], xywh[:, 2:], xywh[:, :2] + xywh[:, 2:]
        low, high = np.clip(start, 0, limit), np.clip(stop, 0, limit)
        sound = ~crowd & (np.isfinite(start) & np.isfinite(stop) & (extent >= _MIN_SIDE)).all(axis=1)
        inside = sound & (high - low >= _MIN_SIDE).all(axis=1)
        moved = inside & (np.maximum(low - start, stop - high) > 1e-3).any(axis=1)  # beyond rounding
    order = np.argsort(owner, kind="stable")
    order = order[inside[order]]
    counts = np.bincount(owner[order], minlength=len(paths)).tolist()
    boxes = torch.split(torch.from_numpy(np.hstack([low, high])[order].astype(np.float32)), counts)
    labels = torch.split(torch.from_numpy(label[order]), counts)
    tallies = [int(mask.sum()) for mask in (crowd, ~crowd & ~sound, sound & ~inside, moved)]
    report = ScanReport(len(paths), counts.count(0), len(order), *tallies)
    records = tuple(map(ImageRecord, position, paths, *zip(*sizes, strict=True), boxes, labels))
    return CocoIndex(records, tuple(categories), report, annotations)


def problem(expected: str, got: str, where: str, fix: str) -> DatasetError:
    """An error in the form of all messages: what was expected, what came, where, what to do."""
    return DatasetError(f"Expected {expected} but got {got} ({where}). Fix: {fix}.")


def _rows(document: Any, table: str, file: Path, **fields: type) -> list[list[Any]]:
    """The named fields of every entry of a table, once they are all known to be there and of the right type."""
    entries = document.get(table) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise problem(f"a list under {table!r}", f"{entries!r:.60}", str(file), "export as COCO instances")
    for n, entry in enumerate(entries):
        for name, kind in fields.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, kind):
                got = "nothing" if value is None else f"{value!r:.60}"
                where = f"{table}[{n}] of {file}"
                raise problem(f"{name!r} to be of type {kind.__name__}", got, where, "complete or correct the entry")
    return [[entry[name] for name in fields] for entry in entries]


def _check_present(paths: Sequence[Path], images: Path) -> None:
    folders = {path.parent for path in paths}  # a listing per folder is much faster than a look at every file
    present = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    missing = [str(path.relative_to(images)) for path in paths if path not in present]
    if missing:
        got = f"{len(missing)} missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        raise problem("every image to be on disk", got, str(images), "complete the folder, or name the right one")
