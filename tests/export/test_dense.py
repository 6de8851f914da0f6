"""Dense outputs: everything that is predicted, of plain operators, and what the host makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosskd_assign import DensePredictions, EndToEndDetector, GridLevel, SelectionBranch
from crosskd_assign.errors import ExportError, OptionError
from crosskd_assign.export import TensorDetector, export_onnx
from crosskd_assign.export.compare import Prediction, dense_difference
from tests.makers.builders import TinyAdapter, TinyNetwork, tiny_detector
from tests.makers.small_models import scene, small_fcos

# What small runtimes have. Nothing here picks values by their size or by an index.
PLAIN = """
    Abs Add BatchNormalization Cast Clip Concat ConstantOfShape Conv Div Exp Expand Identity InstanceNormalization
    Log Max MaxPool Min Mul Neg Pad Range ReduceMax Relu Reshape Resize Shape Sigmoid Slice Split Squeeze Sub Tanh
    Transpose Unsqueeze
"""


def with_selection(seed: int = 0) -> EndToEndDetector:
    adapter = tiny_detector(seed)
    return EndToEndDetector(adapter, selection=SelectionBranch(adapter, width=8), top_k=20).eval()


def run(path: Path, images: Tensor) -> tuple[Tensor, ...]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores"]
    return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@torch.no_grad()
def check(detector: EndToEndDetector, path: Path, images: Tensor) -> None:
    """The file's outputs, sorted in plain Python, are the detections of the detector."""
    tolerance = 1e-5 if detector.selection is None else 1e-3  # whose filter multiplies rounding
    boxes, scores = run(path, images)
    for b, s, found in zip(boxes, scores, detector(list(images)), strict=True):
        pairs = [(float(s[i, c]), i, c) for i in range(s.shape[0]) for c in range(s.shape[1])]
        best = sorted(pairs, reverse=True)[: detector.top_k]
        torch.testing.assert_close(torch.tensor([x[0] for x in best]), found["scores"], atol=tolerance, rtol=0)
        for (_, i, c), box, label in zip(best, found["boxes"], found["labels"], strict=True):
            torch.testing.assert_close(b[i], box, atol=1e-3, rtol=0)
            assert c == label


def operators(path: Path) -> set[str]:
    onnx = pytest.importorskip("onnx")
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def unused(path: Path) -> set[str]:
    """Constants that no node reads."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(path)).graph
    return {x.name for x in graph.initializer} - {name for node in graph.node for name in node.input}


def test_the_host_makes_the_detections_of_dense_outputs(tmp_path):
    pytest.importorskip("onnxscript")
    detector = with_selection()
    report = export_onnx(detector, tmp_path / "a.onnx", outputs="dense", image_size=(64, 80))
    assert (report.outputs, report.detections) == ("dense", run(report.path, torch.rand(1, 3, 64, 80))[1].shape[1])
    assert operators(report.path) <= set(PLAIN.split())
    assert not unused(report.path)
    check(detector, report.path, torch.stack(scene([(64, 80)] * 3)[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"preprocessing": "outside", "image_size": (128, 160), "batch_size": 1}, {}],
    ids=["fixed, outside", "any size"],
)
def test_torchvisions_detectors_have_dense_outputs_without_selecting_operators(options, tmp_path):
    pytest.importorskip("onnxscript")
    model = small_fcos(min_size=128, max_size=256)
    detector = EndToEndDetector(model, selection=SelectionBranch(model), top_k=20).eval()
    report = export_onnx(detector, tmp_path / "a.onnx", outputs="dense", **options)
    unwanted = {"TopK", "GatherElements", "GatherND", "NonZero", "NonMaxSuppression", "ScatterND"}
    assert not operators(report.path) & (unwanted | {"Gather"})
    if options:
        assert operators(report.path) <= set(PLAIN.split()) - {"Shape", "Range", "Expand"}
    else:
        check(detector, report.path, torch.stack(scene([(90, 131)])[0]))


def test_a_one_to_many_detector_is_scored_with_its_quality_and_has_dense_outputs_only():
    adapter = tiny_detector().eval()
    images = torch.stack(scene([(64, 64)] * 2)[0])
    batch, _ = adapter.preprocess(list(images))
    with torch.no_grad():
        p = adapter.head(adapter.features(batch), batch.image_size)
        boxes, scores = TensorDetector(adapter, outputs="dense", one_to_many=True)(images)
    expected = (p.logits.double().sigmoid() * p.quality.double().sigmoid()[..., None]).sqrt()
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)
    assert boxes.shape == (2, scores.shape[1], 4)
    with pytest.raises(OptionError, match=r'outputs "dense" of a one-to-many detector.*NMS on the host'):
        TensorDetector(adapter, one_to_many=True)
    with pytest.raises(OptionError, match="selection branch"):
        TensorDetector(with_selection(), outputs="dense", one_to_many=True)
    with pytest.raises(OptionError, match="outputs"):
        TensorDetector(adapter, outputs="sparse")  # type: ignore[arg-type]


class Indexes(TinyAdapter):
    """Reorders its classes by a list of indices, which becomes a Gather."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        p = super().head(features, image_size)
        levels: tuple[GridLevel, ...] = p.levels or ()
        return DensePredictions.on_grid(p.logits[..., [2, 0, 1]], p.boxes, levels)


def test_an_operator_that_selects_is_refused_by_name(tmp_path):
    pytest.importorskip("onnxscript")
    detector = EndToEndDetector(Indexes(TinyNetwork(3, 8)))
    with pytest.raises(ExportError, match=r"without top-k and gather, but got Gather.*Indexes"):
        export_onnx(detector, tmp_path / "a.onnx", outputs="dense", image_size=(64, 64), batch_size=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("scores", lambda x: x + 0.25, "scores that differ by 0.25"),
        ("boxes", lambda x: x + 0.01, "boxes that differ by 0.01"),
        ("boxes", lambda x: x * float("nan"), "boxes that differ by inf"),
        ("scores", lambda x: x[:1], r"scores of shape (1, 3) instead of (2, 3)"),
        ("scores", lambda x: x + 5e-6, ""),
    ],
)
def test_dense_outputs_are_compared_place_by_place(name, change, fault):
    expected = Prediction(torch.zeros(2, 4), torch.full((2, 3), 0.5))
    parts = {"boxes": expected.boxes, "scores": expected.scores}
    found = Prediction(**(parts | {name: change(parts[name])}))
    assert dense_difference(found, expected, score_tolerance=1e-5, box_tolerance=1e-3).fault == fault
