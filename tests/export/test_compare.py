"""`difference`: rounding and ties are no fault, anything else is."""

from __future__ import annotations

import pytest
import torch

from crosskd_assign.export.compare import Difference, Prediction, difference

A, C, K = 12, 3, 5


def prediction(seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(A, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(A, 2, generator=generator)], dim=1)
    scores = torch.randperm(A * C, generator=generator).reshape(A, C) / 100  # all 0.01 apart
    return Prediction(boxes, scores)


def best(known: Prediction, k: int = K) -> dict[str, torch.Tensor]:
    """The k best, by sorting in Python; of those that tie the first comes first."""
    rows = [(float(s), a, c) for a, row in enumerate(known.scores) for c, s in enumerate(row)]
    rows = sorted(rows, key=lambda row: -row[0])[:k]
    return {
        "boxes": known.boxes[[a for _, a, _ in rows]].clone(),
        "scores": torch.tensor([s for s, _, _ in rows]),
        "labels": torch.tensor([c for _, _, c in rows]),
    }


def compare(found, known) -> Difference:
    return difference(found, known, score_tolerance=1e-5, box_tolerance=1e-3)


def swapped(found, i, j):
    order = list(range(len(found["scores"])))
    order[i], order[j] = j, i
    return {"scores": found["scores"], "boxes": found["boxes"][order], "labels": found["labels"][order]}


def test_the_best_differ_by_nothing():
    known = prediction()
    assert compare(best(known), known) == Difference(0.0, 0.0)
    assert compare(best(known, A * C), known) == Difference(0.0, 0.0)


def test_rounding_is_measured_and_no_fault():
    known = prediction()
    found = best(known)
    found["scores"][2] += 4e-6
    found["boxes"][3, 1] -= 5e-4
    gap = compare(found, known)
    assert not gap.fault
    assert gap.scores == pytest.approx(4e-6, rel=0.02)
    assert gap.boxes == pytest.approx(5e-4, rel=0.02)


@pytest.mark.parametrize("apart", [0.0, 8e-6])
def test_two_that_score_the_same_may_change_places_and_others_may_not(apart):
    known = prediction()
    rank = known.scores.flatten().argsort(descending=True)
    known.scores.view(-1)[rank[1]] = known.scores.view(-1)[rank[2]] + apart
    assert not compare(swapped(best(known), 1, 2), known).fault
    assert compare(swapped(best(known), 2, 3), known).fault


def test_any_of_those_that_tie_for_the_last_place_may_be_there():
    known = prediction()
    rank = known.scores.flatten().argsort(descending=True)
    known.scores.view(-1)[rank[K - 1 : K + 3]] = known.scores.view(-1)[rank[K - 1]].clone()
    found = best(known)
    for tied in rank[K - 1 : K + 3].tolist():
        found["boxes"][-1], found["labels"][-1] = known.boxes[tied // C], tied % C
        assert not compare(found, known).fault
    other = int(rank[K + 3])
    found["boxes"][-1], found["labels"][-1] = known.boxes[other // C], other % C
    assert compare(found, known).fault


def test_where_all_scores_tie_an_invented_box_or_a_repeated_one_is_still_found_out():
    known = prediction()
    known.scores.fill_(0.25)
    found = best(known)
    assert not compare(found, known).fault
    assert "px from" in compare({**found, "boxes": found["boxes"] + 0.01}, known).fault
    repeated = {name: value[[0, 0, 1, 2, 3]] for name, value in found.items()}
    assert "twice" in compare(repeated, known).fault


def test_one_twice_instead_of_another_is_a_fault_although_both_score_the_same():
    known = prediction()
    rank = known.scores.flatten().argsort(descending=True)
    known.scores.view(-1)[rank[0]] = known.scores.view(-1)[rank[1]].clone()
    found = best(known)
    found["boxes"][1], found["labels"][1] = found["boxes"][0], found["labels"][0]
    assert compare(found, known).fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda f: f["scores"].mul_(0.99), "instead of"),
        (lambda f: f["scores"].__setitem__(1, float("nan")), "instead of"),
        (lambda f: f["labels"].copy_((f["labels"] + 1) % C), "nothing predicts"),
        (lambda f: f["boxes"].__setitem__((2, 3), f["boxes"][2, 3] + 0.002), "px from"),
        (lambda f: f["boxes"].__setitem__((2, 3), float("nan")), "px from"),
    ],
    ids=["scores", "NaN score", "labels", "a side", "NaN side"],
)
def test_what_is_no_rounding_is_a_fault(change, fault):
    known = prediction()
    found = best(known)
    change(found)
    assert fault in compare(found, known).fault


def test_more_detections_than_there_are_predictions_are_a_fault():
    known = prediction()
    found = {name: torch.cat([value] * 8) for name, value in best(known).items()}
    assert "40 detections of 36" in compare(found, known).fault


# --- one class a point, and a filter of classes -----------------------------------------------------------------------


def best_of(known: Prediction, classes: list[int], k: int) -> dict[str, torch.Tensor]:
    """The best of some classes, each point with its best class only."""
    rows = [max((float(row[c]), -c) for c in classes) for row in known.scores]
    order = sorted(range(A), key=lambda a: -rows[a][0])[:k]
    scores, labels = torch.tensor([rows[a][0] for a in order]), torch.tensor([-rows[a][1] for a in order])
    return {"boxes": known.boxes[order].clone(), "scores": scores, "labels": labels}


@pytest.mark.parametrize("classes", [None, [0, 2]])
def test_with_one_class_a_point_the_best_of_each_is_expected_and_nothing_else(classes):
    known = prediction()
    options = {"score_tolerance": 1e-5, "box_tolerance": 1e-3, "one_class_per_point": True, "classes": classes}
    found = best_of(known, classes or [0, 1, 2], A)
    assert difference(found, known, **options) == Difference(0.0, 0.0)
    assert difference(best(known, A), known, **options).fault  # several classes of one point
    assert compare(found, known).fault
    more = {name: torch.cat([x, x[:1]]) for name, x in found.items()}
    assert difference(more, known, **options).fault == "13 detections of 12 predictions"


def test_of_classes_that_tie_on_a_point_either_may_be_found_but_not_both():
    known = prediction()
    known.scores[4] = torch.tensor([0.5, 0.5, 0.1])
    known.scores[7] = torch.tensor([0.1, 0.5, 0.5])
    options = {"score_tolerance": 1e-5, "box_tolerance": 1e-3, "one_class_per_point": True}

    def found(*pairs):
        points, labels = [a for a, _ in pairs], torch.tensor([c for _, c in pairs])
        return {"boxes": known.boxes[points].clone(), "scores": torch.full((2,), 0.5), "labels": labels}

    for pairs in [((4, 0), (7, 1)), ((4, 1), (7, 2)), ((7, 1), (4, 0))]:
        assert not difference(found(*pairs), known, **options).fault
    assert difference(found((4, 0), (4, 1)), known, **options).fault == "one prediction twice and another not at all"
