"""COCO scores against pycocotools, to the last bit or rounding, and against cases that can be worked out by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_example.data.annotations import read_annotations
from coco_example.evaluation.coco_metrics import CocoScores, coco_evaluate, coco_results

CATEGORIES = [1, 3, 7, 18, 90]  # with gaps; nothing of category 90 exists
LABEL_TO_CATEGORY = dict(enumerate(CATEGORIES, start=1))
NUMBERS = [f.name for f in fields(CocoScores) if f.name != "per_class"]
BCCD = Path(__file__).parents[4].parent / "shared/data/bccd/annotations/instances_val.json"


def write_coco(path: Path, boxes, image_ids, categories=CATEGORIES) -> Path:
    """Write an instances file from (image id, category id, xywh, crowd) tuples."""
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": 0.7 * box[2] * box[3], "iscrowd": c}
        for i, (image, category, box, c) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids]
    names = [{"id": c, "name": f"class {c}"} for c in categories]
    path.write_text(json.dumps({"images": images, "categories": names, "annotations": annotations}))
    return path


@pytest.fixture(scope="module")
def random_set(tmp_path_factory):
    """60 images with crowds, ties, empty images, images without detections and one crowded with 130 detections."""
    rng = np.random.default_rng(0)
    image_ids = (rng.permutation(500)[:60] + 1).tolist()
    boxes, detections = [], []
    for n, image_id in enumerate(image_ids):
        objects = 0 if n % 10 == 0 else int(rng.integers(1, 12))
        sides = np.exp(rng.uniform(np.log(6), np.log(250), (objects, 2)))
        truth = np.concatenate([rng.uniform(0, 1, (objects, 2)) * ([640, 480] - sides), sides], 1).round(2)
        labels = rng.integers(1, 5, objects)
        crowd = rng.random(objects) < 0.15
        boxes += [
            (image_id, CATEGORIES[k - 1], b, int(c))
            for k, b, c in zip(labels, truth.tolist(), crowd.tolist(), strict=True)
        ]
        copies = 0 if n % 7 == 3 else 130 // max(objects, 1) if n == 1 else 3
        found = np.repeat(truth, copies, 0)
        found = found + rng.normal(0, 0.12, found.shape) * np.tile(found[:, 2:], 2)
        false = rng.uniform(5, 200, (4 if copies else 0, 4))
        xywh = np.concatenate([found, false])
        xywh[:, 2:] = xywh[:, 2:].clip(1)
        classes = np.concatenate([np.repeat(labels, copies), rng.integers(1, 6, len(false))])
        wrong = rng.random(len(classes)) < 0.1
        classes[wrong] = rng.integers(1, 6, wrong.sum())
        detections.append(
            {
                "boxes": torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)).float(),
                "scores": torch.from_numpy(rng.random(len(xywh)).round(1)).float(),  # eleven values: ties everywhere
                "labels": torch.from_numpy(classes),
            }
        )
    path = write_coco(tmp_path_factory.mktemp("coco") / "instances.json", boxes, image_ids)
    return path, coco_results(detections, image_ids, LABEL_TO_CATEGORY), image_ids


def reference(path: Path, results, image_ids=None, category=None, max_detections=None):
    """pycocotools as its own documentation uses it, nothing of ours in between."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        if category is not None:
            evaluation.params.catIds = [category]
        if max_detections is not None:
            evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value == -1 else float(value) for value in evaluation.stats]


def same(ours, stats) -> bool:
    """Recalls to the last bit; APs to one rounding of float64, for the reason that coco_metrics' docstring gives."""
    ours, stats = np.array([getattr(ours, name) for name in NUMBERS]), np.array(stats)
    bound = np.where([name.startswith("ap") for name in NUMBERS], np.spacing(1.0), 0.0)
    return bool(np.all((np.abs(ours - stats) <= bound) | (np.isnan(ours) & np.isnan(stats))))


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_equals_pycocotools(random_set, backend):
    path, results, _ = random_set
    ours = coco_evaluate(read_annotations(path), results, backend=backend)
    if backend == "pycocotools":  # nothing but the summary is ours, so not even a rounding may differ
        assert np.array_equal([getattr(ours, name) for name in NUMBERS], reference(path, results), equal_nan=True)
    assert same(ours, reference(path, results))
    assert 0.02 < ours.ap < 0.9  # a trivial score would compare equal as well
    for category in CATEGORIES:
        expected = reference(path, results, category=category)[0]
        assert ours.per_class[f"class {category}"] == pytest.approx(expected, rel=0, abs=np.spacing(1.0), nan_ok=True)
    assert list(ours.per_class) == [f"class {c}" for c in CATEGORIES]
    assert math.isnan(ours.per_class["class 90"])


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_image_ids_follow_coco(random_set, backend):
    path, results, image_ids = random_set
    ours = coco_evaluate(read_annotations(path), results, image_ids=image_ids[5:25] + image_ids[5:8], backend=backend)
    assert same(ours, reference(path, results, image_ids[5:25]))
    assert ours.ap != coco_evaluate(read_annotations(path), results).ap


