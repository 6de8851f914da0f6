"""`EndToEndDetector`: one-to-one losses in training, NMS-free detections in evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from crosskd_assign import (
    CrossHeadDistiller,
    DensePredictions,
    EndToEndDetector,
    OneToOneLoss,
    TaskAwareOneToOneAssigner,
)
from crosskd_assign.errors import ImageError, OptionError, PredictionError, TargetError, UnknownDetectorError
from crosskd_assign.structures import Assignment, Batch, Detection, Target
from crosskd_assign.transfer import Transfer
from tests.makers.small_models import (
    CLASSES,
    MAKERS,
    backward,
    gradients,
    scene,
    small_fcos,
    small_retinanet,
    snapshot,
    total,
)

SIZES = ((64, 90), (75, 64), (128, 128))


def raw(detector: EndToEndDetector, images: Sequence[Tensor]) -> tuple[Batch, DensePredictions]:
    """The batch and the head's predictions, before anything is selected."""
    adapter = detector.adapter
    batch, _ = adapter.preprocess(images)
    return batch, adapter.head(adapter.features(batch), batch.image_size)


def plain_detections(detector: EndToEndDetector, images: Sequence[Tensor], k: int, threshold: float) -> list[Detection]:
    """Detections by sorting every (point, class) pair of every image in Python."""
    batch, predictions = raw(detector, images)
    found: list[Detection] = []
    for i, image in enumerate(images):
        scores = predictions.logits[i].double().sigmoid()  # (A, C)
        rows = sorted(((s, a, c) for a, row in enumerate(scores.tolist()) for c, s in enumerate(row)), reverse=True)[:k]
        rows = [row for row in rows if row[0] >= threshold]
        boxes = predictions.boxes[i, [a for _, a, _ in rows]]
        height, width = batch.sizes[i]
        boxes = clip_boxes_to_image(boxes, (height, width))
        back = torch.tensor([image.shape[-1] / width, image.shape[-2] / height])
        found.append(
            {
                "boxes": boxes * back.repeat(2),
                "scores": torch.tensor([s for s, _, _ in rows], dtype=torch.float32),
                "labels": torch.tensor([c for _, _, c in rows], dtype=torch.int64),
            }
        )
    return found


# --- training mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("boxes", [(2, 1, 3), (2, 0, 1), (0, 0, 0)], ids=["boxes", "an image without", "none at all"])
def test_training_gives_a_plain_dict_of_finite_losses_that_reaches_every_trainable_parameter(kind, boxes):
    detector = EndToEndDetector(MAKERS[kind]()).train()
    losses = detector(*scene(SIZES, boxes=boxes))
    assert type(losses) is dict
    assert set(losses) == {"classification", "bbox_regression"}
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert losses["classification"] > 0
    assert (losses["bbox_regression"] > 0) == (sum(boxes) > 0)
    backward(losses)
    reached = gradients(detector)
    assert set(reached) == {name for name, p in detector.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in reached.values())


@pytest.mark.parametrize("kind", MAKERS)
def test_losses_are_focal_loss_and_twice_giou_over_the_matched_boxes(kind):
    detector = EndToEndDetector(MAKERS[kind](_skip_resize=True)).train()
    images, targets = scene(SIZES, boxes=(2, 1, 3))
    losses = detector(images, targets)
    _, predictions = raw(detector, images)
    assignment = detector.assigner(predictions, targets)
    assert len(assignment) == 6
    truth = torch.zeros_like(predictions.logits)
    matched = []
    for i, point, g in zip(assignment.image, assignment.point, assignment.target, strict=True):
        truth[i, point, targets[i]["labels"][g]] = 1
        matched.append(targets[i]["boxes"][g])
    boxes = predictions.boxes[assignment.image, assignment.point]
    focal = sigmoid_focal_loss(predictions.logits, truth, alpha=0.25, gamma=2, reduction="sum")
    giou = generalized_box_iou_loss(boxes, torch.stack(matched), reduction="sum")
    torch.testing.assert_close(losses["classification"], focal / 6)
    torch.testing.assert_close(losses["bbox_regression"], 2 * giou / 6)


