"""The assigner against a full matrix of points × boxes, written from the formulas alone, and its invariants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crosskd_assign import DensePredictions, GridLevel, TaskAwareOneToOneAssigner
from crosskd_assign.assignment.matching import Floats, Ints
from crosskd_assign.errors import OptionError, TargetError
from crosskd_assign.structures import Assignment, Target
from tests.makers.builders import GRIDS, KINDS, grid, random_predictions, random_targets, scenes

Masks = NDArray[np.bool_]
ASSIGNERS = [
    TaskAwareOneToOneAssigner(),
    TaskAwareOneToOneAssigner.task_aligned(center_radius=2.5),
    TaskAwareOneToOneAssigner.yolo(solver="greedy"),
]

# --- the oracle: plain numpy, float64, every point with every box -----------------------------------------------------


def oracle(
    predictions: DensePredictions, target: Target, image: int, assigner: TaskAwareOneToOneAssigner
) -> tuple[Floats, Masks, Masks]:
    """Metric, prior and finiteness of one image, each ``(A, G)``."""
    boxes, labels = target["boxes"].double().numpy(), target["labels"].numpy()
    points, strides = predictions.points.double().numpy(), predictions.strides.double().numpy()
    predicted = predictions.boxes[image].detach().double().numpy()[:, None]  # (A, 1, 4)
    z = predictions.logits[image].detach().double().numpy()[:, labels]  # (A, G)
    left, top, right, bottom = np.moveaxis(predicted, -1, 0)
    x1, y1, x2, y2 = boxes.T
    with np.errstate(all="ignore"):
        width = np.clip(np.minimum(right, x2) - np.maximum(left, x1), 0, None)
        height = np.clip(np.minimum(bottom, y2) - np.maximum(top, y1), 0, None)
        own = np.clip(right - left, 0, None) * np.clip(bottom - top, 0, None)
        overlap = width * height / (own + (x2 - x1) * (y2 - y1) - width * height)
        metric = (1 / (1 + np.exp(-z))) ** assigner.alpha * overlap**assigner.beta
    x, y = points[:, :1], points[:, 1:]
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    reach = assigner.center_radius * strides[:, None]
    near = (abs(x - (x1 + x2) / 2) < reach) & (abs(y - (y1 + y2) / 2) < reach)
    return metric, inside & near, np.isfinite(z) & np.isfinite(predicted).all(axis=-1)


def greatest_sum(metric: Floats) -> float:
    """Over all partial one-to-one matchings of ``(A, G)``: point by point, for every set of boxes matched so far."""
    boxes = metric.shape[1]
    best = {0: 0.0}
    for row in metric[(metric > 0).any(axis=1)]:
        for done, total in list(best.items()):
            for g in range(boxes):
                if not done >> g & 1 and row[g] > 0:
                    with_g = done | 1 << g
                    best[with_g] = max(best.get(with_g, 0.0), total + row[g])
    return max(best.values())


def greedy_sum(metric: Floats) -> float:
    """All pairs, best first, each if box and point are both free."""
    free, total = metric.copy(), 0.0
    while free.max(initial=0) > 0:
        p, g = np.unravel_index(free.argmax(), free.shape)
        total += free[p, g]
        free[p], free[:, g] = 0, 0
    return total


def pairs_of(assignment: Assignment, image: int) -> tuple[Ints, Ints, Masks]:
    """Point, target and fallback flag of the pairs of one image."""
    own = assignment.image == image
    return assignment.point[own].numpy(), assignment.target[own].numpy(), assignment.fallback[own].numpy()


def check(
    assigner: TaskAwareOneToOneAssigner,
    scene: tuple[DensePredictions, list[Target]],
    expected_sum: Callable[[Floats], float],
) -> None:
    """Everything an assignment promises; ``expected_sum`` takes the feasible metrics ``(A, G)`` of an image."""
    predictions, targets = scene
    assignment = assigner(predictions, targets)
    a = len(predictions.points)
    assert assignment.unmatched == sum(max(0, len(target["boxes"]) - a) for target in targets)
    order = [(int(i), int(t)) for i, t in zip(assignment.image, assignment.target, strict=True)]
    assert order == sorted(set(order))  # by image, then by target, each box once
    assert (assignment.metric[assignment.fallback] == 0).all()
    non_finite = 0
    for i, target in enumerate(targets):
        point, box, fallback = pairs_of(assignment, i)
        assert len(np.unique(point)) == len(point) == min(len(target["boxes"]), a)
        metric, prior, finite = oracle(predictions, target, i, assigner)
        non_finite += (prior & ~finite).sum()
        assert (prior & finite)[point, box][~fallback].all()
        value = assignment.metric[assignment.image == i].numpy()
        np.testing.assert_allclose(value[~fallback], metric[point, box][~fallback], rtol=1e-4, atol=1e-6)
        feasible = np.where(prior & finite, metric, 0)
        assert value.sum() == pytest.approx(expected_sum(feasible), rel=1e-5, abs=1e-5)
        unused = np.setdiff1d(np.arange(a), point)
        center = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2).double().numpy()
        for p, g in zip(point[fallback], box[fallback], strict=True):
            assert not (prior & finite)[unused, g].any()
            distance = ((predictions.points.double().numpy() - center[g]) ** 2).sum(axis=1)
            assert (distance[p] <= distance[unused]).all()
            assert (unused[distance[unused] == distance[p]] > p).all()
    assert assignment.non_finite == non_finite


@settings(max_examples=150)
@given(scenes())
def test_the_exact_assignment_is_the_best_of_all_and_keeps_every_promise(scene):
    check(ASSIGNERS[0], scene.build(), greatest_sum)


@given(scenes(), st.sampled_from([0.0, 0.5, 3.0]))
def test_other_exponents_and_radii_keep_every_promise(scene, radius):
    check(TaskAwareOneToOneAssigner(1.0, 2.0, radius), scene.build(), greatest_sum)
    check(TaskAwareOneToOneAssigner(0.0, 1.0, radius), scene.build(), greatest_sum)
    check(TaskAwareOneToOneAssigner(0.5, 0.0, radius), scene.build(), greatest_sum)


@given(scenes())
def test_the_greedy_assignment_is_what_sorting_all_pairs_gives(scene):
    check(TaskAwareOneToOneAssigner(solver="greedy"), scene.build(), greedy_sum)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [60, 300])
def test_a_crowd_is_matched_as_scipy_matches_the_full_matrix(kind, count):
    def scipy_sum(metric):
        row, column = linear_sum_assignment(metric, maximize=True)
        return metric[row, column].sum()

    targets = random_targets([count], kind=kind, size=256, seed=count)
    predictions = random_predictions(targets, grid(256, (8, 16, 32)), seed=count)
    check(ASSIGNERS[0], (predictions, targets), scipy_sum)


def test_a_box_at_point_0_keeps_it_when_a_rival_wants_it_too():
    """The place where a padded candidate list would collide with a real candidate."""
    levels = [GridLevel(4, 4, 8.0, (8.0, 8.0), (4.0, 4.0))]
    box = torch.tensor([[0.0, 0, 8, 8]])
    predictions = DensePredictions.on_grid(torch.zeros(1, 16, 1), box.expand(1, 16, 4).clone(), levels)
    target = Target(boxes=box.repeat(2, 1), labels=torch.zeros(2, dtype=torch.int64))
    assignment = ASSIGNERS[0](predictions, [target])
    assert assignment.point.tolist() == [0, 1]
    assert assignment.fallback.tolist() == [False, True]


def test_boxes_beyond_the_number_of_points_are_counted_as_unmatched():
    targets = random_targets([30, 3], size=32)
    assignment = ASSIGNERS[0](random_predictions(targets, grid(32, (8, 16))), targets)
    assert (len(assignment), assignment.unmatched) == (23, 10)
    assert sorted(pairs_of(assignment, 0)[0].tolist()) == list(range(20))


def test_a_box_without_a_point_takes_the_nearest_one():
    levels = [GridLevel(2, 2, 8.0, (8.0, 8.0), (4.0, 4.0))]  # points at 4 and 12
    predictions = DensePredictions.on_grid(torch.zeros(1, 4, 1), torch.ones(1, 4, 4), levels)
    boxes = torch.tensor([[9.0, 1, 10, 2], [6, 5, 7, 6], [99, 99, 100, 100]])
    assignment = ASSIGNERS[0](predictions, [Target(boxes=boxes, labels=torch.zeros(3, dtype=torch.int64))])
    assert assignment.point.tolist() == [1, 0, 3]
    assert assignment.fallback.all()


# --- what must not matter ---------------------------------------------------------------------------------------------


def named(assignment: Assignment, target: Target, image: int = 0) -> list[tuple[Any, ...]]:
    """Pairs of an image by the box's coordinates and label, so that equal boxes may change places."""
    point, box, fallback = pairs_of(assignment, image)
    boxes, labels = target["boxes"][box].tolist(), target["labels"][box].tolist()
    return sorted(zip(boxes, labels, point.tolist(), fallback.tolist(), strict=True))


