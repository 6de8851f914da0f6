"""What arms can be combined with: a second head, other feature losses, schedules."""

import copy

import pytest
import torch
from coco_example.models.methods import build_method
from coco_example.options import MethodOptions
from torch import nn

from crosskd_assign import AuxiliaryHead, EndToEndDetector
from crosskd_assign.errors import OptionError
from tests.makers.builders import random_images, random_targets
from tests.makers.small_models import gradients, small_fcos, small_retinanet

OWN = {"classification", "bbox_regression"}


def method_of(arm, model, teacher=None, **options):
    return build_method(MethodOptions(arm=arm, **options), model, teacher).train()


def batch():
    return random_images(2), random_targets((2, 1))


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
@pytest.mark.parametrize("name", ["one-to-one", "cross-head"])
def test_an_auxiliary_head_adds_one_to_many_losses_of_the_same_features(build, name):
    student, teacher = build(), build(1)
    images, targets = batch()
    plain = method_of(name, copy.deepcopy(student), copy.deepcopy(teacher))
    method = method_of(name, copy.deepcopy(student), copy.deepcopy(teacher), auxiliary_head=True)
    alone, both = plain(images, targets), method(images, targets)
    # The head is a copy of the student's at first, so its losses are those of any other such copy.
    detector = EndToEndDetector(student).train()
    expected = AuxiliaryHead(student)(detector.run(images, targets))
    assert both.keys() - alone.keys() == {f"auxiliary_{key}" for key in expected}
    for key, loss in alone.items():
        torch.testing.assert_close(both[key], loss)
    for key, loss in expected.items():
        torch.testing.assert_close(both[f"auxiliary_{key}"], loss, rtol=1e-4, atol=1e-5)


def test_detached_one_to_one_losses_train_the_head_alone():
    method = method_of("one-to-one", small_fcos(), auxiliary_head=True, detach=True)
    losses = method(*batch())
    torch.stack([losses[key] for key in OWN]).sum().backward()
    names = gradients(method.adapter.model)
    assert names
    assert all(name.startswith("head.") for name in names)
    method.zero_grad(set_to_none=True)
    method(*batch())["auxiliary_classification"].backward()
    assert any(name.startswith("backbone.") for name in gradients(method.adapter.model))


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
@pytest.mark.parametrize("name", ["feature-imitation", "weighted-imitation"])
def test_imitation_costs_nothing_where_features_agree_and_scales_with_its_weights(build, name):
    student, teacher = build(), build(1)
    images, targets = batch()

    def imitation(model, *, weight=1.0, factor=1.0):
        method = method_of(name, copy.deepcopy(model), copy.deepcopy(teacher), imitation=weight)
        method.distillation_weight = factor
        return float(method(images, targets)["distill_features"].detach())

    assert imitation(teacher) == pytest.approx(0, abs=1e-9)
    one = imitation(student)
    assert one > 1e-4
    assert imitation(student, weight=6.0, factor=0.5) == pytest.approx(3 * one, rel=1e-5)


def test_weighted_imitation_is_the_mean_square_where_the_teacher_is_equally_sure_everywhere():
    student, teacher = small_fcos(), small_fcos(1)
    for parameter in teacher.head.classification_head.cls_logits.parameters():
        nn.init.constant_(parameter, 0.0)
    method = method_of("weighted-imitation", student, teacher)
    images, targets = batch()
    adapter = method.detector.adapter
    prepared, _ = adapter.preprocess(images)
    with torch.no_grad():
        pairs = zip(adapter.features(prepared), method.teacher_maps(prepared), strict=True)
        expected = sum(float(((s - t) ** 2).mean()) for s, t in pairs)
    assert float(method(images, targets)["distill_features"].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["cross-head", "one-to-one"])
def test_an_auxiliary_head_goes_with_a_later_entry(name):
    method = method_of(name, small_fcos(), small_fcos(1), auxiliary_head=True, entry=1)
    losses = method(*batch())
    assert {"auxiliary_classification", "auxiliary_bbox_regression"} <= losses.keys()
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_a_detaching_head_and_a_later_entry_exclude_each_other():
    with pytest.raises(OptionError, match="Expected entry of 0 with an auxiliary head"):
        method_of("cross-head", small_fcos(), small_fcos(1), auxiliary_head=True, detach=True, entry=1)
