"""The constructors of `DensePredictions` against a loop over points, and against torchvision's box coder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from crosskd_assign import DensePredictions, GridLevel
from crosskd_assign.errors import OptionError, PredictionError
from tests.makers.builders import GRIDS, grid

CLASSES = 3
SMALL = [grid(32, (8, 16)), grid(32, (8, 16), anchors=3), GRIDS[3]]  # the last: steps that are not the stride
UNITS = ["stride", "pixel"]

# --- the oracle: one point after the other, in Python's own numbers ---------------------------------------------------


def places(levels: Sequence[GridLevel]) -> list[tuple[float, float, float]]:
    """``x, y, stride`` of every prediction: level by level, row by row, cell by cell, anchor by anchor."""
    return [
        (column * level.step[0] + level.origin[0], row * level.step[1] + level.origin[1], level.stride)
        for level in levels
        for row in range(level.height)
        for column in range(level.width)
        for _ in range(level.anchors)
    ]


def by_sides(x: float, y: float, numbers: list[float]) -> list[float]:
    left, top, right, bottom = numbers
    return [x - left, y - top, x + right, y + bottom]


def by_centers(x: float, y: float, numbers: list[float]) -> list[float]:
    dx, dy, width, height = numbers
    return [x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2]


def loop(decode: Callable[..., list[float]], numbers: Tensor, levels: Sequence[GridLevel], unit: str) -> Tensor:
    images = []
    for image in numbers.double().tolist():
        boxes = []
        for (x, y, stride), four in zip(places(levels), image, strict=True):
            factor = stride if unit == "stride" else 1.0
            boxes.append(decode(x, y, [factor * value for value in four]))
        images.append(boxes)
    return torch.tensor(images, dtype=torch.float32)


def random_numbers(levels: Sequence[GridLevel], seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Logits ``(2, A, C)``, and numbers ``(2, A, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    a = len(places(levels))
    return torch.randn(2, a, CLASSES, generator=generator), torch.randn(2, a, *shape, generator=generator)


on_any_grid = given(st.sampled_from(SMALL), st.sampled_from(UNITS), st.integers(0, 2**20))


# --- the boxes --------------------------------------------------------------------------------------------------------


@on_any_grid
def test_sides_are_distances_from_the_point_of_every_anchor(levels, unit, seed):
    logits, numbers = random_numbers(levels, seed, 4)
    made = DensePredictions.from_sides(logits, numbers.exp(), levels, unit=unit)
    torch.testing.assert_close(made.boxes, loop(by_sides, numbers.exp(), levels, unit))
    assert [(*point, stride) for point, stride in zip(made.points.tolist(), made.strides.tolist(), strict=True)] == (
        places(levels)
    )


@on_any_grid
def test_centers_are_shifts_of_the_point_and_sizes(levels, unit, seed):
    logits, numbers = random_numbers(levels, seed, 4)
    numbers[..., 2:] = numbers[..., 2:].exp()
    made = DensePredictions.from_centers(logits, numbers, levels, unit=unit)
    torch.testing.assert_close(made.boxes, loop(by_centers, numbers, levels, unit))


@given(st.sampled_from(SMALL), st.sampled_from([(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]), st.integers(0, 2**20))
def test_anchor_offsets_are_those_of_torchvisions_box_coder(levels, weights, seed):
    logits, offsets = random_numbers(levels, seed, 4)
    offsets[0, 0, 2:] = 1e4  # both bound the logarithms of the scales
    points = torch.tensor(places(levels))
    radius = points[:, 2:] * torch.tensor([1.0, 1.5])
    anchors = torch.cat([points[:, :2] - radius, points[:, :2] + 2 * radius], dim=1)
    made = DensePredictions.from_anchors(logits, offsets, anchors, levels, weights=weights)
    coder = BoxCoder(weights)
    for boxes, of_image in zip(made.boxes, offsets, strict=True):
        torch.testing.assert_close(boxes, coder.decode_single(of_image, anchors), atol=1e-3, rtol=1e-5)
    x1, y1, x2, y2 = anchors[-1].tolist()  # and by hand
    dx, dy, dw, dh = (o / w for o, w in zip(offsets[1, -1].tolist(), weights, strict=True))
    center = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    size = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
    torch.testing.assert_close(
        made.boxes[1, -1], torch.tensor(by_centers(*center, [0, 0, *size])), atol=1e-3, rtol=1e-5
    )


@on_any_grid
def test_bins_are_distributions_whose_mean_is_the_distance(levels, unit, seed):
    logits, bins = random_numbers(levels, seed, 4, 5)
    made = DensePredictions.from_bins(logits, 3 * bins, levels, unit=unit)
    weight = [[[[math.exp(3 * z) for z in side] for side in p] for p in image] for image in bins.double().tolist()]
    mean = [
        [[sum(r * w for r, w in enumerate(side)) / sum(side) for side in point] for point in image] for image in weight
    ]
    torch.testing.assert_close(
        made.boxes, loop(by_sides, torch.tensor(mean, dtype=torch.float64), levels, unit), atol=1e-3, rtol=1e-5
    )
    assert torch.equal(made.distribution, 3 * bins)


def test_a_distribution_on_a_single_bin_is_that_distance():
    levels = grid(32, (8, 16))
    a = len(places(levels))
    bins = torch.full((1, a, 4, 6), -1e4)
    for side, distance in enumerate((0, 2, 5, 3)):
        bins[..., side, distance] = 1e4
    made = DensePredictions.from_bins(torch.zeros(1, a, CLASSES), bins, levels, unit="pixel")
    expected = [[x, y - 2, x + 5, y + 3] for x, y, _ in places(levels)]
    torch.testing.assert_close(made.boxes[0], torch.tensor(expected))


# --- what all of them share -------------------------------------------------------------------------------------------

NUMBERS = {"from_sides": (4,), "from_centers": (4,), "from_anchors": (4,), "from_bins": (4, 5)}


def build(name: str, logits: Tensor, numbers: Tensor, levels: Sequence[GridLevel], **options: Any) -> DensePredictions:
    if name == "from_anchors":
        points = torch.tensor(places(levels))
        options["anchors"] = torch.cat([points[:, :2] - points[:, 2:], points[:, :2] + points[:, 2:]], dim=1)
    return getattr(DensePredictions, name)(logits, numbers, levels=levels, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NUMBERS)
def test_half_precision_is_decoded_in_float32(name, dtype):
    levels = grid(64, (8, 16, 32))
    logits, numbers = random_numbers(levels, 0, *NUMBERS[name])
    logits, numbers = logits.to(dtype), numbers.to(dtype)
    made = build(name, logits, numbers, levels)
    assert made.boxes.dtype == made.points.dtype == made.strides.dtype == torch.float32
    assert made.logits is logits
    assert torch.equal(made.boxes, build(name, logits, numbers.float(), levels).boxes)


@pytest.mark.parametrize("name", NUMBERS)
def test_double_precision_stays_double(name):
    logits, numbers = random_numbers(SMALL[0], 0, *NUMBERS[name])
    made = build(name, logits.double(), numbers.double(), SMALL[0])
    assert made.boxes.dtype == torch.float64
    torch.testing.assert_close(made.boxes.float(), build(name, logits, numbers, SMALL[0]).boxes)


@pytest.mark.parametrize("name", ["from_sides", "from_centers", "from_bins"])
@pytest.mark.parametrize("unit", ["strides", "px", "", None])
def test_an_unknown_unit_is_refused_by_name(name, unit):
    logits, numbers = random_numbers(SMALL[0], 0, *NUMBERS[name])
    with pytest.raises(OptionError, match=r'unit "stride" or "pixel"') as caught:
        build(name, logits, numbers, SMALL[0], unit=unit)
    assert caught.value.got == repr(unit)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("spoil", ["a level short", "channels first", "a number more"])
def test_numbers_of_another_shape_are_refused_with_both_shapes(name, spoil):
    logits, numbers = random_numbers(SMALL[0], 0, *NUMBERS[name])
    wrong = {
        "a level short": numbers[:, :-3],
        "channels first": numbers.transpose(1, 2),
        "a number more": torch.cat([numbers, numbers[:, :, :1]], dim=2),
    }[spoil]
    with pytest.raises(PredictionError) as caught:
        build(name, logits, wrong, SMALL[0])
    assert caught.value.got.startswith(f"({', '.join(map(str, wrong.shape[:3]))}")  # of bins, perhaps their means
    assert "4" in caught.value.expected


@pytest.mark.parametrize("levels", SMALL, ids=["plain", "anchors", "steps"])
@pytest.mark.parametrize("name", NUMBERS)
def test_logits_quality_and_levels_are_kept_as_they_are(name, levels):
    logits, numbers = random_numbers(levels, 1, *NUMBERS[name])
    quality = logits[..., 0] + 1
    made = build(name, logits, numbers, list(levels), quality=quality)
    assert made.logits is logits
    assert made.quality is quality
    assert made.levels == tuple(levels)
    assert made.num_classes == CLASSES
    assert (made.distribution is numbers) if name == "from_bins" else (made.distribution is None)
    bare = build(name, logits, numbers, levels)
    assert bare.quality is None
    assert torch.equal(bare.boxes, made.boxes)


def test_sides_keep_a_distribution_that_was_computed_elsewhere():
    logits, bins = random_numbers(SMALL[0], 0, 4, 5)
    made = DensePredictions.from_sides(logits, bins.sum(dim=-1).exp(), SMALL[0], distribution=bins)
    assert made.distribution is bins


@pytest.mark.parametrize("name", NUMBERS)
def test_gradients_reach_the_numbers(name):
    logits, numbers = random_numbers(SMALL[1], 2, *NUMBERS[name])
    numbers.requires_grad_()
    (build(name, logits, numbers, SMALL[1]).boxes ** 2).sum().backward()
    assert numbers.grad.isfinite().all()
    assert (numbers.grad != 0).flatten(2).any(dim=2).all()
