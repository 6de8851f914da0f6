"""The first training step warns, once, of what looks wrong, and of nothing that is right."""

from __future__ import annotations

import copy
import linecache
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from crosskd_assign import CrossHeadDistiller, DetectorAdapter, EndToEndDetector, symptoms
from crosskd_assign.structures import DensePredictions, Target
from crosskd_assign.symptoms import (
    symptom_of_images,
    symptom_of_labels,
    symptom_of_levels,
    symptom_of_logits,
    symptom_of_quality,
    symptom_of_targets,
    symptom_of_teacher,
    worst_symptom,
)
from tests.makers import foreign
from tests.makers.builders import random_images, tiny_detector
from tests.makers.pages import headings, leads_somewhere
from tests.makers.small_models import scene, small_fcos, small_retinanet

SIZES = ((64, 64), (64, 64))


def messages(model: nn.Module, images: Any, targets: Any, steps: int = 3) -> list[str]:
    """What some steps of training warn of, in a loop that shows everything."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(images, targets)
    return [str(warning.message) for warning in caught]


def foreign_detector(kind: Any, network: Any = foreign.plain_network, levels: int = 3) -> DetectorAdapter:
    adapter: DetectorAdapter = foreign.seeded(lambda: kind(network(levels), **foreign.ImageNet))
    return adapter


# --- the first step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.RIGHT)
def test_a_right_detector_trains_without_a_warning(name):
    adapter = foreign.seeded(foreign.RIGHT[name])
    said = messages(EndToEndDetector(adapter), *scene(SIZES), steps=1)
    assert not said


def in_fractions(targets: list[Target]) -> list[Target]:
    return [{**target, "boxes": target["boxes"] / 64} for target in targets]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (foreign.SigmoidInTheHead, None, r"looks like probabilities.*before the sigmoid"),
        (foreign.LogSoftmaxInTheHead, None, r"logarithms of a softmax"),
        (foreign.Plain, lambda x, t: ([255 * i for i in x], t), r"pixels in 0…1, but got 0…255.*divide by 255"),
        (foreign.Plain, lambda x, t: ([(i - 0.45) / 0.22 for i in x], t), r"looks normalised already"),
        (foreign.Plain, lambda x, t: (x, in_fractions(t)), r"looks like fractions of the image"),
        # Of two, the worse: with pixels of another range nothing else can be judged.
        (foreign.SigmoidInTheHead, lambda x, t: ([255 * i for i in x], in_fractions(t)), r"pixels in 0…1"),
    ],
)
def test_the_first_step_warns_once_of_the_worst(kind, change, words):
    images, targets = scene(SIZES)
    if change is not None:
        images, targets = change(images, targets)
    detector = EndToEndDetector(foreign_detector(kind))
    (said,) = messages(detector, images, targets)
    assert re.search(words, said), said
    assert said.endswith("See docs/troubleshooting.md#warnings-of-the-first-step; check_adapter tells more.")
    assert messages(copy.deepcopy(detector), images, targets) == []
    assert len(messages(EndToEndDetector(foreign_detector(kind)), images, targets)) == 1


@pytest.mark.parametrize("through", ["call", "distiller", "another module", "losses"])
def test_the_warning_is_at_the_line_of_the_users_that_led_to_it(through):
    images, targets = scene(SIZES)
    images = [255 * x for x in images]
    detector = EndToEndDetector(tiny_detector())
    model: nn.Module = detector
    if through == "distiller":
        model = CrossHeadDistiller(detector, tiny_detector(1))
    if through == "another module":
        model = nn.Sequential(nn.Identity(), Unpacked(detector))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if through == "losses":
            detector.losses(detector.run(images, targets))  # HERE losses
        elif through == "another module":
            model((images, targets))
        else:
            model(images, targets)  # HERE call, HERE distiller
    [first, *_] = caught
    line = linecache.getline(first.filename, first.lineno)
    assert first.filename == __file__
    assert f"HERE {through}" in line, line


class Unpacked(nn.Module):
    """A user's module around a detector."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Any) -> Any:
        return self.detector(*batch)  # HERE another module


