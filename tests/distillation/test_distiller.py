"""`CrossHeadDistiller` and `inherit`: who learns, who must not, and what travels with what."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from crosskd_assign import CrossHeadDistiller, CrossHeadLoss, DensePredictions, EndToEndDetector, adapt, errors, inherit
from tests.makers.small_models import MAKERS, backward, gradients, scene, small_fcos, small_retinanet, snapshot, total

SIZES = ((64, 90), (75, 64))
ALIGNMENTS = ["statistics", "none"]
PAIRS = [("fcos", "fcos"), ("fcos", "retinanet"), ("retinanet_v2", "fcos"), ("retinanet", "retinanet_v2")]


def pair(student: str = "fcos", teacher: str = "fcos", **options: Any) -> CrossHeadDistiller:
    return CrossHeadDistiller(MAKERS[student](seed=1), MAKERS[teacher](seed=2), **options).train()


def distilled(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("distill_")}


def crossed(distiller: CrossHeadDistiller, images: Sequence[Tensor]) -> tuple[DensePredictions, DensePredictions]:
    """The teacher's predictions, and its head's on the student's features."""
    batch, _ = distiller.detector.adapter.preprocess(images)
    maps, teacher = distiller.teacher_pass(batch)
    aligned = distiller.aligner(distiller.detector.adapter.features(batch), maps)
    return teacher, distiller.run_teacher_head(aligned, batch.image_size)


