"""``CrossHeadDistiller(entry=k)``: the student enters the teacher's head behind k convolutions of its own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

from crosskd_assign import CrossHeadDistiller, DensePredictions, EndToEndDetector, GridLevel, adapt, errors
from crosskd_assign.diagnostics import cross_head_detections
from tests.makers.small_models import CLASSES, backward, gradients, scene, small_fcos, small_retinanet, snapshot

SIZES = ((64, 90), (75, 64))


def fcos(seed: int = 0, *, convs: int = 3, classes: int = CLASSES, channels: int = 32, **options: Any) -> FCOS:
    """A small FCOS with ``convs`` convolutions in each tower, of weights that say something."""
    model = small_fcos(seed, classes=classes, channels=channels, **options)
    model.head = FCOSHead(channels, 1, classes, num_convs=convs)
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    with torch.no_grad():  # distances go through a ReLU, and an empty box overlaps not even itself
        model.head.regression_head.bbox_reg.weight.mul_(0.1)
        model.head.regression_head.bbox_reg.bias.fill_(2.0)
        model.head.classification_head.cls_logits.bias.fill_(-1.0)
    return model


MODELS = {
    "fcos": fcos,
    "fcos of one convolution": lambda seed=0, **options: fcos(seed, convs=1, **options),
    "retinanet": small_retinanet,
    "retinanet v2": lambda seed=0, **options: small_retinanet(seed, version=2, **options),
    "retinanet with batch norm": lambda seed=0, **options: small_retinanet(seed, norm="batch", **options),
}


def fields(predictions: DensePredictions) -> dict[str, Tensor]:
    names = ("logits", "boxes", "points", "strides", "quality")
    return {name: value for name in names if (value := getattr(predictions, name)) is not None}


def convolutions(head: nn.Module) -> list[list[nn.Module]]:
    """The tower of each branch, convolution by convolution with what follows it."""
    towers = []
    for branch in (head.classification_head, head.regression_head):
        tower: list[list[nn.Module]] = []
        for layer in branch.conv:  # type: ignore[union-attr]
            if isinstance(layer, (nn.Conv2d, nn.Sequential)):
                tower.append([])
            tower[-1].append(layer)
        towers.append([nn.Sequential(*layers) for layers in tower])
    return towers  # type: ignore[return-value]


# --- splitting a head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_two_parts_of_a_head_say_exactly_what_the_whole_says(kind, training):
    model = MODELS[kind](min_size=128, max_size=200)
    adapter = adapt(model).train(training)
    images, _ = scene(SIZES)
    batch, _ = adapter.preprocess(images)
    features = [x.detach() for x in adapter.features(batch)]
    before = [x.clone() for x in features]
    assert adapter.max_entry == {"fcos": 3, "fcos of one convolution": 1}.get(kind, 4)
    whole = fields(adapter.head(features, batch.image_size))
    for k in range(adapter.max_entry + 1):
        maps = adapter.head_stem(features, k)
        assert set(maps) == {"classification", "regression"}
        assert all(len(branch) == len(features) for branch in maps.values())
        kept = {name: [x.clone() for x in branch] for name, branch in maps.items()}
        parts = fields(adapter.head_rest(maps, k, batch.image_size))
        torch.testing.assert_close(parts, whole, atol=0, rtol=0)
        torch.testing.assert_close(maps, kept, atol=0, rtol=0)
        for name, tower in zip(("classification", "regression"), convolutions(model.head), strict=True):
            if not training:  # in training mode batch norm would count twice
                expected = nn.Sequential(*tower[:k])(before[0])
                torch.testing.assert_close(maps[name][0], expected, atol=0, rtol=0)
    torch.testing.assert_close(features, before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_the_two_parts_of_a_head_learn_what_the_whole_learns(kind):
    model = MODELS[kind]()
    adapter = adapt(model).eval()
    batch, _ = adapter.preprocess(scene(SIZES)[0])
    results = []
    for k in (None, *range(adapter.max_entry + 1)):
        model.zero_grad()
        features = adapter.features(batch)
        if k is None:
            predictions = adapter.head(features, batch.image_size)
        else:
            predictions = adapter.head_rest(adapter.head_stem(features, k), k, batch.image_size)
        backward({"loss": predictions.logits.square().mean() + predictions.boxes.mean()})
        results.append(gradients(model))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-5)


def test_a_compiled_or_hooked_head_is_split_as_it_was():
    model = fcos().eval()
    adapter = adapt(model)
    batch, _ = adapter.preprocess(scene()[0])
    features = adapter.features(batch)
    whole = adapter.head(features, batch.image_size)
    model.head.classification_head.register_forward_hook(lambda *_: torch.zeros(1))
    model.head.classification_head._compiled_call_impl = lambda *_: torch.zeros(1)  # what module.compile() leaves
    parts = adapter.head_rest(adapter.head_stem(features, 2), 2, batch.image_size)
    torch.testing.assert_close(fields(parts), fields(whole), atol=0, rtol=0)


class OtherHead(nn.Module):
    """Some head of one's own in a torchvision model."""

    def __init__(self) -> None:
        super().__init__()
        self.classification_head = nn.Conv2d(32, CLASSES, 1)
        self.regression_head = nn.ModuleDict({"sides": nn.Conv2d(32, 4, 1), "bbox_ctrness": nn.Conv2d(32, 1, 1)})

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        classes, sides, centerness = (
            torch.cat([branch(x).flatten(2).transpose(1, 2) for x in features], 1)
            for branch in (self.classification_head, *self.regression_head.values())
        )
        return {"cls_logits": classes, "bbox_regression": sides.exp(), "bbox_ctrness": centerness}


