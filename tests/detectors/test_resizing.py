"""`ResizingAdapter`: images, boxes and detections at another size."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from crosskd_assign import DensePredictions, EndToEndDetector, ResizingAdapter
from crosskd_assign.errors import OptionError
from crosskd_assign.structures import Batch, Target
from tests.makers.builders import TinyAdapter, tiny_detector
from tests.makers.small_models import backward, scene

FITS = ["longer", "letterbox", "stretch"]
SIZES = ((60, 90), (90, 45), (64, 64))
image_sizes = st.lists(st.tuples(st.integers(20, 150), st.integers(20, 150)), min_size=1, max_size=3)


class Resized(ResizingAdapter):
    """No network: only images and boxes count here."""

    def features(self, batch: Batch) -> list[Tensor]:
        raise NotImplementedError

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        raise NotImplementedError


def build(size: Any = 0, **options: Any) -> Resized:
    return Resized(nn.Identity(), size=size, **options)


def painted(height: int, width: int) -> tuple[Tensor, Target]:
    """A black image with one white rectangle, and its box."""
    x1, y1, x2, y2 = width // 4, height // 3, width // 4 + width // 2, height // 3 + height // 2
    image = torch.zeros(3, height, width)
    image[:, y1:y2, x1:x2] = 1
    return image, Target(boxes=torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), labels=torch.tensor([1]))


# --- the oracle: how the examples resized before the library did ------------------------------------------------------


def by_hand(images: Sequence[Tensor], targets: Sequence[Target], longer: int, divisor: int = 32) -> tuple[Any, ...]:
    """Longer side to ``longer``, then zeros to a multiple of ``divisor`` at the right and the bottom."""
    resized, boxes = [], []
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[-2:]
        factor = Fraction(longer, max(height, width)) if longer else Fraction(1)
        size = tuple(max(1, round(side * factor)) for side in (height, width))  # of fractions: exact
        same = size == (height, width)
        other = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
        resized.append(image if same else other)
        x, y = size[1] / width, size[0] / height
        boxes.append(target["boxes"] * torch.tensor([x, y, x, y]))
    rows, columns = (max(image.shape[axis] for image in resized) for axis in (-2, -1))
    padded = torch.zeros(len(images), 3, -(-rows // divisor) * divisor, -(-columns // divisor) * divisor)
    for place, image in zip(padded, resized, strict=True):
        place[:, : image.shape[-2], : image.shape[-1]] = image
    return padded, boxes, tuple(tuple(image.shape[-2:]) for image in resized)


@given(image_sizes, st.sampled_from([0, 33, 64, 96]), st.sampled_from([1, 16, 32]))
def test_longer_is_what_the_examples_did_before(sizes, longer, divisor):
    images, targets = scene(sizes)
    batch, moved = build(longer, size_divisible=divisor).preprocess(images, targets)
    padded, boxes, resized = by_hand(images, targets, longer, divisor)
    torch.testing.assert_close(batch.images, padded, atol=0, rtol=0)
    assert batch.sizes == resized
    assert batch.original_sizes == tuple(sizes)
    for mine, expected, target in zip(moved, boxes, targets, strict=True):
        torch.testing.assert_close(mine["boxes"], expected)
        assert mine["labels"] is target["labels"]


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "size", "sizes", "image_size"),
    [
        ("longer", 0, ((60, 90), (90, 45), (64, 64)), (96, 96)),
        ("longer", 45, ((30, 45), (45, 22), (45, 45)), (64, 64)),
        ("longer", (60, 45), ((30, 45), (60, 30), (45, 45)), (64, 64)),
        ("letterbox", 96, ((64, 96), (96, 48), (96, 96)), (96, 96)),
        ("letterbox", (64, 192), ((64, 96), (64, 32), (64, 64)), (64, 192)),
        ("stretch", 64, ((64, 64),) * 3, (64, 64)),
        ("stretch", (32, 96), ((32, 96),) * 3, (32, 96)),
    ],
)
def test_each_fit_has_its_sizes(fit, size, sizes, image_size):
    batch, _ = build(size, fit=fit).preprocess(scene(SIZES)[0])
    assert batch.sizes == sizes
    assert batch.image_size == image_size
    assert batch.original_sizes == SIZES
    for image, (height, width) in zip(batch.images, sizes, strict=True):
        assert not image[:, height:].any()
        assert not image[..., width:].any()
        assert image[:, :height, :width].any()


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", [100, (50, 75)])
def test_letterbox_and_stretch_are_exact_where_the_size_is_no_multiple_of_the_divisor(fit, size):
    batch, _ = build(size, fit=fit).preprocess(scene(SIZES)[0])
    assert batch.image_size == (size if isinstance(size, tuple) else (size, size))


# --- boxes ------------------------------------------------------------------------------------------------------------


@given(image_sizes, st.sampled_from(FITS), st.sampled_from([64, 96, (64, 128)]))
def test_a_painted_rectangle_stays_in_its_box(sizes, fit, size):
    images, targets = zip(*(painted(*each) for each in sizes), strict=True)
    batch, moved = build(size, fit=fit).preprocess(images, targets)
    for image, target in zip(batch.images, moved, strict=True):
        rows, columns = (torch.nonzero(image[0].amax(dim=axis) > 0.5).flatten() for axis in (1, 0))
        seen = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (seen - target["boxes"][0]).abs().max() <= 1.5


@given(image_sizes, st.sampled_from(FITS), st.sampled_from([64, 96, (64, 128)]))
def test_restoring_brings_boxes_back_and_cuts_them_at_the_image(sizes, fit, size):
    images, targets = scene(sizes)
    adapter = build(size, fit=fit)
    batch, moved = adapter.preprocess(images, targets)
    beyond = torch.tensor([[-1000.0, -1000, 1000, 1000]])
    detections = [
        {"boxes": torch.cat([t["boxes"], beyond]), "scores": torch.ones(3), "labels": torch.zeros(3)} for t in moved
    ]
    for found, target, (height, width) in zip(adapter.restore(detections, batch), targets, sizes, strict=True):
        frame = torch.tensor([width, height, width, height])
        torch.testing.assert_close(found["boxes"][:-1], target["boxes"].minimum(frame), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found["boxes"][-1], torch.tensor([0.0, 0, width, height]), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_targets_that_are_none_stay_none_and_others_keep_what_they_carry(fit):
    images, targets = scene(SIZES)
    targets[2] = {**targets[2], "image_id": torch.tensor([7])}
    before = [target["boxes"].clone() for target in targets]
    _, moved = build(64, fit=fit).preprocess(images, [None, targets[1], targets[2]])
    assert moved[0] is None
    assert moved[2]["image_id"] == 7
    assert all(torch.equal(target["boxes"], boxes) for target, boxes in zip(targets, before, strict=True))
    assert build(64, fit=fit).preprocess(images)[1] == []


def test_images_that_fit_already_are_not_resampled():
    images = torch.rand(2, 3, 64, 96)
    for adapter in (build(0), build(96), build((64, 96), fit="letterbox"), build((64, 96), fit="stretch")):
        assert torch.equal(adapter.preprocess(images)[0].images, images)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 64, "fit": "shorter"}, 'fit "longer", "letterbox" or "stretch"'),
        ({"size": -1}, "size"),
        ({"size": (64, -1)}, "size"),
        ({"size": (0, 64)}, "size"),
        ({"fit": "letterbox"}, "size"),
        ({"fit": "stretch"}, "size"),
        ({"size": (64, 0), "fit": "stretch"}, "size"),
    ],
    ids=str,
)
def test_a_bad_fit_or_size_is_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message):
        build(**options)


# --- a detector on top ------------------------------------------------------------------------------------------------


class ResizedTiny(ResizingAdapter):
    """The smallest detector, at a size of its own."""

    features = TinyAdapter.features
    head = TinyAdapter.head


@pytest.mark.parametrize("fit", FITS)
def test_a_detector_trains_and_detects_in_the_coordinates_of_the_images(fit):
    detector = EndToEndDetector(ResizedTiny(tiny_detector().model, size=64, fit=fit), top_k=5).train()
    images, targets = scene(SIZES)
    backward(detector(images, targets))
    assert detector.model.backbone[0].weight.grad.any()
    for found, (height, width) in zip(detector.eval()(images), SIZES, strict=True):
        assert found["boxes"].shape == (5, 4)
        assert (found["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
