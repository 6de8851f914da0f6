from __future__ import annotations

import itertools

import pytest
import torch
from coco_example.data.augmentation import Level, augmentation
from coco_example.data.dataset import CocoDataset
from coco_example.data.reader import read_coco
from coco_example.models.detectors import build_detector
from coco_example.options import ModelOptions
from PIL import Image
from torch import Tensor

from crosskd_assign import adapt
from tests.makers.coco_files import box, document, image, write_dataset

LEVELS = ("none", "flip", "crop", "full")


def assert_boxes_cover_colours(pixels: Tensor, target: dict[str, Tensor], border: int = 0) -> None:
    """Every box is full of its label's colour, and nothing else has that colour."""
    _, height, width = pixels.shape
    strength = {1: pixels[1] - pixels[[0, 2]].amax(0), 2: pixels[0] - pixels[1:].amax(0)}
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    checked = (x > border) & (x < width - border) & (y > border) & (y < height - border)
    for label, amount in strength.items():
        boxes = target["boxes"][target["labels"] == label].reshape(-1, 4, 1, 1)
        depth = torch.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y]).amin(0)
        depth = depth.amax(0) if len(boxes) else torch.full((height, width), -100.0)
        assert (amount[(depth > 1.5) & checked] > 0.1).all()
        assert (amount[(depth < -1.5) & checked] < 0.1).all()


