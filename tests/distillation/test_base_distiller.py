"""`Distiller`: what a subclass with one method inherits, and what it is given."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import AuxiliaryHead, CrossHeadDistiller, Distiller, EndToEndDetector, functional
from crosskd_assign.errors import IncompatibleDetectorsError, MissingTeacherError, OptionError, PredictionError
from crosskd_assign.structures import ForwardPass
from tests.makers.builders import TinyAdapter, TinyNetwork, random_images, random_targets, tiny_detector
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet, snapshot, total

SIZES = ((64, 90), (75, 64))


class OwnHeadImitation(Distiller):
    """The student's own head is pulled towards the teacher's predictions."""

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        _, expected = self.teacher_pass(run.batch)
        loss = functional.cross_head_classification_loss(
            run.predictions.logits, expected.logits, normalizer=float(len(run.batch.images))
        )
        return {"own": loss}


class FeatureImitation(Distiller):
    """Has a parameter of its own."""

    def __init__(self, *detectors: Any, **options: Any) -> None:
        super().__init__(*detectors, **options)
        self.scale = nn.Parameter(torch.ones(()))

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        maps = self.teacher_maps(run.batch)
        gaps = [(self.scale * run.maps[level.student] - maps[level.teacher]).square().mean() for level in self.levels]
        return {"near": torch.stack(gaps).sum(), "spread": self.scale.square()}


class Keeps(Distiller):
    """Keeps what it is given."""

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        self.seen = run
        return {}


class EditsInPlace(TinyAdapter):
    """A head that begins with an in-place operation, which the rest of it needs."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> Any:
        return super().head([x.relu_() for x in features], image_size)


def editing_detector(seed: int = 0) -> EditsInPlace:
    torch.manual_seed(seed)
    return EditsInPlace(TinyNetwork())


SUBCLASSES = [OwnHeadImitation, FeatureImitation, CrossHeadDistiller]
each_subclass = pytest.mark.parametrize("kind", SUBCLASSES)


def pair(kind: type[Distiller], **options: Any) -> Any:
    return kind(tiny_detector(1, batch_norm=True), tiny_detector(2, batch_norm=True), **options).train()


def call(distiller: Any, seed: int = 0) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = distiller(random_images(seed=seed), random_targets((2, 1), seed=seed))
    return losses


def loaded(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- the one method ---------------------------------------------------------------------------------------------------


def test_distill_is_abstract():
    with pytest.raises(TypeError, match=r"abstract.*distill"):
        Distiller(tiny_detector(1), tiny_detector(2))
    assert Distiller.__abstractmethods__ == {"distill"}


@pytest.mark.parametrize("kind", [OwnHeadImitation, FeatureImitation])
def test_a_subclass_with_one_method_trains(kind):
    distiller = pair(kind)
    teacher = snapshot(distiller.teacher)
    optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(15):
        loss = total(call(distiller))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.8 * history[0]
    torch.testing.assert_close(snapshot(distiller.teacher), teacher, atol=0, rtol=0)
    (detection, _) = distiller.eval()(random_images())
    assert set(detection) == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_a_subclass_distils_torchvisions_detectors(kind):
    make = {"fcos": small_fcos, "retinanet": small_retinanet}[kind]
    distiller = OwnHeadImitation(make(1), make(2)).train()
    losses = distiller(*scene(SIZES))
    assert set(losses) == {"classification", "bbox_regression", "distill_own"}
    backward({"own": losses["distill_own"]})
    reached = gradients(distiller.detector.model)
    assert any(name.startswith("head.classification_head") for name in reached)
    assert any(name.startswith("backbone") for name in reached)


def test_the_base_adds_prefix_and_weight_and_leaves_the_detectors_losses_alone():
    distiller = pair(FeatureImitation)
    usual, detectors = call(distiller), call(distiller.detector)
    assert set(usual) == {"classification", "bbox_regression", "distill_near", "distill_spread"}
    assert distiller.distillation_weight == 1
    for weight in (0.0, 0.3, 2.0):
        distiller.distillation_weight = weight
        losses = call(distiller)
        for name, loss in losses.items():
            expected = weight * usual[name] if name.startswith("distill_") else detectors[name]
            torch.testing.assert_close(loss, expected, msg=name)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (torch.ones(()), "() torch.float32"),
        (None, "NoneType"),
        ({"far": torch.ones(2)}, "(2,) torch.float32 under 'far'"),
        ({"near": torch.ones(()), "far": 1.0}, "float under 'far'"),
    ],
)
def test_a_subclass_that_returns_no_dict_of_scalars_is_refused_by_name(returned, got):
    class Returns(Distiller):
        def distill(self, run: ForwardPass) -> Any:
            return returned

    with pytest.raises(PredictionError) as caught:
        call(pair(Returns))
    assert (caught.value.expected, caught.value.got) == ("a dict of scalar tensors", got)
    assert caught.value.where == "Returns.distill()"


