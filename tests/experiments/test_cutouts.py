"""Cells are pasted where the crowd has its boxes, from pictures of their own split, and hide nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from cutouts import collect, paste, write_cutouts
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

SMEAR = (205, 210, 208)
CELLS = {"train": (200, 120, 120), "val": (120, 120, 200)}  # red to train on, blue to evaluate on


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two pictures a split, of cells in its colour: five, of which two overlap, and one without a label."""
    root = tmp_path_factory.mktemp("source")
    (root / "annotations").mkdir()
    for split, colour in CELLS.items():
        (root / split).mkdir()
        annotations = []
        for number in (1, 2):
            picture = Image.new("RGB", (512, 384), SMEAR)
            pen = ImageDraw.Draw(picture)
            for k, x in enumerate((20, 120, 220, 300, 400)):
                box = [x, 40 + 30 * number, 90, 80]
                pen.ellipse([x, box[1], x + 90, box[1] + 80], fill=colour)
                annotations.append({"bbox": box, "image_id": number, "category_id": 1, "id": 10 * number + k})
            pen.ellipse([200, 250, 290, 330], fill=colour)
            picture.save(root / split / f"{number}.png")
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 512, "height": 384} for n in (1, 2)],
            "annotations": [{**entry, "area": 7200, "iscrowd": 0} for entry in annotations],
            "categories": [{"id": 1, "name": "RBC"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=float)


def test_a_split_is_made_of_its_own_pictures_and_its_boxes_hold_all_cells(source, tmp_path):
    folder = write_cutouts(source, tmp_path / "cells", train=3, val=3, overlap=(0.0, 0.9))
    for split, colour in CELLS.items():
        for record in read_coco(*locate_split(folder, split)).records:
            picture = pixels(record.path)
            outside = np.ones(picture.shape[:2], dtype=bool)
            for left, top, right, bottom in record.boxes.int().tolist():
                outside[top:bottom, left:right] = False
                middle = picture[(top + bottom) // 2, (left + right) // 2]
                assert np.sign(middle[0] - middle[2]) == np.sign(colour[0] - colour[2])
            # Nothing is left of the cells that the background had, with a label or without.
            assert np.abs(picture[outside] - SMEAR).mean() < 5
            assert np.percentile(np.abs(picture[outside] - SMEAR), 99) < 15


def test_only_cells_that_stand_alone_are_cut_out_and_light_goes_through_two(source):
    material = collect(source, "train")
    assert len(material.cells) == 2 * 3  # of five, two touch
    rng, pairs = np.random.default_rng(0), 0
    for _ in range(20):
        picture, objects = paste(rng, material, 128, (0.5, 0.5))
        if len(objects) == 2:
            (_, first), (_, second) = objects
            low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
            if (high - low > 8).all():
                x, y = ((low + high) // 2).astype(int)
                both = np.asarray(picture, dtype=float)[y - 2 : y + 2, x - 2 : x + 2, 1].mean()
                assert both == pytest.approx(210 * (120 / 210) ** 2, abs=12)  # what one lets through, twice
                pairs += 1
    assert pairs > 1


def test_overlaps_are_those_asked_for_but_for_whole_pixels_and_drawn_again_with_the_seed(source, tmp_path):
    first = write_cutouts(source, tmp_path / "a", train=0, val=30, seed=5, overlap=(0.6, 0.6))
    again = write_cutouts(source, tmp_path / "b", train=0, val=30, seed=5, overlap=(0.6, 0.6))
    largest = []
    for one, other in zip(*(read_coco(*locate_split(x, "val")).records for x in (first, again)), strict=True):
        assert np.array_equal(pixels(one.path), pixels(other.path))
        overlap = box_iou(one.boxes, one.boxes).fill_diagonal_(0)
        largest += [x for x in overlap.amax(1).tolist() if x > 0.1]
    assert np.mean(largest) == pytest.approx(0.6, abs=0.02)
    assert np.std(largest) < 0.03
