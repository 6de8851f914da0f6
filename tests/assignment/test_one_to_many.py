"""The one-to-many assigner against a loop over all points and boxes, and its invariants."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from crosskd_assign import DensePredictions, TaskAwareOneToOneAssigner
from crosskd_assign.assignment import TaskAwareOneToManyAssigner
from crosskd_assign.errors import OptionError, TargetError
from crosskd_assign.structures import Assignment, Target
from tests.makers.builders import grid, random_predictions, random_targets, scenes

ASSIGNERS = [
    TaskAwareOneToManyAssigner(),
    TaskAwareOneToManyAssigner(positives=1),
    TaskAwareOneToManyAssigner(positives=3, alpha=1.0, beta=6.0, center_radius=2.5),
    TaskAwareOneToManyAssigner(positives=10_000, center_radius=1.0),
]
assigners = st.sampled_from(ASSIGNERS)
Metrics = np.ndarray[Any, Any]

# --- the oracle: every point with every box ---------------------------------------------------------------------------


def metric_of(
    predictions: DensePredictions, target: Target, image: int, assigner: TaskAwareOneToManyAssigner
) -> Metrics:
    """The metric ``(A, G)`` in float32; −1 outside the prior, and where the prediction is not finite."""
    boxes, labels = target["boxes"].double().numpy(), target["labels"].numpy()
    points, strides = predictions.points.double().numpy(), predictions.strides.double().numpy()
    predicted = predictions.boxes[image].double().numpy()
    z = predictions.logits[image].double().numpy()[:, labels]
    x1, y1, x2, y2 = boxes.T
    with np.errstate(all="ignore"):
        left, top, right, bottom = predicted.T[..., None]
        width = np.clip(np.minimum(right, x2) - np.maximum(left, x1), 0, None)
        height = np.clip(np.minimum(bottom, y2) - np.maximum(top, y1), 0, None)
        own = np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)
        overlap = width * height / (own + (x2 - x1) * (y2 - y1) - width * height)
        metric = (1 / (1 + np.exp(-z))) ** assigner.alpha * overlap**assigner.beta
    x, y = points[:, :1], points[:, 1:]
    reach = assigner.center_radius * strides[:, None]
    prior = (abs(x - (x1 + x2) / 2) < reach) & (abs(y - (y1 + y2) / 2) < reach)
    prior &= (x > x1) & (x < x2) & (y > y1) & (y < y2)
    finite = np.isfinite(z) & np.isfinite(predicted).all(axis=1)[:, None]
    return np.where(prior & finite, metric, -1).astype(np.float32)


def brute_force(metric: Metrics, target: Target, positives: int) -> dict[int, int]:
    """Point to box: each box asks for its best, each point goes to the best of those that ask."""
    asked: dict[int, list[int]] = {}
    for g in range(metric.shape[1]):
        best = sorted((-m, p) for p, m in enumerate(metric[:, g]) if m > 0)[:positives]
        for _, p in best:
            asked.setdefault(p, []).append(g)
    names = list(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True))  # decide where metrics equal
    return {p: min(boxes, key=lambda g: (-metric[p, g], names[g], g)) for p, boxes in asked.items()}


def nearly_tied(metric: Metrics) -> bool:
    """Whether rounding decides what is greater, among the points of a box or the boxes at a point."""
    distinct = np.unique(metric.astype(np.float64), axis=1)  # copies of a box are no matter of rounding
    for axis in (0, 1):
        ranked = np.sort(distinct, axis=axis)
        greater = ranked.take(range(1, ranked.shape[axis]), axis=axis)
        if ((np.diff(ranked, axis=axis) < 1e-6) & (greater > 0)).any():
            return True
    return False


def of_image(assignment: Assignment, n: int) -> list[tuple[int, int, float, bool]]:
    """Point, box, metric and whether it is a fallback, of one image."""
    mine = assignment.image == n
    columns = (assignment.point, assignment.target, assignment.metric, assignment.fallback)
    return list(zip(*(column[mine].tolist() for column in columns), strict=True))


@given(scenes(), assigners)
def test_every_box_has_its_best_points_and_a_contested_point_goes_to_the_greatest_metric(scene, assigner):
    predictions, targets = scene.build()
    assignment = assigner(predictions, targets)
    compared = 0
    for n, target in enumerate(targets):
        metric = metric_of(predictions, target, n, assigner)
        found = of_image(assignment, n)
        for p, g, m, fallback in found:
            if m > 0:
                assert m == pytest.approx(metric[p, g], rel=1e-4, abs=1e-6)
                assert not fallback
        if len(target["boxes"]) == 0 or not nearly_tied(metric):
            expected = brute_force(metric, target, assigner.positives)
            assert {p: g for p, g, _, _ in found if g in expected.values()} == expected
            compared += 1
    event(f"{compared} images compared")


@given(scenes(), assigners)
def test_a_box_left_over_takes_its_best_free_point_and_only_one_outside_the_prior_is_a_fallback(scene, assigner):
    predictions, targets = scene.build()
    assignment = assigner(predictions, targets)
    points = predictions.points.double().numpy()
    for n, target in enumerate(targets):
        metric = metric_of(predictions, target, n, assigner)
        if len(target["boxes"]) > 0 and nearly_tied(metric):
            continue
        found = of_image(assignment, n)
        winners = set(brute_force(metric, target, assigner.positives).values())
        left_over = [(p, g, fallback) for p, g, _, fallback in found if g not in winners]
        assert len({g for _, g, _ in left_over}) == len(left_over), "one point for each"
        for p, g, fallback in left_over:
            others = {q for q, h, _, _ in found if h != g}
            free = [q for q in np.flatnonzero(metric[:, g] >= 0) if q not in others]  # inside the prior
            if not fallback:
                assert p in free
                assert metric[p, g] == pytest.approx(max(metric[free, g]), rel=1e-4, abs=1e-6)
                continue
            assert not free
            center = (target["boxes"][g, :2] + target["boxes"][g, 2:]).double().numpy() / 2
            distance = ((points - center) ** 2).sum(axis=1)
            nearer = np.flatnonzero(distance < distance[p] - 1e-9)
            assert set(nearer.tolist()) <= others


# --- invariants -------------------------------------------------------------------------------------------------------


@given(scenes(most=12), assigners)
def test_no_point_is_given_twice_and_every_box_has_one_while_there_are_points(scene, assigner):
    predictions, targets = scene.build()
    assignment = assigner(predictions, targets)
    pairs = list(zip(assignment.image.tolist(), assignment.point.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= p < len(predictions.points) for _, p in pairs)
    boxes = Counter(zip(assignment.image.tolist(), assignment.target.tolist(), strict=True))
    assert all(count <= assigner.positives for count in boxes.values())
    assert set(boxes) == {(n, g) for n, target in enumerate(targets) for g in range(len(target["boxes"]))}
    assert assignment.unmatched == 0
    order = list(zip(assignment.image.tolist(), assignment.target.tolist(), assignment.point.tolist(), strict=True))
    assert order == sorted(order)


@given(scenes(most=8), assigners, st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order_of_the_boxes(scene, assigner, random):
    predictions, targets = scene.build()
    orders = [random.sample(range(len(t["boxes"])), len(t["boxes"])) for t in targets]
    shuffled = [Target(boxes=t["boxes"][o], labels=t["labels"][o]) for t, o in zip(targets, orders, strict=True)]

    def described(targets: list[Target]) -> Counter[Any]:
        """Points by what their box is, because copies of a box cannot be told apart."""
        assignment = assigner(predictions, targets)
        return Counter(
            (n, p, tuple(target["boxes"][g].tolist()), int(target["labels"][g]), m, fallback)
            for n, target in enumerate(targets)
            for p, g, m, fallback in of_image(assignment, n)
        )

    assert described(shuffled) == described(targets)


def test_boxes_of_equal_metric_at_a_point_are_told_apart_by_what_they_are_and_not_by_their_order():
    predictions = DensePredictions.from_sides(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), grid(64, (8,)))
    boxes, labels = torch.tensor([[16.0, 16, 48, 48]]).repeat(3, 1), torch.tensor([2, 0, 1])
    points = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assignment = TaskAwareOneToManyAssigner(positives=4)(predictions, [Target(boxes=boxes, labels=labels[order])])
        points.append(sorted(zip(labels[order][assignment.target].tolist(), assignment.point.tolist(), strict=True)))
    assert points[0] == points[1] == points[2]


@given(scenes(), assigners)
def test_an_image_is_assigned_as_if_it_were_alone(scene, assigner):
    predictions, targets = scene.build()
    assignment = assigner(predictions, targets)
    for n, target in enumerate(targets):
        alone = replace(predictions, logits=predictions.logits[n : n + 1], boxes=predictions.boxes[n : n + 1])
        assert of_image(assigner(alone, [target]), 0) == of_image(assignment, n)


@given(scenes())
def test_grids_and_the_same_points_without_grids_are_assigned_alike(scene):
    predictions, targets = scene.build()
    assigner = TaskAwareOneToManyAssigner(positives=4)
    torch.testing.assert_close(
        vars(assigner(replace(predictions, levels=None), targets)), vars(assigner(predictions, targets)), atol=0, rtol=0
    )


@given(st.integers(0, 2**20))
def test_one_positive_for_boxes_far_apart_is_the_one_to_one_assignment(seed):
    targets = [
        Target(boxes=torch.tensor([[2.0, 2, 28, 28], [36, 4, 60, 30], [4, 36, 30, 62]]), labels=torch.tensor([0, 1, 2]))
    ]
    predictions = random_predictions(targets, grid(64, (8, 16)), seed=seed)
    many = TaskAwareOneToManyAssigner(positives=1)(predictions, targets)
    one = TaskAwareOneToOneAssigner()(predictions, targets)
    torch.testing.assert_close(vars(many), vars(one), atol=0, rtol=0)


@pytest.mark.parametrize("positives", [1, 3, 9])
def test_a_lone_box_has_as_many_points_as_asked_for(positives):
    levels = grid(64, (8,))
    predictions = DensePredictions.from_sides(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), levels)
    target = Target(boxes=torch.tensor([[16.0, 16, 48, 48]]), labels=torch.tensor([1]))
    assigner = TaskAwareOneToManyAssigner(positives, center_radius=2.0)  # 16 points inside the prior
    assert len(assigner(predictions, [target])) == positives


def test_more_boxes_than_points_leave_some_without_and_count_them():
    targets = random_targets((9,), size=32)
    predictions = random_predictions(targets, grid(32, (16,)))
    assignment = TaskAwareOneToManyAssigner()(predictions, targets)
    assert sorted(assignment.point.tolist()) == [0, 1, 2, 3]
    assert len(set(assignment.target.tolist())) + assignment.unmatched == 9


def test_a_batch_without_boxes_has_no_pairs():
    targets = random_targets((0, 0))
    assignment = TaskAwareOneToManyAssigner()(random_predictions(targets, grid()), targets)
    assert len(assignment) == assignment.unmatched == assignment.non_finite == 0


def test_predictions_that_are_not_finite_are_passed_over_and_counted():
    levels = grid(64, (8,))
    predictions = DensePredictions.from_sides(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), levels)
    target = Target(boxes=torch.tensor([[16.0, 16, 48, 48]]), labels=torch.tensor([1]))
    assigner = TaskAwareOneToManyAssigner(100, center_radius=2.0)
    inside = assigner(predictions, [target]).point
    predictions.boxes[0, inside[0], 2] = float("nan")
    predictions.logits[0, inside[1], 1] = float("inf")
    assignment = assigner(predictions, [target])
    assert assignment.point.tolist() == inside[2:].tolist()
    assert assignment.non_finite == 2


@pytest.mark.parametrize(
    "options", [{"positives": 0}, {"alpha": -1}, {"beta": -0.1}, {"center_radius": float("nan")}], ids=str
)
def test_numbers_out_of_range_are_refused_by_name(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        TaskAwareOneToManyAssigner(**options)


def test_targets_that_cannot_be_learned_are_refused():
    targets = random_targets((1,))
    predictions = random_predictions(targets, grid())
    with pytest.raises(TargetError, match="x1 < x2"):
        TaskAwareOneToManyAssigner()(predictions, [{**targets[0], "boxes": targets[0]["boxes"].flip(1)}])
    with pytest.raises(TargetError, match="label in 0…2"):
        TaskAwareOneToManyAssigner()(predictions, [{**targets[0], "labels": torch.tensor([3])}])
