"""Paste real red blood cells onto real backgrounds, so that neighbours overlap by a chosen IoU.

Cells in a smear are see-through: where two lie on each other, the light passes through both. A cut-out is therefore
what a cell lets through, its pixels over the colour around it, and pasting multiplies; it hides nothing.
A background is a picture of the set from which everything darker than the empty smear was taken out. Pictures to train
on are made from training pictures, pictures to evaluate on from validation pictures alone. S is a side in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from coco_example.data.crowds import iou, sample_groups, validate_overlap
from coco_example.data.folder import Picture, write_coco_folder
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

__all__ = ["Material", "collect", "paste", "write_cutouts"]

Array = npt.NDArray[np.float64]

_VERSION = 1  # of the pasting: every change that shows in a picture raises it
_CATEGORY = 1  # red cells
_SCALE = 0.5  # of the source's pixels
_SMALLEST = 24.0  # side of a cut-out, in scaled pixels
_DARKER = 0.06  # than the empty smear, as a share: what is taken out of a background
_RIM = 0.16  # share of a cut-out's radius over which it fades out


class Material(NamedTuple):
    """What pictures are made of: cells (h, w, 3) as what they let through, in 0..1, and backgrounds (H, W, 3)."""

    cells: list[Array]
    backgrounds: list[Array]


def write_cutouts(
    source: Path, root: Path, *, train: int, val: int, size: int = 128, seed: int = 0, overlap: tuple[float, float]
) -> Path:
    """Paste cells into a COCO folder, unless they are there already.

    Boxes enclose the whole of a cell, in whole pixels, which moves an IoU by about 0.02. Picture k of a split depends
    on ``source``, ``seed``, ``size``, ``overlap`` and k alone.

    Args:
        source: The cells, a COCO folder: ``bccd``.
        root: The folder to make, which is also returned.
        train: Pictures to train on, made from training pictures.
        val: Pictures to evaluate on, made from validation pictures.
        size: Side of the pictures in pixels.
        seed: Not negative.
        overlap: Range of IoUs, low to high, by which neighbours overlap.

    Raises:
        DataError: If ``root`` holds something else, or ``overlap`` is no range of IoUs.
    """
    validate_overlap(overlap, "write_cutouts")
    bounds = [float(bound) for bound in overlap]
    recipe = {"train": train, "val": val, "size": size, "seed": seed, "overlap": bounds, "version": _VERSION}
    splits = {
        split: _pictures(source, split, (seed, number), count, size, overlap)
        for number, (split, count) in enumerate({"train": train, "val": val}.items())
    }
    return write_coco_folder(root, "cutouts.json", json.dumps(recipe), splits, ["cell"])


def _pictures(
    source: Path, split: str, seed: tuple[int, int], count: int, size: int, overlap: tuple[float, float]
) -> Iterator[Picture]:
    """Make the pictures of a split one by one."""
    if count:
        material = collect(source, split)
        for k in range(count):
            yield paste(np.random.default_rng((*seed, k)), material, size, overlap)


def paste(rng: np.random.Generator, material: Material, size: int, overlap: tuple[float, float]) -> Picture:
    """Make one picture of size S × S: a background, and cells whose boxes are `crowds.sample_groups`'."""
    # 1. Take a part of a background.
    background = material.backgrounds[rng.integers(len(material.backgrounds))]
    y, x = (int(rng.integers(0, side - size + 1)) for side in background.shape[:2])
    canvas = _turned(rng, background[y : y + size, x : x + size]).copy()
    # 2. Paste a cell of its own into each box.
    boxes = [box for group in sample_groups(rng, size, overlap) for box in group.round()]
    for left, top, right, bottom in np.array(boxes).astype(int):
        cell = _turned(rng, material.cells[rng.integers(len(material.cells))])
        canvas[top:bottom, left:right] *= _resized(cell, right - left, bottom - top)
    # 3. Add the grain of a camera.
    canvas += rng.normal(0, 2, canvas.shape)
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return picture, [(1, box.tolist()) for box in boxes]


def collect(source: Path, split: str) -> Material:
    """Cut cells and backgrounds out of the pictures of a split."""
    content = json.loads((source / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        objects[entry["image_id"]].append(entry)
    material = Material([], [])
    for image in content["images"]:
        picture = Image.open(source / split / image["file_name"]).convert("RGB").reduce(round(1 / _SCALE))
        pixels = np.asarray(picture, dtype=np.float64)  # (H, W, 3)
        smear = np.percentile(pixels.reshape(-1, 3), 90, axis=0)  # the colour of the empty smear, (3,)
        material.backgrounds.append(_emptied(pixels, smear))
        boxes = np.array([entry["bbox"] for entry in objects[image["id"]]], dtype=np.float64).reshape(-1, 4) * _SCALE
        boxes[:, 2:] += boxes[:, :2]
        for entry, box in zip(objects[image["id"]], boxes, strict=True):
            if entry["category_id"] == _CATEGORY and _stands_alone(box, boxes, pixels.shape):
                left, top, right, bottom = box.round().astype(int)
                material.cells.append(_cut(pixels[top:bottom, left:right] / smear))
    return material


def _stands_alone(box: Array, boxes: Array, shape: tuple[int, ...]) -> bool:
    """Check that no other labelled object, nor the picture's border, touches much of a cell that is large enough."""
    inside = (box[:2] > 1).all() and box[2] < shape[1] - 1 and box[3] < shape[0] - 1
    return bool(inside and (iou(box, boxes) > 0.02).sum() == 1 and (box[2:] - box[:2]).min() >= _SMALLEST)


def _cut(through: Array) -> Array:
    """Fade what a cell lets through (h, w, 3) to all of the light at the rim of an ellipse."""
    height, width = through.shape[:2]
    y, x = np.ogrid[:height, :width]
    radius = np.hypot((x + 0.5) / width * 2 - 1, (y + 0.5) / height * 2 - 1)  # 1 at the ellipse in the box
    mask = ((1 - radius) / _RIM).clip(0, 1)[..., None]
    return np.asarray(1 - mask * (1 - through.clip(0, 1)))


def _emptied(pixels: Array, smear: Array) -> Array:
    """Take everything darker than the empty smear out of a picture (H, W, 3), and fill the holes from around them."""
    light = (pixels / smear).min(axis=2) > 1 - _DARKER
    kept = np.asarray(Image.fromarray(light.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(5))) > 0  # (H, W)
    weight = _blurred(kept.astype(np.float64)) + 1e-3
    smooth = np.stack([(_blurred(pixels[..., c] * kept) + 1e-3 * smear[c]) / weight for c in range(3)], axis=2)
    grain = (pixels - smooth)[kept]
    filled = smooth.copy()
    if len(grain):  # of the pixels that stay, so that the filled ones do not look smoother
        order = np.random.default_rng(0).integers(len(grain), size=kept.shape)
        filled += grain[order] * 0.5
    return np.where(kept[..., None], pixels, filled)


def _blurred(values: Array) -> Array:
    return np.asarray(gaussian_filter(values, 12.0))


def _resized(cell: Array, width: int, height: int) -> Array:
    channels = [Image.fromarray(cell[..., c].astype(np.float32)).resize((width, height)) for c in range(3)]
    return np.stack([np.asarray(channel, dtype=np.float64) for channel in channels], axis=2).clip(0, 1)


def _turned(rng: np.random.Generator, pixels: Array) -> Array:
    """Turn a picture by a multiple of 90 degrees, and flip every other one."""
    turned: Array = np.rot90(pixels, int(rng.integers(4)))
    return np.fliplr(turned) if rng.random() < 0.5 else turned