class TestAugmentation:
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("size", [80, 200])
    def test_boxes_and_labels_go_with_the_pixels(self, rectangles, level, size):
        dataset = CocoDataset(rectangles, augmentation(size, level))
        places = set()
        for epoch in range(8):
            pixels, target = dataset[epoch, 0]
            # A strip too thin for a box of its own may be left at the border of a crop.
            assert_boxes_cover_colours(pixels, target, border=2 if level in ("crop", "full") else 0)
            boxes = target["boxes"]
            places.add(tuple(boxes.flatten().tolist()))
            assert len(target["labels"]) == len(boxes)
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor(pixels.shape[:0:-1])).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
            assert pixels.min() >= 0
            assert pixels.max() <= 1
        assert len(places) == {"none": 1, "flip": 2, "crop": 8, "full": 8}[level]

    def test_mosaic_shows_four_images(self, rectangles):
        dataset = CocoDataset(rectangles, mosaic=1.0)
        grey = torch.tensor(114 / 255)
        counts = []
        for epoch in range(10):
            pixels, target = dataset[epoch, 0]
            assert pixels.shape == (3, 120, 160)
            assert not torch.isclose(pixels, grey).any()  # images of one size leave no gap
            assert_boxes_cover_colours(pixels, target, border=2)
            counts.append(len(target["boxes"]))
        assert max(counts) > 2

    def test_mosaic_of_different_sizes(self, tmp_path):
        sizes = {1: (60, 90), 2: (120, 40), 3: (50, 50), 4: (33, 77), 5: (90, 20)}
        entries = [image(number, *size) for number, size in sizes.items()]
        annotations = [box(number, (0, 0, *size)) for number, size in sizes.items()]
        dataset = CocoDataset(read_coco(*write_dataset(tmp_path, document(entries, annotations))), mosaic=1.0)
        wrong, total = 0.0, 0
        for i, epoch in itertools.product(range(5), range(6)):
            pixels, target = dataset[epoch, i]
            y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in pixels.shape[1:]), indexing="ij")
            covered = torch.zeros(pixels.shape[1:], dtype=torch.bool)
            for x1, y1, x2, y2 in target["boxes"].tolist():
                covered |= (x > x1) & (x < x2) & (y > y1) & (y < y2)
            grey = torch.isclose(pixels, torch.tensor(114 / 255)).all(0)
            meeting = [set.intersection(*({b[n], b[n + 2]} for b in target["boxes"].tolist())) for n in (0, 1)]
            assert all(meeting)  # every image touches the point around which they lie
            wrong += (grey == covered).sum().item()
            total += grey.numel()
            assert target["image_id"] == i
        assert wrong < 0.01 * total  # strips thinner than 2 pixels have no box

    def test_boxes_that_become_too_small_go_with_their_labels(self, tmp_path):
        annotations = [box(1, (10, 10, 3, 50), 1), box(1, (50, 10, 5, 50), 2), box(1, (90, 10, 50, 3), 1)]
        paths = write_dataset(tmp_path, document([image(1)], annotations, ((1, "a"), (2, "b"))))
        _, target = CocoDataset(read_coco(*paths), augmentation(80, "none"))[0]
        assert target["boxes"].tolist() == [[25, 5, 27.5, 30]]
        assert target["labels"].tolist() == [2]

    @pytest.mark.parametrize("level", LEVELS)
    def test_images_without_boxes_survive(self, tmp_path, level):
        index = read_coco(*write_dataset(tmp_path, document([image(1)])))
        for mosaic in (0.0, 1.0):
            pixels, target = CocoDataset(index, augmentation(64, level), mosaic=mosaic)[3, 0]
            assert pixels.shape[0] == 3
            assert (target["boxes"].shape, target["boxes"].dtype) == ((0, 4), torch.float32)
            assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)
            assert (target["image_id"].item(), target["image_id"].dtype) == (0, torch.int64)

    @pytest.mark.parametrize(
        ("level", "shape"), [("none", (3, 60, 80)), ("flip", (3, 60, 80)), ("crop", (3, 80, 80)), ("full", (3, 80, 80))]
    )
    def test_size_is_the_longer_side(self, index, level, shape):
        assert CocoDataset(index, augmentation(80, level))[0][0].shape == shape

    @pytest.mark.parametrize(
        ("size", "short_side", "shape"), [(80, 60, (3, 60, 80)), (80, 45, (3, 45, 60)), (80, 70, (3, 60, 80))]
    )
    def test_neither_side_exceeds_its_bound(self, index, size, short_side, shape):
        pixels, target = CocoDataset(index, augmentation(size, "flip", short_side))[0]
        assert pixels.shape == shape
        model = build_detector(ModelOptions(size=size, short_side=short_side), 3)
        batch, [moved] = adapt(model).preprocess([pixels], [target])
        assert batch.sizes == (shape[1:],)  # the detector has nothing left to resize
        assert torch.equal(moved["boxes"], target["boxes"])

    @pytest.mark.parametrize("level", LEVELS)
    def test_no_side_of_a_thin_image_vanishes(self, tmp_path, level):
        images = [image(1, 900, 3), image(2, 3, 900), image(3, 1, 1)]
        index = read_coco(*write_dataset(tmp_path, document(images, [box(1, (0, 0, 900, 3)), box(2, (0, 0, 3, 900))])))
        for epoch, i in itertools.product(range(4), range(3)):
            pixels, _ = CocoDataset(index, augmentation(64, level))[epoch, i]
            assert min(pixels.shape) >= 1
            assert max(pixels.shape) == 64
        if level == "none":
            model = adapt(build_detector(ModelOptions(size=64), 2))  # which resizes the same images by itself
            batch, _ = model.preprocess([CocoDataset(index)[i][0] for i in range(3)])
            assert batch.sizes == ((1, 64), (64, 1), (64, 64))

    def test_an_image_of_the_right_size_is_not_resampled(self, index):
        dataset, original = CocoDataset(index, augmentation(160, "flip")), CocoDataset(index)[4][0]
        seen = {
            flipped
            for epoch in range(8)
            for flipped in (False, True)
            if torch.equal(dataset[epoch, 4][0], original.flip(-1) if flipped else original)
        }
        assert seen == {False, True}

    def test_full_changes_colours_and_crop_does_not(self, tmp_path):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        Image.new("RGB", (160, 120), (200, 100, 50)).save(images / "1.png")
        index = read_coco(images, annotations)

        def colours(level: Level) -> set[tuple[float, ...]]:
            dataset = CocoDataset(index, augmentation(64, level))
            return {tuple(dataset[epoch, 0][0][:, 0, 32].mul(255).round().tolist()) for epoch in range(20)}

        assert colours("crop") == {(200, 100, 50), (114, 114, 114)}
        assert len(colours("full")) > 10
