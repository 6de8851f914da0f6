"""Values of annotation files: what is plain counts as if it were well written, to the last bit; the rest is named."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_example.data.annotations import Annotations, Category, read_annotations
from coco_example.errors import DataError
from coco_example.evaluation.coco_metrics import CocoScores, coco_evaluate

from tests.makers.coco_files import box, document, image

Document = dict[str, Any]
Change = Callable[[Any], Any]


def well_formed() -> Document:
    """Twelve images with crowds and an image without boxes; ids neither from 1 nor in order."""
    rng = np.random.default_rng(0)
    images = [image(int(number), 640, 480) for number in rng.permutation(90)[:12] + 5]
    boxes = []
    for entry in images[1:]:
        for _ in range(rng.integers(1, 6)):
            x, y, w, h = (float(value) for value in rng.uniform(5, 200, 4).round(2))
            crowd = int(rng.random() < 0.2)
            boxes.append(box(entry["id"], (x, y, w, h), int(rng.choice([2, 7])), iscrowd=crowd, area=w * h))  # type: ignore[arg-type]
    return document(images, boxes, ((2, "a"), (7, "b"), (11, "1")))


def results_of(content: Document) -> list[dict[str, Any]]:
    """Detections near the boxes, with many ties among their scores, which the order of images breaks."""
    rng = np.random.default_rng(1)
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": (np.array(entry["bbox"]) * rng.normal(1, 0.06, 4)).tolist(),
            "score": float(rng.random().__round__(1)),
        }
        for entry in content["annotations"] * 2
    ]


def scores_by_pycocotools(path: Path, results: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value == -1 else float(value) for value in evaluation.stats]


def scores(annotations: Annotations, results: list[dict[str, Any]]) -> list[float]:
    ours = coco_evaluate(annotations, results, backend="pycocotools")
    return [getattr(ours, field.name) for field in fields(CocoScores) if field.name != "per_class"]


def mapped(content: Document, identifier: Change = lambda v: v, **changes: Change) -> Document:
    """The document with some of its values written in another way: all ids, and fields by their names."""
    changes = {**dict.fromkeys(("id", "image_id", "category_id"), identifier), **changes}
    return {
        table: [{key: changes.get(key, lambda v: v)(value) for key, value in entry.items()} for entry in entries]
        for table, entries in content.items()
    }


WAYS: dict[str, dict[str, Change]] = {
    "flags as text": {"iscrowd": str},
    "flags as true and false": {"iscrowd": bool},
    "flags as words": {"iscrowd": lambda v: "True" if v else "false"},
    "flags null": {"iscrowd": lambda v: v or None},
    "areas null": {"area": lambda _: None},
    "areas without a value": {"area": lambda _: float("nan")},
    "areas as empty text": {"area": lambda _: ""},
    "areas as text": {"area": str},
    "sides with a point": {"width": float, "height": float},
    "sides as text": {"width": str, "height": lambda v: f" {float(v)} "},
    "boxes as text": {"bbox": lambda v: [str(value) for value in v]},
    "ids with a point": {"identifier": float},
    "ids as text": {"identifier": str},
    "ids as text in the boxes alone": {"image_id": str, "category_id": str},
    "ids beyond 64 bits": {"identifier": lambda v: v + 10**30},
    "negative ids": {"identifier": lambda v: v - 10**6},
    "names that are numbers": {"name": lambda v: 1 if v == "1" else v},
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A well-formed file, its content, and the scores of its results by pycocotools."""
    content, path = well_formed(), tmp_path_factory.mktemp("clean") / "clean.json"
    path.write_text(json.dumps(content))
    expected = scores_by_pycocotools(path, results_of(content))
    assert 0.05 < expected[0] < 0.95  # a trivial score would be equal anyhow
    return read_annotations(path), content, expected