@pytest.mark.parametrize("assigner", ASSIGNERS)
@settings(max_examples=25)
@given(scene=scenes(most=12))
def test_neither_the_other_images_nor_the_grids_nor_the_order_of_boxes_matter(assigner, scene):
    predictions, targets = scene.build()
    together = assigner(predictions, targets)
    bare = assigner(replace(predictions, levels=None), targets)
    assert (len(bare), bare.unmatched, bare.non_finite) == (len(together), together.unmatched, together.non_finite)
    torch.testing.assert_close(bare.metric.sum(), together.metric.sum(), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(scene.seed)
    for i, target in enumerate(targets):
        order = torch.from_numpy(rng.permutation(len(target["boxes"])))
        shuffled = Target(boxes=target["boxes"][order], labels=target["labels"][order])
        single = replace(predictions, logits=predictions.logits[i : i + 1], boxes=predictions.boxes[i : i + 1])
        expected = named(together, target, i)
        assert named(bare, target, i) == expected
        assert named(assigner(single, [target]), target) == expected
        assert named(assigner(single, [shuffled]), shuffled) == expected


def test_equal_images_of_a_batch_get_equal_assignments_and_ties_go_to_the_lower_point():
    """Vectorised arithmetic may round the last elements of a tensor in another way than the others."""
    levels, rng = grid(512, (8, 16, 32, 64, 128)), np.random.default_rng(0)
    target = Target(boxes=torch.tensor([[3.0, 3, 240, 240]]), labels=torch.tensor([0]))
    a = sum(map(len, levels))
    for z, noise in zip(rng.normal(0, 1, 150).tolist(), rng.normal(0, 20, (150, 4)), strict=True):
        boxes = (target["boxes"] + torch.from_numpy(noise)).float()  # every point predicts the same
        predictions = DensePredictions.on_grid(torch.full((3, a, 1), z), boxes.expand(3, a, 4), levels)
        assert ASSIGNERS[0](predictions, [target] * 3).point.tolist() == [14 * 64 + 14] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_the_dtype_of_the_predictions_does_not_matter(kind, assigner):
    targets = random_targets([9, 0, 5], kind=kind, seed=3)
    predictions = random_predictions(targets, GRIDS[1], seed=3)
    logits = (predictions.logits * 8).round().clamp(-32, 32) / 8  # every format holds these
    boxes = predictions.boxes.round().clamp(-128, 128)
    results = [
        assigner(replace(predictions, logits=logits.to(dtype), boxes=boxes.to(dtype)), targets)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ]
    for result in results[1:]:
        for name in ("image", "point", "target", "metric", "fallback"):
            assert torch.equal(getattr(result, name), getattr(results[0], name))


# --- a single box -----------------------------------------------------------------------------------------------------


@given(scene=scenes(most=1), gain=st.floats(0.1, 20))
def test_raising_the_logit_of_the_winner_keeps_it_the_winner(scene, gain):
    predictions, targets = scene.build()
    for assigner in ASSIGNERS:
        before = assigner(predictions, targets)
        logits = predictions.logits.clone()
        for i, p, t in zip(before.image, before.point, before.target, strict=True):
            logits[i, p, targets[i]["labels"][t]] += gain
        assert torch.equal(assigner(replace(predictions, logits=logits), targets).point, before.point)


@pytest.mark.parametrize("seed", range(20))
def test_for_a_single_box_only_the_ratio_of_the_exponents_matters(seed):
    targets = random_targets([1], seed=seed)
    predictions = random_predictions(targets, GRIDS[1], seed=seed)
    for alpha, beta in [(0.2, 0.8), (1, 0.5), (0.5, 3)]:
        winners = {int(TaskAwareOneToOneAssigner(alpha * k, beta * k)(predictions, targets).point) for k in (0.5, 1, 2)}
        assert len(winners) == 1


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("levels", GRIDS)
def test_ties_go_to_the_lower_point(assigner, levels):
    target = Target(boxes=torch.tensor([[3.0, 3, 60, 50]]), labels=torch.tensor([0]))
    a = sum(map(len, levels))
    same = DensePredictions.on_grid(torch.zeros(1, a, 1), target["boxes"].expand(1, a, 4), levels)
    _, prior, _ = oracle(same, target, 0, assigner)
    assert assigner(same, [target]).point.tolist() == [int(prior.argmax())]


def test_points_inside_the_prior_win_over_nearer_ones_outside_even_without_any_overlap():
    levels = [GridLevel(2, 2, 8.0, (8.0, 8.0), (4.0, 4.0)), GridLevel(1, 1, 16.0, (16.0, 16.0), (1.0, 1.0))]
    predictions = DensePredictions.on_grid(torch.zeros(1, 5, 1), torch.full((1, 5, 4), 99.0), levels)
    target = Target(boxes=torch.tensor([[0.5, 0.5, 2, 2]]), labels=torch.zeros(1, dtype=torch.int64))
    assignment = ASSIGNERS[0](predictions, [target])
    assert (assignment.point.tolist(), assignment.fallback.tolist()) == ([4], [False])


# --- empty, bad and foreign input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [0, 2, 0], [3, 0]])
def test_images_without_boxes_have_no_pairs(counts):
    targets = random_targets(counts)
    assignment = ASSIGNERS[0](random_predictions(targets, GRIDS[1]), targets)
    assert torch.bincount(assignment.image, minlength=len(counts)).tolist() == counts
    for name in ("image", "point", "target"):
        assert getattr(assignment, name).dtype == torch.int64
    assert (assignment.metric.dtype, assignment.fallback.dtype) == (torch.float32, torch.bool)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["logits", "boxes"])
