"""A step on an accelerator: what the host waits for, and when; on one that there is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import AuxiliaryHead, CrossHeadDistiller, EndToEndDetector, TaskAwareOneToOneAssigner
from crosskd_assign.assignment import candidates, lookup
from crosskd_assign.structures import Assignment, DensePredictions, Target
from tests.makers.accelerators import Away, FakeAccelerator
from tests.makers.builders import GRIDS, random_images, random_predictions, random_targets, tiny_detector
from tests.makers.small_models import small_fcos, small_retinanet

FIELDS = ("image", "point", "target", "metric", "fallback")


class Stream:
    """A stream whose work is done as soon as somebody waits for it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def record_event(self) -> Stream:
        self.events.append("sends to the host")
        return self

    def synchronize(self) -> None:
        self.events.append("waits for what was sent")


@pytest.fixture(params=["cuda"])
def accelerator(request, monkeypatch) -> Iterator[FakeAccelerator]:
    fake = FakeAccelerator(request.param)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(fake.events))
    candidates._grids.cache_clear()
    lookup._has_float64.cache_clear()
    yield fake
    candidates._grids.cache_clear()
    lookup._has_float64.cache_clear()


def away(x: Any) -> Any:
    """The same on the device."""
    if isinstance(x, dict):
        return {key: away(value) for key, value in x.items()}
    return [away(y) for y in x] if isinstance(x, list) else x if x is None else Away(x)


def tiny_pair(**options: Any) -> CrossHeadDistiller:
    return CrossHeadDistiller(EndToEndDetector(tiny_detector(0), **options), tiny_detector(1))


def with_auxiliary_head() -> CrossHeadDistiller:
    student = tiny_detector(0)
    return CrossHeadDistiller(EndToEndDetector(student, auxiliary=AuxiliaryHead(student)), tiny_detector(1))


PAIRS = {
    "tiny": tiny_pair,
    "an auxiliary head": with_auxiliary_head,
    "FCOS": lambda: CrossHeadDistiller(small_fcos(), small_fcos(seed=1)),
    "RetinaNet from FCOS": lambda: CrossHeadDistiller(small_retinanet(), small_fcos(seed=1)),
}


def step(distiller: CrossHeadDistiller, images: Any, targets: Any) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The losses and gradients of one step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # networks that have learnt nothing look odd
        losses = distiller(images, targets)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    return {key: loss.detach() for key, loss in losses.items()}, list(
        torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
    )  # type: ignore[arg-type]


def tell(module: nn.Module, name: str, events: list[str]) -> None:
    for part in module.modules():
        part.register_forward_hook(lambda *_: events.append(name))


@pytest.mark.parametrize("accelerator", ["cuda", "mps"], indirect=True)
@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_are_those_of_a_cpu_to_the_last_bit(accelerator, name):
    images, targets = random_images(3), [*random_targets([3, 9], kind="crowded"), None]
    expected, slopes = step(PAIRS[name](), images, targets)
    distiller = PAIRS[name]()
    with accelerator:
        accelerator.carry(distiller)
        accelerator.carry(distiller.teacher)
        found, gradients = step(distiller, away(images), away(targets))
    assert {key: float(loss.held) for key, loss in found.items()} == {key: float(x) for key, x in expected.items()}
    # Features that three heads learn from get the sum of three gradients, here in another order.
    tolerance = 1e-6 if name == "an auxiliary head" else 0
    for gradient, slope in zip(gradients, slopes, strict=True):
        here = None if gradient is None else gradient.held
        torch.testing.assert_close(here, slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["tiny", "FCOS", "RetinaNet from FCOS"])
def test_the_teacher_is_queued_before_the_host_waits_and_nothing_else_is_waited_for(accelerator, name):
    distiller = PAIRS[name]()
    events = accelerator.events
    tell(distiller.detector.adapter.part("head"), "student's head", events)
    tell(distiller.teacher.part("head"), "teacher's head", events)
    images, targets = random_images(3), [*random_targets([3, 9]), None]
    with accelerator:
        accelerator.carry(distiller)
        accelerator.carry(distiller.teacher)
        step(distiller, away(images), away(targets))  # looks at all that comes in, and makes what is kept
        events.clear()
        step(distiller, away(images), away(targets))
    told = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]  # a head calls its parts once a level
    begin = told.index("student's head")
    assert told[begin:] == ["student's head", "sends to the host", "teacher's head", "waits for what was sent"]


