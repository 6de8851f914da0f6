"""Index pictures without labels: any tree of files, and no annotation file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coco_example.data.annotations import Annotations, ImageEntry
from coco_example.data.pictures import picture_sizes, pictures_below
from coco_example.data.reader import CocoIndex, ScanReport
from coco_example.data.records import ImageRecords
from coco_example.errors import DataError

__all__ = ["read_unlabelled"]


def read_unlabelled(folder: Path) -> tuple[CocoIndex, list[str]]:
    """Index the pictures below a folder; each has its path in the folder as its id, and no boxes.

    Args:
        folder: The folder, with pictures in any tree below it.

    Returns:
        The pictures, and warnings of files that are left out because they cannot be read.

    Raises:
        DataError: There is no folder, no picture in it, or none that can be read.
        OSError: A folder cannot be read.
    """
    # 1. Find them.
    paths = pictures_below(folder) if folder.is_dir() else []
    if not paths:
        raise DataError(
            expected="pictures without labels",
            got="none in it" if folder.is_dir() else "no folder there",
            where=f"--unlabelled {folder}",
            fix="name a folder with pictures in it or in folders below it",
        )

    # 2. Read their headers.
    sizes = picture_sizes(paths)
    errors = [error for error in sizes if isinstance(error, DataError)]
    warnings = []
    if errors:
        names = f"{len(errors):,} of {len(paths):,} files"
        warnings.append(f"pictures without labels: {names} cannot be read and are left out, the first: {errors[0]}")
    entries = [
        ImageEntry(path.relative_to(folder).as_posix(), path.name, *size)
        for path, size in zip(paths, sizes, strict=True)
        if not isinstance(size, DataError)
    ]
    if not entries:
        raise DataError(
            expected="pictures without labels that can be read",
            got=f"none of {len(paths):,}, the first: {errors[0].got}",
            where=f"{paths[0]}",
            fix="replace them, or name another folder",
        )
    return _index(folder, entries), warnings


def _index(folder: Path, entries: list[ImageEntry]) -> CocoIndex:
    """Make an index of pictures alone."""
    none, many = np.zeros(0), np.zeros(0, dtype=np.int64)
    content = Annotations(
        folder, (), (), tuple(entries), many, many, none.reshape(0, 4), none, np.zeros(0, dtype=np.bool_)
    )
    records = ImageRecords(
        [entry.id for entry in entries],
        [folder / str(entry.id) for entry in entries],
        [(entry.width, entry.height) for entry in entries],
        [0] * len(entries),
        np.zeros((0, 4), dtype=np.float32),
        many,
    )
    return CocoIndex(records, ScanReport(len(entries), len(entries), 0, 0, 0, 0, 0), content)
