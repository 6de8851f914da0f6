"""What is wrong with the data of a run is known before its first step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from coco_example.data.preflight import judge_boxes, judge_pictures, judge_splits
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.errors import DataError
from PIL import Image

from tests.makers.coco_files import box, document, image, write_dataset

GOOD = (10, 10, 40, 50)


def index_of(root: Path, boxes: Any, images: Any = None, *, files: bool = True) -> CocoIndex:
    """Nine boxes that are good and others."""
    images = [image(1), image(2)] if images is None else images
    annotations = [entry if isinstance(entry, dict) else box(1, entry) for entry in boxes]
    return read_coco(*write_dataset(root, document(images, annotations), files=files))


def judge(index: CocoIndex, **options: Any) -> list[str]:
    """Judge a run that is evaluated on pictures of its own, which are good."""
    records = [dataclasses.replace(record, path=Path("elsewhere") / record.path.name) for record in index.records]
    good = dataclasses.replace(index, records=tuple(records))
    return judge_splits(index, good, **{"size": 128, **options})


def test_good_data_is_not_worth_a_line(tmp_path):
    index = index_of(tmp_path, [GOOD] * 29 + [(10, 10, 0, 5), (0, 0, 1, 1), (-3, 10, 50, 50)])
    assert judge_boxes(index, "training") == []
    assert judge(index) == []


@pytest.mark.parametrize(
    ("boxes", "warning"),
    [
        (  # a tenth
            [GOOD] * 9 + [(10, 10, 0, 5)],
            (
                "1 of 10 boxes (10.0%) are dropped: 1 thinner than a pixel or of negative size, 0 outside their picture"
                "; the first in annotations[9]: [10, 10, 0, 5] ("
            ),
        ),
        (
            [box(1, GOOD, iscrowd=1), GOOD, (8, 8, -10, 20.5), GOOD, (1, 1, 0, 0)],
            (
                "2 of 4 boxes (50.0%) are dropped: 2 thinner than a pixel or of negative size, 0 outside their picture"
                "; the first in annotations[2]: [8, 8, -10, 20.5] ("
            ),
        ),
        (
            [GOOD, (500, 10, 20, 30), box(1, GOOD, iscrowd=1)],
            (
                "1 of 2 boxes (50.0%) are dropped: 0 thinner than a pixel or of negative size, 1 outside their picture"
                "; the first in annotations[1]: [500, 10, 20, 30] ("
            ),
        ),
        ([GOOD] * 8 + [(0.2, 0.3, 1, 0.5)] * 2, "2 of 10 boxes (20.0%) look like fractions of the picture"),
        (
            [(60, 50, 120, 110), (100, 20, 150, 90)],
            "2 of 2 boxes (100.0%) look like x1, y1, x2, y2, where x, y, width, height are expected; write [x",
        ),
        ([GOOD, (10, 10, 400, 20)], "1 of 2 boxes (50.0%) reach out of their picture, as after resizing pictures"),
    ],
)
def test_boxes_that_are_likely_wrong_are_a_line_with_their_share_and_the_cause(tmp_path, boxes, warning):
    index = index_of(tmp_path, boxes)
    lines = judge_boxes(index, "training")
    assert any(line.startswith(f"training data: {warning}") for line in lines), lines
    assert all(str(index.annotations.file) in line for line in lines)
    assert set(lines) <= set(judge(index))


@pytest.mark.parametrize(
    ("boxes", "images", "got"),
    [
        ([], None, "Expected training boxes, but got none \\("),
        (
            [box(1, GOOD, iscrowd=1)],
            None,
            "boxes, but got none of 1 that can be used, 1 crowds, 0 thinner than a pixel",
        ),
        ([(0.1, 0.2, 0.3, 0.4)] * 3, None, r"but got none of 3 .*3 of 3 boxes \(100\.0%\) look like fractions"),
        ([], [], "Expected training images, but got none"),
    ],
)
def test_nothing_to_use_is_an_error(tmp_path, boxes, images, got):
    index = index_of(tmp_path, boxes, images)
    with pytest.raises(DataError, match=got):
        judge_boxes(index, "training")
    with pytest.raises(DataError, match=got.replace("training", "validation")):
        judge_splits(index_of(tmp_path / "good", [GOOD]), index, size=128)


def test_no_categories_are_an_error(tmp_path):
    index = read_coco(*write_dataset(tmp_path, document([image(1)], [], [])))
    with pytest.raises(DataError, match="Expected validation categories, but got none"):
        judge_boxes(index, "validation")


def test_boxes_that_vanish_at_the_size_of_training_are_a_line_and_all_of_them_an_error(tmp_path):
    index = index_of(tmp_path, [GOOD] * 3 + [(10, 10, 3, 50)])  # of a picture 160 pixels wide
    assert judge(index, size=107) == []
    line = "training data: 1 of 4 boxes (25.0%) are thinner than 2 pixels at --size 106 and not trained on"
    assert [warning[: len(line)] for warning in judge(index, size=106)] == [line]
    assert "at --size 160" in judge(index, size=160, short_side=79)[0]  # 79 of 120
    with pytest.raises(DataError, match=r"none of 4 \(--size 6, .*Fix: raise --size"):
        judge(index, size=6)


def test_more_objects_than_detections_are_a_line(tmp_path):
    index = index_of(tmp_path, [box(2, GOOD)] * 101 + [box(1, GOOD)] * 7)
    line = "2 images with more than 6 objects, at most 101: those beyond are never found; raise --top-k"
    assert [warning for warning in judge_boxes(index, "validation", top_k=6) if line in warning]
    assert len(judge(index)) == 2  # of both splits
    assert judge(index, top_k=101) == []


def test_pictures_that_are_in_both_splits_are_a_line(tmp_path):
    index = index_of(tmp_path, [GOOD])
    lines = judge_splits(index, index, size=128)
    assert lines == ["validation data: 2 of 2 pictures are trained on, too; scores say little about others"]


def test_pictures_are_looked_at_before_they_are_needed(tmp_path):
    index = index_of(tmp_path, [GOOD])
    judge_pictures(index, decode=True)
    path = index.records[1].path
    path.write_bytes(path.read_bytes()[:500])  # its header is whole
    judge_pictures(index)
    judge_pictures(index, decode=True, limit=1)
    with pytest.raises(DataError, match=r"a readable image, but got .*2\.png"):
        judge_pictures(index, decode=True)
    Image.new("RGB", (120, 160)).save(path)
    with pytest.raises(DataError, match=r"160×120 pixels, but got 120×160 .*2\.png"):
        judge_pictures(index)