class Called(TaskAwareOneToOneAssigner):
    """One with a call of its own, which `begin` knows nothing of."""

    def __call__(self, predictions: DensePredictions, targets: Any) -> Assignment:
        assignment = super().__call__(predictions, targets)
        return replace(assignment, metric=assignment.metric + 1)


@pytest.mark.parametrize("assigner", [Called(), TaskAwareOneToOneAssigner()], ids=["class", "any"])
def test_an_assigner_that_cannot_be_begun_is_called(accelerator, assigner):
    calls = []

    def assign(predictions: DensePredictions, targets: list[Target]) -> Assignment:
        calls.append(assigner(predictions, targets))
        return calls[-1]

    distiller = tiny_pair(assigner=assign)
    images, targets = random_images(2), random_targets([3, 9])
    expected, _ = step(distiller, images, targets)
    distiller.detector.assigner = assigner if isinstance(assigner, Called) else assign
    with accelerator:
        accelerator.carry(distiller)
        accelerator.carry(distiller.teacher)
        run = distiller.detector.run(away(images), away(targets))
        assert not distiller.detector.begin(run)
        found, _ = step(distiller, away(images), away(targets))
    assert {key: float(loss.held) for key, loss in found.items()} == {key: float(x) for key, x in expected.items()}


def test_what_was_begun_for_another_pass_is_not_used(accelerator):
    detector = EndToEndDetector(tiny_detector(0))
    images, targets = random_images(2), random_targets([3, 9])
    with accelerator:
        accelerator.carry(detector)
        one, other = (detector.run(away(x), away(targets)) for x in (images, images[::-1]))
        expected = detector.losses(other)
        assert detector.begin(one)
        found = detector.losses(other)
        assert detector._begun is None
        for key, loss in found.items():
            assert torch.equal(loss.held, expected[key].held)


@pytest.mark.parametrize("accelerator", ["cuda", "mps"], indirect=True)
@pytest.mark.parametrize("with_levels", [True, False])
@pytest.mark.parametrize("levels", GRIDS[1:])
def test_assignments_are_those_of_a_cpu_also_where_there_is_no_float64_or_no_grid(accelerator, levels, with_levels):
    targets = random_targets([5, 0, 30], kind="crowded")
    predictions = random_predictions(targets, levels)
    predictions.logits[0, ::7] = torch.nan
    predictions = predictions if with_levels else replace(predictions, levels=None)
    expected = TaskAwareOneToOneAssigner()(predictions, targets)
    names = ("logits", "boxes", "points", "strides")
    there = replace(predictions, **{name: Away(getattr(predictions, name)) for name in names})
    with accelerator:
        found = TaskAwareOneToOneAssigner()(there, away(targets))
        assert lookup._has_float64(found.point.device) == (accelerator.device.type == "cuda")
    assert (found.unmatched, found.non_finite) == (expected.unmatched, expected.non_finite)
    for field in FIELDS:
        assert torch.equal(getattr(found, field).held, getattr(expected, field))


def test_the_fake_device_refuses_float64_as_apples_do_and_notices_what_is_waited_for(accelerator):
    with accelerator:
        x = torch.arange(3, device="cuda")
        assert (type(x), x.device.type, float(x.sum()), x.cpu().tolist()) == (Away, "cuda", 3.0, [0, 1, 2])
        torch.tensor([1], device="cuda")
        x.nonzero()
    waits = ("_local_scalar_dense", "a copy to the host", "a copy to the device", "nonzero")
    assert accelerator.events == [f"waits for {what}" for what in waits]
    with FakeAccelerator("mps"), pytest.raises(TypeError, match="float64"):
        torch.arange(3, device="mps").double()
