"""Losses: gradients by finite differences, extremes, and identities with formulas written another way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from crosskd_assign import CrossHeadDistiller, CrossHeadLoss, functional
from crosskd_assign.distributed import normalizer_over_ranks
from crosskd_assign.errors import PredictionError
from tests.makers.builders import assignment_of, random_images, random_targets, tiny_detector

ASSIGNMENT = assignment_of((0, 1, 0), (0, 4, 1), (1, 0, 0))
LABELS = torch.tensor([2, 0, 1])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def boxes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Generic boxes of at least 2 pixels a side, most of which overlap."""
    center, side = 10 * normal(*shape, 2, seed=seed), 2 + 20 * normal(*shape, 2, seed=seed + 100).abs()
    return torch.cat([center - side / 2, center + side / 2], dim=-1).to(dtype)


def one_to_one_classification(logits: Tensor, **options: Any) -> Tensor:
    return functional.one_to_one_classification_loss(logits, ASSIGNMENT, LABELS, **({"normalizer": 3.0} | options))


def cross_classification(logits: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return functional.cross_head_classification_loss(logits, teacher, **({"normalizer": 3.0} | options))


def confidence_like(x: Tensor) -> Tensor:
    return normal(2, 5, seed=9).sigmoid().to(torch.promote_types(x.dtype, torch.float32))


def cross_box(predicted: Tensor, teacher: Tensor) -> Tensor:
    confidence = confidence_like(predicted)
    return functional.cross_head_box_loss(predicted, teacher, confidence, normalizer=3.0)


def cross_quality(quality: Tensor, teacher: Tensor) -> Tensor:
    confidence = confidence_like(quality)
    return functional.cross_head_quality_loss(quality, teacher, confidence, normalizer=3.0)


def imitation(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return functional.feature_imitation_loss([student, student[:, :1]], [teacher, teacher[:, :1]], **options)


def one_to_one_box(predicted: Tensor) -> Tensor:
    return functional.one_to_one_box_loss(predicted, ASSIGNMENT, boxes(3, seed=7), normalizer=3.0)


def metric(logits: Tensor, predicted: Tensor) -> Tensor:
    return functional.task_aware_metric(logits, predicted, boxes(5) + 1, alpha=0.2, beta=0.8)


# Every loss as a function of its student's input, with the shapes of a teacher's input where it has one.
LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Any]] = {
    "one_to_one_classification": (one_to_one_classification, normal(2, 5, 3), None),
    "one_to_one_box": (one_to_one_box, boxes(2, 5), None),
    "cross_classification": (cross_classification, normal(2, 5, 3), normal(2, 5, 3, seed=1)),
    "cross_classification_gamma_0": (partial(cross_classification, gamma=0), normal(2, 5, 3), normal(2, 5, 3, seed=1)),
    "cross_classification_gamma_2": (partial(cross_classification, gamma=2), normal(2, 5, 3), normal(2, 5, 3, seed=1)),
    "cross_box": (cross_box, boxes(2, 5), boxes(2, 5, seed=1)),
    "cross_quality": (cross_quality, normal(2, 5), normal(2, 5, seed=1)),
    "feature_imitation": (imitation, normal(2, 3, 4, 5), 3 * normal(2, 3, 4, 5, seed=1) - 1),
    "align_statistics": (functional.align_statistics, normal(2, 3, 4, 5), 3 * normal(2, 3, 2, 6, seed=1) - 1),
}
WITH_TEACHER = [name for name, (_, _, teacher) in LOSSES.items() if teacher is not None]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    function, x, teacher = LOSSES[name]
    inputs = (x.clone().requires_grad_(),) if teacher is None else (x.clone().requires_grad_(), teacher)
    assert torch.autograd.gradcheck(function, inputs)


def test_metric_and_confidence_have_the_gradients_of_finite_differences():
    assert torch.autograd.gradcheck(metric, (normal(5).requires_grad_(), boxes(5).requires_grad_()))
    assert torch.autograd.gradcheck(functional.teacher_confidence, normal(2, 5, 3).requires_grad_())


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_flows_into_the_teacher(name):
    function, x, teacher = LOSSES[name]
    student, teacher = x.clone().requires_grad_(), teacher.clone().requires_grad_()
    found = torch.autograd.grad(function(student, teacher).sum(), (student, teacher), allow_unused=True)
    assert found[0].abs().sum() > 0
    assert found[1] is None


