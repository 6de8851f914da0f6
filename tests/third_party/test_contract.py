"""What the library asks of an adapter, of detectors that none of us wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import CrossHeadDistiller, DensePredictions, DetectorAdapter, EndToEndDetector
from crosskd_assign.detectors import probe_detector
from crosskd_assign.structures import Batch
from crosskd_assign.validation import validate_predictions
from tests.makers.small_models import scene, snapshot, total

Make = Callable[[], DetectorAdapter]
SIZES = ((96, 96), (96, 64))


def batch_of(adapter: DetectorAdapter, seed: int = 0) -> Batch:
    return adapter.preprocess(scene(SIZES, seed=seed)[0])[0]


def fields(predictions: DensePredictions) -> dict[str, Tensor]:
    return {name: value for name, value in vars(predictions).items() if isinstance(value, Tensor)}


def same(a: DetectorAdapter | nn.Module, before: dict[str, Tensor]) -> bool:
    after = a.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


def confident(adapter: DetectorAdapter) -> DetectorAdapter:
    """Raises scores to 0.2 on the average: a fresh network is sure of nothing, and would have nothing to teach."""
    head, shift = adapter.head, list[Tensor]()

    def raised(features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        predictions = head(features, image_size)
        shift.append(-1.4 - predictions.logits.detach().mean())
        return replace(predictions, logits=predictions.logits + shift[0])

    adapter.head = raised  # type: ignore[method-assign]
    return adapter


@pytest.mark.parametrize("training", [False, True])
def test_predictions_have_their_shapes_and_lie_in_the_picture_in_both_modes(make: Make, training):
    adapter = make().train(training)
    batch = batch_of(adapter)
    predictions = adapter.head(adapter.features(batch), batch.image_size)
    validate_predictions(predictions, where="test", images=2)
    assert predictions.boxes.dtype == torch.float32
    assert all(bool(value.isfinite().all()) for value in fields(predictions).values())
    height, width = batch.images.shape[-2:]
    assert bool(((predictions.points > 0) & (predictions.points < torch.tensor([width, height]))).all())


def test_the_head_reads_its_arguments_alone_and_leaves_them_as_they_are(make: Make):
    adapter = make().eval()
    batch, other = batch_of(adapter), batch_of(adapter, seed=1)
    with torch.no_grad():
        features = adapter.features(batch)
        foreign = [torch.randn_like(x) * x.std() + x.mean() for x in features]
        copies = [x.clone() for x in foreign]
        first = fields(adapter.head(list(foreign), batch.image_size))
        assert all(torch.equal(x, copied) for x, copied in zip(foreign, copies, strict=True))
        adapter.head(features, batch.image_size)
        again = fields(adapter.head(list(foreign), other.image_size))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["logits"], fields(adapter.head(features, batch.image_size))["logits"])


def test_probing_and_detecting_leave_weights_statistics_and_modes_alone(make: Make):
    adapter = make().train()
    before = snapshot(adapter)
    probe = probe_detector(adapter)
    assert not probe.edits_features
    assert all(module.training for module in adapter.modules())
    assert probe.strides == sorted(set(probe.strides))
    EndToEndDetector(adapter).eval()(scene(SIZES)[0])
    assert same(adapter, before)
    maps = adapter.features(batch_of(adapter))
    assert [x.shape[1] for x in maps] == [level.channels for level in probe.levels]


def test_one_to_one_training_reaches_every_parameter_that_is_not_frozen(make: Make):
    detector = EndToEndDetector(make().requires_grad_(True)).train()
    total(detector(*scene(SIZES, classes=3))).backward()  # type: ignore[no-untyped-call]
    missing = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    unused = {id(p) for p in detector.adapter.unused_parameters()}
    assert {id(p) for p in detector.parameters() if not p.requires_grad} >= unused


def test_half_precision_leaves_boxes_and_losses_in_float32(make: Make):
    distiller = CrossHeadDistiller(make().requires_grad_(True), make()).train()
    student = distiller.detector.adapter
    batch = batch_of(student)
    with torch.autocast("cpu", torch.bfloat16):
        assert student.head(student.features(batch), batch.image_size).boxes.dtype == torch.float32
        losses = distiller(*scene(SIZES))
    assert all(loss.dtype == torch.float32 and bool(loss.isfinite()) for loss in losses.values())


def test_a_copy_stands_by_itself(make: Make):
    adapter = make().eval()
    copied = copy.deepcopy(adapter)
    for parameter in adapter.parameters():
        parameter.data.zero_()
    images = scene(((64, 128),), boxes=1)[0]
    for other in (adapter, copied):
        batch, _ = other.preprocess(images)
        spread = other.head(other.features(batch), batch.image_size).logits.std()
        assert (float(spread.detach()) > 0.01) == (other is copied)


def test_the_teachers_head_predicts_the_same_for_a_student_with_its_weights(make: Make):
    student, teacher = make().eval(), make()
    distiller = CrossHeadDistiller(student, teacher)
    batch = batch_of(student)
    with torch.no_grad():
        maps, predictions = distiller.teacher_pass(batch)
        aligned = distiller.aligner(student.features(batch), maps)
        on_teacher, cross = fields(predictions), fields(distiller.run_teacher_head(aligned, batch.image_size))
    for name, value in on_teacher.items():
        torch.testing.assert_close(cross[name], value, rtol=1e-3, atol=1e-3)


def test_a_few_steps_of_distillation_lower_the_loss_and_change_the_student_alone(make: Make):
    torch.manual_seed(0)  # some drop paths at random
    student, teacher = make(), confident(make())
    with torch.no_grad():  # another network of its kind
        for parameter in teacher.parameters():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn_like(parameter))
    distiller = CrossHeadDistiller(student.requires_grad_(True), teacher).train()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    images, targets = scene(SIZES, boxes=3)

    distilled = {name: loss for name, loss in distiller(images, targets).items() if name.startswith("distill_")}
    total(distilled).backward()  # type: ignore[no-untyped-call]
    first = next(p for p in student.part("backbone").parameters() if p.requires_grad)
    assert first.grad is not None  # the teacher's head alone teaches the very first layer
    assert float(first.grad.abs().max()) > 0

    before, kept = [p.detach().clone() for p in trained], snapshot(teacher)
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    history = []
    for _ in range(20):
        loss = total(distiller(images, targets))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-5:]) < 0.95 * sum(history[:5]), history
    assert same(teacher, kept)
    changed = [not torch.equal(a, b) for a, b in zip(before, trained, strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # a level without objects has biases that stay at 0
