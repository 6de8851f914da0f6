"""`export.py` for other runtimes and precisions, dense files, and `evaluate.py --model`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import evaluate
import export
import numpy as np
import pytest
import torch
from coco_example.data.calibration import find_pictures
from coco_example.errors import DataError
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.models.saved_model import ModelSpec, load_model, save_model
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def call(script: Any, *arguments: object) -> int:
    code: int = script.main([str(argument) for argument in arguments])
    return code


@pytest.fixture
def pictures(tmp_path):
    """Pictures in a tree, beside what is none."""
    for i, name in enumerate(["a/b/1.png", "a/2.png", "3.png", "a/b/4.jpg", "5.png"]):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * i, 90, 120)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "a" / "._2.png").write_text("macOS")
    return tmp_path / "pictures"


def test_pictures_are_found_in_any_tree_and_spread_over_all(pictures, tmp_path):
    names = [path.relative_to(pictures).as_posix() for path in find_pictures(pictures, 100)]
    assert sorted(names) == ["3.png", "5.png", "a/2.png", "a/b/1.png", "a/b/4.jpg"]
    assert [names.index(path.relative_to(pictures).as_posix()) for path in find_pictures(pictures, 2)] == [0, 2]
    (tmp_path / "empty" / "below").mkdir(parents=True)
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(DataError, match=str(folder)):
            find_pictures(folder, 3)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--int8", "{tmp}/empty"], "Expected pictures, but got none"),
        (["--int8", "{tmp}/nowhere"], "Expected a folder of pictures, but got no such folder"),
        (["--int8", "{pictures}", "--int8-images", 0], "at least 1 picture, but got 0"),
        (["--half", "--check", "{tmp}/empty"], "Expected pictures, but got none"),
        (["--runtime", "openvino", "--output", "{tmp}/a.onnx"], "ends in .xml, but got a.onnx"),
        (["--half", "--output", "{tmp}/a.xml"], "ends in .onnx, but got a.xml"),
        (["--runtime", "openvino"], 'pip install "crosskd_assign[openvino]"'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_traced(
    arguments, fault, student, pictures, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(export, "export_onnx", lambda *_, **__: pytest.fail("was traced"))
    if "pip" in fault:
        monkeypatch.setitem(sys.modules, "openvino", None)
    filled = [str(x).format(tmp=tmp_path, pictures=pictures) for x in arguments]
    assert call(export, student, *filled) == 2
    assert fault in capsys.readouterr().err


def test_int8_and_half_exclude_each_other(student, pictures, capsys):
    with pytest.raises(SystemExit):
        call(export, student, "--int8", pictures, "--half")
    assert "not allowed with argument" in capsys.readouterr().err


def test_without_its_validation_pictures_a_run_asks_for_others(student, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.json", "model.safetensors"):
        (run / name).write_bytes((student / name).read_bytes())
    monkeypatch.setattr(export, "export_onnx", lambda *_, **__: pytest.fail("was traced"))
    assert call(export, run, "--half") == 2
    assert "name a folder of pictures with --check" in capsys.readouterr().err


# --- files ------------------------------------------------------------------------------------------------------------

BOXES = [[0.0, 0, 20, 20], [1, 0, 20, 20], [30, 30, 50, 50]]
SCORES = [[0.1, 0.9, 0.2], [0.1, 0.8, 0.3], [0.1, 0.05, 0.7]]


def dense_file(path: Path, *, one_to_many: bool) -> Path:
    """A file that returns the same boxes and scores for every image."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = {"boxes": np.array([BOXES], np.float32), "scores": np.array([SCORES], np.float32)}
    nodes = [helper.make_node("Constant", [], [n], value=onnx.numpy_helper.from_array(v)) for n, v in values.items()]
    images = helper.make_tensor_value_info("images", kind, [1, 3, "height", "width"])
    outputs = [helper.make_tensor_value_info(name, kind, v.shape) for name, v in values.items()]
    graph = helper.make_graph(nodes, "g", [images], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    metadata = {"preprocessing": "inside", "class_names": '{"1": "cat", "2": "dog"}', "short_side": "64"}
    metadata |= {"long_side": "64", "size_divisible": "32", "image_mean": "[0, 0, 0]", "top_k": "4"}
    helper.set_model_props(model, metadata | {"one_to_many": json.dumps(one_to_many), "outputs": "dense"})
    onnx.save(model, str(path))
    return path


def test_dense_outputs_are_finished_by_top_k_and_where_needed_by_nms(tmp_path):
    image = torch.zeros(3, 50, 50)
    (plain,) = OnnxDetector(dense_file(tmp_path / "a.onnx", one_to_many=False))([image])
    assert plain["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.3])
    assert plain["labels"].tolist() == [1, 1, 2, 2]
    assert plain["boxes"].tolist() == [BOXES[i] for i in (0, 1, 2, 1)]
    detector = OnnxDetector(dense_file(tmp_path / "b.onnx", one_to_many=True), top_k=3)
    (suppressed,) = detector([image])
    assert suppressed["scores"].tolist() == pytest.approx([0.9, 0.7, 0.3])  # 0.8 is the first one's duplicate
    (two,) = detector.detect_twice([image], nms_threshold=0.99)[1]
    assert two["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_a_file_without_category_ids_is_not_scored(tmp_path, scenes_folder, capsys):
    path = dense_file(tmp_path / "a.onnx", one_to_many=False)
    assert call(evaluate, "--model", path, "--data-path", scenes_folder) == 2
    assert "an older export.py" in capsys.readouterr().err


@pytest.mark.slow
def test_an_exported_file_scores_what_its_run_scores_and_int8_almost(student, scenes_folder, tmp_path, capsys):
    shared = ("--data-path", scenes_folder, "--batch-size", 1)
    int8 = tmp_path / "a.int8.onnx"
    assert call(export, student, "--output", tmp_path / "a.onnx", "--size", 64, 64) == 0
    assert call(export, student, "--output", int8, "--int8", scenes_folder / "train", "--size", 64, 64) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["int8"]["kept_in_float"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.int8.onnx"}
    scores = []
    for source in (("--run", student), ("--model", tmp_path / "a.onnx"), ("--model", int8)):
        assert call(evaluate, *source, *shared, "--output", tmp_path / "scores.json") == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
    assert scores[1]["ap"] == pytest.approx(scores[0]["ap"], abs=1e-6)
    assert scores[1]["duplicates"] == pytest.approx(scores[0]["duplicates"], abs=1e-6)
    assert scores[2]["ap"] == pytest.approx(scores[0]["ap"], abs=0.05)


@pytest.mark.slow
def test_a_one_to_many_run_is_exported_dense_and_scores_with_nms_what_its_run_scores(student, scenes_folder, tmp_path):
    model, spec = load_model(student)
    (tmp_path / "many").mkdir()
    save_model(tmp_path / "many", model, ModelSpec(spec.model, one_to_many=True, categories=spec.categories))
    file = tmp_path / "dense.onnx"
    assert call(export, tmp_path / "many", "--outputs", "dense", "--output", file, "--size", 64, 64) == 0
    scores = []
    for source in (("--run", tmp_path / "many"), ("--model", file)):
        output = tmp_path / "scores.json"
        assert call(evaluate, *source, "--data-path", scenes_folder, "--batch-size", 1, "--output", output) == 0
        scores.append(json.loads(output.read_text())["scores"])
    assert scores[1]["ap_nms"] == pytest.approx(scores[0]["ap_nms"], abs=1e-6)
    assert scores[1]["ap"] == pytest.approx(scores[0]["ap"], abs=1e-6)
