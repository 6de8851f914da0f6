"""Every error that bad input can cause: its type, and that its message says what, where and what to do."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crosskd_assign import (
    CrossHeadDistiller,
    CrossHeadLoss,
    DensePredictions,
    EndToEndDetector,
    OneToOneLoss,
    adapt,
    errors,
    inherit,
)
from crosskd_assign.distillation import FeatureAligner
from crosskd_assign.errors import (
    CrossKDError,
    DetectorError,
    ImageError,
    IncompatibleDetectorsError,
    MissingTeacherError,
    OptionError,
    PredictionError,
    TargetError,
    UnknownDetectorError,
)
from crosskd_assign.validation import (
    validate_images,
    validate_option,
    validate_predictions,
    validate_target_values,
    validate_targets,
)
from tests.makers.builders import (
    GRIDS,
    TinyAdapter,
    TinyNetwork,
    random_images,
    random_predictions,
    random_targets,
    tiny_detector,
)
from tests.makers.pages import leads_somewhere

IMAGE = torch.rand(3, 32, 32)
BOXES, LABELS = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([0, 2])
GOOD: Any = {"boxes": BOXES, "labels": LABELS}


def raises(error: type[Exception], expected: str, got: str, where: str) -> AbstractContextManager[Any]:
    """The one template, filled; what to do may be worded freely but must be there."""
    sentence = rf"{re.escape(f'Expected {expected}, but got {got} ({where}). Fix: ')}[^\n]{{10,}}[^.]\."
    return pytest.raises(error, match=rf"^{sentence}\nSee docs/troubleshooting\.md#\w+\.$")  # the note counts, too


def test_the_template_of_messages():
    error = TargetError(expected="a cat", got="a dog", where="house", fix="buy a cat")
    assert str(error) == "Expected a cat, but got a dog (house). Fix: buy a cat."


@pytest.mark.parametrize("name", errors.__all__)
def test_the_parts_of_a_message_are_attributes_and_survive_another_process(name):
    error = getattr(errors, name)(expected="a cat", got="a dog", where="house", fix="buy a cat")
    for twin in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):  # noqa: S301
        assert (twin.expected, twin.got, twin.where, twin.fix) == ("a cat", "a dog", "house", "buy a cat")
        assert str(twin) == str(error)
        assert leads_somewhere(twin.page)
    assert str(type(error)(str(error))) == str(error)  # how torch's loaders raise a worker's error again


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_can_be_caught_as_one_and_as_a_value_error(name):
    assert issubclass(getattr(errors, name), CrossKDError)
    assert issubclass(CrossKDError, ValueError)


def test_detector_errors_can_be_caught_together():
    assert issubclass(UnknownDetectorError, DetectorError)
    assert issubclass(IncompatibleDetectorsError, DetectorError)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_an_option_outside_its_range_is_refused(value):
    with raises(OptionError, "share between 0 and 1", f"{value}", "constructor argument"):
        validate_option("share", value, low=0, high=1)


def test_an_option_without_an_upper_bound_is_described_by_its_lower_one():
    with raises(OptionError, "top_k of at least 1", "0", "constructor argument"):
        validate_option("top_k", 0, low=1)


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_the_bounds_of_an_option_are_allowed(value):
    validate_option("share", value, low=0, high=1)


@pytest.mark.parametrize("option", ["top_k", "score_threshold"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_detector_names_the_option_that_is_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"^Expected {option} .* but got {value} "):
        EndToEndDetector(tiny_detector(), **{option: value})


@pytest.mark.parametrize("option", ["classification", "box", "ranking", "focal_alpha", "focal_gamma"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_one_to_one_loss_names_the_option_that_is_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"^Expected {option} .* but got {value} "):
        OneToOneLoss(**{option: value})


def test_shares_end_at_1():
    with pytest.raises(OptionError, match=r"^Expected score_threshold between 0 and 1, but got 1.5 "):
        EndToEndDetector(tiny_detector(), score_threshold=1.5)
    with pytest.raises(OptionError, match=r"^Expected focal_alpha between 0 and 1, but got 1.5 "):
        OneToOneLoss(focal_alpha=1.5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((o, -1) for o in ["classification", "box", "quality", "distribution"]),
        ("confidence_threshold", 2),
        ("gamma", 0.5),
    ],
)
def test_a_cross_head_loss_names_the_option_that_is_out_of_range(option, value):
    with pytest.raises(OptionError, match=f"^Expected {option} .* but got {value} "):
        CrossHeadLoss(**{option: value})


def test_a_distiller_names_the_option_that_is_out_of_range():
    with pytest.raises(OptionError, match=r"^Expected feature_weight .* but got -1 "):
        CrossHeadDistiller(tiny_detector(0), tiny_detector(1), feature_weight=-1)


def test_an_unknown_alignment_is_refused():
    with raises(OptionError, 'alignment "statistics" or "none"', "'both'", "constructor argument"):
        FeatureAligner([], "both")  # type: ignore[arg-type]


# --- images -----------------------------------------------------------------------------------------------------------

RGB = "a tensor of shape (3, H, W)"
KIND = "torch.float32, torch.strided, on cpu"
BAD_IMAGES = [
    ([], "at least one image", "none", "images"),
    (torch.zeros(0, 3, 8, 8), "at least one image", "none", "images"),
    ([IMAGE, IMAGE.numpy()], RGB, "ndarray", "images[1]"),
    ([IMAGE[0]], RGB, "shape (32, 32)", "images[0]"),
    ([IMAGE[:1]], RGB, "shape (1, 32, 32)", "images[0]"),
    ([IMAGE, IMAGE, IMAGE[None]], RGB, "shape (1, 3, 32, 32)", "images[2]"),
    ([IMAGE[:, :0]], RGB, "shape (3, 0, 32)", "images[0]"),
    (IMAGE, RGB, "shape (32, 32)", "images[0]"),
    ([(IMAGE * 255).byte()], "pixels in 0…1", "dtype torch.uint8", "images[0]"),
    ([IMAGE, IMAGE.half()], f"images of one kind, {KIND}", KIND.replace("32", "16"), "images[1]"),
    (
        [IMAGE, IMAGE, IMAGE.to_sparse()],
        f"images of one kind, {KIND}",
        KIND.replace("strided", "sparse_coo"),
        "images[2]",
    ),
    ([IMAGE, IMAGE.to("meta")], f"images of one kind, {KIND}", KIND.replace("cpu", "meta"), "images[1]"),
]


@pytest.mark.parametrize(("images", "expected", "got", "where"), BAD_IMAGES)
def test_bad_images_are_named(images, expected, got, where):
    with raises(ImageError, expected, got, where):
        validate_images(images)
    detector = EndToEndDetector(tiny_detector())
    for model in (detector, detector.eval(), CrossHeadDistiller(tiny_detector(0), tiny_detector(1))):
        with raises(ImageError, expected, got, where):
            model(images, [])


@pytest.mark.parametrize("images", [[IMAGE], (IMAGE, IMAGE[:, :5]), IMAGE.repeat(2, 1, 1, 1), [IMAGE.half()]])
def test_good_images_pass(images):
    validate_images(images)


# --- targets ----------------------------------------------------------------------------------------------------------

SHAPE_4 = "floating-point boxes of shape (G, 4)"
ONE_A_BOX = "int64 labels of shape (2,), one a box"
BOTH = 'a dict with "boxes" and "labels"'
ON_CPU = "the device of the image, cpu"
BAD_TARGETS = [
    (None, "targets in training mode", "None", "targets"),
    ([GOOD], "2 targets, one an image", "1", "targets"),
    ([GOOD] * 3, "2 targets, one an image", "3", "targets"),
    ([GOOD, [BOXES, LABELS]], BOTH, "list", "targets[1]"),
    ([{"boxes": BOXES, "area": LABELS}, GOOD], BOTH, "keys ['area', 'boxes']", "targets[0]"),
    ([GOOD, {"labels": LABELS}], BOTH, "keys ['labels']", "targets[1]"),
    ([{**GOOD, "boxes": BOXES[0]}, GOOD], SHAPE_4, "(4,) torch.float32", 'targets[0]["boxes"]'),
    ([{**GOOD, "boxes": BOXES[:, :3]}, GOOD], SHAPE_4, "(2, 3) torch.float32", 'targets[0]["boxes"]'),
    ([{**GOOD, "boxes": torch.zeros(0)}, GOOD], SHAPE_4, "(0,) torch.float32", 'targets[0]["boxes"]'),
    ([GOOD, {**GOOD, "boxes": BOXES.long()}], SHAPE_4, "(2, 4) torch.int64", 'targets[1]["boxes"]'),
    ([GOOD, {**GOOD, "boxes": BOXES.tolist()}], SHAPE_4, "list", 'targets[1]["boxes"]'),
    ([GOOD, {**GOOD, "labels": LABELS[:1]}], ONE_A_BOX, "(1,) torch.int64", 'targets[1]["labels"]'),
    ([GOOD, {**GOOD, "labels": LABELS[:, None]}], ONE_A_BOX, "(2, 1) torch.int64", 'targets[1]["labels"]'),
    ([{**GOOD, "labels": LABELS.int()}, GOOD], ONE_A_BOX, "(2,) torch.int32", 'targets[0]["labels"]'),
    ([{**GOOD, "labels": LABELS.tolist()}, GOOD], ONE_A_BOX, "list", 'targets[0]["labels"]'),
    (
        [{**GOOD, "boxes": BOXES.to_sparse()}, GOOD],
        "dense boxes and labels",
        "torch.sparse_coo and torch.strided",
        "targets[0]",
    ),
    ([{**GOOD, "boxes": BOXES.to("meta")}, GOOD], ON_CPU, "boxes on meta and labels on cpu", "targets[0]"),
    ([GOOD, {**GOOD, "labels": LABELS.to("meta")}], ON_CPU, "boxes on cpu and labels on meta", "targets[1]"),
]


@pytest.mark.parametrize(("targets", "expected", "got", "where"), BAD_TARGETS)
def test_bad_targets_are_named(targets, expected, got, where):
    with raises(TargetError, expected, got, where):
        validate_targets(targets, [IMAGE, IMAGE])
    for model in (EndToEndDetector(tiny_detector()), CrossHeadDistiller(tiny_detector(0), tiny_detector(1))):
        with raises(TargetError, expected, got, where):
            model([IMAGE, IMAGE], targets)


def test_good_targets_pass():
    empty: Any = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    more: Any = OrderedDict(GOOD | {"image_id": torch.tensor(7), "masks": None})
    double: Any = MappingProxyType({"boxes": BOXES.double(), "labels": LABELS})
    validate_targets([GOOD, empty, more, double], [IMAGE] * 4)
    assert set(EndToEndDetector(tiny_detector())([IMAGE] * 4, [GOOD, empty, more, double]))


def test_targets_are_not_looked_at_in_evaluation_mode():
    assert len(EndToEndDetector(tiny_detector()).eval()([IMAGE], None)) == 1


@pytest.mark.parametrize("bad", [[4, 1, 3, 8], [1, 4, 8, 3], [1, 1, 1, 8], [1, 2, 8, 2], [1, float("nan"), 8, 8]])
def test_the_first_bad_box_of_a_batch_is_named(bad):
    boxes = np.array([[1, 2, 3, 4], bad, [0, 0, 1, 1], bad], dtype=np.float32)
    arguments = np.array([0, 1, 1, 1]), np.array([5, 6, 7, 8])
    expected = "a finite box with x1 < x2 and y1 < y2", f"{boxes[1].tolist()}", 'targets[1]["boxes"][6]'
    with raises(TargetError, *expected):
        validate_target_values(boxes, np.zeros(4, dtype=np.int64), *arguments, 3)
    targets = [GOOD, {"boxes": torch.tensor([[1.0, 1, 9, 9], bad]), "labels": LABELS}]
    for model in (EndToEndDetector(tiny_detector()), CrossHeadDistiller(tiny_detector(0), tiny_detector(1))):
        with raises(TargetError, *expected[:2], 'targets[1]["boxes"][1]'):
            model([IMAGE, IMAGE], targets)


def test_the_remedies_of_a_bad_box_and_a_bad_label_work_on_plain_tensors():
    boxes = torch.tensor([[1.0, 1, 9, 9], [4, 1, 3, 8], [2, 2, 20, 20]])
    labels = torch.tensor([2, 0, 1])
    with pytest.raises(TargetError) as caught:
        EndToEndDetector(tiny_detector())([IMAGE], [{"boxes": boxes, "labels": labels}])
    [remedy] = re.findall(r"keep = .*?\(dim=1\)", caught.value.fix)
    names: Any = {"boxes": boxes, "labels": labels}
    exec(remedy, names)  # noqa: S102
    kept: Any = {name: names[name][names["keep"]] for name in ("boxes", "labels")}
    assert kept["labels"].tolist() == [2, 1]
    assert EndToEndDetector(tiny_detector())([IMAGE], [kept])

    with pytest.raises(TargetError) as caught:
        EndToEndDetector(tiny_detector())([IMAGE], [{**kept, "labels": kept["labels"] + 1}])
    words = "1…2 for a torchvision detector of num_classes=3 (0 is its background), 0…2 for an adapter"
    assert words in caught.value.fix


@pytest.mark.parametrize(
    ("field", "shape", "remedy"),
    [
        ("logits", (2, 4, 8, 8), "x.flatten(2).transpose(1, 2), then concatenate all levels"),
        ("boxes", (2, 84, 3), "return four coordinates in the last dimension"),
        ("boxes", (2, 4, 8, 8), "x.flatten(2).transpose(1, 2), then concatenate all levels"),
        ("boxes", (2, 83, 4), "concatenate all levels in one order"),
        ("quality", (2, 84, 1), "drop the last dimension"),
        ("distribution", (2, 84, 3, 8), "return four sides in the last dimension but one"),
        ("distribution", (2, 84, 32), "distribution.unflatten(-1, (4, -1))"),
    ],
)
def test_the_remedy_of_a_shape_is_of_the_axis_at_fault(field, shape, remedy):
    predictions = replace(PREDICTIONS, **{field: torch.zeros(shape)})
    with pytest.raises(PredictionError) as caught:
        validate_predictions(predictions, where="head()", images=2)
    assert remedy in caught.value.fix
    for name, build in (("sides", DensePredictions.from_sides), ("centers", DensePredictions.from_centers)):
        if field == "boxes":
            with pytest.raises(PredictionError) as caught:
                build(PREDICTIONS.logits, torch.zeros(shape), GRIDS[1])
            assert remedy.replace("coordinates", "sides" if name == "sides" else "coordinates") in caught.value.fix


def test_boxes_of_x_y_width_and_height_are_recognised_by_their_remedy():
    boxes = torch.tensor([[8.0, 8, 4, 6], [1, 1, 9, 9]])
    with pytest.warns(UserWarning, match="looks like x, y, w, h"), pytest.raises(TargetError) as caught:
        EndToEndDetector(tiny_detector())([IMAGE], [{**GOOD, "boxes": boxes}])
    assert 'box_convert(boxes, "xywh", "xyxy")' in caught.value.fix


def test_images_as_numpy_makes_them_are_refused_by_dtype():
    for model in (EndToEndDetector(tiny_detector()), EndToEndDetector(tiny_detector()).eval()):
        with raises(
            ImageError,
            "pixels of torch.float32, like the network's weights",
            "torch.float64",
            "images, after preprocessing",
        ):
            model([IMAGE.double()] * 2, [GOOD] * 2)
    assert EndToEndDetector(tiny_detector()).double()([IMAGE.double()], [GOOD])


@pytest.mark.parametrize("label", [-1, 3])
def test_the_first_label_without_a_channel_is_named(label):
    labels, index = np.array([0, label, label]), np.array([0, 0, 0])
    boxes = np.array([[0, 0, 1, 1]] * 3, dtype=np.float32)
    with raises(TargetError, "a label in 0…2", f"{label}", 'targets[0]["labels"][1]'):
        validate_target_values(boxes, labels, index, np.arange(3), 3)
    validate_target_values(boxes, np.array([0, 2, 1]), index, np.arange(3), 3)
    with raises(TargetError, "a label in 0…2", f"{label}", 'targets[1]["labels"][0]'):
        EndToEndDetector(tiny_detector())([IMAGE] * 2, [GOOD, {**GOOD, "labels": torch.tensor([label, 0])}])


# --- predictions and detectors ----------------------------------------------------------------------------------------

PREDICTIONS = random_predictions(random_targets([1, 2]), GRIDS[1])  # 84 points, 3 classes
BAD_PREDICTIONS = [
    ({"logits": torch.zeros(84, 3)}, "logits of shape (2, A, C)", "(84, 3)", "logits"),
    ({"logits": torch.zeros(3, 84, 3)}, "logits of shape (2, A, C)", "(3, 84, 3)", "logits"),
    ({"boxes": torch.zeros(2, 83, 4)}, "boxes of shape (2, 84, 4) for 84 points", "(2, 83, 4)", "boxes"),
    ({"boxes": torch.zeros(2, 84, 5)}, "boxes of shape (2, 84, 4) for 84 points", "(2, 84, 5)", "boxes"),
    ({"points": torch.zeros(83, 2)}, "points of shape (84, 2) for 84 points", "(83, 2)", "points"),
    ({"strides": torch.zeros(84, 1)}, "strides of shape (84,) for 84 points", "(84, 1)", "strides"),
    ({"quality": torch.zeros(2, 84, 1)}, "quality of shape (2, 84) for 84 points", "(2, 84, 1)", "quality"),
    ({"levels": GRIDS[1][:2]}, "levels that hold 84 points in all", "[64, 16]", "levels"),
]


@pytest.mark.parametrize("returned", [(torch.zeros(1, 84, 3), torch.zeros(1, 84, 4)), None])
def test_a_head_that_returns_something_else_is_refused_by_name(returned):
    class Bare(TinyAdapter):
        def head(self, features, image_size) -> Any:
            return returned

    with pytest.raises(PredictionError) as caught:
        EndToEndDetector(Bare(TinyNetwork()))([IMAGE], [GOOD])
    assert (caught.value.expected, caught.value.where) == ("DensePredictions", "Bare.head()")


class Broken(TinyAdapter):
    """A detector whose head breaks the contract."""

    change: dict[str, Any]

    def head(self, features, image_size) -> DensePredictions:
        return replace(super().head(features, image_size), **self.change)


@pytest.mark.parametrize(("change", "expected", "got", "field"), BAD_PREDICTIONS)
def test_bad_predictions_are_named(change, expected, got, field):
    with raises(PredictionError, expected, got, f"here.{field}"):
        validate_predictions(replace(PREDICTIONS, **change), where="here", images=2)
    broken = Broken(TinyNetwork())
    broken.change = change
    student = EndToEndDetector(broken)
    images, targets = random_images(2), random_targets([1, 2])
    with raises(PredictionError, expected, got, f"Broken.head().{field}"):
        student(images, targets)
    with raises(PredictionError, expected, got, f"Broken.head().{field}"):
        student.eval()(images)
    with raises(PredictionError, expected, got, f"teacher Broken.head().{field}"):
        CrossHeadDistiller(tiny_detector(), broken)(images, targets)


def test_good_predictions_pass():
    validate_predictions(PREDICTIONS, where="here", images=2)
    validate_predictions(replace(PREDICTIONS, quality=torch.zeros(2, 84), levels=None), where="here", images=2)


class Fine(TinyAdapter):
    def features(self, batch):
        return super().features(batch)[:1]


class Coarse(TinyAdapter):
    def features(self, batch):
        return super().features(batch)[1:]


class Flat(TinyAdapter):
    def features(self, batch):
        return [x.flatten(1) for x in super().features(batch)]


def test_detectors_that_cannot_be_crossed_are_refused():
    with raises(
        IncompatibleDetectorsError,
        "a common stride in both pyramids",
        "student [8.0] and teacher [16.0, 32.0]",
        "feature levels",
    ):
        CrossHeadDistiller(Fine(TinyNetwork()), Coarse(TinyNetwork()))
    detector = tiny_detector()
    with pytest.raises(
        IncompatibleDetectorsError, match=r"^Expected a teacher of its own, but got .* shared parameters"
    ):
        CrossHeadDistiller(detector, detector)
    with raises(
        IncompatibleDetectorsError, "tensors of equal name and shape", "none of the student's 6 tensors", "inherit"
    ):
        inherit(tiny_detector(channels=4), tiny_detector(channels=8))


def test_features_that_are_no_maps_are_refused():
    with raises(DetectorError, "a map of shape (N, *, H, W)", "shape (2, 8192)", "Flat.features()[0]"):
        CrossHeadDistiller(Flat(TinyNetwork()), tiny_detector())


def test_a_model_without_an_adapter_is_refused():
    with raises(
        UnknownDetectorError,
        "torchvision's FCOS or RetinaNet, or a DetectorAdapter",
        "torch.nn.modules.linear.Linear",
        "adapt",
    ):
        adapt(nn.Linear(2, 2))
    with pytest.raises(UnknownDetectorError, match="SSDlite, EfficientDet, YOLO, YOLOX") as caught:
        adapt(nn.Linear(2, 2))
    assert leads_somewhere(*re.findall(r"docs/how-to/third-party\.md", caught.value.fix))


def test_a_copied_distiller_says_that_its_teacher_is_missing():
    twin = copy.deepcopy(CrossHeadDistiller(tiny_detector(0), tiny_detector(1)))
    with raises(MissingTeacherError, "a teacher", "none: copies and pickles leave it behind", "teacher"):
        twin(random_images(1), random_targets([1]))