def test_a_detector_that_was_trained_one_to_one_can_be_the_teacher():
    student, teacher = tiny_detector(1), tiny_detector(2)
    wrapped = OwnHeadImitation(student, EndToEndDetector(teacher))
    assert wrapped.teacher is teacher
    assert set(call(wrapped.train())) == set(call(OwnHeadImitation(student, teacher).train()))


def test_distillation_reaches_the_detections_of_no_distiller():
    distiller = pair(OwnHeadImitation).eval()
    torch.testing.assert_close(distiller(random_images()), distiller.detector(random_images()))


# --- the teacher is hidden, whatever the subclass ---------------------------------------------------------------------


@each_subclass
def test_the_teacher_is_in_no_list_of_the_distiller(kind):
    distiller = pair(kind)
    teacher = distiller.teacher
    foreign = {id(x) for x in (*teacher.parameters(), *teacher.buffers(), *teacher.modules())}
    assert not foreign & {id(x) for x in (*distiller.parameters(), *distiller.buffers(), *distiller.modules())}
    tensors = distiller.state_dict(keep_vars=True).values()
    assert not foreign & {id(x) for x in tensors}
    assert len(distiller.state_dict()) == len(distiller.detector.state_dict()) + int(kind is FeatureImitation)


@each_subclass
def test_the_teacher_stays_frozen_and_in_evaluation_mode(kind):
    distiller = pair(kind)
    before = snapshot(distiller.teacher)
    for mode in (True, False, True):
        distiller.train(mode)
        assert distiller.detector.training is mode
        assert not any(module.training for module in distiller.teacher.modules())
    backward(call(distiller))
    assert not gradients(distiller.teacher)
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    distiller.teacher.train()  # a caller who holds the network
    call(distiller)
    torch.testing.assert_close(snapshot(distiller.teacher), before, atol=0, rtol=0)


@each_subclass
def test_the_teacher_follows_conversions(kind):
    distiller = pair(kind).double()
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
    losses = distiller([x.double() for x in random_images()], random_targets((2, 1)))
    assert all(loss.isfinite() for loss in losses.values())


@each_subclass
@pytest.mark.parametrize("duplicate", [copy.deepcopy, loaded], ids=["deepcopy", "pickle"])
def test_copies_leave_the_teacher_behind_and_take_another(kind, duplicate):
    distiller = pair(kind)
    distiller.distillation_weight = 0.5
    losses = call(distiller)
    twin = duplicate(distiller)
    torch.testing.assert_close(twin.eval()(random_images()), distiller.eval()(random_images()))
    twin.train()
    distiller.train()
    assert type(twin) is kind
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in distiller.parameters())
    with pytest.raises(MissingTeacherError, match="attach_teacher"):
        call(twin)
    assert repr(twin).count("teacher=None") == 1
    assert twin.attach_teacher(tiny_detector(2, batch_norm=True)) is twin
    torch.testing.assert_close(call(twin), call(distiller))
    assert set(losses) == set(call(twin))


@each_subclass
def test_a_teacher_that_is_the_student_is_refused(kind):
    student = tiny_detector(1)
    with pytest.raises(IncompatibleDetectorsError, match="shared parameters"):
        kind(student, student)
    with pytest.raises(IncompatibleDetectorsError, match="shared parameters"):
        kind(EndToEndDetector(student), student)


def test_branches_that_a_subclass_needs_are_looked_for_in_the_teachers_head():
    assert Keeps(tiny_detector(1), tiny_detector(2), branches=("quality",)).branches == ("quality",)
    with pytest.raises(IncompatibleDetectorsError, match="a head that predicts distribution"):
        Keeps(tiny_detector(1), tiny_detector(2), branches=("quality", "distribution"))
    plain = Keeps(tiny_detector(1), small_fcos(2), branches=("quality",))
    with pytest.raises(IncompatibleDetectorsError, match="a head that predicts quality"):
        plain.attach_teacher(small_retinanet(2))