def test_no_gradient_flows_into_the_confidence_or_the_normalizer():
    logits = normal(2, 5, 3).requires_grad_()
    confidence = functional.teacher_confidence(logits)
    assert not functional.distillation_normalizer(confidence).requires_grad
    quality = normal(2, 5).requires_grad_()
    for loss in (
        functional.cross_head_quality_loss(quality, normal(2, 5, seed=1), confidence, normalizer=1),
        functional.cross_head_box_loss(boxes(2, 5).requires_grad_(), boxes(2, 5), confidence, normalizer=1),
    ):
        assert torch.autograd.grad(loss, logits, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_and_losses_are_float32(name, dtype):
    function, x, teacher = LOSSES[name]
    inputs = [x.to(dtype)] if teacher is None else [x.to(dtype), teacher.to(dtype)]
    outside = function(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = function(*inputs)
    assert inside.dtype == outside.dtype == (dtype if name == "align_statistics" else torch.float32)
    assert torch.equal(inside, outside)
    rtol = 1e-2 if name == "align_statistics" else 1e-5  # its result is in half precision; the others' never is
    torch.testing.assert_close(outside.double(), function(*(i.double() for i in inputs)), rtol=rtol, atol=rtol)


# --- extremes ---------------------------------------------------------------------------------------------------------

EXTREMES = torch.tensor([-100.0, -50, 0, 50, 100])
GAMMAS = [0, 0.5, 1, 1.5, 2, 5]


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def check_finite(loss: Tensor, x: Tensor) -> None:
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert gradient(loss, x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_logits_give_finite_focal_losses_and_gradients(dtype, gamma):
    x = EXTREMES.to(dtype).view(1, 5, 1).requires_grad_()
    for pairs in [(), ((0, 0, 0), (0, 2, 1), (0, 4, 2))]:
        labels = torch.zeros(len(pairs), dtype=torch.int64)
        check_finite(
            functional.one_to_one_classification_loss(x, assignment_of(*pairs), labels, normalizer=1.0, gamma=gamma), x
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0, 1, 1.5, 2])
def test_extreme_logits_give_finite_distillation_losses_and_gradients(dtype, gamma):
    x, teacher = (m[None].to(dtype) for m in torch.meshgrid(EXTREMES, EXTREMES, indexing="ij"))  # (1, 5, 5), all pairs
    student = x.clone().requires_grad_()
    check_finite(functional.cross_head_classification_loss(student, teacher, normalizer=1.0, gamma=gamma), student)
    quality = x.clone().requires_grad_()
    confidence = functional.teacher_confidence(teacher[..., None])
    check_finite(functional.cross_head_quality_loss(quality, teacher, confidence, normalizer=1.0), quality)


def test_a_loss_scale_beyond_float16_leaves_float16_gradients_finite():
    """GradScaler starts at 2¹⁶ and doubles; the gradient itself is far from float16's limit of 65504."""
    x = torch.full((1, 5, 3), -2.0, dtype=torch.float16, requires_grad=True)
    focal = functional.one_to_one_classification_loss(x, assignment_of(), torch.zeros(0).long(), normalizer=1.0)
    distillation = functional.cross_head_classification_loss(x, torch.full_like(x, -3), normalizer=1.0)
    for loss in (focal, distillation):
        scaled, plain = gradient(loss * 2**17, x), gradient(loss, x)
        assert scaled.isfinite().all()
        torch.testing.assert_close(scaled.float(), plain.float() * 2**17, rtol=1e-2, atol=0)


# --- one-to-one losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.9])
@pytest.mark.parametrize("gamma", [0, 1, 2])
def test_classification_equals_focal_loss_with_a_dense_target(alpha, gamma):
    z = 4 * normal(2, 5, 3)
    target = torch.zeros(2, 5, 3, dtype=torch.float64)
    target[ASSIGNMENT.image, ASSIGNMENT.point, LABELS] = 1
    p, t = 1 / (1 + np.exp(-z.numpy())), target.numpy()
    positive = -alpha * (1 - p) ** gamma * np.log(p)
    negative = -(1 - alpha) * p**gamma * np.log(1 - p)
    by_hand = (t * positive + (1 - t) * negative).sum()
    loss = one_to_one_classification(z, normalizer=1.0, alpha=alpha, gamma=gamma)
    assert float(loss) == pytest.approx(by_hand)
    assert float(loss) == pytest.approx(float(sigmoid_focal_loss(z, target, alpha, gamma, "sum")))
    half = one_to_one_classification(z, normalizer=torch.tensor(2.0), alpha=alpha, gamma=gamma)
    assert float(half) == pytest.approx(by_hand / 2)


def test_large_and_strided_logits_give_the_loss_and_gradient_of_small_ones():
    """Dense sums may walk through memory in pieces; neither the pieces nor the layout may show."""
    z = normal(3, 4, 50_000).transpose(1, 2).requires_grad_()  # (3, 50000, 4), not contiguous
    dense = torch.zeros_like(z).detach()
    dense[ASSIGNMENT.image, ASSIGNMENT.point, LABELS] = 1
    loss, expected = one_to_one_classification(z), sigmoid_focal_loss(z, dense, 0.25, 2.0, "sum") / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, z), gradient(expected, z))
    q = normal(4, 50_000, 3, seed=1).permute(2, 1, 0).sigmoid()
    loss = cross_classification(z, q.logit())
    expected = ((z.sigmoid() - q).abs() * F.binary_cross_entropy_with_logits(z, q, reduction="none")).sum() / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, z), gradient(expected, z))