def test_other_detection_limits(random_set):
    path, results, _ = random_set
    faster = coco_evaluate(read_annotations(path), results, max_detections=(5, 2, 20))
    slow = coco_evaluate(read_annotations(path), results, max_detections=(2, 5, 20), backend="pycocotools")
    assert same(faster, [getattr(slow, name) for name in NUMBERS])
    # pycocotools' own summary of AP looks for a limit of 100 only, so its first number is left out
    assert same(faster, [faster.ap, *reference(path, results, max_detections=(2, 5, 20))[1:]])
    assert faster.ar1 < faster.ar10 < faster.ar100


def test_results_are_not_modified_and_nothing_is_printed(random_set, capfd, caplog):
    path, results, _ = random_set
    before = copy.deepcopy(results)
    with caplog.at_level(logging.DEBUG):
        coco_evaluate(read_annotations(path), results)
        coco_evaluate(read_annotations(path), results, backend="pycocotools")
    assert results == before
    assert all(set(result) == {"image_id", "category_id", "bbox", "score"} for result in results)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger("faster_coco_eval").level == logging.NOTSET


def test_half_the_objects_found(tmp_path):
    path = write_coco(tmp_path / "a.json", [(4, 1, [10, 10, 50, 50], 0), (4, 1, [200, 10, 50, 50], 0)], [4])
    found = {
        "boxes": torch.tensor([[10.0, 10, 60, 60]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([1]),
    }
    scores = coco_evaluate(read_annotations(path), coco_results([found], [4], LABEL_TO_CATEGORY))
    assert scores.ap == scores.ap50 == scores.per_class["class 1"] == pytest.approx(51 / 101)
    assert scores.ar1 == scores.ar100 == scores.ar_medium == 0.5
    assert math.isnan(scores.ap_small)
    assert math.isnan(scores.ar_large)


@pytest.mark.parametrize(("crowd", "expected"), [(1, 1.0), (0, 51 / 101 / 6)])
def test_crowds_swallow_detections(tmp_path, crowd, expected):
    path = write_coco(tmp_path / "a.json", [(1, 3, [0, 0, 40, 40], 0), (1, 3, [100, 100, 300, 300], crowd)], [1])
    inside = [[120.0 + 20 * i, 150, 160 + 20 * i, 200] for i in range(5)]
    found = {
        "boxes": torch.tensor([*inside, [0, 0, 40, 40]]),
        "scores": torch.linspace(0.9, 0.4, 6),
        "labels": torch.full((6,), 2),
    }
    scores = coco_evaluate(read_annotations(path), coco_results([found], [1], LABEL_TO_CATEGORY))
    # as an object, the big box is missed and the five are false: precision 1/6 up to recall 1/2
    assert scores.ap == pytest.approx(expected)


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_no_results_score_zero(random_set, backend):
    path, _, image_ids = random_set
    assert coco_results([], [], {}) == []
    scores = coco_evaluate(read_annotations(path), [], backend=backend)
    assert set(scores.as_dict().values()) == {0.0}
    assert list(scores.as_dict()) == NUMBERS
    only_empty = coco_evaluate(read_annotations(path), [], image_ids=[image_ids[0]], backend=backend)
    assert all(map(math.isnan, only_empty.as_dict().values()))


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_the_truth_itself_scores_one(random_set, backend):
    path, _, image_ids = random_set
    truth = json.loads(path.read_text())["annotations"]
    category_to_label = {category: label for label, category in LABEL_TO_CATEGORY.items()}
    detections = []
    for image_id in image_ids:
        own = [box for box in truth if box["image_id"] == image_id and not box["iscrowd"]]
        boxes = torch.tensor([box["bbox"] for box in own]).reshape(-1, 4)
        labels = torch.tensor([category_to_label[box["category_id"]] for box in own], dtype=torch.int64)
        boxes[:, 2:] += boxes[:, :2]
        detections.append({"boxes": boxes, "scores": torch.ones(len(own)), "labels": labels})
    scores = coco_evaluate(
        read_annotations(path), coco_results(detections, image_ids, LABEL_TO_CATEGORY), backend=backend
    )
    assert {scores.ap, scores.ap50, scores.ap_small, scores.ap_medium, scores.ap_large, scores.ar100} == {1.0}


@pytest.mark.skipif(not BCCD.exists(), reason="needs ../shared/data/bccd")
def test_backends_agree_on_real_boxes():
    rng = np.random.default_rng(1)
    results = []
    for box in json.loads(BCCD.read_text())["annotations"]:
        x, y, w, h = box["bbox"]
        for _ in range(2):
            dx, dy, dw, dh = rng.normal(0, 0.08, 4)
            moved = [x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh)]
            results.append({**box, "bbox": moved, "score": float(rng.random())})
    faster, slow = (
        coco_evaluate(read_annotations(BCCD), results, backend=backend) for backend in ("faster", "pycocotools")
    )
    assert same(faster, [getattr(slow, name) for name in NUMBERS])
    assert faster.per_class == pytest.approx(slow.per_class, rel=0, abs=np.spacing(1.0))
    assert 0.1 < faster.ap < 0.9


def test_files_with_bad_ids_and_without_optional_fields(tmp_path):
    path = write_coco(tmp_path / "a.json", [(1, 1, [0, 0, 50, 50], 0), (1, 1, [100, 0, 50, 50], 0)], [1])
    content = json.loads(path.read_text())
    for box in content["annotations"]:
        box["id"] = 0  # twice the same id, and the one that COCO reads as "unmatched"
        del box["area"], box["iscrowd"]
    for category in content["categories"]:
        category["name"] = "thing"
    path.write_text(json.dumps(content))
    found = {
        "boxes": torch.tensor([[0.0, 0, 50, 50], [100, 0, 150, 50]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 1]),
    }
    scores = coco_evaluate(read_annotations(path), coco_results([found], [1], LABEL_TO_CATEGORY))
    assert scores.ap == scores.ap_medium == 1.0  # 50 × 50 px is medium
    assert scores.per_class["thing (1)"] == 1.0
    assert len(scores.per_class) == len(CATEGORIES)


def test_coco_results_format():
    detection = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 1, 1], [3, 3, 5, 9]]),
        "scores": torch.tensor([0.25, 0.75, 0.5]),
        "labels": torch.tensor([4, 0, 9]),  # 0 is background, 9 a class that the data set lacks
    }
    assert coco_results([detection], [12], LABEL_TO_CATEGORY) == [
        {"image_id": 12, "category_id": 18, "bbox": [1, 2, 10, 20], "score": 0.25}
    ]
    assert json.dumps(coco_results([detection], [12], {9: 1}))  # plain Python numbers only
    far = torch.tensor([[0.1, 0.2, 1000.3, 700.4]])
    result = coco_results([{"boxes": far, "scores": torch.ones(1), "labels": torch.ones(1)}], [12], {1: 1})[0]
    x1, y1, x2, y2 = far[0].tolist()
    assert result["bbox"] == [x1, y1, x2 - x1, y2 - y1]  # not rounded to float32 once more


