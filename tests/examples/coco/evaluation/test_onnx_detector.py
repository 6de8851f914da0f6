"""`export.py` and `predict.py --model`: the file of a run finds what the run finds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import export
import predict
import pytest
import torch
from coco_example.errors import MissingPackageError, RunError
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import ModelSpec, save_model
from coco_example.options import ModelOptions
from PIL import Image
from torch import nn

from crosskd_assign.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SPEC = ModelSpec(ModelOptions(size=64), one_to_many=False, categories=((7, "cat"), (9, "Füchse")))


def write_run(folder: Path, spec: ModelSpec = SPEC) -> Path:
    """A finished run of a detector whose detections differ, although nobody has trained it."""
    torch.manual_seed(0)
    model: Any = build_detector(spec.model, len(spec.categories) + 1)
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.3)
    folder.mkdir()
    save_model(folder, model, spec)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        noise = torch.randint(256, (48, 80, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((80, 48)).save(folder / f"{i}.png")
    return folder


def call(script: Any, *arguments: object) -> int:
    code: int = script.main([str(argument) for argument in arguments])
    return code


def detections(source: list[object], pictures: Path, output: Path) -> list[dict[str, Any]]:
    assert call(predict, *source, "--output", output, "--score-threshold", 0, pictures) == 0
    rows: list[dict[str, Any]] = json.loads((output / "detections.json").read_text())
    return rows


def check_the_same(run, model, pictures, tmp_path):
    found = detections(["--model", model], pictures, tmp_path / "found")
    expected = detections(["--run", run], pictures, tmp_path / "expected")
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=2e-5)
        rows = list(zip(theirs["names"], theirs["boxes"], theirs["scores"], strict=True))
        for name, box, score in zip(mine["names"], mine["boxes"], mine["scores"], strict=True):
            boxes = [b for n, b, s in rows if n == name and abs(s - score) <= 2e-5]
            assert any(b == pytest.approx(box, abs=2e-3) for b in boxes) or score <= theirs["scores"][-1] + 2e-5
        assert set(mine["names"]) <= {"0", "cat", "Füchse"}
        assert max(mine["scores"]) > min(mine["scores"]) + 0.05
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["0.png", "1.png", "detections.json"]


def test_the_file_of_a_run_finds_what_the_run_finds(run, pictures, tmp_path, capsys):
    model = tmp_path / "a.onnx"
    assert call(export, run, "--output", model, "--size", 48, 80) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(model)
    assert report["input"] == ["batch", 3, 48, 80]
    assert 0 < report["score_difference"] <= 1e-5
    check_the_same(run, model, pictures, tmp_path)
    Image.new("RGB", (81, 48)).save(pictures / "2.png")
    assert call(predict, "--model", model, "--output", tmp_path / "other", pictures) == 2
    assert "got [1, 3, 48, 81]" in capsys.readouterr().err
    rows = json.loads((tmp_path / "other" / "detections.json").read_text())
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png"]  # it did not cost the others


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", ["inside", "outside"])
def test_a_file_for_any_size_finds_what_the_run_finds(preprocessing, run, pictures, tmp_path):
    model = tmp_path / "a.onnx"
    assert call(export, run, "--output", model, "--preprocessing", preprocessing) == 0
    check_the_same(run, model, pictures, tmp_path)


@pytest.mark.slow
def test_a_file_for_prepared_images_of_one_size_finds_what_the_run_finds(run, pictures, tmp_path, capsys):
    model = tmp_path / "a.onnx"
    assert call(export, run, "--output", model, "--preprocessing", "outside", "--size", 64, 64) == 0
    image = predict.read_image(pictures / "0.png")
    (found,) = OnnxDetector(model)([image])
    assert found["boxes"].shape == (100, 4)
    assert found["boxes"].amax(0)[2:].tolist() == pytest.approx([80, 48])
    assert call(export, run, "--output", model, "--preprocessing", "outside", "--size", 32, 32) == 0
    with pytest.raises(RunError, match="fit into 32 × 32 px"):
        OnnxDetector(model)([image])


def test_a_run_that_needs_nms_is_not_exported(tmp_path, capsys):
    folder = write_run(tmp_path / "run", ModelSpec(**{**vars(SPEC), "one_to_many": True}))
    assert call(export, folder) == 2
    assert "a one-to-many run" in capsys.readouterr().err
    assert not list(folder.glob("*.onnx"))


def test_what_is_no_run_is_not_exported(tmp_path, capsys):
    assert call(export, tmp_path) == 2
    assert "a folder without model.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_is_off_by_more_than_its_tolerance_names_the_options(run, tmp_path, capsys):
    file = tmp_path / "a.onnx"
    assert call(export, run, "--output", file, "--size", 64, 64, "--score-tolerance", 0) == 2
    sentence, page = capsys.readouterr().err.splitlines()[-2:]
    assert re.search(r"Expected the detections of the detector, but got score 0\.\d+ instead of 0\.\d+ at", sentence)
    assert "raise --score-tolerance or --box-tolerance" in sentence
    assert page == f"See {ExportError.page}."
    assert not file.exists()


def test_tolerances_are_passed_on_and_named_as_options_where_they_are_too_small(run, tmp_path, monkeypatch, capsys):
    given: dict[str, Any] = {}

    def refuse(*_: Any, **options: Any) -> None:
        given.update(options)
        fix = 'raise score_tolerance or box_tolerance, or export it with outputs="dense" and a fixed image_size'
        raise ExportError(expected="the detections of the detector", got="others", where="export_onnx", fix=fix)

    monkeypatch.setattr(export, "export_onnx", refuse)
    assert call(export, run, "--output", tmp_path / "a.onnx", "--score-tolerance", 0.5, "--box-tolerance", 0.25) == 2
    assert (given["score_tolerance"], given["box_tolerance"]) == (0.5, 0.25)
    fix = 'raise --score-tolerance or --box-tolerance, or export it with --outputs="dense" and a fixed --size'
    assert capsys.readouterr().err.endswith(f"Fix: {fix}.\nSee {ExportError.page}.\n")
    with pytest.raises(ExportError):
        export.export(run, tmp_path / "a.onnx")
    assert (given["score_tolerance"], given["box_tolerance"]) == (None, 1e-3)


def test_a_size_that_cannot_be_is_an_error(run, tmp_path, capsys):
    assert call(export, run, "--size", 0, 48) == 2
    assert "image_size" in capsys.readouterr().err


def test_what_is_no_exported_file_ends_with_a_sentence(pictures, tmp_path, capsys):
    text = tmp_path / "text.onnx"
    text.write_text("no protobuf")
    foreign = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), foreign)
    for path, fault in ((tmp_path / "none.onnx", "got none"), (text, "readable"), (foreign, "without class_names")):
        assert call(predict, "--model", path, "--output", tmp_path / "out", pictures) == 2
        assert fault in capsys.readouterr().err


def test_onnxruntime_is_asked_for_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(MissingPackageError, match=r'pip install "crosskd_assign\[export\]"'):
        OnnxDetector(tmp_path / "a.onnx")