def test_loss_options_reach_the_losses():
    images, targets = scene(SIZES)
    model = small_fcos()
    usual = EndToEndDetector(model)(images, targets)
    other = EndToEndDetector(model, loss=OneToOneLoss(classification=3, box=0.5))(images, targets)
    torch.testing.assert_close(other["classification"], 3 * usual["classification"])
    torch.testing.assert_close(other["bbox_regression"], 0.25 * usual["bbox_regression"])
    for option in (
        {"loss": OneToOneLoss(focal_alpha=0.5)},
        {"loss": OneToOneLoss(focal_gamma=1.0)},
        {"assigner": TaskAwareOneToOneAssigner(alpha=5, beta=0)},
    ):
        assert total(EndToEndDetector(model, **option)(images, targets)) != total(usual)


@pytest.mark.parametrize("label", range(CLASSES))
def test_only_the_matched_point_is_pulled_towards_its_label_and_by_channel_of_that_number(label):
    detector = EndToEndDetector(small_fcos(levels=3))
    images, targets = scene(SIZES[1:2], boxes=1)
    targets[0]["labels"] = torch.tensor([label])
    run = detector.run(images, targets)
    predictions = run.predictions
    predictions.logits.retain_grad()
    backward(detector.losses(run))
    assert predictions.logits.grad is not None
    assignment = detector.assigner(predictions, run.targets)
    rising = (predictions.logits.grad < 0).nonzero().tolist()
    assert rising == [[0, int(assignment.point), label]]


def test_targets_are_in_pixels_of_the_image_that_came_in():
    detector = EndToEndDetector(small_fcos(min_size=64, max_size=128))
    images, targets = scene(((64, 64), (64, 96)))
    large = [F.interpolate(x[None], scale_factor=2, mode="nearest")[0] for x in images]
    larger: list[Target] = [{**t, "boxes": 2 * t["boxes"]} for t in targets]
    usual, resized = detector(images, targets), detector(large, larger)
    for name in usual:
        torch.testing.assert_close(resized[name], usual[name])


def test_a_batch_of_one_tensor_trains_and_detects_as_a_list():
    images, targets = scene(((64, 96), (64, 96)))
    detector = EndToEndDetector(small_fcos())
    for name, loss in detector(torch.stack(images), targets).items():
        torch.testing.assert_close(loss, detector(images, targets)[name])
    detector.eval()
    torch.testing.assert_close(detector(torch.stack(images)), detector(images))


def test_centerness_is_frozen_and_nothing_else():
    detector = EndToEndDetector(small_fcos())
    assert {name for name, p in detector.named_parameters() if not p.requires_grad} == {
        "adapter.model.head.regression_head.bbox_ctrness.weight",
        "adapter.model.head.regression_head.bbox_ctrness.bias",
    }
    assert all(p.requires_grad for p in EndToEndDetector(small_retinanet()).parameters())


def test_a_few_steps_fit_an_image_so_that_each_object_is_detected_once_without_nms():
    torch.manual_seed(0)
    detector = EndToEndDetector(small_fcos(levels=3, confidence=0.05))
    image = torch.full((3, 64, 64), 0.1)
    image[0, 8:40, 4:30] = image[2, 30:60, 36:60] = 1
    boxes, labels = torch.tensor([[4.0, 8, 30, 40], [36, 30, 60, 60]]), torch.tensor([0, 2])
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        backward(detector.train()([image], [{"boxes": boxes, "labels": labels}]))
        optimizer.step()
    with torch.no_grad():
        found = detector.eval()([image])[0]
    order = found["labels"][:2].argsort()
    assert found["labels"][:2][order].tolist() == [0, 2]
    assert box_iou(found["boxes"][:2][order], boxes).diagonal().min() > 0.7
    assert (found["scores"] > 0.5).sum() == 2