@pytest.mark.parametrize("entry", [-1, 0.5, "1"])
def test_an_entry_that_is_no_natural_number_is_refused(entry):
    with pytest.raises(OptionError, match="entry of 0 or more"):
        Keeps(tiny_detector(1), tiny_detector(2), entry=entry)


# --- what distill() is given ------------------------------------------------------------------------------------------


def test_a_run_holds_the_batch_and_targets_in_its_pixels():
    distiller = Keeps(small_fcos(1, min_size=128, max_size=256), small_fcos(2)).train()
    images, targets = scene(((64, 90), (64, 64)))
    distiller(images, targets)
    run = distiller.seen
    assert run.batch.original_sizes == ((64, 90), (64, 64))
    assert run.batch.sizes == ((128, 180), (128, 128))  # twice as large
    assert run.batch.image_size == (128, 192)
    assert run.batch.images.shape == (2, 3, 128, 192)
    for moved, target in zip(run.targets, targets, strict=True):
        torch.testing.assert_close(moved["boxes"], 2 * target["boxes"])
        assert torch.equal(moved["labels"], target["labels"])


def test_a_run_holds_features_maps_and_the_predictions_made_of_them():
    distiller = Keeps(small_fcos(1), small_fcos(2)).eval()
    adapter = distiller.detector.adapter
    images, _ = scene(SIZES)
    run = distiller.detector.run(images, entry=distiller.student_entry)
    assert run.targets == []
    assert all(a is b for a, b in zip(run.maps, run.features, strict=True))
    torch.testing.assert_close(run.features, adapter.features(run.batch))
    torch.testing.assert_close(run.predictions.logits, adapter.head(run.features, run.batch.image_size).logits)


def test_with_an_entry_the_maps_lie_behind_the_heads_first_convolutions():
    distiller = Keeps(small_retinanet(1), small_retinanet(2), entry=2).train()
    images, targets = scene(SIZES)
    distiller(images, targets)
    run, adapter = distiller.seen, distiller.detector.adapter
    stem = adapter.head_stem(run.features, 2)
    torch.testing.assert_close(run.maps, [*stem["classification"], *stem["regression"]])
    assert len(run.maps) == 2 * len(run.features) == len(distiller.levels)
    whole = adapter.head(run.features, run.batch.image_size)
    torch.testing.assert_close((run.predictions.logits, run.predictions.boxes), (whole.logits, whole.boxes))


@pytest.mark.parametrize("wrapped", ["auxiliary", "distiller", "both"])
def test_features_of_a_run_are_unedited_although_the_head_edits_in_place(wrapped):
    student = editing_detector(1)
    auxiliary = None if wrapped == "distiller" else AuxiliaryHead(student)
    detector = EndToEndDetector(student, auxiliary=auxiliary).train()
    images, targets = random_images(), random_targets((2, 1))
    if wrapped == "auxiliary":
        run = detector.run(images, targets)
        detector.losses(run)
    else:
        distiller = Keeps(detector, editing_detector(2)).train()
        distiller(images, targets)
        run = distiller.seen
    clean = student.features(run.batch)
    torch.testing.assert_close(run.features, clean, atol=0, rtol=0)
    assert all((x < 0).any() for x in run.features), "nothing that an edit would change"
    whole = student.head([x.clone() for x in clean], run.batch.image_size)
    torch.testing.assert_close(run.predictions.logits, whole.logits)


def test_teacher_pass_has_no_graph_and_its_head_has_one_where_the_maps_have():
    distiller = pair(OwnHeadImitation)
    run = distiller.detector.run(random_images(), random_targets((2, 1)))
    maps, predictions = distiller.teacher_pass(run.batch)
    assert not any(x.requires_grad for x in (*maps, predictions.logits, predictions.boxes))
    teacher = distiller.teacher
    torch.testing.assert_close(maps, teacher.features(run.batch))
    torch.testing.assert_close(predictions.boxes, teacher.head(maps, run.batch.image_size).boxes)
    crossed = distiller.run_teacher_head(run.maps, run.batch.image_size)
    assert crossed.logits.requires_grad
