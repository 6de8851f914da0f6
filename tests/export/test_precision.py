"""INT8, half precision and OpenVINO: what changes in the file, what does not, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_assign import EndToEndDetector, SelectionBranch
from crosskd_assign.errors import ExportError, ImageError, OptionError
from crosskd_assign.export import agreement, convert_openvino, export_onnx, halve_onnx, quantize_onnx
from crosskd_assign.export.graph import graph_parts
from crosskd_assign.export.openvino import openvino_runner
from crosskd_assign.export.running import detections_of, onnx_runner
from crosskd_assign.functional import product_logits
from crosskd_assign.structures import Detection
from tests.makers.builders import tiny_detector
from tests.makers.small_models import scene

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (64, 80)
IMAGES = scene([SIZE] * 6)[0]
LAST = ("classification", "regression", "quality", "selection.output")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A detector with a selection branch, exported for one image of one size."""
    adapter = tiny_detector(batch_norm=True)
    torch.manual_seed(0)
    selection = SelectionBranch(adapter, width=8)
    torch.nn.init.normal_(selection.output.weight, std=0.1)
    detector = EndToEndDetector(adapter, selection=selection, top_k=20)
    path = tmp_path_factory.mktemp("precision") / "float.onnx"
    export_onnx(detector, path, image_size=SIZE, batch_size=1, metadata={"run": "a"}, class_names={0: "cat"})
    return path


def layers(model: Any, names: tuple[str, ...]) -> set[str]:
    """The names that torch gave to the weights of layers."""
    chosen = [node for node in model.graph.node if node.name in names and node.op_type == "Conv"]
    return {node.input[1].removeprefix("adapter.model.").removesuffix(".weight") for node in chosen}


def test_the_last_layers_are_found_by_walking_back_from_the_outputs(path):
    model = onnx.load(str(path))
    parts = graph_parts(model)
    assert {name.removeprefix("view.") for name in layers(model, parts.outputs)} == set(LAST)
    assert layers(model, parts.network) == {"backbone.0", "backbone.1", "backbone.2", "tower.0"}
    assert layers(model, parts.followers) == {"selection.trunk.0", "selection.trunk.3"}
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert {"TopK", "Sigmoid"} <= {kinds[name] for name in parts.followers}
    first = {node.name for node in model.graph.node if "images" in node.input}
    assert not first & {*parts.network, *parts.outputs, *parts.followers}, "normalisation is no part of the network"


def graph(*nodes: Any, outputs: tuple[str, ...], weights: tuple[str, ...] = ()) -> Any:
    def value(name: str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)

    constants = [onnx.helper.make_tensor(w, onnx.TensorProto.FLOAT, [1], [1.0]) for w in weights]
    parts = onnx.helper.make_graph(list(nodes), "g", [value("images")], [value(x) for x in outputs], constants)
    return onnx.helper.make_model(parts)


