"""Soft-NMS and the count of found objects, against the slowest ways to compute them."""

from __future__ import annotations

import doctest
import math

import found
import numpy as np
import pytest
import torch
from found import Matches, match, soft_nms
from torchvision.ops import box_iou

from crosskd_assign.structures import Detection, Target


def crowd(seed: int, count: int, *, labels: int = 2) -> Detection:
    """Boxes of about 20 pixels in a picture of 40."""
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 20, (count, 2)), rng.uniform(14, 22, (count, 2))
    return {
        "boxes": torch.from_numpy(np.hstack([corner, corner + side])).float(),
        "scores": torch.from_numpy(rng.uniform(0.01, 1, count)).float(),
        "labels": torch.from_numpy(rng.integers(1, labels + 1, count)),
    }


def slow_soft_nms(detection: Detection, decay: str) -> list[tuple[float, int]]:
    """The paper's loop, class by class: scores and places."""
    overlap = box_iou(detection["boxes"], detection["boxes"]).tolist()
    done = []
    for label in set(detection["labels"].tolist()):
        left = {i: float(s) for i, s in enumerate(detection["scores"]) if detection["labels"][i] == label}
        while left:
            best = max(left, key=lambda i: left[i])
            done.append((left.pop(best), best))
            for i in left:
                if decay == "gaussian":
                    left[i] *= math.exp(-(overlap[best][i] ** 2) / 0.5)
                elif overlap[best][i] > 0.3:
                    left[i] *= 1 - overlap[best][i]
    return sorted(done, reverse=True)


@pytest.mark.parametrize("decay", ["gaussian", "linear"])
def test_soft_nms_is_the_papers_loop(decay):
    for seed in range(12):
        detection = crowd(seed, 25)
        expected = slow_soft_nms(detection, decay)
        for top_k in (100, 7):
            kept = soft_nms(detection, decay, top_k=top_k)
            assert kept["scores"].tolist() == pytest.approx([score for score, _ in expected[:top_k]], rel=1e-4)
            places = [place for _, place in expected[:top_k]]
            assert torch.equal(kept["boxes"], detection["boxes"][places])
            assert torch.equal(kept["labels"], detection["labels"][places])
    assert len(soft_nms(crowd(0, 0), decay)["scores"]) == 0


def test_found_objects_are_those_of_a_greedy_search_at_any_threshold():
    """Whatever is left out below a threshold, a search that starts anew finds as many."""
    for seed in range(12):
        detection, other = crowd(seed, 20), crowd(100 + seed, 6)
        target: Target = {"boxes": other["boxes"], "labels": other["labels"]}
        matches = match([detection], [target])
        overlap = box_iou(detection["boxes"], target["boxes"])
        for threshold in (0.0, 0.4, 0.8):
            free = set(range(6))
            for d in sorted(range(20), key=lambda d: -float(detection["scores"][d])):
                able = [g for g in free if overlap[d, g] >= 0.5 and detection["labels"][d] == target["labels"][g]]
                if able and detection["scores"][d] >= threshold:
                    free.remove(max(able, key=lambda g: float(overlap[d, g])))
            assert matches.found(threshold) == 6 - len(free)


def test_one_detection_on_two_objects_finds_one():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10]])
    target: Target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    one: Detection = {"boxes": boxes[:1], "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    two: Detection = {"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([1, 1])}
    other: Detection = {"boxes": boxes, "scores": torch.tensor([0.9, 0.2]), "labels": torch.tensor([2, 1])}
    assert [match([x], [target]).found() for x in (one, two, other)] == [1, 2, 1]
    assert match([two], [target]).found(0.5) == 1
    assert match([one, two], [target, target]).objects == 4


def test_the_threshold_has_the_best_f1_of_all():
    def f1(matches: Matches, threshold: float) -> float:
        reported = matches.reported(threshold)
        return 2 * matches.found(threshold) / (reported + matches.objects)

    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = torch.from_numpy(np.sort(rng.integers(1, 12, 30) / 12)[::-1].copy())  # with ties
        matches = Matches(scores, torch.from_numpy(rng.random(30) < 0.5), 20)
        best = max(f1(matches, t) for t in set(scores.tolist()))
        assert f1(matches, matches.threshold()) == pytest.approx(best)
    assert (
        match([crowd(0, 0)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]).found() == 0
    )


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(found).failed == 0