def test_mistakes_are_explained(random_set, tmp_path):
    path, results, image_ids = random_set
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"Expected one image id per detection, but got 1 .* 2 ids.*Fix:"):
        coco_results([empty], [1, 2], {})
    broken = {"boxes": torch.full((1, 4), math.nan), "scores": torch.ones(1), "labels": torch.ones(1)}
    with pytest.raises(ValueError, match=r"finite.*image 7"):
        coco_results([broken], [7], {})
    with pytest.raises(ValueError, match=r"image_ids.*another id, 999999"):
        coco_evaluate(read_annotations(path), results, image_ids=[*image_ids, 999999])
    with pytest.raises(ValueError, match=r"results.*another id, 999999"):
        coco_evaluate(read_annotations(path), [*results, {**results[0], "image_id": 999999}])
    with pytest.raises(ValueError, match="at least one image"):
        coco_evaluate(read_annotations(path), results, image_ids=[])
    with pytest.raises(ValueError, match="three positive"):
        coco_evaluate(read_annotations(path), results, max_detections=(1, 0, 100))
    with pytest.raises(ValueError, match="backend"):
        coco_evaluate(read_annotations(path), results, backend="hot")  # type: ignore[arg-type]


@pytest.mark.parametrize(("backend", "extra"), [("faster", "coco"), ("pycocotools", "dev")])
def test_missing_package_names_the_extra(random_set, monkeypatch, backend, extra):
    path, results, _ = random_set
    package = {"faster": "faster_coco_eval", "pycocotools": "pycocotools"}[backend]
    for name in [package, f"{package}.coco", f"{package}.cocoeval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf'Fix: pip install "crosskd_assign\[{extra}\]"'):
        coco_evaluate(read_annotations(path), results, backend=backend)


def test_pycocotools_is_not_needed_nor_replaced(random_set, monkeypatch):
    path, results, _ = random_set
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert coco_evaluate(read_annotations(path), results).ap > 0
    assert sys.modules["pycocotools"] is None
