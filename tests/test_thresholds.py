"""`best_thresholds` against every score tried as a threshold, and against COCO's own evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosskd_assign.diagnostics import Threshold, Thresholds, best_thresholds
from crosskd_assign.errors import OptionError
from crosskd_assign.structures import Detection, Target
from tests.makers.builders import random_targets

A, B, FAR = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [70.0, 70, 80, 80]


def detection(*rows):
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    return Detection(boxes=boxes, scores=torch.tensor([row[1] for row in rows]), labels=labels)


def target(*rows):
    labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    return Target(boxes=torch.tensor([row[0] for row in rows]).reshape(-1, 4), labels=labels)


def jittered(targets, seed, *, count=40, steps=20):
    """Detections around the objects, some of them nowhere, many with equal scores."""
    rng = np.random.default_rng(seed)
    found = []
    for truth in targets:
        n = len(truth["boxes"])
        pick = torch.from_numpy(rng.integers(0, max(1, n), count if n else 3))
        known = truth["boxes"][pick] if n else torch.tensor([[5.0, 5, 20, 20]]).repeat(3, 1)
        boxes = known + torch.from_numpy(rng.normal(0, 3, known.shape)).float()
        boxes = torch.cat([boxes[:, :2].minimum(boxes[:, 2:] - 1), boxes[:, 2:]], dim=1)
        labels = truth["labels"][pick] if n else torch.zeros(3, dtype=torch.int64)
        labels = torch.where(torch.from_numpy(rng.random(len(labels))) < 0.8, labels, (labels + 1) % 4)
        scores = torch.from_numpy(rng.integers(1, steps, len(labels)) / steps).float()
        found.append(Detection(boxes=boxes, scores=scores, labels=labels))
    return found


# --- oracles ----------------------------------------------------------------------------------------------------------


def overlap(a, b):
    """IoU of two boxes in Python."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(0.0, w) * max(0.0, h)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def counts(detections, targets, threshold, label, iou_threshold=0.5):
    """Right and kept detections and objects: only what the threshold keeps is matched, from the start."""
    right = kept = objects = 0
    for found, truth in zip(detections, targets, strict=True):
        free = [
            (box, c)
            for box, c in zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True)
            if label in (None, c)
        ]
        objects += len(free)
        rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        rows = [row for row in rows if row[1] >= threshold and label in (None, row[2])]
        for box, _, c in sorted(rows, key=lambda row: -row[1]):
            kept += 1
            best = max(
                (overlap(box, other[0]) if other[1] == c else -1, -i) for i, other in enumerate([*free, (box, None)])
            )
            if best[0] >= iou_threshold:
                free.pop(-best[1])
                right += 1
    return right, kept, objects


@given(st.integers(0, 10**6), st.sampled_from([[6, 0, 3], [1], [12, 8]]), st.sampled_from(["scattered", "crowded"]))
def test_no_score_is_a_better_threshold(seed, sizes, kind):
    targets = random_targets(sizes, seed=seed, kind=kind)
    found = jittered(targets, seed)
    thresholds = best_thresholds(found, targets)
    assert set(thresholds.per_class) == {int(label) for truth in targets for label in truth["labels"]}
    for label, chosen in [(None, thresholds.overall), *thresholds.per_class.items()]:
        tried = {}
        own = [d["scores"] if label is None else d["scores"][d["labels"] == label] for d in found]
        for t in torch.cat(own).unique().tolist():
            right, kept, objects = counts(found, targets, t, label)
            tried[t] = 2 * right / (kept + objects) if kept + objects else 0.0
        assert chosen.f1 == max(tried.values(), default=0.0)
        right, kept, objects = counts(found, targets, chosen.score, label)
        assert chosen.objects == objects
        if right:
            assert (2 * right / (kept + objects), right / kept, right / objects) == (
                chosen.f1,
                chosen.precision,
                chosen.recall,
            )
            lowest = min(t for t in tried if t >= chosen.score)
            assert all(f1 < chosen.f1 for t, f1 in tried.items() if t > lowest)


def test_right_wrong_and_ignored_are_those_of_coco():
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    targets = random_targets([9, 7, 0, 11], seed=3, kind="crowded", size=128)
    crowds = random_targets([2, 0, 1, 3], seed=4, size=128)
    found = jittered(
        [{k: torch.cat([t[k], c[k]]) for k in t} for t, c in zip(targets, crowds, strict=True)], 5, steps=10**6
    )

    # 1. pycocotools: every detection of all images, with a verdict.
    def rows(records, **more):
        for i, record in enumerate(records, 1):
            boxes = record["boxes"].double().clone()
            boxes[:, 2:] -= boxes[:, :2]
            for n, (box, label) in enumerate(zip(boxes.tolist(), record["labels"].tolist(), strict=True)):
                extra = {"score": float(record["scores"][n])} if "scores" in record else more
                yield {"image_id": i, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], **extra}

    truth, result = coco.COCO(), coco.COCO()
    every = [*rows(targets, iscrowd=0), *rows(crowds, iscrowd=1)]
    shared = {"images": [{"id": i} for i in range(1, 5)], "categories": [{"id": c} for c in range(1, 5)]}
    truth.dataset = {**shared, "annotations": [{"id": i, **row} for i, row in enumerate(every, 1)]}
    result.dataset = {**shared, "annotations": [{"id": i, "iscrowd": 0, **row} for i, row in enumerate(rows(found), 1)]}
    truth.createIndex()
    result.createIndex()
    evaluation = cocoeval.COCOeval(truth, result, "bbox")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.evaluate()
    verdicts = [
        (score, e["category_id"] - 1, match > 0)
        for e in evaluation.evalImgs
        if e is not None
        for score, match, ignore in zip(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0], strict=True)
        if not ignore
    ]
    assert len(verdicts) < sum(len(d["scores"]) for d in found), "nothing is ignored, so this test shows nothing"

    # 2. The best F1 of theirs.
    thresholds = best_thresholds(found, targets, ignored=crowds)
    for label, chosen in [(None, thresholds.overall), *thresholds.per_class.items()]:
        objects = sum(label is None or int(x) == label for t in targets for x in t["labels"])
        mine = [(s, ok) for s, c, ok in verdicts if label in (None, c)]
        f1 = {t: 2 * sum(ok for s, ok in mine if s >= t) / (sum(s >= t for s, _ in mine) + objects) for t, _ in mine}
        assert chosen.f1 == pytest.approx(max(f1.values()), abs=1e-12)
    assert best_thresholds(found, targets).overall.f1 < thresholds.overall.f1


