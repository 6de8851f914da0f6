"""Duplicates counted by hand, suppression and one-to-many detections against torchvision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchvision.models.detection import FCOS
from torchvision.ops import batched_nms, box_iou

from crosskd_assign import TaskAwareOneToOneAssigner, adapt
from crosskd_assign.diagnostics import (
    duplicate_report,
    end_to_end_report,
)
from crosskd_assign.postprocessing import one_to_many_detections, suppress
from crosskd_assign.structures import Detection, Target
from tests.makers.builders import GRIDS, random_images, random_predictions, random_targets, tiny_detector
from tests.makers.small_models import small_fcos

A, B = [0.0, 0, 10, 10], [20.0, 20, 40, 40]
HALF_A, LESS_OF_A = [0.0, 0, 10, 5], [0.0, 0, 10, 4.9]  # IoU with A of exactly 0.5, and below


def detection(*rows: tuple[list[float], float, int]) -> Detection:
    """Detections from (box, score, label) rows."""
    boxes = torch.tensor([row[0] for row in rows]).reshape(-1, 4)
    return Detection(
        boxes=boxes, scores=torch.tensor([r[1] for r in rows]), labels=torch.tensor([r[2] for r in rows]).long()
    )


def target(*rows: tuple[list[float], int]) -> Target:
    return Target(boxes=torch.tensor([r[0] for r in rows]).reshape(-1, 4), labels=torch.tensor([r[1] for r in rows]))


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_duplicates_are_counted_per_object_and_class():
    found = detection(
        (HALF_A, 0.75, 1),  # a claim by exactly the threshold, in no order of scores
        (A, 1.0, 1),
        (A, 0.5, 1),
        (LESS_OF_A, 0.9, 1),  # overlaps too little
        (A, 0.95, 2),  # wrong class
        (A, 0.29, 1),  # too faint beside the best
        (B, 0.5, 2),
        (B, 0.04, 2),  # too faint at all
    )
    report = duplicate_report([found], [target((A, 1), (B, 2), ([50.0, 50, 60, 60], 1))])
    assert (report.objects, report.found, report.duplicates) == (3, 2, 2)
    assert report.rate == 1
    assert report.per_class == {1: 2.0, 2: 0.0}
    assert report.margin == pytest.approx((0.25 + 0.5) / 2)  # 1 − 0.75 for A, nothing to subtract for B


@pytest.mark.parametrize(
    ("thresholds", "duplicates"),
    [
        ({}, 2),
        ({"iou_threshold": 0.51}, 1),
        ({"score_threshold": 0.5}, 1),
        ({"score_threshold": 0.51}, 0),  # inclusive, as are the others
        ({"relative_score": 0.5}, 1),
        ({"relative_score": 0.51}, 0),
        ({"relative_score": 0.0, "score_threshold": 0.0}, 3),
    ],
)
def test_each_threshold_is_a_least_value(thresholds, duplicates):
    found = detection((A, 1.0, 0), (A, 0.5, 0), (HALF_A, 0.4, 0), (A, 0.01, 0))
    assert duplicate_report([found], [target((A, 0))], **thresholds).duplicates == duplicates


def test_a_second_report_is_faint_in_relation_to_the_best_one():
    for best, duplicates in [(0.5, 1), (0.9, 0)]:
        found = detection((A, best, 0), (A, 0.2, 0))
        assert duplicate_report([found], [target((A, 0))], relative_score=0.3).duplicates == duplicates


def test_a_detection_claims_only_the_object_it_overlaps_most():
    neighbour = [0.0, 0, 10, 7]
    found = detection((A, 0.9, 0), (neighbour, 0.8, 0))  # their IoU is 0.7
    report = duplicate_report([found], [target((A, 0), (neighbour, 0))])
    assert (report.found, report.duplicates) == (2, 0)


def test_the_class_of_a_detection_decides_between_objects_in_one_place():
    report = duplicate_report([detection((A, 0.9, 0), (A, 0.8, 1))], [target((A, 1), (A, 0))])
    assert (report.found, report.duplicates, report.per_class) == (2, 0, {0: 0.0, 1: 0.0})


def test_images_are_counted_apart_and_summed():
    twice, once, none = detection((A, 0.9, 0), (A, 0.8, 0)), detection((A, 0.9, 0)), detection()
    truth = target((A, 0))
    report = duplicate_report([twice, once, none, twice], [truth, truth, truth, target()])
    assert (report.objects, report.found, report.duplicates) == (3, 2, 1)
    assert (report.rate, report.per_class) == (0.5, {0: 0.5})


def test_without_a_found_object_the_rate_is_nan_and_the_margin_zero():
    for found, truth in [(detection(), target((A, 0))), (detection((A, 0.9, 0)), target()), (detection(), target())]:
        report = duplicate_report([found], [truth])
        assert math.isnan(report.rate)
        assert (report.found, report.duplicates, report.margin, report.per_class) == (0, 0, 0.0, {})


def test_detections_and_targets_must_be_of_the_same_images():
    with pytest.raises(ValueError, match="zip"):
        duplicate_report([detection()], [])


# --- duplicates across classes ----------------------------------------------------------------------------------------


def brute_force_across(found: Detection, truth: Target, least: float = 0.05, relative: float = 0.3) -> int:
    """Count reports under another class, one pair of boxes after the other."""
    overlap = box_iou(found["boxes"], truth["boxes"]).tolist()
    scores, labels, own = found["scores"].tolist(), found["labels"].tolist(), truth["labels"].tolist()
    best: dict[int, float] = {}
    strays = []
    for d, row in enumerate(overlap):
        mine = [(o, -g) for g, o in enumerate(row) if own[g] == labels[d] and o >= 0.5]
        if not mine:
            strays.append(d)
        elif scores[d] >= least:
            g = -max(mine)[1]
            best[g] = max(best.get(g, 0.0), scores[d])
    count = 0
    for d in strays:
        others = [(overlap[d][g], -g) for g in best if own[g] != labels[d] and overlap[d][g] >= 0.5]
        count += bool(others) and scores[d] >= max(least, relative * best[-max(others)[1]])
    return count


@pytest.mark.parametrize("seed", range(6))
def test_reports_across_classes_are_those_that_brute_force_counts(seed):
    truth = random_targets([12, 0, 5], seed=seed, kind="crowded" if seed % 2 else "scattered")
    made = random_predictions(truth, GRIDS[1], seed=seed)
    found = [
        Detection(
            boxes=b.repeat(3, 1), scores=s.T.flatten().sigmoid(), labels=torch.arange(3).repeat_interleave(len(b))
        )
        for b, s in zip(made.boxes, made.logits, strict=True)
    ]
    report = duplicate_report(found, truth)
    expected = sum(brute_force_across(d, t) for d, t in zip(found, truth, strict=True))
    assert report.across_classes == expected > 0
    assert report.rate_across_classes == expected / report.found


def test_a_report_across_classes_has_no_object_of_its_own_and_can_be_seen():
    found = detection(
        (A, 1.0, 1),
        (HALF_A, 0.75, 2),  # counts, by exactly the threshold
        (A, 0.3, 0),  # counts, just seen beside the best
        (A, 0.29, 3),  # too faint beside it
        (LESS_OF_A, 0.9, 2),  # overlaps too little
        (B, 0.9, 2),  # has an object of its own
        (B, 0.04, 1),  # too faint at all
        ([50.0, 50, 60, 60], 0.9, 2),  # where an object of another class was missed
    )
    truth = target((A, 1), (B, 2), ([50.0, 50, 60, 60], 1))
    report = duplicate_report([found], [truth])
    assert (report.found, report.duplicates, report.across_classes) == (2, 0, 2)
    assert report.rate_across_classes == 1
    assert math.isnan(duplicate_report([detection()], [truth]).rate_across_classes)
    same_place = duplicate_report([detection((A, 0.9, 1), (A, 0.8, 2), (A, 0.7, 2))], [target((A, 1), (A, 2))])
    assert (same_place.duplicates, same_place.across_classes) == (1, 0)


# --- suppression ------------------------------------------------------------------------------------------------------


def crowd(seed: int, count: int = 150) -> Detection:
    generator = torch.Generator().manual_seed(seed)
    boxes = random_targets([count], seed=seed, kind="crowded")[0]["boxes"]
    labels = torch.randint(0, 3, (count,), generator=generator)
    return Detection(boxes=boxes, scores=torch.rand(count, generator=generator), labels=labels)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("top_k", [10, 100])
def test_suppression_is_torchvisions_batched_nms(threshold, top_k):
    found = crowd(0)
    keep = batched_nms(found["boxes"], found["scores"], found["labels"], threshold)[:top_k]
    kept = suppress(found, threshold, top_k=top_k)
    assert 1 < len(keep) < 150
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(kept[name], found[name][keep])
    assert (kept["scores"].diff() <= 0).all()


def test_suppression_spares_other_classes_and_survives_no_detections():
    assert suppress(detection((A, 0.9, 0), (A, 0.8, 1), (A, 0.7, 0)))["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert len(suppress(detection())["scores"]) == 0


def test_the_report_scores_detections_as_they_are_and_suppressed():
    seen = []

    def average_precision(detections):
        seen.append(detections)
        return 30.0 if len(seen) == 1 else 41.0

    found, truth = [crowd(0), crowd(1)], random_targets([5, 6], kind="crowded")
    report = end_to_end_report(found, truth, average_precision, nms_threshold=0.4)
    assert (report.ap, report.ap_nms, report.gap) == (30.0, 41.0, 11.0)
    assert seen[0] is found
    for got, before in zip(seen[1], found, strict=True):
        assert torch.equal(got["scores"], suppress(before, 0.4)["scores"])
    assert report.duplicates == duplicate_report(found, truth)


# --- one-to-many detections -------------------------------------------------------------------------------------------

IMAGES = [
    torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate([(64, 96), (50, 40)])
]


@torch.no_grad()
def detect_one_to_many(model: FCOS, **options: Any) -> list[Detection]:
    adapter = adapt(model.eval())
    batch, _ = adapter.preprocess(IMAGES)
    return one_to_many_detections(adapter, adapter.head(adapter.features(batch), batch.image_size), batch, **options)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nms_threshold", [0.3, 0.6, None])
def test_one_to_many_detections_are_those_of_torchvisions_fcos(seed, nms_threshold):
    threshold = 1.0 if nms_threshold is None else nms_threshold  # nothing overlaps by more than 1
    model = small_fcos(seed, score_thresh=1e-6, nms_thresh=threshold, detections_per_img=80).eval()
    for got, expected in zip(
        detect_one_to_many(model, nms_threshold=nms_threshold, top_k=80), model(IMAGES), strict=True
    ):
        assert len(expected["scores"]) > 20
        torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(got["labels"], expected["labels"])


def test_no_more_detections_enter_suppression_than_candidates():
    few = detect_one_to_many(small_fcos(), candidates=7)
    assert all(1 <= len(found["scores"]) <= 7 for found in few)


@torch.no_grad()
def test_without_a_quality_the_class_score_alone_counts():
    adapter = tiny_detector()
    batch, _ = adapter.preprocess(random_images(2))
    predictions = random_predictions(random_targets([3, 0]), GRIDS[1])
    found = one_to_many_detections(adapter, predictions, batch, nms_threshold=None, top_k=9)
    best, _ = predictions.logits.sigmoid().flatten(1).sort(descending=True)
    torch.testing.assert_close(torch.stack([f["scores"] for f in found]), best[:, :9])


# --- assignments ------------------------------------------------------------------------------------------------------


def test_an_assignment_is_summarised_in_shares_of_all_boxes():
    truth = random_targets([100, 0])  # 84 points
    assignment = TaskAwareOneToOneAssigner()(random_predictions(truth, GRIDS[1]), truth)
    assert assignment.num_boxes == 100
    assert assignment.unmatched_share == 0.16
    assert 0 < assignment.fallback_share == int(assignment.fallback.sum()) / 100
    assert assignment.mean_metric == pytest.approx(float(assignment.metric.sum()) / 100)
    assert assignment.non_finite == 0


def test_an_assignment_of_no_boxes_has_no_shares():
    truth = random_targets([0])
    none = TaskAwareOneToOneAssigner()(random_predictions(truth, GRIDS[1]), truth)
    assert (none.num_boxes, none.fallback_share, none.unmatched_share, none.mean_metric) == (0, 0, 0, 0)
