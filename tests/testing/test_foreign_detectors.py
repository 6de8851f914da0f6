"""`check_adapter` and the first training step, on detectors as other code bases build them: nothing that trains is
refused, and each mistake is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder

from crosskd_assign import DensePredictions, GridLevel, TaskAwareOneToOneAssigner, functional, geometry
from crosskd_assign.errors import UnknownDetectorError
from crosskd_assign.structures import Batch, Target
from crosskd_assign.testing import AdapterCheck, AdapterReport, check_adapter
from tests.makers import foreign
from tests.makers.builders import TinyAdapter, TinyNetwork
from tests.makers.small_models import scene, small_fcos

SIZES = [((64, 64), (64, 64)), ((160, 150), (96, 130))]


def found(report: AdapterReport, name: str) -> AdapterCheck:
    return next(check for check in report.checks if check.name == name)


def problems(report: AdapterReport) -> list[str]:
    return [problem.name for problem in report.problems]


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", foreign.RIGHT)
def test_what_trains_is_found_right(name, sizes):
    adapter = foreign.seeded(foreign.RIGHT[name])
    report = check_adapter(adapter, *scene(sizes))
    assert report.ok, str(report)
    assert not [check.name for check in report.checks if check.outcome == "skipped"], str(report)


@pytest.mark.parametrize("strides", [(8, 8, 8), (8, 16, 16), (16, 16, 16), (8, 16, 64), (4, 8, 16)])
def test_a_grid_of_another_stride_than_its_map_is_named(strides):
    class Misplaced(TinyAdapter):
        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            right = super().head(features, image_size)
            levels = [GridLevel.of(x, stride) for x, stride in zip(features, strides, strict=True)]
            return DensePredictions.on_grid(right.logits, right.boxes, levels, right.quality)

    (first, *_) = check_adapter(Misplaced(TinyNetwork()), *scene(SIZES[0])).problems
    level = next(i for i, (own, right) in enumerate(zip(strides, (8, 16, 32), strict=True)) if own != right)
    assert first.name == "strides"
    assert first.got == f"stride {strides[level]}"
    assert first.where == f"Misplaced.head().levels[{level}]"


def test_a_model_is_checked_with_its_built_in_adapter_and_a_stranger_is_refused():
    assert check_adapter(small_fcos(), *scene(SIZES[0])).adapter == "FCOSAdapter"
    with pytest.raises(UnknownDetectorError, match="subclass DetectorAdapter"):
        check_adapter(nn.Linear(1, 1), *scene(SIZES[0]))


def test_what_builds_on_a_problem_takes_one_line_of_the_report():
    class Nothing(TinyAdapter):
        def features(self, batch: Batch) -> list[Tensor]:
            raise RuntimeError("no maps")

    report = check_adapter(Nothing(TinyNetwork()), *scene(SIZES[0]))
    waiting = [check for check in report.checks if check.outcome == "skipped"]
    assert len(waiting) > 10
    assert str(report).count("skipped") == 1
    assert f"skipped {len(waiting)} checks, which build on what is wrong" in str(report)


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (
            foreign.SigmoidInTheHead,
            "scores",
            r"class logits, but got what looks like probabilities.*before the sigmoid",
        ),
        (foreign.SoftmaxInTheHead, "scores", r"probabilities of a softmax.*sigmoid_logits\(scores\)"),
        (foreign.LogSoftmaxInTheHead, "scores", r"logarithms of a softmax.*sigmoid_logits\(scores\)"),
    ],
)
@pytest.mark.parametrize("classes", [2, 8])
def test_scores_that_are_no_logits_are_named(kind, check, words, classes):
    adapter = foreign.seeded(lambda: kind(foreign.plain_network(3, classes), **foreign.ImageNet))
    images, targets = scene(SIZES[0], classes=1)
    report = check_adapter(adapter, images, targets)
    if kind is not foreign.SoftmaxInTheHead or classes > 2:  # a single class behind the background has no sum
        assert re.search(words, found(report, check).sentence), str(report)
    assert problems(report) == [check]


@pytest.mark.parametrize("prior", [foreign.PRIOR, 0.0])
def test_an_objectness_in_quality_is_multiplied_in_and_never_frozen(prior):
    adapter = foreign.seeded(lambda: foreign.ObjectnessAsQuality(foreign.yolox_network(prior=prior)))
    report = check_adapter(adapter, *scene(SIZES[0]))
    assert problems(report) == ["unused parameters"]
    (problem,) = report.problems
    assert "none for obj.weight, obj.bias" in problem.got
    assert problem.fix.startswith("if quality is an objectness, give logits=functional.product_logits")

    # Trained, the objectness is low where nothing is, and the class is whatever it likes to be.
    with torch.no_grad():
        adapter.model.obj.bias.fill_(-8)
        adapter.model.cls.bias.fill_(-1)
    report = check_adapter(adapter, *scene(SIZES[0]))
    assert problems(report)[0] == "scores"
    assert re.search(r"looks like an objectness.*leave quality out.*product_logits", found(report, "scores").sentence)
    adapter.__class__ = foreign.YOLOX
    assert check_adapter(adapter, *scene(SIZES[0])).ok


def test_a_teacher_that_is_sure_of_nothing_is_a_note():
    report = check_adapter(foreign.fresh_retinanet(), *scene(SIZES[0]))
    assert found(report, "scores").outcome == "note"
    assert "a teacher would have nothing to teach, so load its weights first" in found(report, "scores").sentence


def test_predictions_without_levels_are_a_note_on_their_price():
    report = check_adapter(foreign.seeded(foreign.RIGHT["built by hand"]), *scene(SIZES[0]))
    assert found(report, "points").outcome == "note"
    assert "makes it wait in every step" in found(report, "points").sentence


def test_a_network_of_one_size_whose_images_all_have_it_is_right():
    adapter = foreign.seeded(
        lambda: foreign.FixedSize(foreign.fixed_network(384), size_divisible=384, **foreign.ImageNet)
    )
    report = check_adapter(adapter, *scene(((384, 384),) * 2))
    assert report.ok, str(report)
    assert found(report, "sizes").outcome == "note"
    assert "takes images of 384 × 384 alone" in found(report, "sizes").sentence
    assert problems(check_adapter(adapter, *scene(((384, 384), (300, 384))))) == ["sizes"]


def test_progress_is_every_check_as_it_is_done_and_reads_as_the_report_does():
    heard: list[AdapterCheck] = []
    report = check_adapter(foreign.seeded(foreign.RIGHT["YOLOv6"]), *scene(SIZES[0]), progress=heard.append)
    assert tuple(heard) == report.checks
    assert str(report).splitlines()[1:] == [line for check in heard for line in str(check).splitlines()]


class Counted(foreign.Plain):
    """Counts the images that go through it."""

    passed = 0

    def features(self, batch: Batch) -> list[Tensor]:
        Counted.passed += len(batch.images)
        return super().features(batch)

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        Counted.passed += len(features[0])
        return super().head(features, image_size)


def test_a_check_costs_a_few_dozen_passes():
    """On two cores a ResNet-50 detector needs a tenth of a second for each, at 256 pixels."""
    Counted.passed = 0
    assert check_adapter(foreign.seeded(lambda: Counted(foreign.plain_network())), *scene(((256, 256),) * 2)).ok
    assert Counted.passed <= 100


# --- what foreign code brings, as the guide has it --------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def row(start: str) -> list[str]:
    """All code that the guide's table has for a thing that foreign code brings."""
    guide = (ROOT / "docs/how-to/your-detector.md").read_text(encoding="utf-8")
    (line,) = [line for line in guide.splitlines() if line.startswith(f"| {start}")]
    return re.findall(r"`([^`]+)`", line.split("|")[2])


