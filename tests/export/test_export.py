"""`export_onnx`: what onnxruntime finds with the file is what the detector finds, and nothing else gets written."""

from __future__ import annotations

import json
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import (
    CrossHeadDistiller,
    DensePredictions,
    DetectorAdapter,
    EndToEndDetector,
    GridLevel,
    ResizingAdapter,
    __version__,
)
from crosskd_assign.detectors import probe_detector
from crosskd_assign.errors import ExportError, ImageError, OptionError, UnknownDetectorError
from crosskd_assign.export import TensorDetector, export_onnx
from crosskd_assign.export.checking import check_batches
from crosskd_assign.export.compare import predict, validate_tracing_mode
from crosskd_assign.structures import Batch
from tests.makers.builders import TinyAdapter, tiny_detector
from tests.makers.small_models import MAKERS, scene, small_fcos, snapshot

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

K = 20
# Operators of fixed arithmetic alone: none decides by what is in the picture how much comes out.
HARMLESS = """
    Add BatchNormalization Cast Clip Concat Conv Div Exp Expand Floor Gather GatherElements Identity
    InstanceNormalization Less Max Min Mod Mul Neg Pad Range ReduceMax Relu Reshape Resize Shape Sigmoid Slice Squeeze
    Sub Tanh Tile TopK Transpose Unsqueeze
"""


def run(path: Path, images: Tensor) -> tuple[Tensor, ...]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return tuple(map(torch.from_numpy, session.run(["boxes", "scores", "labels"], {"images": images.numpy()})))


@torch.no_grad()
def detect(detector: EndToEndDetector, images: Tensor, top_k: int = 10**6, **options: Any) -> tuple[Tensor, ...]:
    """What the detector finds in a list of images, in its own way; by default everything it predicts."""
    detections = EndToEndDetector(detector.adapter, top_k=top_k, **options).eval()(list(images))
    return stacked(detections)


def stacked(detections: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([d[name] for d in detections]).detach() for name in ("boxes", "scores", "labels"))


def assert_same(found, everything, *, box: float = 1e-3, score: float = 1e-5) -> None:
    """Scores are the best of ``everything``, and each row (box, label, score) is one of it; ties stand anywhere."""
    for boxes, scores, labels, *rows in zip(*found, *everything, strict=True):
        torch.testing.assert_close(scores, rows[1][: len(scores)], atol=score, rtol=0)
        same = (boxes[:, None] - rows[0][None]).abs().amax(dim=2) <= box
        same &= (scores[:, None] - rows[1][None]).abs() <= score
        same &= labels[:, None] == rows[2][None]
        assert same.any(dim=1).all()


def state(module: nn.Module) -> tuple[Any, ...]:
    """Values, modes and gradients wanted."""
    modes, wanted = [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]
    return snapshot(module), modes, wanted


def operators(path: Path) -> set[str]:
    model = onnx.load(str(path))
    assert not model.functions
    return {node.op_type for node in model.graph.node}


# --- a distiller of FCOS and RetinaNet, for images of one size --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Any]:
    """A distiller in training mode, exported for images of 96 × 150 pixels, which it enlarges and pads."""
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    student = small_fcos(1, min_size=128, max_size=256)
    teacher = MAKERS["retinanet"](2, channels=64)
    distiller = CrossHeadDistiller(EndToEndDetector(student, top_k=K, score_threshold=0.5), teacher)
    before = state(distiller)
    names = {0: "nothing", 1: "größe", 2: "two"}
    report = export_onnx(distiller, path, image_size=(96, 150), class_names=names, metadata={"run": "a"})
    return {
        "path": path,
        "report": report,
        "distiller": distiller,
        "teacher": teacher,
        "before": before,
        "after": state(distiller),
    }


@pytest.mark.parametrize("count", [1, 3])
def test_onnxruntime_finds_what_the_detector_finds(exported, count):
    images = torch.stack(scene([(96, 150)] * count, seed=count)[0])
    found, everything = run(exported["path"], images), detect(exported["distiller"].detector, images)
    assert_same(found, everything)
    assert found[0].std() > 5, "boxes are alike, so this test shows nothing"
    assert found[1].std() > 1e-3, "scores are alike, so this test shows nothing"


