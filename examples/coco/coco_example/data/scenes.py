"""Draw scenes in COCO format: a detection problem that needs no download and is not trivial.

A scene is sampled from front to back, so that the visible share of a new object is known at once, and painted from
back to front. S is the side of a picture in pixels, P the number of corners of a polygon.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from coco_example.errors import DataError

Array = npt.NDArray[np.float64]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

_VERSION = 1  # of the drawing: every change that shows in a picture raises it
_FINE = 4  # lines per pixel when a polygon is drawn
_MIN_VISIBLE = 0.4  # of an object's area
_MAX_IOU = 0.7  # between the boxes of two objects
_HOLE = 0.55  # inner radius of a ring over its outer radius
_RIM = 0.86  # inner radius of a rim over the outer radius


@dataclass(frozen=True)
class Layer:
    """One painted shape of a scene: an object or clutter."""

    shape: str | None  # one of SHAPES; None for clutter
    box: tuple[float, ...]  # x1, y1, x2, y2 around all of it that lies in the picture, hidden or not
    visible: float  # share of its own area that can be seen
    window: tuple[slice, slice]  # the h × w pixels that it touches
    alpha: Array  # how much of each of these it covers, (h, w) in 0..1
    colour: Array  # (h, w, 3) in 0..255


@dataclass(frozen=True)
class Scene:
    """Contents of a picture: background (S, S, 3), layers from front to back, blur in pixels, noise (S, S, 1)."""

    background: Array
    layers: tuple[Layer, ...]
    blur: float
    noise: Array


def sample_scene(rng: np.random.Generator, size: int) -> Scene:
    """Sample everything that a picture of ``size`` × ``size`` pixels shows.

    One to nine objects, 14 to 55 % of the side long; in a third of the scenes, some of one shape crowd together. Every
    object keeps at least 40 % of its area in sight, and no two boxes have an IoU above 0.7.
    """
    # 1. Sample background, objects and clutter.
    background = _background(rng, size)
    covered = np.zeros((size, size))
    layers: list[Layer] = []
    front = [(None, _line(rng, size), rng.random()) for _ in range(rng.integers(0, 3))]
    back = [(None, _clutter(rng, size), rng.random()) for _ in range(rng.integers(1, 5))]
    # 2. Paint them from front to back; leave out objects that are hidden or nearly the same as another one.
    for shape, polygon, hue in [*front, *_objects(rng, size), *back]:
        layer = _layer(rng, shape, polygon, hue, background, covered)
        if layer is not None and (shape is None or _acceptable(layer, layers)):
            covered[layer.window] += (1 - covered[layer.window]) * layer.alpha
            layers.append(layer)
    # 3. Add noise and blur.
    noise = rng.normal(0, rng.uniform(2, 9), (size, size, 1))
    return Scene(background, tuple(layers), rng.uniform(0, 0.7) * size / 128, noise)


def render(scene: Scene) -> Image.Image:
    """Paint a scene, (S, S) RGB."""
    canvas = scene.background.copy()
    for layer in reversed(scene.layers):
        part = canvas[layer.window]
        part += layer.alpha[..., None] * (layer.colour - part)
    return _image(np.asarray(_image(canvas).filter(ImageFilter.GaussianBlur(scene.blur))) + scene.noise)


def _image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


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
    shape, hue, length = SHAPES[rng.integers(len(SHAPES))], rng.random(), size * _log_uniform(rng, 0.18, 0.36)
    centre, course = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0, 2 * math.pi)
    for _ in range(members):
        yield shape, _place(rng, shape, centre, length * rng.uniform(0.85, 1.15)), hue + rng.normal(0, 0.06)
        course += rng.normal(0, 0.7)
        centre = centre + length * rng.uniform(0.1, 0.5) * np.array([math.cos(course), math.sin(course)])
    for n in range(members, int(rng.integers(max(1, members), 10))):
        margin = 0.08 if n else 0.3
        shape, centre = SHAPES[rng.integers(len(SHAPES))], rng.uniform(margin, 1 - margin, 2) * size
        yield shape, _place(rng, shape, centre, size * _log_uniform(rng, 0.14, 0.55)), rng.random()


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _circle(points: int, turn: float = 0.0) -> Array:
    angles = turn + np.arange(points) * (2 * math.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _outline(shape: str) -> Array:
    """Return the polygon (P, 2) of a shape, around the origin, at any scale."""
    if shape == "square":
        return _circle(4, math.pi / 4)
    if shape == "triangle":
        return _circle(3)
    if shape == "star":
        star: Array = _circle(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
        return star
    if shape == "cross":
        arm = np.array([[1.0, 0.33], [0.33, 0.33], [0.33, 1.0]])
        return np.concatenate([arm, arm[::-1] * [-1, 1], -arm, arm[::-1] * [1, -1]])
    return _circle(48)


def _place(rng: np.random.Generator, shape: str, centre: Array, length: float) -> Array:
    """Place a shape's polygon (P, 2): stretched, turned, its box ``length`` pixels on the longer side."""
    stretch, turn = math.exp(rng.uniform(-0.18, 0.18)), rng.uniform(-0.4, 0.4)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = _outline(shape) * [stretch, 1 / stretch] @ rotation
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - (low + high) / 2) * (length / (high - low).max()) + centre)