def test_the_guide_multiplies_class_and_objectness():
    classes, objectness = torch.randn(2, 5, 3), torch.randn(2, 5)
    names = {"class_logits": classes, "objectness_logits": objectness, "functional": functional}
    made = eval(row("a score that is class × objectness")[0].removeprefix("logits="), names)  # noqa: S307
    torch.testing.assert_close(made.sigmoid(), classes.sigmoid() * objectness.sigmoid()[..., None])


def test_the_guide_turns_a_softmax_into_logits():
    names = {"scores": torch.randn(2, 5, 4), "functional": functional}
    made = eval(row("a softmax with a background class")[0], names)  # noqa: S307
    torch.testing.assert_close(made.sigmoid(), names["scores"].softmax(dim=-1))


def test_the_guide_gives_a_network_of_bgr_and_255_what_it_is_used_to():
    adapter = foreign.seeded(foreign.RIGHT["NanoDet-Plus"])
    batch, _ = adapter.preprocess(scene(SIZES[0])[0])
    made = [eval(code, {"self": adapter, "batch": batch}) for code in row("pixels as BGR") if "(" in code]  # noqa: S307
    mean, std = (torch.tensor(foreign.BGR[name]).view(3, 1, 1) for name in ("mean", "std"))
    bgr = 255 * batch.images.flip(1)
    torch.testing.assert_close(made[0], (bgr - mean) / std)
    plain = foreign.seeded(foreign.RIGHT["YOLOX"])
    torch.testing.assert_close(eval(row("pixels as BGR")[-1], {"self": plain, "batch": batch}), bgr)  # noqa: S307


