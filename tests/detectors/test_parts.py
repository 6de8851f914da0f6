"""`parts()` and `part()`: what a detector calls its modules, and what `inherit` copies of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import AuxiliaryHead, DensePredictions, DetectorAdapter, EndToEndDetector, adapt, inherit
from crosskd_assign.errors import DetectorError
from crosskd_assign.structures import Batch
from tests.makers.builders import TinyAdapter, TinyNetwork, tiny_detector
from tests.makers.small_models import MAKERS, small_fcos, snapshot


class Plain(DetectorAdapter):
    """An adapter of the two methods alone."""

    def features(self, batch: Batch) -> list[Tensor]:
        raise NotImplementedError

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        raise NotImplementedError


def network(**attributes: Any) -> nn.Module:
    model = nn.Module()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def tensors(module: nn.Module) -> set[int]:
    return {id(x) for x in (*module.parameters(), *module.buffers())}


# --- names ------------------------------------------------------------------------------------------------------------


def test_by_default_parts_are_the_attributes_of_these_names_that_are_modules():
    backbone, head, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    adapter = Plain(network(backbone=backbone, neck="none", head=head, trunk=other))
    assert adapter.parts() == {"backbone": backbone, "head": head}
    assert adapter.part("backbone") is backbone
    assert adapter.part("head") is head
    assert Plain(network(body=other)).parts() == {}


@pytest.mark.parametrize(
    ("model", "name", "got"),
    [
        (network(backbone=nn.Linear(1, 1), head=nn.Linear(1, 1)), "neck", "backbone, head"),
        (network(head=nn.Linear(1, 1)), "backbone", "head"),
        (network(), "head", "none"),
        (network(head=nn.Linear(1, 1)), "tail", "head"),
    ],
)
def test_a_missing_part_is_named_with_the_adapter_and_those_there_are(model, name, got):
    with pytest.raises(DetectorError) as caught:
        Plain(model).part(name)
    assert caught.value.expected == f'a module named "{name}" in parts()'
    assert (caught.value.got, caught.value.where) == (got, "Plain")
    assert name in caught.value.fix
    assert "Plain.parts()" in caught.value.fix


@pytest.mark.parametrize("kind", MAKERS)
def test_torchvisions_detectors_are_backbone_neck_and_head_without_a_rest_or_an_overlap(kind):
    model = MAKERS[kind](norm="batch")
    parts = adapt(model).parts()
    assert list(parts) == ["backbone", "neck", "head"]
    assert parts["neck"] is model.backbone.fpn
    assert parts["head"] is model.head
    owned = [tensors(part) for part in parts.values()]
    assert sum(map(len, owned)) == len(set.union(*owned))
    assert set.union(*owned) == tensors(model)


def test_a_backbone_without_a_pyramid_network_keeps_its_neck():
    model = small_fcos()
    model.backbone = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8))
    parts = adapt(model).parts()
    assert list(parts) == ["backbone", "head"]
    assert parts["backbone"] is model.backbone


def test_parts_name_the_modules_of_the_moment():
    model = small_fcos(1)
    adapter = adapt(model)
    adapter.parts()
    model.head = small_fcos(2).head
    assert adapter.part("head") is model.head


def test_parts_can_be_frozen_and_add_nothing_to_the_state():
    adapter = tiny_detector()
    names = set(adapter.state_dict())
    adapter.part("backbone").requires_grad_(False)
    adapter.part("head")
    assert {name for name, p in adapter.named_parameters() if not p.requires_grad} == {
        "model.backbone.0.weight",
        "model.backbone.0.bias",
    }
    assert set(adapter.state_dict()) == names


# --- inherit ----------------------------------------------------------------------------------------------------------

PARTS = {
    "backbone": {"backbone.0"},
    "neck": {"backbone.1", "backbone.2"},
    "head": {"tower", "classification", "regression", "quality"},
}


@pytest.mark.parametrize("parts", [("backbone",), ("head",), ("neck", "head"), ("backbone", "neck"), tuple(PARTS)])
@pytest.mark.parametrize("wrapped", ["adapter", "detector"])
def test_inheriting_copies_the_parts_that_are_named_and_no_other(parts, wrapped):
    student, teacher = (tiny_detector(seed, batch_norm=True) for seed in (1, 2))
    with torch.no_grad():
        for x in (*teacher.parameters(), teacher.model.tower[1].running_mean):
            x.add_(1)
    before, source = snapshot(student.model), snapshot(teacher.model)
    report = inherit(EndToEndDetector(student) if wrapped == "detector" else student, teacher, parts)
    assert {name.partition(".")[0] for name in report.copied} == set(parts)
    assert not report.skipped
    chosen = tuple(name for part in parts for name in PARTS[part])
    for name, value in snapshot(student.model).items():
        assert torch.equal(value, source[name] if name.startswith(chosen) else before[name]), name
    copied = sum(name.startswith(chosen) for name in before)
    assert len(report.copied) == len(set(report.copied)) == copied
    assert not tensors(student) & tensors(teacher)


def test_by_default_the_head_is_left_alone():
    assert {name.partition(".")[0] for name in inherit(tiny_detector(1), tiny_detector(2)).copied} == {
        "backbone",
        "neck",
    }


def test_heads_of_other_classes_give_what_fits_and_the_report_says_what_does_not():
    student, teacher = small_fcos(1), small_fcos(2, classes=7)
    before = snapshot(student.head)
    report = inherit(student, teacher, ["head"])
    assert set(report.copied) | set(report.skipped) == {f"head.{name}" for name in before}
    assert report.skipped == {
        "head.classification_head.cls_logits.weight": "(3, 32, 3, 3) here, (7, 32, 3, 3) in the teacher",
        "head.classification_head.cls_logits.bias": "(3,) here, (7,) in the teacher",
    }
    for name, value in snapshot(student.head).items():
        taken = f"head.{name}" in report.copied
        assert torch.equal(value, teacher.head.state_dict()[name] if taken else before[name])


class Headless(TinyAdapter):
    def parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.model.backbone}


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_part_that_one_of_the_two_lacks_is_refused_before_anything_is_copied(who):
    student, teacher = tiny_detector(1), tiny_detector(2)
    before = snapshot(student)
    if who == "student":
        student = Headless(student.model)
    else:
        teacher = Headless(teacher.model)
    with pytest.raises(DetectorError, match=r'a module named "head" in parts\(\), but got backbone \(Headless\)'):
        inherit(student, teacher, ["backbone", "head"])
    torch.testing.assert_close(snapshot(student), before, atol=0, rtol=0)


def test_an_auxiliary_head_needs_a_head_by_name():
    with pytest.raises(DetectorError, match=r'a module named "head" in parts\(\), but got backbone \(Headless\)'):
        AuxiliaryHead(Headless(TinyNetwork()))