def test_a_torchvision_model_with_a_head_of_its_own_works_but_cannot_be_split():
    student = small_fcos(1)
    student.head = OtherHead()
    assert adapt(student).max_entry == 0
    losses = CrossHeadDistiller(student, fcos(2))(*scene())
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(errors.IncompatibleDetectorsError, match=r"entry of 0.*cannot be split.*got 1 \(student FCOSA"):
        CrossHeadDistiller(student, fcos(2), entry=1)


# --- crossing there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_a_student_equal_to_its_teacher_gets_the_teachers_predictions_and_no_loss(k):
    student = fcos(3)
    teacher = copy.deepcopy(student)
    distiller = CrossHeadDistiller(student, teacher, entry=k)
    losses = distiller(*scene(SIZES))
    assert float(losses["distill_classification"].detach()) < 1e-4
    assert float(losses["distill_bbox_regression"].detach()) < 1e-4
    with torch.no_grad():  # what follows the entrance plays no part, what comes before it does
        student.head.classification_head.cls_logits.weight.zero_()
    assert float(distiller(*scene(SIZES))["distill_classification"].detach()) < 1e-4
    with torch.no_grad():
        student.head.classification_head.conv[0].weight.mul_(-1)
    assert float(distiller(*scene(SIZES))["distill_classification"].detach()) > 0.01


