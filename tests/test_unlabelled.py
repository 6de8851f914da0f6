"""Images without labels, whose target is None: distillation alone learns from them, and they are no background."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_assign import (
    AuxiliaryHead,
    CrossHeadDistiller,
    EndToEndDetector,
    OneToOneLoss,
    ResizingAdapter,
    adapt,
)
from crosskd_assign.errors import TargetError
from crosskd_assign.structures import Target, labelled
from tests.makers.builders import TinyNetwork, random_images, random_targets, tiny_detector
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet

KINDS = {"tiny": tiny_detector, "fcos": small_fcos, "retinanet": small_retinanet}


def student(kind: str, *, auxiliary: bool = True, ranking: float = 0.1) -> EndToEndDetector:
    model: Any = KINDS[kind](1)
    head = AuxiliaryHead(model) if auxiliary and kind != "tiny" else None
    return EndToEndDetector(model, loss=OneToOneLoss(ranking=ranking), auxiliary=head).train()


def batch(kind: str) -> tuple[list[Tensor], list[Target]]:
    if kind == "tiny":
        return random_images(3), random_targets((2, 0, 1))
    return scene(((64, 64),) * 3, boxes=(2, 0, 1))


def losses_and_gradients(detector: EndToEndDetector, images: Any, targets: Any) -> tuple[dict[str, Tensor], Any]:
    detector.zero_grad()
    losses = detector.losses(detector.run(images, targets))
    backward(losses)
    return {name: loss.detach() for name, loss in losses.items()}, gradients(detector)


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_learns_what_it_would_learn_without_these_images(kind):
    detector = student(kind)
    images, targets = batch(kind)
    mixed = losses_and_gradients(detector, images, [targets[0], None, targets[2]])
    alone = losses_and_gradients(detector, [images[0], images[2]], [targets[0], targets[2]])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    background, _ = losses_and_gradients(detector, images, targets)  # the middle one has a target of no boxes
    assert background["classification"] > 1.01 * mixed[0]["classification"]


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_learns_from_them_as_from_any_image(kind):
    distiller = CrossHeadDistiller(student(kind), KINDS[kind](2), feature_weight=1.0)  # type: ignore[operator]
    images, targets = batch(kind)
    usual = distiller(images, targets)
    for given in ([None, targets[1], None], [None, None, None]):
        losses = distiller(images, given)
        assert set(losses) == set(usual)
        for name, loss in losses.items():
            if name.startswith("distill_"):
                torch.testing.assert_close(loss, usual[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_labels_reaches_every_parameter_with_losses_of_0(kind):
    # Or DistributedDataParallel would wait for the parameters that only the detector's own losses reach.
    detector = student(kind)
    images, _ = batch(kind)
    losses, found = losses_and_gradients(detector, images, [None] * 3)
    assert all(loss == 0 for loss in losses.values())
    assert set(found) == {name for name, p in detector.named_parameters() if p.requires_grad}
    assert all(not gradient.any() for gradient in found.values())


def test_without_distillation_they_are_refused_by_index():
    images, targets = batch("tiny")
    with pytest.raises(TargetError, match="only distillation learns from it") as caught:
        student("tiny")(images, [targets[0], None, targets[2]])
    assert caught.value.where == "targets[1]"


class Stretched(ResizingAdapter):
    """Resizes, as preprocess of many a detector does."""

    def features(self, batch: Any) -> list[Tensor]:
        raise NotImplementedError

    def head(self, features: Any, image_size: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "adapter",
    [
        tiny_detector(),
        adapt(small_fcos()),
        adapt(small_retinanet()),
        Stretched(TinyNetwork(), size=96, fit="letterbox"),
    ],
    ids=["plain", "fcos", "retinanet", "resizing"],
)
def test_preprocessing_moves_the_other_targets_and_keeps_their_places(adapter):
    images, targets = scene(((64, 90), (75, 64), (64, 64)), boxes=(2, 0, 1))
    _, all_moved = adapter.preprocess(images, targets)
    _, moved = adapter.preprocess(images, [targets[0], None, targets[2]])
    assert moved[1] is None
    assert torch.equal(moved[0]["boxes"], all_moved[0]["boxes"])
    assert torch.equal(moved[2]["boxes"], all_moved[2]["boxes"])


def test_predictions_of_a_labelled_batch_are_not_copied():
    detector = tiny_detector()
    images, targets = batch("tiny")
    run = EndToEndDetector(detector).run(images, targets)
    assert labelled(run.predictions, targets)[0] is run.predictions