def test_a_threshold_afterwards_is_the_detectors_own(exported):
    images = torch.stack(scene([(96, 150)])[0])
    boxes, scores, labels = (x[0] for x in run(exported["path"], images))
    threshold = float(scores[[K // 2 - 1, K // 2]].mean())
    keep = scores >= threshold
    expected = detect(exported["distiller"].detector, images, top_k=K, score_threshold=threshold)
    assert_same([x[keep][None] for x in (boxes, scores, labels)], expected)
    assert int(keep.sum()) == expected[0].shape[1] == K // 2
    none = detect(exported["distiller"].detector, images, score_threshold=1.0)
    assert none[0].shape == (1, 0, 4) == boxes[scores >= 1.0][None].shape


def test_the_graph_has_no_suppression_and_no_shape_that_depends_on_the_picture(exported):
    assert operators(exported["path"]) <= set(HARMLESS.split())


def test_names_types_and_shapes_are_as_promised(exported):
    session = onnxruntime.InferenceSession(str(exported["path"]), providers=["CPUExecutionProvider"])
    described = {x.name: (x.type, x.shape) for x in [*session.get_inputs(), *session.get_outputs()]}
    assert described == {
        "images": ("tensor(float)", ["batch", 3, 96, 150]),
        "boxes": ("tensor(float)", ["batch", K, 4]),
        "scores": ("tensor(float)", ["batch", K]),
        "labels": ("tensor(int64)", ["batch", K]),
    }


def test_the_report_says_what_was_checked(exported):
    report = exported["report"]
    assert report.path == exported["path"]
    assert report.opset == 18 == onnx.load(str(report.path)).opset_import[0].version
    assert report.input_shape == ("batch", 3, 96, 150)
    assert report.detections == K
    assert report.batches == ((1, 3, 96, 150), (2, 3, 96, 150))
    assert 0 < report.score_difference <= 1e-5
    assert 0 < report.box_difference <= 1e-3


def test_no_weight_of_the_teacher_is_in_the_file_and_every_one_of_the_student_is(exported):
    constants = [onnx.numpy_helper.to_array(x) for x in onnx.load(str(exported["path"])).graph.initializer]
    values = [torch.from_numpy(x.copy()) for x in constants if x.size > 100]

    def there(weight: Tensor) -> bool:
        return any(x.shape == weight.shape and torch.equal(x, weight.detach()) for x in values)

    student = exported["distiller"].detector.model
    named = {n: p for n, p in student.named_parameters() if p.numel() > 100 and "ctrness" not in n}
    assert not [name for name, weight in named.items() if not there(weight)]
    assert not [name for name, weight in exported["teacher"].named_parameters() if there(weight)]
    size = exported["path"].stat().st_size
    assert size < 4 * sum(p.numel() for p in student.parameters()) + 100_000


def test_the_file_is_one_file_and_names_classes_but_no_folder_of_this_machine(exported):
    path = exported["path"]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(str(path))
    assert (model.producer_name, model.producer_version) == ("crosskd_assign", __version__)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found["class_names"]) == {"0": "nothing", "1": "größe", "2": "two"}
    assert json.loads(found["strides"]) == [8, 16, 32, 64, 128]
    expected = {"classes": "3", "adapter": "FCOSAdapter", "preprocessing": "inside", "run": "a", "size_divisible": "32"}
    assert expected.items() <= found.items()
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b".py" not in content


def test_the_detector_stays_as_it_was(exported):
    before, after = exported["before"], exported["after"]
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(before[1]), "the detector was not in training mode, so this test shows nothing"


# --- images of any size -----------------------------------------------------------------------------------------------

# torchvision computes sizes in float64, where n · (192 / n) is below 192 for other n than in float32.
SHORT = 192  # pixels
HALF = [n for n in range(100, 500) if (n * (SHORT / n) < SHORT) != (n * (np.float32(SHORT) / np.float32(n)) < SHORT)]


def check_any_size(detector, path, sizes, *, box=1e-3, score=1e-5):
    for i, (height, width) in enumerate(sizes):
        images = torch.rand(1 + i % 3, 3, height, width, generator=torch.Generator().manual_seed(i))
        assert_same(run(path, images), detect(detector, images), box=box, score=score)


@pytest.mark.parametrize("kind", ["one pixel", pytest.param("tiny", marks=pytest.mark.slow)])
def test_any_adapter_of_plain_operators_takes_images_of_any_size(kind, tmp_path):
    adapter = one_pixel().adapter if kind == "one pixel" else tiny_detector(batch_norm=True)
    detector = EndToEndDetector(adapter, top_k=80)
    report = export_onnx(detector, tmp_path / "any.onnx")
    assert report.input_shape == ("batch", 3, "height", "width")
    check_any_size(detector, report.path, [(64, 64), (65, 200), (200, 33), (97, 131), (32, 96)])
    assert operators(report.path) <= set(HARMLESS.split())
    small = torch.rand(2, 3, 8, 9)  # padded to 32 × 32 px, where there are fewer predictions than top_k
    expected = detect(detector, small)
    assert expected[0].shape[1] < detector.top_k == report.detections
    torch.testing.assert_close(run(report.path, small)[1], expected[1], atol=1e-5, rtol=0)


class Resized(ResizingAdapter):
    features, head = TinyAdapter.features, TinyAdapter.head


@pytest.mark.parametrize(
    ("fit", "size"),
    [
        ("longer", 96),
        pytest.param("letterbox", (64, 96), marks=pytest.mark.slow),
    ],
)
def test_an_adapter_that_resizes_takes_images_of_any_size(fit, size, tmp_path):
    detector = EndToEndDetector(Resized(tiny_detector(batch_norm=True).model, size=size, fit=fit), top_k=20)
    report = export_onnx(detector, tmp_path / "any.onnx")
    assert report.input_shape == ("batch", 3, "height", "width")
    check_any_size(detector, report.path, [(97, 131), (200, 33), (96, 96), (50, 60)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_torchvisions_detectors_take_images_of_any_size(kind, tmp_path):
    detector = EndToEndDetector(MAKERS[kind](min_size=SHORT, max_size=320), top_k=K)
    report = export_onnx(detector, tmp_path / "any.onnx")
    sizes = [(128, 128), (333, 250), (90, 300), (300, 90), (640, 481), *((n, n + 37) for n in HALF[:3])]
    # Of noise enlarged or made smaller, which differs most between the two.
    check_any_size(detector, report.path, sizes, box=1e-2, score=1e-4)
    assert operators(report.path) <= set(HARMLESS.split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_torchvisions_detectors_take_prepared_images_of_any_size(kind, tmp_path):
    detector = EndToEndDetector(MAKERS[kind](), top_k=K)
    report = export_onnx(detector, tmp_path / "any.onnx", preprocessing="outside")
    assert report.input_shape == ("batch", 3, "32*rows", "32*columns")
    view = TensorDetector(EndToEndDetector(detector.adapter, top_k=10**6).eval(), preprocessing="outside")
    # The map sizes of P6 and P7 divide none of these but the first.
    for i, (height, width) in enumerate([(128, 256), (160, 96), (224, 64), (96, 352), (800, 1056)]):
        images = torch.stack(scene([(height, width)] * (1 + i % 2), seed=i)[0])
        with torch.no_grad():
            assert_same(run(report.path, images), view(images))


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", ["inside", "outside"])
@pytest.mark.parametrize("kind", ["retinanet", "retinanet_v2"])
def test_retinanet_exports_for_one_size_and_one_image(kind, preprocessing, tmp_path):
    detector = EndToEndDetector(MAKERS[kind](min_size=128, max_size=256), top_k=K)
    size = {"image_size": (128, 160), "batch_size": 1}
    report = export_onnx(detector, tmp_path / "a.onnx", preprocessing=preprocessing, **size)
    assert report.input_shape == (1, 3, 128, 160)
    assert operators(report.path) <= set(HARMLESS.split())


# --- what torch and others cannot do, and what goes wrong -------------------------------------------------------------


def test_torchvisions_own_fcos_cannot_be_traced_whole():
    """Its suppression decides by what it sees how much comes out; `exported` shows that ours can."""
    model = small_fcos(min_size=256, max_size=512).eval()
    with pytest.raises(Exception, match=r"data-dependent|Could not guard"):
        torch.export.export(model, ([torch.rand(3, 256, 320)],), strict=False)


class OnePixelNetwork(nn.Module):
    """A convolution, and what goes wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2 + 4, 8, stride=8)


class OnePixelAdapter(DetectorAdapter):
    """The smallest detector there is: one level, two classes."""

    def features(self, batch: Batch) -> list[Tensor]:
        return [self.normalize(batch)]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        out = self.model.conv(features[0])
        level = GridLevel.of(out, stride=8)
        out = out.flatten(2).transpose(1, 2)
        points = level.points()
        boxes = torch.cat([points - 8 * out[..., 2:4].exp(), points + 8 * out[..., 4:].exp()], dim=-1)
        return self.predictions(out[..., :2], boxes, level)

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        return DensePredictions.on_grid(logits, boxes, [level])


class Liar(OnePixelAdapter):
    """Says something else as soon as it is traced."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        lying = torch.compiler.is_compiling()
        if lying and self.lie == "labels":
            logits = logits.flip(2)
        if lying and self.lie == "boxes":
            boxes = boxes + 0.01
        return DensePredictions.on_grid(logits, boxes, [level])


class Counter(OnePixelAdapter):
    """Looks how many logits are above 0."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        above = torch.nonzero(logits.flatten() > 0).float().sum()
        return DensePredictions.on_grid(logits + 0 * above, boxes, [level])


class Looper(OnePixelAdapter):
    """Goes through the images one by one."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        return DensePredictions.on_grid(torch.stack([x - 1 for x in logits]), boxes, [level])


class Chooser(OnePixelAdapter):
    """Decides by a value, in Python."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        return DensePredictions.on_grid(logits if boxes.mean() > 0 else -logits, boxes, [level])


class Asks(OnePixelAdapter):
    """Squashes its scores where it is told that it is being exported."""

    asks = "onnx.is_in_onnx_export"

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        exporting = attrgetter(self.asks)(torch)()
        return DensePredictions.on_grid(logits.sigmoid() if exporting else logits, boxes, [level])


class AsksForNothing(OnePixelAdapter):
    """Leaves out in export what changes nothing."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        return DensePredictions.on_grid(logits if torch.onnx.is_in_onnx_export() else logits * 1, boxes, [level])


class AsksForTheSize(OnePixelAdapter):
    """Predicts otherwise on small pictures, in Python."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        return DensePredictions.on_grid(logits if level.width > 12 else -logits, boxes, [level])


class ChoosesBySize(OnePixelAdapter):
    """Predicts otherwise on small pictures, in the graph."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        width = torch.full((), level.width, dtype=torch.float32, device=logits.device)
        return DensePredictions.on_grid(torch.where(width > 12, logits, -logits), boxes, [level])


class CountsByLen(OnePixelAdapter):
    """Splits by ``len(level)``, which is a Python number."""

    def predictions(self, logits: Tensor, boxes: Tensor, level: GridLevel) -> DensePredictions:
        first, second = torch.cat([logits, logits], dim=1).split([len(level), len(level)], dim=1)
        return DensePredictions.on_grid((first + second) / 2, boxes, [level])


def one_pixel(kind: type[OnePixelAdapter] = OnePixelAdapter, **attributes: Any) -> EndToEndDetector:
    torch.manual_seed(0)
    adapter = kind(OnePixelNetwork())
    for name, value in attributes.items():
        setattr(adapter, name, value)
    return EndToEndDetector(adapter, top_k=8)


SMALL: dict[str, Any] = {"image_size": (32, 64)}
IMAGE = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"one_class_per_point": True}, {"classes": [0]}])
def test_one_class_a_point_and_a_filter_of_classes_are_in_the_graph(options, tmp_path):
    detector = EndToEndDetector(one_pixel().adapter, top_k=40, **options)  # of 32 points and 2 classes
    report = export_onnx(detector, tmp_path / "a.onnx", image_size=(32, 64), images=[IMAGE])
    assert not {"NonZero", "If", "Loop"} & operators(report.path)
    images = torch.stack([IMAGE, IMAGE.flip(1), IMAGE.flip(2)])
    found = run(report.path, images)
    torch.testing.assert_close(found, stacked(detector.eval()(list(images))), atol=1e-3, rtol=0)
    assert report.detections == found[1].shape[1] == 32
    assert detect(detector, images)[1].shape[1] == 64, "without the option there are more"


@pytest.mark.slow
def test_constant_scores_are_exported_although_every_one_ties(tmp_path):
    detector = one_pixel()
    nn.init.zeros_(detector.model.conv.weight[:2])
    report = export_onnx(detector, tmp_path / "a.onnx", **SMALL)
    assert report.score_difference < 1e-6
    _, scores, _ = run(report.path, torch.rand(1, 3, 32, 64))
    assert scores.std() < 1e-6


@pytest.mark.parametrize("lie", ["boxes", pytest.param("labels", marks=pytest.mark.slow)])
def test_a_graph_that_says_something_else_is_found_out_and_not_written(lie, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_text("what was there before")
    with pytest.raises(
        ExportError,
        match=r"Expected the detections of the detector, but got .*image 0 of \(1, 3, 32, 64.* raise score_tol",
    ):
        export_onnx(one_pixel(Liar, lie=lie), path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_text() == "what was there before"


@pytest.mark.slow
def test_tolerances_images_and_the_size_of_the_batch_can_be_chosen(tmp_path):
    options = {"box_tolerance": 0.02, "images": [IMAGE, IMAGE.flip(1)], "batch_size": 3}
    report = export_onnx(one_pixel(Liar, lie="boxes"), tmp_path / "a.onnx", **options, **SMALL)
    assert report.box_difference == pytest.approx(0.01, rel=0.01)
    assert report.batches == ((3, 3, 32, 64),) * 2
    assert report.input_shape == (3, 3, 32, 64)


def test_a_shape_that_depends_on_values_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="without data-dependent shapes, but got NonZero"):
        export_onnx(one_pixel(Counter), tmp_path / "a.onnx", **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_fixes_the_number_of_images_is_told_so_and_exports_for_that_many(tmp_path):
    with pytest.raises(ExportError, match=r"open number of images, but got .* fixed at 2 .*len\(x\).*batch_size=1"):
        export_onnx(one_pixel(Looper), tmp_path / "a.onnx", **SMALL)
    assert not list(tmp_path.iterdir())
    assert export_onnx(one_pixel(Looper), tmp_path / "a.onnx", batch_size=1, **SMALL).input_shape == (1, 3, 32, 64)


def test_an_if_on_the_size_is_found_out_with_open_sizes_and_its_cures_export(tmp_path):
    path = tmp_path / "a.onnx"
    with pytest.raises(ExportError, match=r"the detections of the detector.*\(., 3, 64, 64\)"):
        export_onnx(one_pixel(AsksForTheSize), path)
    assert not list(tmp_path.iterdir())
    assert export_onnx(one_pixel(AsksForTheSize), path, image_size=(64, 64)).batches[0] == (1, 3, 64, 64)
    detector = one_pixel(ChoosesBySize)
    export_onnx(detector, path)
    check_any_size(detector, path, [(64, 64), (64, 320), (48, 96), (48, 104)])


@pytest.mark.parametrize("kind", ["one pixel", "torchvision"])
def test_small_pictures_are_checked_where_the_network_sees_small_ones(kind):
    detector = one_pixel() if kind == "one pixel" else EndToEndDetector(small_fcos())  # which makes all 64 pixels high
    view = TensorDetector(detector.eval())
    batches = check_batches(view, probe_detector(view.adapter), None, None, None)
    sizes = [tuple(batch.shape[2:]) for batch in batches]
    assert sizes == [(240, 320), (333, 250), (480, 640), (64, 64), (96, 64)][: 5 if kind == "one pixel" else 3]


@pytest.mark.parametrize("asks", ["onnx.is_in_onnx_export", "compiler.is_exporting"])
def test_a_head_that_predicts_otherwise_while_exporting_is_told_so_before_it_is_traced(asks, tmp_path):
    with pytest.raises(ExportError, match=rf"the same predictions while exporting.*torch\.{asks}\(\)"):
        export_onnx(one_pixel(Asks, asks=asks), tmp_path / "a.onnx", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_branch_on_exporting_that_changes_nothing_is_allowed():
    view = TensorDetector(one_pixel(AsksForNothing)).eval()
    validate_tracing_mode(view, IMAGE[None], predict(view, IMAGE[None]))


def test_sizes_frozen_by_len_are_named_with_their_line(tmp_path):
    with pytest.raises(
        ExportError, match=r"test_export\.py, line \d+, in predictions\).*level\.height \* level\.width"
    ):
        export_onnx(one_pixel(CountsByLen), tmp_path / "a.onnx", batch_size=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_cannot_be_traced_is_an_error_that_says_where(tmp_path):
    with pytest.raises(ExportError, match="Chooser, torch") as caught:
        export_onnx(one_pixel(Chooser), tmp_path / "a.onnx", **SMALL)
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf'{name}.*pip install "crosskd_assign\[export\]"'):
        export_onnx(one_pixel(), tmp_path / "a.onnx")


def test_an_old_torch_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    with pytest.raises(ExportError, match=r"torch 2\.9 or newer, but got 2\.8\.1"):
        export_onnx(one_pixel(), tmp_path / "a.onnx")


def test_weights_beyond_one_file_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("crosskd_assign.export.onnx._LARGEST", 4000)
    with pytest.raises(ExportError, match="2 GB"):
        export_onnx(one_pixel(), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("error", "options", "match"),
    [
        (OptionError, {"opset": 17}, "opset of at least 18"),
        (OptionError, {"batch_size": 0}, "batch_size of at least 1"),
        (OptionError, {"score_tolerance": -1e-9}, "score_tolerance of at least 0"),
        (OptionError, {"box_tolerance": float("nan")}, "box_tolerance of at least 0"),
        (OptionError, {"preprocessing": "no"}, "'no'"),
        (OptionError, {"image_size": (0, 32)}, "image_size"),
        (OptionError, {"image_size": (30, 64), "preprocessing": "outside"}, "multiples of 32"),
        (ImageError, {"image_size": (64, 64), "images": [IMAGE]}, r"images of \(64, 64\), but got \(32, 64\)"),
        (ImageError, {"images": [IMAGE[:, :30]], "preprocessing": "outside"}, r"multiples of 32.*images\[0\]"),
        (ImageError, {"images": [IMAGE.byte()]}, "uint8"),
    ],
)
def test_options_out_of_range_are_errors(error, options, match, tmp_path):
    with pytest.raises(error, match=match):
        export_onnx(one_pixel(), tmp_path / "a.onnx", **options)


def test_a_model_or_an_adapter_is_exported_as_the_detector_it_would_be_and_stays_as_it_is(tmp_path):
    adapter = tiny_detector()
    before = {name: p.requires_grad for name, p in adapter.named_parameters()}
    export_onnx(adapter, tmp_path / "model.onnx", image_size=(64, 64), batch_size=1)
    images = torch.rand(1, 3, 64, 64)
    assert {name: p.requires_grad for name, p in adapter.named_parameters()} == before
    for found, expected in zip(run(tmp_path / "model.onnx", images), TensorDetector(adapter)(images), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(UnknownDetectorError, match="DetectorAdapter"):
        export_onnx(nn.Linear(1, 1), tmp_path / "other.onnx")


@pytest.mark.parametrize(("place", "got"), [("", "a folder"), ("nowhere/model.onnx", "no such folder")])
def test_a_place_where_no_file_can_be_is_refused_before_anything_is_traced(place, got, tmp_path, monkeypatch):
    monkeypatch.setattr("crosskd_assign.export.onnx.trace_model", lambda *_: pytest.fail("was traced"))
    with pytest.raises(ExportError) as caught:
        export_onnx(tiny_detector(), tmp_path / place)
    assert (caught.value.expected, caught.value.got) == ("a file in a folder that is there", got)