def test_box_loss_equals_torchvision():
    predicted, truth = boxes(2, 5), boxes(3, seed=7)
    matched = predicted[ASSIGNMENT.image, ASSIGNMENT.point]
    expected = generalized_box_iou_loss(matched, truth, reduction="sum") / 3
    torch.testing.assert_close(one_to_one_box(predicted), expected)


def test_an_empty_assignment_gives_a_zero_box_loss_with_a_graph_even_beside_nan():
    predicted = torch.full((2, 5, 4), float("nan"), requires_grad=True)
    loss = functional.one_to_one_box_loss(predicted, assignment_of(), torch.zeros(0, 4), normalizer=1.0)
    assert loss.item() == 0
    assert not gradient(loss, predicted).any()


def test_boxes_that_nothing_is_matched_with_have_no_influence_even_if_nan():
    predicted = boxes(2, 5)
    expected = one_to_one_box(predicted)
    unmatched = torch.ones(2, 5, dtype=torch.bool)
    unmatched[ASSIGNMENT.image, ASSIGNMENT.point] = False
    predicted[unmatched] = float("nan")
    predicted.requires_grad_()
    loss = one_to_one_box(predicted)
    assert loss.item() == expected.item()
    assert not gradient(loss, predicted)[unmatched].any()


def test_an_empty_assignment_makes_everything_background():
    z = normal(2, 5, 3).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = functional.one_to_one_classification_loss(z, assignment_of(), none, normalizer=1.0)
    torch.testing.assert_close(loss, sigmoid_focal_loss(z, torch.zeros_like(z), 0.25, 2.0, "sum"))
    assert (gradient(loss, z) > 0).all()


# --- distillation losses ----------------------------------------------------------------------------------------------


def test_classification_distillation_with_gamma_0_is_binary_cross_entropy():
    z, t = normal(2, 5, 3), normal(2, 5, 3, seed=1)
    expected = F.binary_cross_entropy_with_logits(z, t.sigmoid(), reduction="sum") / 3
    torch.testing.assert_close(cross_classification(z, t, gamma=0), expected)


@pytest.mark.parametrize("gamma", [1, 2])
def test_classification_distillation_weighs_cross_entropy_by_the_distance(gamma):
    z, t = normal(2, 5, 3).numpy(), normal(2, 5, 3, seed=1).numpy()
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-t))
    expected = (abs(p - q) ** gamma * -(q * np.log(p) + (1 - q) * np.log(1 - p))).sum() / 3
    loss = cross_classification(torch.from_numpy(z), torch.from_numpy(t), gamma=gamma)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [1, 1.5, 2])
def test_a_student_that_agrees_has_zero_loss_and_zero_gradient(gamma):
    z = (3 * normal(2, 5, 3)).float().requires_grad_()
    loss = cross_classification(z, z.detach(), gamma=gamma)
    assert loss.item() == 0
    assert not gradient(loss, z).any()


def test_agreeing_boxes_cost_nothing_and_agreeing_quality_has_no_gradient():
    assert float(cross_box(boxes(2, 5), boxes(2, 5))) == pytest.approx(0, abs=1e-6)
    quality = normal(2, 5).requires_grad_()
    assert gradient(cross_quality(quality, quality.detach()), quality).abs().max() < 1e-12


def test_box_and_quality_losses_are_weighted_by_confidence():
    a, b, w = boxes(2, 5), boxes(2, 5, seed=1), normal(2, 5, seed=9).sigmoid()
    expected = (w * generalized_box_iou_loss(a, b)).sum() / 3
    torch.testing.assert_close(cross_box(a, b), expected)
    z, t = normal(2, 5), normal(2, 5, seed=1)
    expected = (w * F.binary_cross_entropy_with_logits(z, t.sigmoid(), reduction="none")).sum() / 3
    torch.testing.assert_close(cross_quality(z, t), expected)


def test_confidence_is_the_best_class_score():
    logits = torch.tensor([[[-2.0, 0, -9], [3, -1, 2]]])
    torch.testing.assert_close(functional.teacher_confidence(logits), torch.tensor([[0.0, 3]]).sigmoid())
    assert functional.teacher_confidence(logits.bfloat16()).dtype == torch.float32


def test_the_normalizer_sums_what_lies_above_the_threshold_and_is_at_least_1():
    confidence = torch.tensor([[0.5, 0.75, 0.25], [0.9, 0.05, 0.04]])
    for threshold, expected in [(0.05, 2.4), (0.5, 1.65), (0.89, 1), (0.95, 1), (0.0, 2.49)]:
        assert float(functional.distillation_normalizer(confidence, threshold)) == pytest.approx(expected)
    assert float(functional.distillation_normalizer(confidence)) == pytest.approx(2.4)