def test_other_ranks_and_evaluation_say_nothing(monkeypatch):
    images, targets = scene(SIZES)
    images = [255 * x for x in images]
    detector = EndToEndDetector(tiny_detector())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.eval()(images)
    monkeypatch.setattr("crosskd_assign.symptoms.is_first_rank", lambda: False)
    assert messages(detector.train(), images, targets) == []


def test_a_look_changes_no_loss_and_no_random_number():
    images, targets = scene(SIZES)
    first, second = EndToEndDetector(small_fcos()), EndToEndDetector(small_fcos())
    second.first_look.done = True
    outcomes = []
    for detector in (first, second):
        torch.manual_seed(0)  # torchvision draws a size
        outcomes.append((detector(images, targets), torch.get_rng_state()))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
def test_label_0_of_a_detector_that_learnt_labels_from_1_is_warned_of(build):
    model = build()
    last = model.head.classification_head.cls_logits
    with torch.no_grad():  # what training does with a channel that no object has; by channel of every anchor
        last.bias[:: model.head.classification_head.num_classes] = -9
        last.weight[:: model.head.classification_head.num_classes] = 0
    images, targets = scene(SIZES)
    assert {int(label) for target in targets for label in target["labels"]} == {1, 2}
    assert messages(EndToEndDetector(copy.deepcopy(model)), images, targets) == []
    shifted: list[Target] = [{**target, "labels": target["labels"] - 1} for target in targets]
    (said,) = messages(EndToEndDetector(model), images, shifted)
    assert re.search(r"labels that count from 1, but got label 0.* no score of it is above 0\.000", said)
    assert messages(EndToEndDetector(build()), images, shifted) == []  # fresh: labels may count from 0


def test_a_distiller_warns_of_its_teacher_too():
    images, targets = scene(SIZES)
    unsure = CrossHeadDistiller(small_fcos(1), small_retinanet(2, confidence=0.01, levels=5))
    with torch.no_grad():
        unsure.teacher.model.head.classification_head.cls_logits.bias.fill_(-12)
    (said,) = messages(unsure, images, targets)
    assert re.search(r"a teacher with scores above 0\.05, but got none above .*load its trained weights", said)

    squashed = CrossHeadDistiller(small_fcos(1), foreign_detector(foreign.SigmoidInTheHead))
    (said,) = messages(squashed, images, targets)
    assert "looks like probabilities" in said

    both = CrossHeadDistiller(foreign_detector(foreign.SigmoidInTheHead), unsure.teacher)
    assert len(messages(both, images, targets)) == 2
    assert messages(CrossHeadDistiller(small_fcos(1), small_fcos(2)), images, targets) == []


# --- what is right, and nearly wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: 1.15 * x - 0.1, lambda x: 0 * x, lambda x: 0 * x + 1, lambda x: x * float("nan")],
    ids=["pixels", "overshooting", "black", "white", "NaN"],
)
def test_images_of_right_range_are_no_symptom(change):
    assert symptom_of_images([change(x) for x in random_images(3)]) is None


def boxes(*rows: tuple[float, ...]) -> list[Target]:
    return [{"boxes": torch.tensor(rows).reshape(-1, 4), "labels": torch.zeros(len(rows), dtype=torch.int64)}]


@pytest.mark.parametrize(
    "targets",
    [
        boxes(),
        [None],
        boxes((0, 0, 64, 48)),
        boxes((2, 3, 5, 4)),  # a small object near the origin
        boxes((-20, -3, 30, 40)),  # cropped without clipping
        boxes((50, 30, 76.5, 60)),
        boxes((1, 1, 9, 9), (8, 8, 20, 20), (30, 2, 20, 9)),  # one bad box, which the assigner names
        boxes((1, float("nan"), 9, 9)),
    ],
    ids=range(8),
)
def test_targets_of_right_form_are_no_symptom(targets):
    assert symptom_of_targets(targets, [(48, 64)]) is None


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    ("bias", "spread"),
    [(-4.6, 0.0), (-4.6, 1e-3), (-4.6, 1.0), (0.0, 0.0), (0.0, 1e-3), (0.0, 1.0), (0.5, 0.0), (0.5, 1.0), (3.0, 1e-3)],
)
def test_logits_of_fresh_heads_are_no_symptom(classes, bias, spread):
    logits = torch.full((2, 84, classes), bias) + spread * torch.randn(2, 84, classes)
    assert symptom_of_logits(logits) is None
    assert symptom_of_logits(logits + float("nan")) is None