def assert_same(mine: Annotations, theirs: Annotations) -> None:
    for name in ("owner", "label", "xywh", "area", "crowd"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert [c.name for c in mine.categories] == [c.name for c in theirs.categories]
    for a, b in zip(mine.images, theirs.images, strict=True):
        assert (a.file_name, a.width, a.height) == (b.file_name, b.width, b.height)


@pytest.mark.parametrize("way", WAYS)
def test_values_whose_meaning_is_plain_score_as_the_well_written_file(clean, tmp_path, way):
    theirs, content, expected = clean
    path = tmp_path / "a.json"
    path.write_text(json.dumps(mapped(content, **WAYS[way])))
    mine = read_annotations(path)
    assert_same(mine, theirs)
    identifier = WAYS[way].get("identifier", lambda v: v)
    results = mapped({"results": results_of(content)}, identifier)["results"]  # with the file's own ids
    assert scores(mine, results) == expected
    ids = [identifier(entry["id"]) for entry in content["images"]]
    assert [entry.id for entry in mine.images] == ids


@pytest.mark.parametrize("prefix", ["", "007", "Bild №"])
def test_ids_that_are_texts_are_numbered_in_the_order_of_the_file(clean, tmp_path, prefix):
    _, content, _ = clean
    order = {entry["id"]: n for n, entry in enumerate(content["images"], start=1)}
    numbered = mapped(content, image_id=order.__getitem__)
    named = mapped(content, image_id=lambda v: f"{prefix}{order[v]}x")
    for entry in content["images"]:
        n = order[entry["id"]]
        numbered["images"][n - 1]["id"], named["images"][n - 1]["id"] = n, f"{prefix}{n}x"
    paths = [tmp_path / "numbered.json", tmp_path / "named.json"]
    for path, each in zip(paths, (numbered, named), strict=True):
        path.write_text(json.dumps(each, ensure_ascii=False))
    expected = scores_by_pycocotools(paths[0], results_of(numbered))
    assert scores(read_annotations(paths[1]), results_of(named)) == expected


def test_an_id_with_leading_zeros_is_another_one(tmp_path):
    images = [{**image(7), "id": key} for key in ("7", "07", "007")]
    (tmp_path / "a.json").write_text(json.dumps(document(images, [box(7, (1, 2, 3, 4)), box("07", (1, 2, 3, 4))])))  # type: ignore[arg-type]
    assert read_annotations(tmp_path / "a.json").owner.tolist() == [0, 1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_read(clean, tmp_path, encoding):
    theirs, content, expected = clean
    content = mapped(content, name=lambda v: v + "ß№")
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    mine = read_annotations(tmp_path / "a.json")
    assert [c.name for c in mine.categories] == ["aß№", "bß№", "1ß№"]
    assert np.array_equal(mine.xywh, theirs.xywh)
    assert scores(mine, results_of(content)) == expected


HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("images", {"width": HUGE}, r"'width' to be a whole number of pixels, but got 999"),
        ("images", {"width": 96.5}, r"'width' to be a whole number of pixels, but got 96\.5"),
        ("images", {"width": 0}, "'width' to be a whole number of pixels, but got 0"),
        ("images", {"height": "tall"}, "'height' to be a whole number of pixels, but got 'tall'"),
        ("images", {"height": True}, "'height' to be a whole number of pixels, but got True"),
        ("images", {"id": True}, "'id' to be a whole number or a text, but got True"),
        ("images", {"id": 1.5}, r"'id' to be a whole number or a text, but got 1\.5"),
        ("images", {"id": math.nan}, "'id' to be a whole number or a text, but got nan"),
        ("images", {"file_name": ["a.png"]}, r"'file_name' to be a text, but got \['a.png'\]"),
        ("categories", {"name": "\ud800"}, "'name' to be a text"),  # could not be written into model.json at the end
        ("categories", {"name": None}, "'name' to be a text, but got nothing"),
        ("annotations", {"bbox": [1, 2, HUGE, 4]}, r"bbox' to be \[x, y, width, height\], but got \[1, 2, 999"),
        ("annotations", {"bbox": [1, 2, "9" * 400, 4]}, r"bbox' to be \[x, y, width, height\], but got \[1, 2, '999"),
        ("annotations", {"bbox": [1, 2, "3 px", 4]}, r"bbox' to be \[x, y, width, height\]"),
        ("annotations", {"bbox": [1, 2, True, 4]}, r"bbox' to be \[x, y, width, height\]"),
        ("annotations", {"bbox": [[[[[[[[1]]]]]]]]}, r"bbox' to be \[x, y, width, height\], but got \[\[\[.*\.\.\."),
        ("annotations", {"bbox": {}}, r"bbox' to be \[x, y, width, height\], but got \{\}"),
        ("annotations", {"area": "large"}, "'area' to be a number from 0 up, but got 'large'"),
        ("annotations", {"area": -1}, "'area' to be a number from 0 up, but got -1"),
        ("annotations", {"iscrowd": 2}, "'iscrowd' to be 0 or 1, but got 2"),
        ("annotations", {"iscrowd": "maybe"}, "'iscrowd' to be 0 or 1, but got 'maybe'"),
        ("annotations", {"iscrowd": []}, r"'iscrowd' to be 0 or 1, but got \[\]"),
        ("annotations", {"image_id": None}, "'image_id' to be a whole number or a text, but got nothing"),
        ("annotations", {"category_id": "a"}, "ids listed under categories, but got category_id 'a'"),
    ],
)
def test_values_whose_meaning_is_not_plain_are_named_with_their_entry(tmp_path, table, change, message):
    content = document([image(3), image(1)], [box(1, (1, 2, 3, 4))] * 2, ((2, "b"), (1, "a")))
    content[table][1] |= change
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(tmp_path / "a.json")
    assert f"({table}[1] of {tmp_path / 'a.json'})" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "recursion"),
        (json.dumps(document())[:-1] + ', "x": ' + "9" * 5000 + "}", "limit.*4300"),
        ("{'images': []}", "line 1 column 2"),
        ("", "line 1 column 1"),
    ],
    ids=["deep", "long number", "no JSON", "empty"],
)
def test_what_no_reader_can_take_in_is_an_error_of_the_file(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"readable JSON, but got .*{message}.*a\.json"):
        read_annotations(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + "{".encode("utf-16-le"))
    with pytest.raises(DataError, match="readable JSON"):
        read_annotations(tmp_path / "a.json")