def _line(rng: np.random.Generator, size: int) -> Array:
    start, stop = rng.uniform(-0.1, 1.1, (2, 2)) * size
    across = np.array([start[1] - stop[1], stop[0] - start[0]])
    across *= rng.uniform(0.4, 1.2) * size / 128 / max(1.0, float(np.hypot(*across)))
    return np.stack([start + across, stop + across, stop - across, start - across])


def _clutter(rng: np.random.Generator, size: int) -> Array:
    """Sample a line, or a blob too wobbly to be one of the shapes."""
    if rng.random() < 0.4:
        return _line(rng, size)
    angles, phases = np.arange(40) * (2 * math.pi / 40), rng.uniform(0, 2 * math.pi, 3)
    wobble = 1 + np.sum([h * np.cos((n + 2) * angles + phases[n]) for n, h in enumerate((0.45, 0.25, 0.15))], axis=0)
    return np.asarray(_circle(40) * wobble[:, None] * size * _log_uniform(rng, 0.02, 0.16) + rng.uniform(0, size, 2))


def _layer(
    rng: np.random.Generator, shape: str | None, polygon: Array, hue: float, background: Array, covered: Array
) -> Layer | None:
    """Paint a polygon (P, 2) on a layer of its own, behind what is ``covered`` (S, S); None outside the picture."""
    # 1. Find the window of the picture that the polygon touches.
    (left, top), (right, bottom) = np.floor(polygon.min(axis=0)).astype(int), np.ceil(polygon.max(axis=0)).astype(int)
    inside = np.clip([left, top, right, bottom], 0, len(covered))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return None
    window = (slice(inside[1], inside[3]), slice(inside[0], inside[2]))
    part = (slice(inside[1] - top, inside[3] - top), slice(inside[0] - left, inside[2] - left))
    # 2. Compute how much of each pixel it covers, and how much of it is visible.
    local, extent = polygon - [left, top], (int(bottom - top), int(right - left))
    alpha = _coverage(local, extent)
    if shape == "ring":
        alpha = alpha - _coverage(_shrunk(local, _HOLE), extent)
    visible = float((alpha[part] * (1 - covered[window])).sum() / max(1.0, alpha.sum()))
    # 3. Colour it, and box what lies in the picture.
    colour = _paint(rng, hue, background[window].mean(axis=(0, 1)), local, extent)
    box = np.clip([*polygon.min(axis=0), *polygon.max(axis=0)], 0, len(covered)).tolist()
    return Layer(shape, tuple(box), visible, window, alpha[part], colour[part])


def _shrunk(polygon: Array, factor: float) -> Array:
    return np.asarray(polygon * factor + polygon.mean(axis=0) * (1 - factor))


def _coverage(polygon: Array, extent: tuple[int, int]) -> Array:
    """Compute how much of each of h × w pixels a polygon (P, 2) covers, (h, w) in 0..1."""
    image = Image.new("L", (extent[1] * _FINE, extent[0] * _FINE))
    ImageDraw.Draw(image).polygon((polygon * _FINE - 0.5).ravel().tolist(), fill=255)
    return np.asarray(image.reduce(_FINE)) / 255.0


def _paint(rng: np.random.Generator, hue: float, behind: Array, polygon: Array, extent: tuple[int, int]) -> Array:
    """Sample colours (h, w, 3) unlike the colour ``behind`` (3,): plain, shaded, striped, speckled or with a rim."""
    # 1. Of three colours, take the one that differs most from what lies behind, and a lighter or darker one with it.
    tries = 255 * np.array([hsv_to_rgb(hue % 1, rng.uniform(0.3, 1), rng.uniform(0.25, 1)) for _ in range(3)])
    colour = tries[np.abs(tries - behind).sum(axis=1).argmax()]
    second = colour * rng.uniform(0.35, 0.75) if rng.random() < 0.5 else colour + (255 - colour) * rng.uniform(0.3, 0.7)
    # 2. Mix the two by one of five patterns.
    along = _ramp(rng, extent)
    mixes = (
        lambda: np.zeros(extent),
        lambda: (along - along.min()) / max(1.0, float(np.ptp(along))),
        lambda: np.sin(along * (2 * math.pi / rng.uniform(3.5, 9))) > 0,
        lambda: rng.random(extent),
        lambda: 1 - _coverage(_shrunk(polygon, _RIM), extent),
    )
    mix = np.asarray(mixes[rng.integers(len(mixes))](), dtype=np.float64)
    return np.asarray(colour + mix[..., None] * (second - colour))