@pytest.mark.parametrize(
    ("best", "labels"),
    [
        ([-4.6, -4.6, -4.6], [0]),  # a fresh head
        ([-5.4, -4.6, -4.6], [0]),
        ([-9.0, -9.0, -9.0], [0]),  # sure of nothing, of label 0 no less than of others
        ([-4.4, 2.0, 2.0], [0]),  # an object that is hard to see
        ([-9.0, -8.0, 2.0, -8.0], [0]),  # most other classes are not in the image, and as unlikely
        ([-9.0, 2.0, 2.0], [1, 2]),  # the background, and nothing has its label
        ([-9.0, 2.0, 2.0], []),
        ([-9.0], [0]),
        ([float("nan"), 2.0, 2.0], [0]),
    ],
)
def test_label_0_of_a_class_is_no_symptom(best, labels):
    logits = torch.full((2, 5, len(best)), -12.0)
    logits[1, 3] = torch.tensor(best)
    targets: list[Target | None] = [None, {"boxes": torch.zeros(len(labels), 4), "labels": torch.tensor(labels).long()}]
    assert symptom_of_labels(targets, logits) is None
    assert symptom_of_labels([None, None], logits) is None


@pytest.mark.parametrize("confidence", [0.01, 0.1, 0.3])
def test_a_centerness_is_no_objectness(confidence):
    adapter = EndToEndDetector(small_fcos(confidence=confidence)).adapter.eval()
    batch, _ = adapter.preprocess(scene(SIZES)[0])
    predictions = adapter.head(adapter.features(batch), batch.image_size)
    assert predictions.quality is not None
    assert symptom_of_quality(predictions) is None


def test_the_look_is_at_one_pass_as_training_makes_it():
    images, targets = scene(((96, 150), (64, 90)))
    detector = EndToEndDetector(small_fcos())
    run = detector.run(images, targets)
    assert worst_symptom(run) is None
    squashed = replace(run.predictions, logits=run.predictions.logits.sigmoid())
    assert "probabilities" in str(worst_symptom(replace(run, predictions=squashed)))


# --- where they are explained -----------------------------------------------------------------------------------------


def predicted(logits: float, quality: float | None = None) -> DensePredictions:
    """Nine points without ``levels``."""
    spread = torch.linspace(0, 1, 9)[None, :, None].expand(1, 9, 2)
    objectness = None if quality is None else torch.full((1, 9), quality)
    return DensePredictions(logits + spread, torch.zeros(1, 9, 4), torch.zeros(9, 2), torch.ones(9), objectness)


SYMPTOMS = {
    "symptom_of_images": lambda: symptom_of_images([torch.full((3, 4, 4), 255.0)]),
    "symptom_of_targets": lambda: symptom_of_targets(boxes((0.1, 0.1, 0.5, 0.5)), SIZES[:1]),
    "symptom_of_logits": lambda: symptom_of_logits(torch.rand(1, 9, 2)),
    "symptom_of_quality": lambda: symptom_of_quality(predicted(3, quality=-5)),
    "symptom_of_labels": lambda: symptom_of_labels(boxes((0, 0, 9, 9)), torch.tensor([[[-9.0, 2.0]]])),
    "symptom_of_levels": lambda: symptom_of_levels(predicted(3)),
    "symptom_of_teacher": lambda: symptom_of_teacher(predicted(-12)),
}


def test_each_symptom_has_a_section_with_its_words():
    assert leads_somewhere(symptoms.PAGE)
    assert set(SYMPTOMS) == {name for name in symptoms.__all__ if name.startswith("symptom_of_")}
    sections = headings(symptoms.PAGE.partition("#")[0])
    found = [find() for find in SYMPTOMS.values()]
    assert [f"Expected {symptom.expected}" for symptom in found if symptom] == [
        heading for heading in sections if heading.startswith("Expected ")
    ]