def test_the_mean_of_a_distribution_is_decoding_and_no_last_layer_and_a_shape_leads_nowhere():
    node = onnx.helper.make_node
    model = graph(
        node("Conv", ["images", "w"], ["map"], name="body"),
        node("Conv", ["map", "w"], ["bins"], name="bins"),
        node("Softmax", ["bins"], ["p"]),
        node("Transpose", ["p"], ["q"]),
        node("Conv", ["q", "w"], ["mean"], name="mean"),
        node("Shape", ["map"], ["size"]),
        node("Reshape", ["mean", "size"], ["boxes"], name="flat"),
        outputs=("boxes",),
        weights=("w",),
    )
    parts = graph_parts(model)
    assert (parts.network, parts.outputs) == (("body",), ("bins",))
    assert {"mean", "flat"} <= set(parts.followers)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_int8_holds_the_network_and_float_what_decides(path, method, tmp_path):
    report = quantize_onnx(path, tmp_path / "int8.onnx", IMAGES, method=method, threshold=0.0)
    model = onnx.load(str(report.path))
    makers = {value: node for node in model.graph.node for value in node.output}
    kinds = {x.name: x.data_type for x in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantised = [node for node in convolutions if node.input[1] in makers]
    names = {makers[node.input[1]].input[0].removesuffix("_quantized") for node in quantised}
    assert all(kinds[f"{name}_quantized"] == onnx.TensorProto.INT8 for name in names)
    assert len(quantised) == report.layers == 6  # three stages, and the tower on each of their maps
    assert {node.name for node in convolutions} - {node.name for node in quantised} >= set(report.kept)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.items() >= {"precision": "int8", "run": "a", "class_names": '{"0": "cat"}'}.items()

    # What is reported is what the two files find.
    found = [detections_of(onnx_runner(p), IMAGES, where="") for p in (path, report.path)]
    assert report.agreement == agreement(*found, threshold=0.0)
    assert len(IMAGES) * 10 < report.agreement.compared < len(IMAGES) * 20  # without those that tie with the last
    assert report.agreement.matched > 0.8
    assert 0 < report.agreement.mean_score_difference < 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


def test_half_precision_holds_the_network_and_decodes_in_float(path, tmp_path):
    report = halve_onnx(path, tmp_path / "half.onnx", IMAGES, threshold=0.0, least_matched=0.9)
    model = onnx.load(str(report.path))
    halves = [x for x in model.graph.initializer if x.data_type == onnx.TensorProto.FLOAT16 and len(x.dims) == 4]
    assert len(halves) == 6
    assert all("backbone" in x.name or "tower" in x.name for x in halves)
    assert all(x.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for x in model.graph.input)
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert 0 < report.agreement.score_difference < 0.01
    with pytest.raises(ExportError, match="of the detections in half precision"):
        halve_onnx(path, tmp_path / "other.onnx", IMAGES, threshold=0.0, score_tolerance=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["half.onnx"]


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_openvino_finds_what_onnxruntime_finds(path, precision, tmp_path):
    openvino = pytest.importorskip("openvino")
    source = path if precision == "float" else quantize_onnx(path, tmp_path / "int8.onnx", IMAGES).path
    report = convert_openvino(source, tmp_path / "model.xml", IMAGES, threshold=0.1)
    assert report.agreement.compared > 0
    assert {p.suffix for p in tmp_path.iterdir()} >= {".xml", ".bin"}
    model = openvino.Core().read_model(str(tmp_path / "model.xml"))
    assert model.get_rt_info(["crosskd_assign", "run"]).astype(str) == "a"
    bits = {op.get_output_element_type(0).get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
    assert ("i8" in bits) == (precision == "int8")


def test_an_operator_that_openvino_lacks_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("openvino")
    model = onnx.load(str(make_unknown(tmp_path)))
    assert model.graph.node[0].op_type == "Unheard"
    with pytest.raises(ExportError, match=r"operators that OpenVINO has, but got .*Unheard"):
        openvino_runner(tmp_path / "unknown.onnx")


def make_unknown(folder: Path) -> Path:
    model = graph(onnx.helper.make_node("Unheard", ["images"], ["boxes"], domain="nowhere"), outputs=("boxes",))
    onnx.save(model, str(folder / "unknown.onnx"))
    return folder / "unknown.onnx"


WRITERS = [quantize_onnx, halve_onnx, convert_openvino]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("error", "images", "match"),
    [
        (ImageError, [], "at least one image, but got none"),
        (ImageError, [torch.rand(3, 30, 80)], r"images of 64 × 80 px, as the file takes, but got 30 × 80"),
        (ImageError, [torch.zeros(3, 64, 80, dtype=torch.uint8)], "uint8"),
    ],
)
def test_images_that_the_file_cannot_take_are_refused(write, error, images, match, path, tmp_path):
    if write is convert_openvino:
        pytest.importorskip("openvino")
    with pytest.raises(error, match=match):
        write(path, tmp_path / "a.xml", images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("write", "package", "extra"),
    [
        (quantize_onnx, "onnxruntime.quantization", "export"),
        (halve_onnx, "onnxruntime.transformers.float16", "export"),
        (convert_openvino, "openvino", "openvino"),
    ],
)
def test_a_runtime_that_is_not_installed_is_named_with_the_command_that_installs_it(
    write, package, extra, path, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf'{package}.*pip install "crosskd_assign\[{extra}\]"'):
        write(path, tmp_path / "a.xml", IMAGES)


def test_what_cannot_be_quantised_is_refused(path, tmp_path):
    with pytest.raises(OptionError, match="method"):
        quantize_onnx(path, tmp_path / "a.onnx", IMAGES, method="guess")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="an ONNX file, but got none"):
        quantize_onnx(tmp_path / "none.onnx", tmp_path / "a.onnx", IMAGES)
    with pytest.raises(ExportError, match="no such folder"):
        quantize_onnx(path, tmp_path / "nowhere" / "a.onnx", IMAGES)
    with pytest.raises(ExportError, match="0 layers and 0 last ones"):
        graph_parts(graph(onnx.helper.make_node("Relu", ["images"], ["boxes"]), outputs=("boxes",)))


def test_detections_agree_one_to_one_by_label_and_overlap():
    def detection(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detection:
        return Detection(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))

    a = detection([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 9, 9]], [0.9, 0.8, 0.7, 0.1], [1, 1, 2, 1])
    b = detection([[0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 10]], [0.85, 0.7, 0.2], [1, 1, 2])
    found = agreement([a], [b])
    assert (found.compared, found.matched) == (
        3,
        pytest.approx(1 / 3),
    )  # the second has no partner, the third's is of 1
    assert found.iou == pytest.approx(0.8)
    assert found.score_difference == pytest.approx(0.05)
    assert agreement([b], [detection([], [], [])], threshold=0.99).matched == 1.0


class Product(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return product_logits(x, y), torch.logaddexp(x, y), torch.nn.functional.logsigmoid(x)


def test_logits_of_any_size_stay_finite_in_onnxruntime(tmp_path):
    """torch alone writes log(eᵃ + eᵇ) and log(σ(x)), which are infinite beyond ±88."""
    from crosskd_assign.export.translations import stable_translations

    x = torch.tensor([-300.0, -100, -5, 0, 5, 100, 300]).repeat(2)
    arguments = (x, x.roll(3))
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": 18, "input_names": ["x", "y"]}
    program = torch.onnx.export(Product().eval(), arguments, custom_translation_table=stable_translations(), **options)
    program.save(str(tmp_path / "a.onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    found = session.run(None, {"x": x.numpy(), "y": x.roll(3).numpy()})
    for value, expected in zip(found, Product()(*arguments), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected, atol=1e-6, rtol=1e-6)