def test_boxes_that_are_not_finite_do_not_count(clean, tmp_path):
    theirs, content, expected = clean
    more = [box(content["images"][0]["id"], (1, 2, value, 4), 2) for value in (math.nan, math.inf)]
    (tmp_path / "a.json").write_text(json.dumps({**content, "annotations": [*content["annotations"], *more]}))
    mine = read_annotations(tmp_path / "a.json")
    assert len(mine.xywh) == len(theirs.xywh) + 2
    assert scores(mine, results_of(content)) == expected


# --- classes ----------------------------------------------------------------------------------------------------------

RUN = [Category(2, "a"), Category(7, "b"), Category(11, "c")]


def classes(tmp_path: Path, rows: Any, used: Any = (), run: Any = RUN, **more: str) -> Annotations:
    """Read a file with these categories, one box of each that is used, in the classes of a run."""
    content = document([image(1)], [box(1, (1, 2, 30, 40), number, area=1200, iscrowd=0) for number in used], rows)
    for entry in content["categories"]:
        entry["supercategory"] = more.get(entry["name"], "none")
    (tmp_path / "a.json").write_text(json.dumps(content))
    return read_annotations(tmp_path / "a.json", run)


def test_a_file_of_fewer_classes_has_the_labels_of_the_run(tmp_path):
    content = classes(tmp_path, [(11, " C"), (7.0, "b")], [7, 11, 7])
    assert content.label.tolist() == [2, 3, 2]
    assert [c.id for c in content.categories] == [2, 7, 11]
    assert content.unknown == ()


@pytest.mark.parametrize(
    ("rows", "theirs", "mine"),
    [
        ([(2, "a"), (7, "c")], "'b' \\(id 7\\)", "'c' \\(id 7\\)"),  # the same id, another name
        ([(2, "a"), (9, "b")], "'b' \\(id 7\\)", "'b' \\(id 9\\)"),  # the same name, another id
        ([(1, "a"), (2, "b")], "'a' \\(id 2\\), 'a' \\(id 2\\)", "'a' \\(id 1\\), 'b' \\(id 2\\)"),
    ],
)
def test_a_file_that_contradicts_the_classes_of_the_run_is_refused_by_both_names(tmp_path, rows, theirs, mine):
    with pytest.raises(DataError, match=rf"the classes of the run, {theirs}, but got {mine} \(categories of .*a\.json"):
        classes(tmp_path, rows)


def test_classes_that_the_run_does_not_know_stand_behind_and_are_missed(tmp_path):
    content = classes(tmp_path, [(1, "z"), (2, "a"), (3, "unused")], [1, 2, 1])
    assert content.label.tolist() == [4, 1, 4]
    assert content.unknown == (Category(1, "z"),)
    results = [{"image_id": 1, "category_id": 2, "bbox": [1, 2, 30, 40], "score": 0.9}]
    ours = coco_evaluate(content, results, backend="pycocotools")
    expected = scores_by_pycocotools(tmp_path / "a.json", results)
    assert [ours.ap, ours.ar100] == [expected[0], expected[8]]
    assert {name: value for name, value in ours.per_class.items() if value >= 0} == {"z": 0, "a": pytest.approx(1)}


def test_a_super_category_without_boxes_is_no_class(tmp_path):
    """As Roboflow's, which may have the name of a class; COCO's person is in the super-category person itself."""
    rows = [(0, "b"), (1, "a"), (2, "b"), (3, "person"), (4, "unused")]
    groups = {"a": "b", "person": "person"}
    assert [c.id for c in classes(tmp_path, rows, [1, 2], None, **groups).categories] == [1, 2, 3, 4]
    assert [c.id for c in classes(tmp_path, rows, [0, 1, 2], None, **groups).categories] == [0, 1, 2, 3, 4]
    run = classes(tmp_path, rows, [1, 2], None, **groups).categories
    assert classes(tmp_path, rows, [2], run, **groups).label.tolist() == [2]