def test_the_normalizer_does_not_depend_on_the_assignment_of_the_student():
    distiller = CrossHeadDistiller(tiny_detector(0), tiny_detector(1), loss=CrossHeadLoss(quality=1.0))
    images = random_images(2)
    few, many = (distiller(images, random_targets(counts)) for counts in ([0, 0], [9, 30]))
    names = [name for name in few if name.startswith("distill")]
    assert len(names) == 3
    for name in names:
        assert torch.equal(few[name], many[name])


def test_the_normalizer_of_a_single_process_is_the_value_or_one_without_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    for factor, expected in ((2, 6.0), (0.1, 1.0)):
        normalizer = normalizer_over_ranks(factor * value)
        assert (float(normalizer), normalizer.requires_grad) == (expected, False)


# --- imitation of features --------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.floats(-20, 20))
def test_feature_imitation_is_one_minus_the_correlation_of_numpy(seed, gain, offset):
    student, teacher = normal(2, 3, 4, 5, seed=seed), normal(2, 3, 4, 5, seed=seed + 1)
    channels = zip(*(x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher)), strict=True)
    expected = np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in channels])
    found = functional.feature_imitation_loss([student], [teacher], eps=0)
    assert float(found) == pytest.approx(expected, abs=1e-9)
    changed = student * torch.tensor(gain, dtype=student.dtype)[:, None, None] + offset
    assert float(functional.feature_imitation_loss([changed], [teacher], eps=0)) == pytest.approx(expected, abs=1e-6)
    three = functional.feature_imitation_loss([student, teacher, teacher], [teacher, -teacher, student], eps=0)
    assert float(three) == pytest.approx(2 * expected + 2, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 3, 3)])
def test_feature_imitation_of_constant_maps_is_finite_and_has_finite_gradients(shape):
    student, teacher = torch.full(shape, 3.0, requires_grad=True), torch.full(shape, -1.0)
    loss = functional.feature_imitation_loss([student], [teacher])
    assert float(loss.detach()) == 0
    assert gradient(loss, student).isfinite().all()


# --- alignment of statistics ------------------------------------------------------------------------------------------


def test_aligned_maps_have_the_mean_and_deviation_of_the_teacher():
    student, teacher = 5 * normal(2, 3, 8, 8) + 7, 0.3 * normal(4, 3, 5, 9, seed=1) - 2
    aligned = functional.align_statistics(student, teacher)
    for c in range(3):
        assert float(aligned[:, c].mean()) == pytest.approx(float(teacher[:, c].mean()), rel=1e-6)
        assert float(aligned[:, c].std(correction=0)) == pytest.approx(float(teacher[:, c].std(correction=0)), rel=1e-3)
    correlation = torch.corrcoef(torch.stack([aligned[:, 0].flatten(), student[:, 0].flatten()]))
    assert float(correlation[0, 1]) == pytest.approx(1)


def test_aligning_a_map_with_itself_changes_nothing():
    x = normal(2, 3, 4, 4)
    torch.testing.assert_close(functional.align_statistics(x, x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0, 1e-8, 1e-3])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 2), (2, 4, 3, 3)])
def test_maps_without_spread_stay_finite_with_finite_gradients(dtype, spread, shape):
    student = (1 + spread * normal(*shape)).to(dtype).requires_grad_()
    teacher = normal(*shape, seed=1, dtype=dtype)
    aligned = functional.align_statistics(student, teacher)
    assert aligned.dtype == dtype
    assert aligned.isfinite().all()
    assert gradient(aligned.float().square().sum(), student).isfinite().all()
    if shape[2:] == (1, 1):
        torch.testing.assert_close(aligned, teacher)


def test_a_dead_channel_takes_the_teachers_mean_and_leaves_the_others_alone():
    student, teacher = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    student[:, 1] = 4.0
    aligned = functional.align_statistics(student, teacher)
    torch.testing.assert_close(aligned[:, 1], teacher[:, 1].mean().expand(2, 4, 4))
    alone = functional.align_statistics(student[:, ::2], teacher[:, ::2])
    torch.testing.assert_close(aligned[:, ::2], alone)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 1), (1, 5, 3), (2, 5, 4)])
def test_teacher_logits_of_another_shape_are_refused(shape):
    """Also those with as many elements, which would be compared in the wrong order."""
    with pytest.raises(PredictionError, match=rf"\(2, 5, 3\) on cpu, but got \({', '.join(map(str, shape))}\) on cpu"):
        functional.cross_head_classification_loss(normal(2, 5, 3), normal(*shape), normalizer=1.0)
