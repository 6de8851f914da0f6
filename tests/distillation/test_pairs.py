"""Unlike students and teachers, each pair trained for a few steps: the student learns, the teacher stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import CrossHeadDistiller, CrossHeadLoss, DetectorAdapter
from crosskd_assign.testing import check_adapter
from tests.detectors.test_functions_adapter import adapter as of_functions
from tests.detectors.test_functions_adapter import network
from tests.distillation.test_entry import fcos
from tests.makers import odd_detectors as odd
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet, snapshot

STEPS = 8
SIZES = ((64, 90), (75, 64))


class PerLevel(odd.Good):
    """One convolution for all levels, a batch norm for each (as in EfficientDet), and an activation in place."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        model.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(3))
        for norm in model.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def towers(self, features: list[Tensor]) -> list[Tensor]:
        norms: Any = self.model.norms
        convolution = self.model.tower[0]
        return [torch.relu_(norm(convolution(x))) for norm, x in zip(norms, features, strict=True)]


class InPlaceFirst(odd.Good):
    """Begins with an activation in place, which would edit the student's maps."""

    def towers(self, features: list[Tensor]) -> list[Tensor]:
        return super().towers([torch.nn.functional.silu(x, inplace=True) for x in features])


Maker = Callable[[], nn.Module]
PAIRS: dict[str, tuple[Maker, Maker, dict[str, Any]]] = {
    "a RetinaNet teaches an FCOS": (lambda: small_fcos(1), lambda: small_retinanet(2), {}),
    "an FCOS teaches a RetinaNet": (lambda: small_retinanet(1), lambda: small_fcos(2), {}),
    "91 classes teach 3": (lambda: small_fcos(1), lambda: small_retinanet(2, classes=91), {}),
    "256 channels teach 96": (lambda: small_fcos(1, channels=96), lambda: small_fcos(2, channels=256), {}),
    "P3 to P7 teach P3 to P5": (lambda: small_fcos(1, levels=3), lambda: small_fcos(2), {}),
    "other normalisation": (
        lambda: small_fcos(1, image_mean=(0.1, 0.9, 0.3), image_std=(0.5, 0.2, 0.7)),
        lambda: small_fcos(2, image_mean=(0, 0, 0), image_std=(1, 1, 1)),
        {},
    ),
    "a larger teacher": (lambda: fcos(1, convs=1, levels=3), lambda: fcos(2, convs=4, channels=64), {}),
    "batch norm in the teacher's head": (lambda: small_fcos(1), lambda: small_retinanet(2, norm="batch"), {}),
    "a norm for each level of the teacher": (
        lambda: small_fcos(1, levels=3),
        lambda: odd.build(PerLevel, 2),
        {"loss": CrossHeadLoss(box=2.0)},
    ),
    "a teacher that works in place": (lambda: small_fcos(1, levels=3), lambda: odd.build(InPlaceFirst, 2), {}),
    "a student of two functions": (lambda: of_functions(network(1)), lambda: small_fcos(2), {}),
    "a teacher of two functions": (lambda: small_retinanet(1), lambda: of_functions(network(2)), {}),
    "from inside the head, other channels and levels": (
        lambda: fcos(1, convs=2, levels=3),
        lambda: small_retinanet(2, channels=64, norm="batch"),
        {"entry": 2},
    ),
    "from inside the head, with centerness": (
        lambda: fcos(1),
        lambda: fcos(2),
        {"entry": 1, "loss": CrossHeadLoss(quality=1.0)},
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_trains(kind):
    torch.manual_seed(0)
    make_student, make_teacher, options = PAIRS[kind]
    student, teacher = make_student(), make_teacher()
    before = snapshot(teacher)
    distiller = CrossHeadDistiller(student, teacher, **options)
    learning = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3)
    images, targets = scene(SIZES)
    history = []
    for _ in range(STEPS):
        losses = distiller.train()(images, targets)
        optimizer.zero_grad()
        backward(losses)
        reached = gradients(distiller.detector.adapter.part("backbone"))
        assert reached
        assert all(gradient.isfinite().all() for gradient in reached.values())
        assert any(gradient.any() for gradient in reached.values())
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    for name in ("classification", "distill_classification"):
        assert history[-1][name] < 0.95 * history[0][name], history
    assert sum(history[-1].values()) < 0.9 * sum(history[0].values()), history
    for name, value in snapshot(teacher).items():
        assert torch.equal(value, before[name]), name
    assert not gradients(teacher)
    bridges = [m for m in distiller.aligner.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for m in bridges for p in m.parameters()} <= {id(p) for p in learning}
    assert not [name for name in distiller.detector.state_dict() if "aligner" in name]
    entries = distiller.student_entry, distiller.teacher_entry
    own, other = ({level.channels for level in entry.pyramid} for entry in entries)
    assert bool(bridges) == (own != other)
    with torch.no_grad():
        assert len(distiller.eval()(images)) == 2


@pytest.mark.parametrize("kind", [PerLevel, InPlaceFirst])
def test_the_adapters_of_these_tests_are_good(kind):
    adapter: DetectorAdapter = odd.build(kind)
    report = check_adapter(adapter, *scene())
    assert report.ok, str(report)