@pytest.mark.parametrize("alignment", ["statistics", "none"])
@pytest.mark.parametrize(("student", "teacher", "k"), [("fcos", "retinanet", 1), ("retinanet v2", "fcos", 3)])
def test_cross_predictions_are_the_teachers_tower_from_there_on_upon_the_students_up_to_there(
    student, teacher, k, alignment
):
    mine, other = MODELS[student](1), MODELS[teacher](2)
    distiller = CrossHeadDistiller(mine, other, entry=k, alignment=alignment)
    adapter = distiller.detector.adapter
    batch, _ = adapter.preprocess(scene(SIZES)[0])
    features = adapter.features(batch)
    own = distiller.student_entry.maps(adapter, features)
    cross = distiller.run_teacher_head(distiller.aligner(own, distiller.teacher_maps(batch)), batch.image_size)

    tower, teacher_tower = convolutions(mine.head)[0], convolutions(other.head)[0]  # of the class branch
    rows = []
    for own, theirs in zip(features, distiller.teacher.features(batch), strict=True):
        x, y = nn.Sequential(*tower[:k])(own), nn.Sequential(*teacher_tower[:k])(theirs)
        if alignment == "statistics":
            gain = y.std((0, 2, 3), correction=0, keepdim=True).square().add(1e-5).sqrt()
            gain = gain / x.std((0, 2, 3), correction=0, keepdim=True).square().add(1e-5).sqrt()
            x = (x - x.mean((0, 2, 3), keepdim=True)) * gain + y.mean((0, 2, 3), keepdim=True)
        z = other.head.classification_head.cls_logits(nn.Sequential(*teacher_tower[k:])(x))
        rows.append(z.unflatten(1, (-1, CLASSES)).permute(0, 3, 4, 1, 2).flatten(1, 3))
    torch.testing.assert_close(cross.logits, torch.cat(rows, dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("loss", ["distill_classification", "distill_bbox_regression"])
def test_the_cross_loss_teaches_the_trunk_and_the_first_convolutions_of_its_branch_and_nothing_behind(k, loss):
    student = small_retinanet(1, min_size=128, max_size=200)
    distiller = CrossHeadDistiller(student, small_retinanet(2), entry=k)
    backward({loss: distiller(*scene(SIZES))[loss]})
    branch = "classification_head" if loss == "distill_classification" else "regression_head"
    expected = {f"head.{branch}.conv.{i}.0.{name}" for i in range(k) for name in ("weight", "bias")}
    expected |= {name for name, _ in student.named_parameters() if name.startswith("backbone.")}
    reached = gradients(student)
    assert set(reached) == expected
    for name, gradient in reached.items():
        assert gradient.isfinite().all(), name
        if gradient.dim() > 1:
            assert gradient.abs().max() > 0, name
    assert not gradients(distiller.teacher)


def test_other_channels_pass_one_convolution_for_every_map_of_every_branch():
    student = fcos(1, levels=3)
    distiller = CrossHeadDistiller(student, fcos(2, channels=64), entry=2)
    convs = [m for m in distiller.aligner.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(32, 64)] * 6
    backward({name: loss for name, loss in distiller(*scene(SIZES)).items() if name.startswith("distill_")})
    assert all(c.weight.grad is not None and c.weight.grad.abs().max() > 0 for c in convs)


@pytest.mark.parametrize(("student_levels", "teacher_levels"), [(5, 3), (3, 5)])
def test_levels_are_paired_by_stride_in_every_branch(student_levels, teacher_levels):
    distiller = CrossHeadDistiller(
        fcos(1, levels=student_levels), small_retinanet(2, levels=teacher_levels), entry=2, alignment="none"
    )
    adapter = distiller.detector.adapter
    batch, _ = adapter.preprocess(scene(SIZES)[0])
    maps, on_teacher = distiller.teacher_pass(batch)
    own = distiller.student_entry.maps(adapter, adapter.features(batch))
    cross = distiller.run_teacher_head(distiller.aligner(own, maps), batch.image_size)
    shared = on_teacher.strides <= 32
    for field in ("logits", "boxes"):
        mine, theirs = getattr(cross, field), getattr(on_teacher, field)
        assert not torch.isclose(mine[:, shared], theirs[:, shared]).all(dim=-1).any()
        torch.testing.assert_close(mine[:, ~shared], theirs[:, ~shared])


def test_the_students_convolutions_run_once_a_step():
    student = small_fcos(1, norm="batch", levels=3, _skip_resize=True)
    distiller = CrossHeadDistiller(student, small_fcos(2, levels=3), entry=1)
    distiller(*scene())
    assert student.head.classification_head.conv[1].num_batches_tracked == 3  # once a level


def test_the_students_own_losses_are_those_of_any_entry():
    images, targets = scene(SIZES)
    teacher = fcos(2)
    losses = [CrossHeadDistiller(fcos(1), teacher, entry=k)(images, targets) for k in range(4)]
    for other in losses[1:]:
        for name in ("classification", "bbox_regression"):
            torch.testing.assert_close(other[name], losses[0][name], atol=0, rtol=0)
        assert not torch.isclose(other["distill_classification"], losses[0]["distill_classification"], rtol=1e-3)


# --- copies, files, diagnostics ---------------------------------------------------------------------------------------


def test_a_copy_takes_a_teacher_at_the_same_entry_and_carries_none():
    images, targets = scene(SIZES)
    distiller = CrossHeadDistiller(fcos(1), fcos(2), entry=2)
    losses = distiller(images, targets)
    file = io.BytesIO()
    torch.save(distiller, file)
    own = io.BytesIO()
    torch.save([distiller.detector, distiller.aligner], own)
    assert len(file.getvalue()) < 1.1 * len(own.getvalue())
    twin = copy.deepcopy(distiller)
    assert twin.student_entry.convolutions == 2
    with pytest.raises(errors.IncompatibleDetectorsError, match="at most 1"):
        twin.attach_teacher(fcos(2, convs=1))
    torch.testing.assert_close(twin.attach_teacher(fcos(2))(images, targets), losses)


def test_the_teachers_head_on_an_equal_student_detects_what_the_teacher_detects():
    student = fcos(3)
    images, _ = scene(SIZES)
    found = []
    for k in (0, 2):
        distiller = CrossHeadDistiller(student, copy.deepcopy(student), entry=k, alignment="none").eval()
        found.append(cross_head_detections(distiller, images))
    torch.testing.assert_close(found[1], found[0])


def test_measuring_an_entrance_leaves_both_detectors_alone():
    student, teacher = (small_retinanet(seed, norm="batch") for seed in (1, 2))
    before = snapshot(student), snapshot(teacher)
    distiller = CrossHeadDistiller(student, teacher, entry=3)
    assert student.training
    assert EndToEndDetector(student).model is distiller.detector.model
    torch.testing.assert_close((snapshot(student), snapshot(teacher)), before, atol=0, rtol=0)


def test_grids_of_the_split_head_are_those_of_the_whole_one():
    adapter = adapt(fcos())
    batch, _ = adapter.preprocess(scene(SIZES)[0])
    features = adapter.features(batch)
    levels = adapter.head_rest(adapter.head_stem(features, 3), 3, batch.image_size).levels
    assert levels is not None
    assert all(isinstance(level, GridLevel) for level in levels)
    assert levels == adapter.head(features, batch.image_size).levels
