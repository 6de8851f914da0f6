"""Paint a scene: a background, and layers of simple shapes before one another.

S is the side of a picture in pixels, P the number of corners of a polygon.
"""

from __future__ import annotations

import math
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

__all__ = [
    "SHAPES",
    "Array",
    "Layer",
    "Scene",
    "clutter",
    "fit",
    "line",
    "log_uniform",
    "paint_background",
    "paint_layer",
    "place",
    "render",
]

Array = npt.NDArray[np.float64]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

_FINE = 4  # lines per pixel when a polygon is drawn
_HOLE = 0.55  # inner radius of a ring over its outer radius
_RIM = 0.86  # inner radius of a rim over the outer radius
_GLASS = 0.3  # opacity of a see-through object inside its rim


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


def render(scene: Scene) -> Image.Image:
    """Paint a scene, (S, S) RGB."""
    canvas = scene.background.copy()
    for layer in reversed(scene.layers):
        part = canvas[layer.window]
        part += layer.alpha[..., None] * (layer.colour - part)
    return _image(np.asarray(_image(canvas).filter(ImageFilter.GaussianBlur(scene.blur))) + scene.noise)


def _image(pixels: Array) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
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


def place(rng: np.random.Generator, shape: str, centre: Array, length: float) -> Array:
    """Place a shape's polygon (P, 2): stretched, turned, its box ``length`` pixels on the longer side."""
    stretch, turn = math.exp(rng.uniform(-0.18, 0.18)), rng.uniform(-0.4, 0.4)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = _outline(shape) * [stretch, 1 / stretch] @ rotation
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - (low + high) / 2) * (length / (high - low).max()) + centre)


def line(rng: np.random.Generator, size: int) -> Array:
    start, stop = rng.uniform(-0.1, 1.1, (2, 2)) * size
    across = np.array([start[1] - stop[1], stop[0] - start[0]])
    across *= rng.uniform(0.4, 1.2) * size / 128 / max(1.0, float(np.hypot(*across)))
    return np.stack([start + across, stop + across, stop - across, start - across])


def fit(polygon: Array, box: Array) -> Array:
    """Stretch a polygon (P, 2) until it fills a box (4,)."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return np.asarray((polygon - low) * ((box[2:] - box[:2]) / (high - low)) + box[:2])


def clutter(rng: np.random.Generator, size: int) -> Array:
    """Sample a line, or a blob too wobbly to be one of the shapes."""
    if rng.random() < 0.4:
        return line(rng, size)
    angles, phases = np.arange(40) * (2 * math.pi / 40), rng.uniform(0, 2 * math.pi, 3)
    wobble = 1 + np.sum([h * np.cos((n + 2) * angles + phases[n]) for n, h in enumerate((0.45, 0.25, 0.15))], axis=0)
    return np.asarray(_circle(40) * wobble[:, None] * size * log_uniform(rng, 0.02, 0.16) + rng.uniform(0, size, 2))


def paint_layer(
    rng: np.random.Generator,
    shape: str | None,
    polygon: Array,
    hue: float,
    background: Array,
    covered: Array,
    *,
    glass: bool = False,
) -> Layer | None:
    """Paint a polygon (P, 2) on a layer of its own, behind what is ``covered`` (S, S); None outside the picture.

    What lies behind an object of ``glass`` shows through all of it but its rim.
    """
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
    if glass:
        alpha = alpha * (1 - (1 - _GLASS) * _coverage(_shrunk(local, _RIM), extent))
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


def paint_background(rng: np.random.Generator, size: int) -> Array:
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