def test_predictions_that_are_not_finite_are_passed_over_and_counted(field, value):
    targets = [Target(boxes=torch.tensor([[4.0, 4, 44, 44]]), labels=torch.tensor([1]))]
    predictions = random_predictions(targets, grid(64, (8,)))
    candidates = oracle(predictions, targets[0], 0, ASSIGNERS[0])[1].nonzero()[0]
    for alive in candidates:
        broken = getattr(predictions, field).clone()
        broken[0, np.setdiff1d(candidates, alive), 1] = value
        assignment = ASSIGNERS[0](replace(predictions, **{field: broken}), targets)
        assert (assignment.point.tolist(), assignment.non_finite) == ([alive], len(candidates) - 1)
        assert not assignment.fallback.any()


BAD_BOXES = [(9, 1, 3, 8), (1, 9, 8, 3), (1, 1, 1, 8), (1, 2, 8, 2), (1, float("nan"), 8, 8), (1, 1, float("inf"), 8)]


@pytest.mark.parametrize("box", BAD_BOXES)
@pytest.mark.parametrize("with_levels", [True, False])
def test_a_bad_box_is_named_with_its_image_and_index(box, with_levels):
    targets = random_targets([2, 0, 4])
    predictions = random_predictions(targets, GRIDS[1])
    targets[2]["boxes"][3] = torch.tensor(box)
    with pytest.raises(TargetError, match=r'x1 < x2 and y1 < y2.*targets\[2\]\["boxes"\]\[3\]'):
        ASSIGNERS[0](predictions if with_levels else replace(predictions, levels=None), targets)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_without_a_channel_is_named_with_its_image_and_index(label):
    targets = random_targets([2, 4])
    targets[1]["labels"][2] = label
    with pytest.raises(TargetError, match=rf'a label in 0…2, but got {label} \(targets\[1\]\["labels"\]\[2\]'):
        ASSIGNERS[0](random_predictions(targets, GRIDS[1]), targets)


