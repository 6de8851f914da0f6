"""What arms can be combined with: a second head, other feature losses, schedules."""

import copy
from dataclasses import asdict

import pytest
import torch
from arms import build_arm
from options import Options
from torch import nn

from crosskd_assign import EndToEndDetector
from tests.builders import random_images, random_targets
from tests.small_models import gradients, small_fcos, small_retinanet

OWN = {"classification", "bbox_regression"}


def batch():
    return random_images(2), random_targets((2, 1))


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
@pytest.mark.parametrize("name", ["one-to-one", "cross-head"])
def test_an_auxiliary_head_adds_torchvisions_own_losses_of_the_same_features(build, name):
    student, teacher = build(), build(1)
    images, targets = batch()
    plain = build_arm(name, copy.deepcopy(student), copy.deepcopy(teacher)).train()
    arm = build_arm(name, copy.deepcopy(student), copy.deepcopy(teacher), auxiliary_head=True).train()
    alone, both = plain(images, targets), arm(images, targets)
    # The head is a copy of the student's at first, so its losses are those that torchvision gives the student.
    expected = student.train()(images, targets)
    assert both.keys() - alone.keys() == {f"auxiliary_{key}" for key in expected}
    for key, loss in alone.items():
        torch.testing.assert_close(both[key], loss)
    for key, loss in expected.items():
        torch.testing.assert_close(both[f"auxiliary_{key}"], loss, rtol=1e-4, atol=1e-5)


def test_detached_one_to_one_losses_train_the_head_alone():
    arm = build_arm("one-to-one", small_fcos(), auxiliary_head=True, detach=True).train()
    losses = arm(*batch())
    torch.stack([losses[key] for key in OWN]).sum().backward()
    names = gradients(arm.adapter.model)
    assert names
    assert all(name.startswith("head.") for name in names)
    arm.zero_grad(set_to_none=True)
    arm(*batch())["auxiliary_classification"].backward()
    assert any(name.startswith("backbone.") for name in gradients(arm.adapter.model))


def test_losses_without_predictions_are_refused():
    arm = build_arm("one-to-one", small_fcos(), auxiliary_head=True).train()
    detector = arm.trainee
    assert isinstance(detector, EndToEndDetector)
    with pytest.raises(RuntimeError, match="Expected predict"):
        detector.losses(detector.adapter.head(*features_of(detector)), batch()[1])


def features_of(detector):
    prepared, _ = detector.adapter.preprocess(batch()[0])
    return detector.adapter.features(prepared), prepared


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
@pytest.mark.parametrize("name", ["feature-imitation", "weighted-imitation"])
def test_imitation_costs_nothing_where_features_agree_and_scales_with_its_weights(build, name):
    student, teacher = build(), build(1)
    images, targets = batch()

    def imitation(model, *, weight=1.0, factor=1.0):
        arm = build_arm(name, copy.deepcopy(model), copy.deepcopy(teacher), imitation_weight=weight).train()
        arm.scale_distillation(factor)
        return float(arm(images, targets)["imitation"].detach())

    assert imitation(teacher) == pytest.approx(0, abs=1e-9)
    one = imitation(student)
    assert one > 1e-4
    assert imitation(student, weight=6.0, factor=0.5) == pytest.approx(3 * one, rel=1e-5)


def test_weighted_imitation_is_the_mean_square_where_the_teacher_is_equally_sure_everywhere():
    student, teacher = small_fcos(), small_fcos(1)
    for parameter in teacher.head.classification_head.cls_logits.parameters():
        nn.init.constant_(parameter, 0.0)
    arm = build_arm("weighted-imitation", student, teacher).train()
    images, targets = batch()
    prepared, _ = arm.adapter.preprocess(images)
    with torch.no_grad():
        pairs = zip(arm.adapter.features(prepared), arm.trainee.teacher_features(prepared), strict=True)
        expected = sum(float(((s - t) ** 2).mean()) for s, t in pairs)
    assert float(arm(images, targets)["imitation"].detach()) == pytest.approx(expected, rel=1e-4)


def test_a_run_of_an_older_version_had_the_default_of_options_that_came_later():
    now = Options(output="a", epochs=3)
    then = {name: value for name, value in asdict(now).items() if name != "short_side"}
    assert now.differences(then | {"output": "b"}) == []
    assert Options(epochs=3, short_side=800).differences(then) == ["short_side: 0 then, 800 now"]


def test_an_auxiliary_head_and_a_later_entry_exclude_each_other():
    with pytest.raises(ValueError, match="Expected --entry 0 with --auxiliary-head"):
        build_arm("cross-head", small_fcos(), small_fcos(1), auxiliary_head=True, entry=1)