# --- where a threshold stands -----------------------------------------------------------------------------------------


def test_a_threshold_stands_halfway_to_the_next_score_and_keeps_what_equals_it():
    found = detection((A, 0.75, 0), (B, 0.5, 0), (FAR, 0.25, 0))
    thresholds = best_thresholds([found], [target((A, 0), (B, 0))])
    assert thresholds.overall == Threshold(0.375, 1.0, 1.0, 1.0, 2)
    limit = Thresholds(Threshold(0.5, 1.0, 1.0, 1.0, 2), {})
    assert limit.apply(found)["scores"].tolist() == [0.75, 0.5]


def test_between_neighbours_of_float32_it_is_the_upper_one():
    high = torch.tensor(0.5)
    low = torch.nextafter(high, torch.tensor(0.0))
    found = detection((A, float(high), 0), (FAR, float(low), 0))
    thresholds = best_thresholds([found], [target((A, 0))])
    assert len(thresholds.apply(found)["scores"]) == 1
    assert int((found["scores"] >= thresholds.overall.score).sum()) == 1


def test_of_equal_f1_the_highest_threshold_is_taken_and_equal_scores_stay_together():
    one_more = detection((A, 0.9, 0), (FAR, 0.5, 0), (FAR, 0.4, 0), (B, 0.3, 0))  # F1 2/3 with one, and with all four
    assert best_thresholds([one_more], [target((A, 0), (B, 0))]).overall.recall == 0.5
    together = detection((FAR, 0.5, 0), (A, 0.5, 0))
    assert best_thresholds([together], [target((A, 0))]).overall == Threshold(0.5, 2 / 3, 0.5, 1.0, 1)


def test_classes_have_thresholds_of_their_own_and_those_without_objects_the_overall_one():
    found = detection((A, 0.9, 1), (FAR, 0.8, 1), (B, 0.4, 2), (FAR, 0.3, 3))
    thresholds = best_thresholds([found], [target((A, 1), (B, 2), (FAR, 0))])
    assert sorted(thresholds.per_class) == [0, 1, 2]
    assert thresholds.of(1) == pytest.approx(0.85)
    assert thresholds.of(2) == pytest.approx(0.4)
    assert thresholds.of(0) == thresholds.of(3) == thresholds.overall.score  # never found, and nothing to find
    assert thresholds.per_class[0].objects == 1
    assert thresholds.apply(found)["labels"].tolist() == [1, 2]


def test_a_further_report_of_an_object_is_wrong_and_each_object_is_taken_once():
    neighbour = [0.0, 0, 10, 7]
    found = detection((neighbour, 0.9, 0), (A, 0.8, 0), (A, 0.7, 0))
    assert best_thresholds([found], [target((A, 0), (neighbour, 0))]).overall.precision == 1.0
    twice = best_thresholds([detection((A, 0.9, 0), (A, 0.8, 0))], [target((A, 0))]).overall
    assert (twice.precision, twice.score) == (1.0, pytest.approx(0.85))


def test_a_detection_in_a_region_to_ignore_is_neither_right_nor_wrong_in_its_class_alone():
    found = detection((A, 0.9, 0), ([70.0, 70, 80, 82], 0.95, 0), ([70.0, 70, 80, 80], 0.97, 1))
    truth, region = target((A, 0), (A, 1)), target(([60.0, 60, 100, 80], 0))
    assert best_thresholds([found], [truth]).overall.precision == pytest.approx(1 / 3)
    assert best_thresholds([found], [truth], ignored=[region]).overall.precision == 0.5
    assert best_thresholds([found], [truth], ignored=[region]).per_class[0].precision == 1.0


def test_without_a_right_detection_no_threshold_is_better_than_another():
    for found, truth in [(detection(), target((A, 0))), (detection((A, 0.5, 0)), target()), (detection(), target())]:
        thresholds = best_thresholds([found], [truth])
        assert math.isnan(thresholds.overall.score)
        assert (thresholds.overall.f1, len(thresholds.apply(found)["scores"])) == (0.0, 0)
    broken = detection((A, float("nan"), 0), (A, 0.5, 0))
    assert best_thresholds([broken], [target((A, 0))]).overall.f1 == 1.0


def test_lists_of_other_images_and_an_iou_out_of_range_are_errors():
    with pytest.raises(ValueError, match="zip"):
        best_thresholds([detection()], [])
    with pytest.raises(OptionError, match="iou_threshold"):
        best_thresholds([detection()], [target()], iou_threshold=1.5)