@pytest.mark.parametrize("option", ["alpha", "beta", "center_radius"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(OptionError, match=f"Expected {option} of at least 0, but got {value}"):
        TaskAwareOneToOneAssigner(**{option: value})


def test_an_unknown_solver_is_refused():
    with pytest.raises(OptionError, match="'hungarian'"):
        TaskAwareOneToOneAssigner(solver="hungarian")  # type: ignore[arg-type]


def test_presets_have_the_exponents_of_their_papers():
    kind = TaskAwareOneToOneAssigner
    presets = [kind.poto, kind.balanced, kind.task_aligned, kind.yolo]
    assert [(p().alpha, p().beta) for p in presets] == [(0.2, 0.8), (0.5, 0.5), (1.0, 6.0), (0.5, 6.0)]
    assert TaskAwareOneToOneAssigner() == TaskAwareOneToOneAssigner.poto() == TaskAwareOneToOneAssigner(0.2, 0.8, 1.5)
    for preset in presets:
        made = preset(center_radius=3, solver="greedy")
        assert (made.center_radius, made.solver) == (3, "greedy")


def test_no_gradient_flows_and_nothing_is_written():
    targets = random_targets([3, 2])
    predictions = random_predictions(targets, GRIDS[1])
    logits, boxes = predictions.logits.requires_grad_(), predictions.boxes.requires_grad_()
    versions = [x._version for x in (logits, boxes, targets[0]["boxes"])]
    assignment = ASSIGNERS[0](predictions, targets)
    assert len(assignment) == 5
    assert not assignment.metric.requires_grad
    assert [x._version for x in (logits, boxes, targets[0]["boxes"])] == versions