def stored(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_student_with_the_teachers_features_gets_the_teachers_predictions_and_no_loss(kind, alignment):
    student = MAKERS[kind](seed=3, levels=3 if alignment == "statistics" else 5)
    teacher = copy.deepcopy(student)
    student.head.load_state_dict(MAKERS[kind](seed=4).head.state_dict())  # the student's own head plays no part
    if alignment == "statistics":  # another offset and scale of a channel do not count
        with torch.no_grad():
            for (convolution,) in student.backbone.fpn.layer_blocks:
                convolution.weight *= 2
                convolution.bias.mul_(2).add_(0.5)
    loss = CrossHeadLoss(quality=int(kind == "fcos"))
    distiller = CrossHeadDistiller(student, teacher, alignment=alignment, loss=loss, feature_weight=1)
    images, targets = scene(SIZES)
    on_teacher, cross = crossed(distiller, images)
    for field in ("logits", "boxes", "quality"):
        mine, theirs = getattr(cross, field), getattr(on_teacher, field)
        # The eps in the statistics is felt: up to 3e-4 px of a box here, in float64 as well.
        torch.testing.assert_close(mine, theirs, atol=1e-3 if field == "boxes" else 1e-4, rtol=1e-4)
    losses = distilled(distiller(images, targets))
    losses.pop("distill_quality", None)  # binary cross-entropy: its least value is the entropy of the target
    assert all(abs(float(loss.detach())) < 1e-4 for loss in losses.values())
    assert len(losses) == 3


def test_the_teacher_sees_images_and_padding_in_its_own_normalisation():
    student = small_fcos(1, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    teacher = small_fcos(2, norm="batch", image_mean=(0.1, 0.9, 0.3), image_std=(0.5, 0.2, 0.7))
    images, _ = scene(((64, 90), (75, 64), (128, 64)))
    on_teacher, _ = crossed(CrossHeadDistiller(student, teacher), images)
    image_list, _ = teacher.transform(images)  # the teacher's own way, alone
    output = teacher.head(list(teacher.backbone(image_list.tensors).values()))
    torch.testing.assert_close(on_teacher.logits, output["cls_logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(on_teacher.quality, output["bbox_ctrness"][..., 0], atol=1e-4, rtol=1e-4)


def test_normalisation_folded_into_the_first_convolution_changes_no_loss():
    plain = small_fcos(2, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    folded = small_fcos(2, image_mean=(0, 0, 0), image_std=(0.5, 0.2, 0.7))
    with torch.no_grad():
        folded.backbone.stem[0].weight *= torch.tensor([0.5, 0.2, 0.7]).view(3, 1, 1)
    images, targets = scene(SIZES)
    one, other = (CrossHeadDistiller(small_fcos(1), teacher)(images, targets) for teacher in (plain, folded))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("classes", [1, 3, 7])
def test_class_spaces_may_differ_and_the_students_alone_limits_labels(classes):
    images, targets = scene(SIZES)
    distiller = CrossHeadDistiller(small_fcos(1), small_fcos(2, classes=classes))
    assert crossed(distiller, images)[1].logits.shape[-1] == classes
    targets[0]["labels"][:] = 2
    assert total(distiller(images, targets)).isfinite()
    targets[0]["labels"][:] = 3
    with pytest.raises(errors.TargetError, match="label in 0…2"):
        distiller(images, targets)


def test_images_without_boxes_distil_all_the_same():
    images, with_boxes = scene(SIZES)
    _, without = scene(SIZES, boxes=0)
    distiller = pair()
    full, empty = distiller(images, with_boxes), distiller(images, without)
    assert all(loss.isfinite() for loss in empty.values())
    torch.testing.assert_close(distilled(empty), distilled(full))  # no part of it depends on the assignment


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("loss", ["distill_classification", "distill_bbox_regression"])
def test_each_distillation_loss_alone_teaches_backbone_and_neck_and_nothing_else(student, teacher, alignment, loss):
    large = MAKERS[student](1, min_size=160, max_size=200)  # group normalisation silences levels of a single point
    distiller = CrossHeadDistiller(large, MAKERS[teacher](2), alignment=alignment)
    backward({loss: distiller(*scene(SIZES))[loss]})
    trunk = distiller.detector.model.backbone
    reached = gradients(trunk)
    assert set(reached) == {name for name, _ in trunk.named_parameters()}
    for name, gradient in reached.items():
        assert gradient.isfinite().all(), name
        if gradient.dim() > 1:  # statistics take the last bias of a level out again
            assert gradient.abs().max() > 0, name
    assert len(gradients(distiller)) == len(reached), "the student's head was reached"
    assert not gradients(distiller.teacher)
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


def test_other_channels_pass_a_convolution_that_trains_but_is_not_deployed():
    distiller = CrossHeadDistiller(small_fcos(1), small_fcos(2, channels=64)).train()
    convolutions = [m for m in distiller.aligner.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [(32, 64, (1, 1))] * 5
    assert {p for c in convolutions for p in c.parameters()} <= set(distiller.parameters())
    backward(distilled(distiller(*scene(SIZES))))
    assert all(c.weight.grad is not None and c.weight.grad.abs().max() > 0 for c in convolutions)
    assert set(gradients(distiller.detector.model.backbone))
    assert {name for name in distiller.state_dict() if name.startswith("aligner")}
    assert not any("aligner" in name for name in distiller.detector.state_dict())
    assert not list(pair().aligner.parameters())


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("student_levels", "teacher_levels"), [(5, 3), (3, 5)])
def test_only_levels_that_both_have_are_distilled(student_levels, teacher_levels, alignment):
    distiller = CrossHeadDistiller(
        small_fcos(1, levels=student_levels), small_retinanet(2, levels=teacher_levels), alignment=alignment
    )
    images, targets = scene(SIZES)
    on_teacher, cross = crossed(distiller, images)
    shared = on_teacher.strides <= 32
    assert not torch.isclose(cross.logits[:, shared], on_teacher.logits[:, shared]).all(dim=-1).any()
    torch.testing.assert_close(cross.logits[:, ~shared], on_teacher.logits[:, ~shared])
    torch.testing.assert_close(cross.boxes[:, ~shared], on_teacher.boxes[:, ~shared])
    backward(distilled(distiller(images, targets)))
    reached = gradients(distiller.detector.model.backbone)
    assert all(gradient.isfinite().all() for gradient in reached.values())
    assert not any("extra_blocks" in name for name in reached)
    assert {name for name in reached if "layer_blocks" in name}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("worker", ["teacher", "student"])
def test_a_head_that_works_in_place_edits_no_features(worker, alignment):
    images, targets = scene(SIZES)
    results = []
    for inplace in (False, True):
        models = {"student": small_fcos(1, levels=3), "teacher": small_fcos(2, levels=3)}
        head = models[worker].head
        head.classification_head.conv.insert(0, nn.ReLU(inplace))  # what follows sees its result, too
        head.regression_head.conv.insert(0, nn.Identity() if inplace else nn.ReLU())
        distiller = CrossHeadDistiller(models["student"], models["teacher"], alignment=alignment)
        losses = distiller(images, targets)
        backward(losses)
        results.append((losses, gradients(models["student"].backbone)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_feature_imitation_pulls_the_students_pyramid_and_neither_head(alignment):
    distiller = pair("fcos", "retinanet", alignment=alignment, feature_weight=1)
    images, targets = scene(SIZES)
    model = distiller.detector.model
    distiller(images, targets)["distill_features"].backward()
    assert total({name: p.grad.abs().sum() for name, p in model.backbone.named_parameters() if p.grad is not None}) > 0
    assert all(p.grad is None or not p.grad.any() for p in model.head.parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())


# --- options ----------------------------------------------------------------------------------------------------------


def test_weights_scale_their_loss_zero_removes_it_and_the_students_losses_stay():
    images, targets = scene(SIZES)
    on = {"quality": 1.0, "features": 1.0}

    def weighted(features: float, **weights: float) -> CrossHeadDistiller:
        return pair(loss=CrossHeadLoss(**weights), feature_weight=features)

    usual = weighted(**on)(images, targets)
    names = {"classification": "classification", "box": "bbox_regression", "quality": "quality", "features": "features"}
    assert set(distilled(usual)) == {f"distill_{name}" for name in names.values()}
    assert set(distilled(pair()(images, targets))) == {"distill_classification", "distill_bbox_regression"}
    for option, name in names.items():
        weights: dict[str, Any] = {**on, option: 2.5}
        other = weighted(**weights)(images, targets)
        torch.testing.assert_close(other.pop(f"distill_{name}"), 2.5 * usual[f"distill_{name}"])
        gone = weighted(**{**weights, option: 0})(images, targets)
        assert set(gone) == set(other) == set(usual) - {f"distill_{name}"}
        torch.testing.assert_close(other, {key: usual[key] for key in other})
    with pytest.raises(errors.IncompatibleDetectorsError, match="a head that predicts quality"):
        pair("fcos", "retinanet", loss=CrossHeadLoss(quality=1))


def test_the_distillation_weight_scales_all_distillation_losses_and_no_other():
    images, targets = scene(SIZES)
    distiller = pair(loss=CrossHeadLoss(quality=1), feature_weight=1)
    usual = distiller(images, targets)
    for weight in (0.0, 0.5, 2.0):
        distiller.distillation_weight = weight
        for name, loss in distiller(images, targets).items():
            torch.testing.assert_close(loss, usual[name] * (weight if name in distilled(usual) else 1))


def test_gamma_threshold_and_alignment_reach_the_losses():
    images, targets = scene(SIZES)
    usual = total(distilled(pair()(images, targets)))
    losses = [CrossHeadLoss(gamma=0), CrossHeadLoss(gamma=2.0), CrossHeadLoss(confidence_threshold=0.4)]
    options: list[dict[str, Any]] = [{"loss": loss} for loss in losses]
    for option in (*options, {"alignment": "none"}):
        assert not torch.isclose(total(distilled(pair(**option)(images, targets))), usual), option


@pytest.mark.parametrize(
    "option",
    [
        {"feature_weight": -1},
        {"alignment": "adain"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(errors.OptionError, match=next(iter(option))):
        pair(**option)


def test_two_detectors_that_cannot_be_crossed_are_refused():
    with pytest.raises(errors.IncompatibleDetectorsError, match=r"stride.*8\.0.*64\.0"):
        CrossHeadDistiller(small_fcos(1, levels=3), small_fcos(2, levels=3, stem_stride=32))
    model = small_fcos()
    for student in (model, adapt(model), EndToEndDetector(model)):
        with pytest.raises(errors.IncompatibleDetectorsError, match="shared parameters"):
            CrossHeadDistiller(student, model)
    half, other = small_fcos(1), small_fcos(2)
    other.backbone = half.backbone
    with pytest.raises(errors.IncompatibleDetectorsError, match=r"shared parameters.*backbone"):
        CrossHeadDistiller(half, other)
    with pytest.raises(errors.UnknownDetectorError):
        CrossHeadDistiller(model, nn.Identity())


# --- the teacher is present and no part -------------------------------------------------------------------------------


def test_nothing_that_lists_saves_or_copies_a_distiller_finds_its_teacher():
    teacher = small_fcos(2, channels=64)
    distiller = CrossHeadDistiller(small_fcos(1), teacher)
    distiller(*scene(SIZES))
    foreign = {id(x) for x in [*teacher.parameters(), *teacher.buffers(), *teacher.modules()]}
    found = [*distiller.parameters(), *distiller.buffers(), *distiller.modules()]
    assert not foreign & {id(x) for x in found}
    students = {f"detector.{name}" for name in distiller.detector.state_dict()}
    assert set(distiller.state_dict()) == students | {f"aligner.{name}" for name in distiller.aligner.state_dict()}
    kept = len(stored([distiller.detector, distiller.aligner]))
    weight = len(stored(teacher.state_dict()))
    assert weight > 0.5 * kept, "the teacher is too small to show"
    for copied in (distiller, copy.deepcopy(distiller), AveragedModel(distiller)):
        assert len(stored(copied)) < kept + 0.1 * weight


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda d: torch.load(io.BytesIO(stored(d)), weights_only=False), lambda d: AveragedModel(d).module],
    ids=["deepcopy", "pickle", "average"],
)
def test_a_copy_detects_at_once_and_trains_when_it_is_given_a_teacher(duplicate):
    images, targets = scene(SIZES)
    distiller = CrossHeadDistiller(small_fcos(1, norm="batch"), small_fcos(2)).train()
    losses = distiller(images, targets)
    twin = duplicate(distiller)
    torch.testing.assert_close(twin.eval()(images), distiller.eval()(images))
    before = snapshot(twin)
    with pytest.raises(errors.MissingTeacherError, match="attach_teacher"):
        twin.train()(images, targets)
    torch.testing.assert_close(snapshot(twin), before, atol=0, rtol=0)
    assert "teacher=None" in repr(twin)
    teacher = small_fcos(2)
    assert twin.attach_teacher(teacher) is twin
    assert not any(p.requires_grad or m.training for m in teacher.modules() for p in m.parameters())
    torch.testing.assert_close(twin(images, targets), losses)
    with pytest.raises(errors.IncompatibleDetectorsError, match="shared parameters"):
        twin.attach_teacher(twin.detector.model)
    twin.load_state_dict(distiller.state_dict(), strict=True)


@pytest.mark.parametrize(
    "other",
    [{"channels": 64}, {"levels": 3, "stem_stride": 32}, {"stem_stride": 8}],
    ids=["channels", "levels", "strides"],
)
def test_a_teacher_that_does_not_fit_cannot_be_attached_later(other):
    distiller = pair()
    with pytest.raises(errors.IncompatibleDetectorsError):
        distiller.attach_teacher(small_fcos(3, **other))


def test_repr_names_the_teacher():
    assert "teacher=RetinaNet (0.1 M parameters, frozen)" in repr(pair("fcos", "retinanet"))


def named(name: str) -> str:
    """The name that `inherit` gives a tensor of a small model's backbone."""
    return f"neck.{name.removeprefix('fpn.')}" if name.startswith("fpn.") else f"backbone.{name}"


# --- inherit ----------------------------------------------------------------------------------------------------------


def test_inheriting_copies_all_of_an_equal_trunk_shares_no_memory_and_leaves_the_head_alone():
    student, teacher = small_fcos(1, norm="batch"), small_retinanet(2, norm="batch")
    head, before = snapshot(student.head), snapshot(teacher)
    with torch.no_grad():
        teacher.backbone.stem[1].running_mean += 1
    report = inherit(student, adapt(teacher))
    assert len(report.copied) == len(student.backbone.state_dict())
    assert set(report.copied) == {named(name) for name in student.backbone.state_dict()}
    assert not report.skipped
    assert str(len(report.copied)) in str(report)
    torch.testing.assert_close(snapshot(student.backbone), snapshot(teacher.backbone), atol=0, rtol=0)
    torch.testing.assert_close(snapshot(student.head), head, atol=0, rtol=0)
    with torch.no_grad():
        for p in [*student.parameters(), student.backbone.stem[1].running_mean]:
            p.add_(1)
    teacher.backbone.stem[1].running_mean -= 1
    torch.testing.assert_close(snapshot(teacher), before, atol=1e-5, rtol=0)
    CrossHeadDistiller(student, teacher)


def test_inheriting_says_what_did_not_fit_and_why():
    student, teacher = small_fcos(1, channels=64), small_fcos(2, levels=3)
    before = snapshot(student.backbone)
    report = inherit(student, teacher)
    assert set(report.copied) | set(report.skipped) == {named(name) for name in before}
    assert all(name.startswith(("backbone.stem", "backbone.body")) for name in report.copied)
    assert report.skipped["neck.inner_blocks.0.0.weight"] == "(64, 16, 1, 1) here, (32, 16, 1, 1) in the teacher"
    assert report.skipped["neck.extra_blocks.p6.weight"] == "the teacher has none"
    assert "neck" in str(report)
    for name, value in snapshot(student.backbone).items():
        assert torch.equal(value, teacher.backbone.state_dict()[name] if named(name) in report.copied else before[name])


def test_inheriting_nothing_is_refused():
    stranger = small_fcos()
    stranger.backbone = nn.Conv2d(3, 32, 1)
    with pytest.raises(errors.IncompatibleDetectorsError, match="inherit"):
        inherit(small_fcos(), stranger, parts=["backbone"])
    with pytest.raises(errors.DetectorError, match=r'a module named "neck" in parts\(\), but got backbone, head'):
        inherit(small_fcos(), stranger)


@pytest.mark.parametrize("parts", [["head"], ["neck"], ["backbone", "neck", "head"]])
def test_inheriting_copies_the_parts_that_are_named_and_no_other(parts):
    student, teacher = small_fcos(1), small_fcos(2)
    before = snapshot(student)
    report = inherit(student, teacher, parts)
    assert {name.partition(".")[0] for name in report.copied} == set(parts)
    chosen = {"head": "head.", "neck": "backbone.fpn.", "backbone": ("backbone.stem.", "backbone.body.")}
    for name, value in snapshot(student).items():
        taken = any(name.startswith(chosen[part]) for part in parts)
        assert torch.equal(value, teacher.state_dict()[name] if taken else before[name]), name