def test_the_guide_letterboxes():
    options = eval(f"dict({row('a letterbox or another resizing')[1]})")  # noqa: S307
    adapter = foreign.seeded(lambda: foreign.FixedSize(foreign.fixed_network(options["size"]), **options))
    image, target = torch.rand(3, 100, 200), torch.tensor([[20.0, 10, 120, 90]])
    batch, (moved,) = adapter.preprocess([image], [{"boxes": target, "labels": torch.tensor([0])}])
    assert batch.image_size == (640, 640)
    torch.testing.assert_close(moved["boxes"], 3.2 * target)


def test_the_guide_takes_anchors_without_a_grid():
    anchors = torch.tensor([[0.0, 0, 30, 20], [5, 9, 60, 50], [40, 40, 64, 64]])
    offsets, logits = 0.1 * torch.randn(2, 3, 4), torch.randn(2, 3, 2)
    code = row("anchors without a grid")
    boxes = eval(code[1], {"geometry": geometry})(anchors, offsets)  # noqa: S307
    oracle = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(offsets.reshape(-1, 4), [anchors, anchors]).reshape(2, 3, 4)
    torch.testing.assert_close(boxes, oracle)
    names = {"logits": logits, "boxes": boxes, "points": (anchors[:, :2] + anchors[:, 2:]) / 2}
    names |= {"strides": torch.tensor([8.0, 16, 8]), "DensePredictions": DensePredictions}  # type: ignore[dict-item]
    made = eval(code[0], names)  # noqa: S307
    targets = [Target(boxes=anchors[i : i + 1], labels=torch.tensor([i])) for i in (0, 1)]
    assert TaskAwareOneToOneAssigner()(made, targets).point.tolist() == [0, 1]


# --- images and targets -----------------------------------------------------------------------------------------------

MEAN, STD = (torch.tensor(foreign.ImageNet[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
WRONG_IMAGES: dict[str, tuple[Any, str]] = {
    "0…255": (lambda x: x * 255, r"pixels in 0…1, but got 0.*…255 \(images\).*divide by 255"),
    "0…65535": (lambda x: x * 65535, r"divide by 65535"),
    "normalised": (lambda x: (x - MEAN) / STD, r"looks normalised already.*pass pixels as they are"),
    "-1…1": (lambda x: 2 * x - 1, r"looks normalised already"),
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_images_of_another_range_are_named(name):
    change, words = WRONG_IMAGES[name]
    images, targets = scene(SIZES[0])
    report = check_adapter(foreign.seeded(foreign.RIGHT["five levels"]), [change(x) for x in images], targets)
    assert problems(report) == ["pixels"]
    assert re.search(words, found(report, "pixels").sentence)


def _centers(b: Tensor) -> Tensor:
    return torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], dim=1)


def _corners(b: Tensor) -> Tensor:
    return torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], dim=1)


WIDE = ((96, 160), (64, 128))
WRONG_BOXES: dict[str, tuple[Any, str]] = {
    "fractions": (lambda b, f: b / f, r"looks like fractions of the image.*multiply x by the width"),
    "centres": (lambda b, f: _centers(b), r"looks like cx, cy, w, h( or| \().*'cxcywh'"),
    "corners": (lambda b, f: _corners(b), r"looks like (cx, cy, w, h or )?x, y, w, h \(.*'xywh'"),
    "centres in fractions": (lambda b, f: _centers(b / f), r"cx, cy, w, h.* in fractions.*'cxcywh'.*then multiply"),
    "rows first": (lambda b, f: b[:, [1, 0, 3, 2]], r"looks like y1, x1, y2, x2.*swap"),
    "of a larger image": (lambda b, f: 3 * b, r"middle outside, as boxes of another image size.*scale boxes along"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRONG_BOXES)
def test_boxes_of_another_kind_are_named(name, seed):
    change, words = WRONG_BOXES[name]
    images, targets = scene(WIDE, boxes=6, seed=seed)
    wrong: list[Target] = []
    for image, target in zip(images, targets, strict=True):
        frame = torch.tensor([image.shape[2], image.shape[1]] * 2)
        wrong.append({**target, "boxes": change(target["boxes"], frame)})
    report = check_adapter(foreign.seeded(foreign.RIGHT["five levels"]), images, wrong)
    assert problems(report) == ["targets"]
    assert re.search(words, found(report, "targets").sentence), found(report, "targets").sentence


def test_many_boxes_that_all_lie_in_one_quarter_are_a_note():
    images, targets = scene(WIDE, boxes=10)
    halved: list[Target] = [{**target, "boxes": target["boxes"] / 2} for target in targets]
    report = check_adapter(foreign.seeded(foreign.RIGHT["five levels"]), images, halved)
    assert report.ok
    assert found(report, "targets").outcome == "note"
    assert (
        found(check_adapter(foreign.seeded(foreign.RIGHT["five levels"]), images, targets), "targets").outcome == "ok"
    )