@pytest.mark.parametrize("distil", [False, True], ids=["detector", "distiller"])
def test_a_stock_torchvision_loop_trains_it_unchanged(distil):
    data = [scene(SIZES, boxes=1, seed=seed) for seed in range(2)]
    student = small_fcos(confidence=0.1)
    model = CrossHeadDistiller(student, small_fcos(2)) if distil else EndToEndDetector(student)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    history = []
    for _ in range(10):
        model.train()
        for images, targets in data:
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            history.append(float(losses.detach()))
    assert sum(history[-4:]) < 0.85 * sum(history[:4])
    model.eval()
    with torch.no_grad():
        assert [set(detection) for detection in model(data[0][0])] == [{"boxes", "scores", "labels"}] * 3


def test_a_detector_keeps_its_options_as_a_student():
    detector = EndToEndDetector(small_fcos(1), top_k=3, loss=OneToOneLoss(box=0))
    distiller = CrossHeadDistiller(detector, small_fcos(2))
    images, targets = scene(SIZES)
    assert distiller.detector is detector
    assert distiller(images, targets)["bbox_regression"] == 0
    torch.testing.assert_close(distiller.eval()(images), detector(images))
    assert len(detector(images)[0]["scores"]) == 3


# --- evaluation mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_k": 40, "score_threshold": 0.4}], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_detections_are_the_best_pairs_of_point_and_class_carried_back_to_the_image(kind, options):
    detector = EndToEndDetector(MAKERS[kind](min_size=48, max_size=100), **options).eval()
    images, _ = scene(SIZES)
    with torch.no_grad():
        found = detector(images)
        expected = plain_detections(detector, images, options.get("top_k", 100), options.get("score_threshold", 0.0))
    assert len(found) == 3
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    for image, detection in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert set(detection) == {"boxes", "scores", "labels"}
        assert 0 < len(detection["boxes"]) <= options.get("top_k", 100)
        assert (detection["scores"].diff() <= 0).all()
        assert detection["labels"].dtype == torch.int64
        assert (detection["boxes"] >= 0).all()
        assert (detection["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
    assert any((d["boxes"][:, :2] == 0).any() for d in found), "nothing was clipped, so clipping is not shown"


def test_a_threshold_keeps_what_reaches_it_and_nothing_below():
    model = small_fcos().eval().requires_grad_(False)
    images, _ = scene()
    every = EndToEndDetector(model, top_k=1000).eval()(images)[0]
    assert len(every["scores"]) > 100, "zero must keep all"
    threshold = float(every["scores"][10])
    kept = EndToEndDetector(model, top_k=1000, score_threshold=threshold).eval()(images)[0]
    torch.testing.assert_close(kept["scores"], every["scores"][:11])
    assert len(EndToEndDetector(model, score_threshold=1.0).eval()(images)[0]["boxes"]) == 0


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_detections_label_is_its_channel(label):
    model = small_fcos()
    with torch.no_grad():
        model.head.classification_head.cls_logits.bias[label] = 20
    found = EndToEndDetector(model, top_k=10).eval()(scene()[0])
    assert all(detection["labels"].eq(label).all() for detection in found)


def test_asking_for_more_detections_than_there_are_gives_all():
    detector = EndToEndDetector(small_fcos(levels=3, classes=2), top_k=10**6).eval()
    assert len(detector(scene()[0])[0]["scores"]) == (64 + 16 + 4) * 2


def test_detecting_changes_no_weight_and_no_statistic_and_ignores_targets():
    detector = EndToEndDetector(small_fcos(norm="batch")).eval()
    before = snapshot(detector)
    images, targets = scene()
    torch.testing.assert_close(detector(images, targets), detector(images))
    for name, value in snapshot(detector).items():
        assert torch.equal(value, before[name]), name


# --- what it wraps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_the_models_weights_load_into_a_plain_torchvision_model(kind):
    detector = EndToEndDetector(MAKERS[kind]())
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    backward(detector(*scene()))
    optimizer.step()
    fresh = MAKERS[kind](seed=1)
    fresh.load_state_dict(detector.model.state_dict(), strict=True)
    images, _ = scene()
    torch.testing.assert_close(EndToEndDetector(fresh).eval()(images), detector.eval()(images))


def test_repr_shows_the_options():
    text = repr(EndToEndDetector(small_fcos(), top_k=33, score_threshold=0.25))
    for word in ("33", "0.25", "TaskAwareOneToOneAssigner", "FCOS"):
        assert word in text


@pytest.mark.parametrize(
    "option",
    [
        {"top_k": 0},
        {"score_threshold": 1.5},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        EndToEndDetector(small_fcos(), **option)


@pytest.mark.parametrize(
    "option", [{"focal_alpha": -0.1}, {"focal_gamma": -1.0}, {"box": -1.0}, {"classification": math.nan}], ids=str
)
def test_weights_out_of_range_are_refused_by_name(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        OneToOneLoss(**option)


def test_a_detector_nobody_knows_is_refused():
    with pytest.raises(UnknownDetectorError):
        EndToEndDetector(torch.nn.Linear(1, 1))


def test_wrong_input_is_refused_before_it_reaches_the_network():
    detector = EndToEndDetector(small_fcos())
    images, targets = scene()
    with pytest.raises(ImageError, match="at least one image"):
        detector([], [])
    with pytest.raises(ImageError, match=r"images\[1\]"):
        detector([images[0], (255 * images[1]).byte()], targets)
    with pytest.raises(TargetError, match=r"call \.eval\(\)"):
        detector(images)
    with pytest.raises(TargetError, match="2 targets"):
        detector(images, targets[:1])
    targets[1]["boxes"][0] = targets[1]["boxes"][0].flip(0)
    with pytest.raises(TargetError, match=r'targets\[1\]\["boxes"\]\[0\]'):
        detector(images, targets)
    with pytest.raises(ImageError, match="at least one image"):
        detector.eval()([])


def test_a_head_that_loses_points_is_refused_by_name(monkeypatch):
    detector = EndToEndDetector(small_fcos())
    images, targets = scene()
    _, predictions = raw(detector, images)
    short = replace(predictions, logits=predictions.logits[:, :-1])
    monkeypatch.setattr(detector.adapter, "head", lambda features, image_size: short)
    with pytest.raises(PredictionError, match=r"FCOSAdapter\.head\(\)"):
        detector(images, targets)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distil", [False, True], ids=["alone", "distilled"])
def test_pixels_that_are_not_finite_are_refused_by_image_before_batch_norm_counts_them(value, distil):
    model = small_fcos()
    student = CrossHeadDistiller(model, small_fcos()) if distil else EndToEndDetector(model)
    images, targets = scene()
    before = snapshot(student)
    images[1][1, 3, 5] = value
    with pytest.raises(ImageError) as caught:
        student.train()(images, targets)
    assert caught.value.expected == "finite pixels"
    assert caught.value.where.startswith("images[1]")
    assert all(torch.equal(x, before[name]) for name, x in snapshot(student).items())


def test_on_an_accelerator_the_look_at_the_pixels_travels_while_the_assigner_works(monkeypatch):
    # There, `run` does not look, because it would have to wait; `losses` asks before the assigner does and reads after.
    order: list[str] = []

    class Recorded(Transfer):
        def __init__(self, x: Tensor) -> None:
            order.append("sent")
            super().__init__(x)

        def wait(self) -> Tensor:
            order.append("read")
            return super().wait()

    def assigner(predictions: DensePredictions, targets: Sequence[Target]) -> Assignment:
        order.append("assigned")
        return TaskAwareOneToOneAssigner()(predictions, targets)

    monkeypatch.setattr("crosskd_assign.end_to_end.Transfer", Recorded)
    detector = EndToEndDetector(small_fcos(), assigner=assigner)
    run = detector.run(*scene())
    detector.losses(run)
    assert order == ["sent", "assigned", "read"]
    spoilt = run.batch.images.clone()
    spoilt[1, 2, 3, 4] = math.nan
    with pytest.raises(ImageError, match="finite pixels"):
        detector.losses(replace(run, batch=replace(run.batch, images=spoilt)))
