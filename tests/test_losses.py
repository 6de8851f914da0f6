"""The families of losses: their terms against dense formulas, their options, and a user's own in their place."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from crosskd_assign import (
    CrossHeadDistiller,
    CrossHeadLoss,
    DensePredictions,
    EndToEndDetector,
    OneToOneLoss,
    TaskAwareOneToOneAssigner,
    functional,
)
from crosskd_assign.errors import IncompatibleDetectorsError, OptionError
from crosskd_assign.losses import box_index, matched_targets
from crosskd_assign.structures import Assignment, Target
from tests.makers.builders import (
    assignment_of,
    grid,
    random_images,
    random_predictions,
    random_targets,
    tiny_detector,
)
from tests.makers.small_models import total

LEVELS = grid(64, (16, 32))
WEIGHTS = st.sampled_from([0.25, 1.0, 3.0])


def drawn(seed: int, counts: tuple[int, ...] = (3, 0, 2)) -> tuple[DensePredictions, list[Target], Assignment]:
    targets = random_targets(counts, seed=seed)
    predictions = random_predictions(targets, LEVELS, seed=seed)
    low, high = predictions.boxes[..., :2], predictions.boxes[..., 2:]  # some are inverted, which torchvision forbids
    predictions = replace(predictions, boxes=torch.cat([torch.minimum(low, high), torch.maximum(low, high)], dim=-1))
    return predictions, targets, TaskAwareOneToOneAssigner()(predictions, targets)


def both_heads(seed: int) -> tuple[DensePredictions, DensePredictions]:
    """What two heads with all branches predict."""
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(2):
        bins = torch.randn(2, 20, 4, 5, generator=generator)
        logits, quality = torch.randn(2, 20, 3, generator=generator) - 2, torch.randn(2, 20, generator=generator)
        heads.append(DensePredictions.from_bins(logits, bins, LEVELS, quality=quality))
    return heads[0], heads[1]


# --- one-to-one -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), WEIGHTS, WEIGHTS, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.5]))
def test_one_to_one_terms_are_torchvisions_losses_on_dense_targets(seed, classification, box, alpha, gamma):
    predictions, targets, assignment = drawn(seed)
    dense, predicted, wanted = torch.zeros_like(predictions.logits), [], []
    pairs = torch.stack([assignment.image, assignment.point, assignment.target], dim=1)
    for image, point, g in pairs.tolist():
        dense[image, point, targets[image]["labels"][g]] = 1
        predicted.append(predictions.boxes[image, point])
        wanted.append(targets[image]["boxes"][g])
    overlap = generalized_box_iou_loss(torch.stack(predicted), torch.stack(wanted), reduction="sum")
    focal = sigmoid_focal_loss(predictions.logits, dense, alpha=alpha, gamma=gamma, reduction="sum")
    losses = OneToOneLoss(classification, box, focal_alpha=alpha, focal_gamma=gamma)(predictions, targets, assignment)
    assert list(losses) == ["classification", "bbox_regression"]
    torch.testing.assert_close(losses["classification"], classification * focal / 5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["bbox_regression"], box * overlap / 5, atol=1e-4, rtol=1e-4)


def test_one_to_one_terms_are_the_functions_of_the_library():
    predictions, targets, assignment = drawn(1)
    labels, boxes = matched_targets(assignment, targets)
    losses = OneToOneLoss(0.5, 3.0, 0.1, 0.4, 1.5)(predictions, targets, assignment)
    n = float(len(assignment))
    focal = functional.one_to_one_classification_loss(
        predictions.logits, assignment, labels, normalizer=n, alpha=0.4, gamma=1.5
    )
    giou = functional.one_to_one_box_loss(predictions.boxes, assignment, boxes, normalizer=n)
    ranking = functional.one_to_one_ranking_loss(
        predictions.logits, predictions.boxes, assignment, labels, boxes, normalizer=n
    )
    expected = {"classification": 0.5 * focal, "bbox_regression": 3 * giou, "ranking": 0.1 * ranking}
    torch.testing.assert_close(losses, expected)


def test_a_batch_without_boxes_is_divided_by_one_and_has_a_gradient():
    predictions, targets, assignment = drawn(0, counts=(0, 0))
    predictions.logits.requires_grad_()
    predictions.boxes.requires_grad_()
    losses = OneToOneLoss(ranking=1.0)(predictions, targets, assignment)
    background = sigmoid_focal_loss(predictions.logits, torch.zeros_like(predictions.logits), reduction="sum")
    torch.testing.assert_close(losses["classification"], background)
    assert losses["bbox_regression"] == losses["ranking"] == 0
    total(losses).backward()
    assert predictions.logits.grad.any()
    assert not predictions.boxes.grad.any()


def test_matched_targets_number_boxes_through_the_batch():
    targets = random_targets((2, 0, 3))
    assignment = assignment_of((0, 7, 1), (2, 0, 0), (2, 5, 2))
    assert box_index(assignment, targets).tolist() == [1, 2, 4]
    labels, boxes = matched_targets(assignment, targets)
    assert torch.equal(boxes, torch.stack([targets[0]["boxes"][1], targets[2]["boxes"][0], targets[2]["boxes"][2]]))
    assert labels.tolist() == [int(targets[i]["labels"][g]) for i, g in ((0, 1), (2, 0), (2, 2))]


# --- cross-head -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), WEIGHTS, st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 0.05, 0.5]))
def test_cross_head_terms_are_their_formulas_on_every_point(seed, weight, gamma, threshold):
    cross, teacher = both_heads(seed)
    probability, soft = cross.logits.sigmoid(), teacher.logits.sigmoid()
    w = soft.amax(dim=-1)
    n = max(1.0, float(w[w > threshold].sum()))
    entropy = F.binary_cross_entropy(probability, soft, reduction="none")
    giou = generalized_box_iou_loss(cross.boxes.flatten(0, 1), teacher.boxes.flatten(0, 1))
    quality = F.binary_cross_entropy(cross.quality.sigmoid(), teacher.quality.sigmoid(), reduction="none")
    p, q = teacher.distribution.softmax(dim=-1), cross.distribution.softmax(dim=-1)
    divergence = (p * (p / q).log()).sum(dim=-1).mean(dim=-1)
    expected = {
        "classification": ((probability - soft).abs() ** gamma * entropy).sum(),
        "bbox_regression": (w.flatten() * giou).sum(),
        "quality": (w * quality).sum(),
        "distribution": (w * divergence).sum(),
    }
    loss = CrossHeadLoss(weight, weight, weight, weight, gamma, threshold)
    losses = loss(cross, teacher)
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], weight * value / n, atol=1e-4, rtol=1e-4)


def test_cross_head_terms_are_the_functions_of_the_library_and_a_weight_of_zero_leaves_one_out():
    cross, teacher = both_heads(3)
    w = functional.teacher_confidence(teacher.logits)
    n = functional.distillation_normalizer(w, 0.1)
    expected = {
        "classification": functional.cross_head_classification_loss(
            cross.logits, teacher.logits, normalizer=n, gamma=2.0
        ),
        "bbox_regression": functional.cross_head_box_loss(cross.boxes, teacher.boxes, w, normalizer=n),
        "quality": functional.cross_head_quality_loss(cross.quality, teacher.quality, w, normalizer=n),
        "distribution": functional.cross_head_distribution_loss(
            cross.distribution, teacher.distribution, w, normalizer=n
        ),
    }
    fields = dict(zip(("classification", "box", "quality", "distribution"), expected, strict=True))
    for field, name in fields.items():
        weights = {other: 0.5 * (other != field) for other in fields}
        losses = CrossHeadLoss(**weights, gamma=2.0, confidence_threshold=0.1)(cross, teacher)
        torch.testing.assert_close(losses, {key: 0.5 * expected[key] for key in expected if key != name})


def test_branches_are_those_of_the_weighted_terms():
    assert CrossHeadLoss().branches == frozenset()
    assert CrossHeadLoss(quality=0.1).branches == {"quality"}
    assert CrossHeadLoss(distribution=2.0).branches == {"distribution"}
    assert CrossHeadLoss(0, 0, 1, 1).branches == {"quality", "distribution"}


@pytest.mark.parametrize("branch", ["quality", "distribution"])
@pytest.mark.parametrize("side", ["cross", "teacher"])
def test_a_weighted_branch_that_one_of_the_two_lacks_is_refused_by_name(branch, side):
    heads = dict(zip(("cross", "teacher"), both_heads(0), strict=True))
    heads[side] = replace(heads[side], **{branch: None})
    with pytest.raises(IncompatibleDetectorsError, match=rf"heads that predict {branch}.*CrossHeadLoss\({branch}="):
        CrossHeadLoss(**{branch: 1.0})(**heads)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [OneToOneLoss(), CrossHeadLoss()], ids=["one-to-one", "cross-head"])
def test_losses_are_frozen_compare_by_value_and_say_their_weights(loss):
    for field in dataclasses.fields(loss):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loss, field.name, 0.5)
    assert loss == type(loss)()
    assert len({loss, type(loss)(), replace(loss, box=7.0)}) == 2
    assert "box=7.0" in repr(replace(loss, box=7.0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((OneToOneLoss, {name: -0.1}) for name in ("classification", "box", "ranking", "focal_gamma", "focal_alpha")),
        (OneToOneLoss, {"focal_alpha": 1.1}),
        (OneToOneLoss, {"box": float("nan")}),
        *((CrossHeadLoss, {name: -0.1}) for name in ("classification", "box", "quality", "distribution", "gamma")),
        (CrossHeadLoss, {"gamma": 0.5}),
        (CrossHeadLoss, {"confidence_threshold": 1.5}),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_by_name(kind, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        kind(**options)


# --- a user's own -----------------------------------------------------------------------------------------------------


def test_any_callable_of_predictions_targets_and_assignment_is_a_detectors_loss():
    seen: list[Any] = []

    def pull(predictions: DensePredictions, targets: list[Target], assignment: Assignment) -> dict[str, Tensor]:
        seen.append((predictions, targets, assignment))
        return {"mine": predictions.logits.square().mean(), "boxes": predictions.boxes.square().mean()}

    targets = random_targets((2, 1))
    detector = EndToEndDetector(tiny_detector(), loss=pull).train()
    losses = detector(random_images(), targets)
    assert set(losses) == {"mine", "boxes"}
    ((predictions, given_targets, assignment),) = seen
    torch.testing.assert_close(losses["mine"], predictions.logits.square().mean())
    assert len(assignment) == 3
    assert [len(target["boxes"]) for target in given_targets] == [2, 1]
    total(losses).backward()
    assert detector.model.backbone[0].weight.grad.any()


def test_any_callable_of_two_predictions_is_a_distillers_loss():
    def gap(cross: DensePredictions, teacher: DensePredictions) -> dict[str, Tensor]:
        assert cross.logits.requires_grad
        assert not teacher.logits.requires_grad
        return {"gap": (cross.logits - teacher.logits).square().mean()}

    distiller = CrossHeadDistiller(tiny_detector(1), tiny_detector(2), loss=gap).train()
    losses = distiller(random_images(), random_targets((2, 1)))
    assert set(losses) == {"classification", "bbox_regression", "distill_gap"}
    losses["distill_gap"].backward()
    assert distiller.detector.model.backbone[0].weight.grad.any()
    assert distiller.detector.model.classification.weight.grad is None


class QualityGap:
    """A loss of one's own that says which branch it needs."""

    branches = ("quality", "distribution")

    def __call__(self, cross: DensePredictions, teacher: DensePredictions) -> dict[str, Tensor]:
        raise NotImplementedError


def test_branches_that_a_users_loss_needs_are_looked_for_at_once():
    with pytest.raises(IncompatibleDetectorsError, match="a head that predicts distribution"):
        CrossHeadDistiller(tiny_detector(1), tiny_detector(2), loss=QualityGap())
