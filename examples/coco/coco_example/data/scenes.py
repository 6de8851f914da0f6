"""Draw scenes in COCO format: a detection problem that needs no download and is not trivial.

A scene is sampled from front to back, so that the visible share of a new object is known at once, and painted from
back to front. S is the side of a picture in pixels, P the number of corners of a polygon.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coco_example.data.crowds import sample_groups, validate_overlap
from coco_example.data.folder import Picture, write_coco_folder
from coco_example.data.painting import (
    SHAPES,
    Array,
    Layer,
    Scene,
    clutter,
    fit,
    line,
    log_uniform,
    paint_background,
    paint_layer,
    place,
    render,
)
from coco_example.errors import DataError

__all__ = ["sample_crowd", "sample_scene", "write_scenes"]

_VERSION = 1  # of the drawing: every change that shows in a picture raises it
_MIN_VISIBLE = 0.4  # of an object's area
_MAX_IOU = 0.7  # between the boxes of two objects


def sample_scene(rng: np.random.Generator, size: int) -> Scene:
    """Sample everything that a picture of ``size`` × ``size`` pixels shows.

    One to nine objects, 14 to 55 % of the side long; in a third of the scenes, some of one shape crowd together. Every
    object keeps at least 40 % of its area in sight, and no two boxes have an IoU above 0.7.
    """
    # 1. Sample background, objects and clutter.
    background = paint_background(rng, size)
    covered = np.zeros((size, size))
    layers: list[Layer] = []
    front = [(None, line(rng, size), rng.random()) for _ in range(rng.integers(0, 3))]
    back = [(None, clutter(rng, size), rng.random()) for _ in range(rng.integers(1, 5))]
    # 2. Paint them from front to back; leave out objects that are hidden or nearly the same as another one.
    for shape, polygon, hue in [*front, *_objects(rng, size), *back]:
        layer = paint_layer(rng, shape, polygon, hue, background, covered)
        if layer is not None and (shape is None or _acceptable(layer, layers)):
            covered[layer.window] += (1 - covered[layer.window]) * layer.alpha
            layers.append(layer)
    # 3. Add noise and blur.
    noise = rng.normal(0, rng.uniform(2, 9), (size, size, 1))
    return Scene(background, tuple(layers), rng.uniform(0, 0.7) * size / 128, noise)


def sample_crowd(rng: np.random.Generator, size: int, overlap: tuple[float, float]) -> Scene:
    """Sample a scene of groups in which neighbours of one shape overlap by an IoU from a range.

    Objects are see-through but for their rims, and those of a group differ in colour: two that nearly coincide can
    still be told apart. `crowds.sample_groups` says how they lie.
    """
    # 1. Sample background, clutter and objects.
    background = paint_background(rng, size)
    covered = np.zeros((size, size))
    back = [(None, clutter(rng, size), rng.random()) for _ in range(rng.integers(1, 5))]
    objects: list[tuple[str, Array, float]] = []
    for boxes in sample_groups(rng, size, overlap):
        shape, hue = SHAPES[rng.integers(len(SHAPES))], rng.random()
        for k, box in enumerate(boxes):
            polygon = fit(place(rng, shape, np.zeros(2), 1.0), box)
            objects.append((shape, polygon, hue + (k + rng.uniform(-0.2, 0.2)) / len(boxes)))
    # 2. Paint them from front to back.
    layers: list[Layer] = []
    for kind, polygon, hue in [*objects, *back]:
        layer = paint_layer(rng, kind, polygon, hue, background, covered, glass=kind is not None)
        if layer is not None:
            covered[layer.window] += (1 - covered[layer.window]) * layer.alpha
            layers.append(layer)
    # 3. Add noise and blur.
    noise = rng.normal(0, rng.uniform(2, 9), (size, size, 1))
    return Scene(background, tuple(layers), rng.uniform(0, 0.7) * size / 128, noise)


def _acceptable(layer: Layer, others: list[Layer]) -> bool:
    """Check that a new object can be seen, and is not nearly the same as another one."""
    x1, y1, x2, y2 = np.array([layer.box, *(other.box for other in others if other.shape is not None)]).T
    width, height = np.minimum(x2, x2[0]) - np.maximum(x1, x1[0]), np.minimum(y2, y2[0]) - np.maximum(y1, y1[0])
    shared, areas = width.clip(0) * height.clip(0), (x2 - x1) * (y2 - y1)
    iou = shared / (areas + areas[0] - shared)
    return layer.visible >= _MIN_VISIBLE and bool((iou[1:] <= _MAX_IOU).all())


def _objects(rng: np.random.Generator, size: int) -> Iterator[tuple[str, Array, float]]:
    """Sample up to nine candidates, front to back: shape, polygon (P, 2) in pixels, hue; the first is never cut off."""
    members = int(rng.integers(4, 8)) if rng.random() < 0.35 else 0
    shape, hue, length = SHAPES[rng.integers(len(SHAPES))], rng.random(), size * log_uniform(rng, 0.18, 0.36)
    centre, course = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0, 2 * math.pi)
    for _ in range(members):
        yield shape, place(rng, shape, centre, length * rng.uniform(0.85, 1.15)), hue + rng.normal(0, 0.06)
        course += rng.normal(0, 0.7)
        centre = centre + length * rng.uniform(0.1, 0.5) * np.array([math.cos(course), math.sin(course)])
    for n in range(members, int(rng.integers(max(1, members), 10))):
        margin = 0.08 if n else 0.3
        shape, centre = SHAPES[rng.integers(len(SHAPES))], rng.uniform(margin, 1 - margin, 2) * size
        yield shape, place(rng, shape, centre, size * log_uniform(rng, 0.14, 0.55)), rng.random()


def write_scenes(
    root: Path,
    *,
    train: int = 2000,
    val: int = 500,
    size: int = 128,
    seed: int = 0,
    overlap: tuple[float, float] | None = None,
) -> Path:
    """Draw scenes into a COCO folder, unless they are there already.

    The folder holds ``train/*.png``, ``val/*.png`` and ``annotations/instances_{train,val}.json``; boxes enclose all
    of an object that lies in the picture, hidden parts included. Picture k of a split depends on ``seed``, ``size``
    and k alone. The folder appears when it is complete, and not before.

    Args:
        root: The folder to make, which is also returned.
        train: Pictures to train on.
        val: Pictures to evaluate on.
        size: Side of the pictures in pixels, at least 32.
        seed: Not negative.
        overlap: Range of IoUs, low to high, by which neighbours of one class overlap, all objects being see-through
            but for their rims; None for scenes as `sample_scene` samples them.

    Raises:
        DataError: If ``root`` holds something else, or an argument is out of range.
    """
    # 1. Check the arguments.
    knob = {} if overlap is None else {"overlap": [float(bound) for bound in overlap]}
    wanted = json.dumps({"train": train, "val": val, "size": size, "seed": seed, "version": _VERSION, **knob})
    if min(train, val, seed) < 0 or size < 32:
        expected = "nothing below 0 and size from 32 up"
        raise DataError(expected=expected, got=wanted, where="write_scenes", fix="raise the numbers")
    if overlap is not None:
        validate_overlap(overlap, "write_scenes")
    # 2. Draw them.
    splits = {
        split: _pictures((seed, number), count, size, overlap)
        for number, (split, count) in enumerate({"train": train, "val": val}.items())
    }
    return write_coco_folder(root, "scenes.json", wanted, splits, SHAPES)


def _pictures(seed: tuple[int, int], count: int, size: int, overlap: tuple[float, float] | None) -> Iterator[Picture]:
    """Draw the pictures of a split one by one, with the category and box of each object."""
    for k in range(count):
        rng = np.random.default_rng((*seed, k))
        scene = sample_scene(rng, size) if overlap is None else sample_crowd(rng, size, overlap)
        objects = [(SHAPES.index(layer.shape) + 1, layer.box) for layer in scene.layers if layer.shape is not None]
        yield render(scene), objects


def main() -> None:
    """Draw scenes from the command line; in examples/coco, ``python -m coco_example.data.scenes --output FOLDER``."""
    parser = argparse.ArgumentParser(description="Draw scenes of simple shapes in COCO format.")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=2000, help="pictures to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="pictures to evaluate on (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--overlap",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="draw crowds in which neighbours of one class have an IoU from this range, such as 0 0.9",
    )
    options = vars(parser.parse_args())
    options["overlap"] = options["overlap"] and tuple(options["overlap"])
    print(f"scenes in {write_scenes(options.pop('output'), **options)}")


if __name__ == "__main__":
    main()
