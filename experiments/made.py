"""The data sets that the laboratory makes itself: drawn scenes, and crowds with a chosen overlap.

A set whose name begins with ``overlap`` is trained with all overlaps mixed, and scored besides on validation images of
one overlap each. The others are found under the data root.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coco_example.data.scenes import write_scenes
from cutouts import write_cutouts

__all__ = ["MIXED", "OVERLAPS", "make", "make_crowds"]

OVERLAPS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""IoU between neighbours of one class; at 0 they touch."""
MIXED = (0.0, 0.9)

_VALIDATION = 300  # images


def make(name: str, data_root: Path, work: Path) -> Path:
    """Return the folder of a set, which is made if it is one that can be."""
    if name == "demo":
        return write_scenes(work / "data" / name)
    if name in _CROWDS:
        return _CROWDS[name](data_root, work / "data" / name, _TRAINING[name], MIXED)
    return data_root / name


def make_crowds(name: str, data_root: Path, work: Path, overlap: float) -> Path:
    """Make the folder with the validation images of one overlap, and without training images."""
    return _CROWDS[name](data_root, work / "data" / f"{name}-{overlap:g}", 0, (overlap, overlap))


def _scenes(_: Path, folder: Path, train: int, overlap: tuple[float, float]) -> Path:
    return write_scenes(folder, train=train, val=_VALIDATION, overlap=overlap)


def _cells(data_root: Path, folder: Path, train: int, overlap: tuple[float, float]) -> Path:
    return write_cutouts(data_root / "bccd", folder, train=train, val=_VALIDATION, overlap=overlap)


_CROWDS: dict[str, Callable[[Path, Path, int, tuple[float, float]], Path]] = {
    "overlap_scenes": _scenes,
    "overlap_cells": _cells,
}
_TRAINING = {"overlap_scenes": 2000, "overlap_cells": 1000}  # images