def _ramp(rng: np.random.Generator, extent: tuple[int, int]) -> Array:
    """Measure pixels along a random direction, (h, w)."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.ogrid[: extent[0], : extent[1]]
    return np.asarray(columns * math.cos(angle) + rows * math.sin(angle))


def _background(rng: np.random.Generator, size: int) -> Array:
    """Sample a soft, muted landscape of two scales, sometimes with faint waves, (S, S, 3) in 0..255."""
    base = hsv_to_rgb(rng.random(), rng.uniform(0, 0.45), rng.uniform(0.25, 0.85))
    picture = np.full((size, size, 3), 255 * np.array(base))
    for cells, strength in ((3, rng.uniform(10, 45)), (int(rng.integers(8, 24)), rng.uniform(3, 16))):
        patches = 128 + rng.normal(0, 32, (cells, cells, 1)) + rng.normal(0, 20, (cells, cells, 3))
        soft = _image(patches).resize((size, size), Image.Resampling.BICUBIC)
        picture += (np.asarray(soft) - 128.0) * (strength / 40)
    if rng.random() < 0.4:
        wave = np.sin(_ramp(rng, (size, size)) * (2 * math.pi / (rng.uniform(4, 24) * size / 128)))
        picture += rng.uniform(3, 14) * wave[..., None]
    return picture


def write_scenes(root: Path, *, train: int = 2000, val: int = 500, size: int = 128, seed: int = 0) -> Path:
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

    Raises:
        DataError: If ``root`` holds something else, or an argument is out of range.
    """
    # 1. Check the arguments, and whether the scenes are there.
    wanted = json.dumps({"train": train, "val": val, "size": size, "seed": seed, "version": _VERSION})
    if min(train, val, seed) < 0 or size < 32:
        expected = "nothing below 0 and size from 32 up"
        raise DataError(expected=expected, got=wanted, where="write_scenes", fix="raise the numbers")
    if _complete(root, wanted):
        return root
    # 2. Draw them beside their place, and move them there in one piece.
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        draft = Path(folder, root.name)
        (draft / "annotations").mkdir(parents=True)
        for number, (split, count) in enumerate({"train": train, "val": val}.items()):
            (draft / split).mkdir()
            document = _write_split(draft / split, (seed, number), count, size)
            (draft / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        (draft / "scenes.json").write_text(wanted)
        try:
            draft.rename(root)
        except OSError:  # another process may have been faster, with the same scenes
            if not _complete(root, wanted):
                raise
    return root


def _complete(root: Path, wanted: str) -> bool:
    """Return True if these scenes are there, False if nothing is; raise if it is anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / "scenes.json"
    found = file.read_text(errors="replace") if file.is_file() else "something else"
    if found != wanted:
        raise DataError(
            expected=f"nothing, or scenes drawn with {wanted}",
            got=found,
            where=str(root),
            fix="name another folder, or remove this one",
        )
    return True


def _write_split(folder: Path, seed: tuple[int, int], count: int, size: int) -> dict[str, Any]:
    """Write the pictures of a split and return its COCO instances."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for k in range(count):
        # 1. Draw picture k.
        scene = sample_scene(np.random.default_rng((*seed, k)), size)
        images.append({"id": k + 1, "file_name": f"{k:06d}.png", "width": size, "height": size})
        render(scene).save(folder / f"{k:06d}.png", compress_level=1)  # noise hardly gets smaller, only slower
        # 2. List the boxes of its objects.
        for layer in scene.layers:
            if layer.shape is not None:
                x1, y1, x2, y2 = (round(value, 2) for value in layer.box)
                box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
                entry = {"id": len(annotations) + 1, "image_id": k + 1, "category_id": SHAPES.index(layer.shape) + 1}
                annotations.append({**entry, "bbox": box, "area": round(box[2] * box[3], 4), "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main() -> None:
    """Draw scenes from the command line; in examples/coco, ``python -m coco_example.data.scenes --output FOLDER``."""
    parser = argparse.ArgumentParser(description="Draw scenes of simple shapes in COCO format.")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=2000, help="pictures to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="pictures to evaluate on (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    options = vars(parser.parse_args())
    print(f"scenes in {write_scenes(options.pop('output'), **options)}")


if __name__ == "__main__":
    main()
