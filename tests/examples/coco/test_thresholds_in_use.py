"""Thresholds, classes and top-k from a run to its pictures: what is chosen, kept, exported and used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import export
import numpy as np
import predict
import pytest
import torch
from coco_example.data.annotations import read_annotations
from coco_example.errors import RunError
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.evaluation.operating_point import choose_thresholds
from coco_example.models.class_filter import labels_of
from coco_example.models.saved_model import load_model, save_spec
from coco_example.models.score_thresholds import USUAL, ScoreThresholds

from crosskd_assign.diagnostics import Threshold, Thresholds
from crosskd_assign.structures import Detection


def call(script: Any, *arguments: object) -> int:
    code: int = script.main([str(argument) for argument in arguments])
    return code


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Leaves out drawing, most of the time that `predict.py` takes for a few pictures."""
    monkeypatch.setattr(predict, "draw_predictions", lambda *_: None)


@pytest.fixture
def pictures(scenes_folder):
    return scenes_folder / "val"


def shown(pictures: Path, output: Path, *arguments: object) -> list[dict[str, Any]]:
    assert call(predict, *arguments, "--output", output, "--limit", 3, "--", pictures) == 0
    rows: list[dict[str, Any]] = read(output / "detections.json")
    return rows


def copied(run: Path, folder: Path, **values: Any) -> Path:
    """A copy of a run with other values in its ``model.json``; None takes one out."""
    shutil.copytree(run, folder)
    content = {**read(run / "model.json"), **values}
    (folder / "model.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


# --- chosen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_run_keeps_the_thresholds_of_what_it_is_used_with(kind, request):
    run = request.getfixturevalue(kind)
    summary, model = read(run / "summary.json")["thresholds"], read(run / "model.json")["thresholds"]
    assert summary["chosen_on"] == model["chosen_on"] == "validation images"
    assert (summary["iou"], summary["with_nms"]) == (0.5, kind == "teacher")
    assert model["overall"] == summary["overall"]["score"] > 0
    names = load_model(run)[1].label_to_name
    assert {names[int(n)]: score for n, score in model["per_label"].items()} == {
        name: each["score"] for name, each in summary["per_class"].items()
    }


def test_crowds_do_not_count_and_classes_go_by_their_category(tmp_path):
    boxes = [[0, 0, 10, 10], [20, 20, 10, 10], [50, 50, 40, 40]]
    rows = [
        {"id": i, "image_id": "a", "bbox": b, "category_id": c}
        for i, (b, c) in enumerate(zip(boxes, (7, 9, 7), strict=True))
    ]
    rows[2]["iscrowd"] = 1
    file = tmp_path / "a.json"
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    image = {"id": "a", "file_name": "a.png", "width": 100, "height": 100}
    file.write_text(json.dumps({"images": [image], "annotations": rows, "categories": categories}))

    corners = torch.tensor([[0.0, 0, 10, 10], [52, 52, 60, 60], [20, 20, 30, 30], [70, 0, 80, 10], [0, 60, 9, 70]])
    found = Detection(
        boxes=corners, scores=torch.tensor([0.5, 0.9, 0.4, 0.95, 0.99]), labels=torch.tensor([4, 4, 2, 2, 1])
    )
    chosen = choose_thresholds([found], read_annotations(file), ["a"], {4: 7, 2: 9, 1: 3})  # no category 3 in the file
    assert chosen.per_class[4] == Threshold(0.5, 1.0, 1.0, 1.0, 1)
    assert (chosen.per_class[2].precision, sorted(chosen.per_class)) == (0.5, [2, 4])
    assert chosen.overall.precision == pytest.approx(2 / 3)


def test_where_nothing_is_right_there_are_none():
    nothing = Thresholds(Threshold(float("nan"), 0.0, 0.0, 0.0, 3), {})
    assert ScoreThresholds.of_best_f1(nothing, "validation images") is None


# --- used -------------------------------------------------------------------------------------------------------------


def test_the_runs_thresholds_are_used_by_class_unless_another_is_given(student, pictures, tmp_path, capsys):
    everything = shown(pictures, tmp_path / "all", "--run", student, "--score-threshold", 0)
    assert json.loads(capsys.readouterr().out)["score_threshold"] == "0.00"
    names = load_model(student)[1].label_to_name
    scores = sorted(score for row in everything for score in row["scores"])
    low, high = scores[len(scores) // 4], scores[-len(scores) // 4]
    limits = {"overall": low, "per_label": {"1": high}, "chosen_on": "validation images"}
    run = copied(student, tmp_path / "run", thresholds=limits)

    rows = shown(pictures, tmp_path / "some", "--run", run)
    told = f"{low:.2f}, by class {high:.2f}, the best F1 on validation images"
    assert json.loads(capsys.readouterr().out)["score_threshold"] == told
    for row, every in zip(rows, everything, strict=True):
        pairs = zip(every["names"], every["scores"], strict=True)
        kept = [(name, s) for name, s in pairs if s >= (high if name == names[1] else low)]
        assert list(zip(row["names"], row["scores"], strict=True)) == kept
    assert 0 < sum(len(row["names"]) for row in rows) < len(scores)


def test_a_run_of_an_earlier_version_is_used_with_the_usual_threshold(student, pictures, tmp_path, capsys):
    run = copied(student, tmp_path / "run", thresholds=None, one_class_per_point=None)
    assert load_model(run)[1].thresholds is None
    shown(pictures, tmp_path / "out", "--run", run)
    assert json.loads(capsys.readouterr().out)["score_threshold"] == "0.30"
    broken = copied(student, tmp_path / "broken", thresholds={"overall": "much", "per_label": {}})
    with pytest.raises(RunError, match="thresholds that are no numbers"):
        load_model(broken)


def test_thresholds_are_read_as_they_were_written(tmp_path, student):
    limits = ScoreThresholds(0.25, "validation images", {1: 0.125, 3: 0.5})
    spec = replace(load_model(student)[1], thresholds=limits)
    run = copied(student, tmp_path / "run")
    save_spec(run, spec)
    assert load_model(run)[1] == spec
    assert ScoreThresholds.from_metadata(limits.as_metadata()) == limits
    assert ScoreThresholds.from_metadata({}) is None
    assert str(limits) == "0.25, by class 0.12 to 0.50, the best F1 on validation images"
    assert str(ScoreThresholds(0.25, "", {1: 0.25})) == "0.25"
    assert [limits.of(label) for label in (1, 2, 3)] == [0.125, 0.25, 0.5]


# --- classes and top-k ------------------------------------------------------------------------------------------------


def test_a_filter_of_classes_acts_before_top_k(student, pictures, tmp_path):
    names = load_model(student)[1].label_to_name
    options = ["--run", student, "--score-threshold", 0, "--top-k", 5]
    best = shown(pictures, tmp_path / "best", *options)
    rarest = min(names.values(), key=lambda name: sum(row["names"].count(name) for row in best))
    assert any(row["names"].count(rarest) < 5 for row in best), "it is found without the filter, so this shows nothing"
    rows = shown(pictures, tmp_path / "rare", *options, "--classes", rarest.upper())
    assert [row["names"] for row in rows] == [[rarest] * 5] * 3


def test_classes_are_named_or_given_by_id_and_unknown_ones_get_the_nearest_names():
    names, ids = {1: "car", 2: "Truck", 3: "7", 4: "car"}, {1: 7, 2: 8, 3: 9, 4: "x"}
    assert labels_of(["truck"], names, ids) == (2,)
    assert labels_of(["Car", "8"], names, ids) == (1, 2, 4)
    assert labels_of(["7", "x"], names, ids) == (3, 4)  # a name before an id
    assert labels_of(["2"], {1: "car", 2: "bus"}) == (2,)
    assert labels_of(None, names, ids) is None
    with pytest.raises(RunError, match=r"got trcuk .*choose among Truck, …"):
        labels_of(["trcuk"], names, ids)


def test_what_top_k_may_have_dropped_is_said(student, scenes_folder, pictures, tmp_path, capsys):
    options = ["--run", student, "--score-threshold", 0, "--top-k", 2]
    shown(pictures, tmp_path / "out", *options)
    assert "in 3 of 3 images all 2 detections that --top-k allows score above the threshold" in capsys.readouterr().err
    shown(pictures, tmp_path / "out", "--run", student, "--score-threshold", 0.999, "--top-k", 2)
    assert "warning" not in capsys.readouterr().err
    assert call(evaluate, "--run", student, "--data-path", scenes_folder, "--top-k", 4) == 0
    assert "images all 4 detections" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "labels", "cuts"),
    [
        ([0.9, 0.5], [1, 1], True),
        ([0.9, 0.2], [1, 9], True),  # the last one is not shown, but another of class 1 may come after it
        ([0.9, 0.2], [9, 1], True),
        ([0.9, 0.5], [5, 5], False),  # of class 5 nothing below 0.6 would be shown
        ([0.9, 0.5], [9, 5], False),
        ([0.9, 0.1], [1, 1], False),  # all that is dropped scores less than every threshold of what is there
        ([0.9, 0.5], [5, 3], True),
        ([0.9, 0.005], [3, 3], False),
        ([0.9, 0.9], [9, 9], False),  # classes that nobody asked for
        ([0.9], [1], False),
    ],
)
def test_top_k_cuts_where_the_last_one_scores_above_the_threshold_of_a_class_that_is_found(scores, labels, cuts):
    # Class 3 had few objects, and so has a threshold that nearly everything passes: it counts where it is found.
    limits = ScoreThresholds(0.6, "", {1: 0.2, 3: 0.01})
    found = Detection(
        boxes=torch.zeros(len(scores), 4), scores=torch.tensor(scores).double(), labels=torch.tensor(labels)
    )
    assert limits.cuts(found, 2, [1, 3, 5]) == cuts


# --- one class a point ------------------------------------------------------------------------------------------------


def test_one_class_a_point_is_part_of_the_model_and_can_be_overridden(workshop, student, pictures, tmp_path):
    assert workshop.options(tmp_path, arm="one-to-one", one_class_per_point=True).model.one_class_per_point
    run = copied(student, tmp_path / "run", one_class_per_point=True)
    options, classes = ["--score-threshold", 0, "--top-k", 10**6], load_model(run)[1].num_classes
    for source, more, single in [(run, [], True), (run, ["--no-one-class-per-point"], False), (student, [], False)]:
        rows = shown(pictures, tmp_path / "out", "--run", source, *options, *more)
        assert [len(row["boxes"]) for row in rows] == [85 if single else 85 * classes] * 3  # 8² + 4² + 2² + 1 points


# --- an exported file -------------------------------------------------------------------------------------------------


def test_a_run_is_exported_with_its_thresholds_its_ids_and_the_classes_that_are_asked_for(
    student, tmp_path, monkeypatch
):
    given: dict[str, Any] = {}
    monkeypatch.setattr(export, "export_onnx", lambda detector, *_, **options: given.update(options, detector=detector))
    limits = ScoreThresholds(0.25, "validation images", {1: 0.125})
    run = copied(student, tmp_path / "run", thresholds=limits.as_flat(), one_class_per_point=True)
    names = load_model(run)[1].label_to_name
    export.export(run, tmp_path / "a.onnx", classes=[names[2], names[1]])
    assert (given["detector"].classes, given["detector"].one_class_per_point) == ((1, 2), True)
    assert ScoreThresholds.from_metadata(given["metadata"]) == limits
    assert given["metadata"]["thresholds_chosen_on"] == "validation images"
    ids = {int(label): i for label, i in json.loads(given["metadata"]["category_ids"]).items()}
    assert ids == load_model(run)[1].label_to_category
    export.export(run, tmp_path / "a.onnx", one_class_per_point=False)
    assert (given["detector"].classes, given["detector"].one_class_per_point) == (None, False)


@pytest.mark.slow
def test_a_file_is_used_with_its_own_thresholds_and_classes(student, pictures, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    limits = {"overall": 0.001, "per_label": {"1": 0.002}, "chosen_on": "validation images"}
    run = copied(student, tmp_path / "run", thresholds=limits, one_class_per_point=True)
    file = tmp_path / "a.onnx"
    names, size = load_model(run)[1].label_to_name, ["--size", 64, 64]
    assert call(export, run, "--output", file, *size, "--top-k", 4, "--classes", names[2], names[1]) == 0
    model = OnnxDetector(file)
    assert model.thresholds == load_model(run)[1].thresholds
    assert (model.top_k, model.class_names, model.category_ids) == (4, names, load_model(run)[1].label_to_category)

    capsys.readouterr()
    rows = shown(pictures, tmp_path / "file", "--model", file)
    output, warning = capsys.readouterr()
    assert json.loads(output)["score_threshold"] == "0.00, the best F1 on validation images"  # in two digits
    assert "in 3 of 3 images all 4 detections" in warning
    same = shown(pictures, tmp_path / "run-out", "--run", run, "--top-k", 4, "--classes", names[1], names[2])
    for mine, theirs in zip(rows, same, strict=True):
        assert mine["names"] == theirs["names"]
        np.testing.assert_allclose(mine["boxes"], theirs["boxes"], atol=1e-2)
    fewer = shown(pictures, tmp_path / "one", "--model", file, "--classes", names[1])
    assert {name for row in fewer for name in row["names"]} <= {names[1]}
    assert call(predict, "--model", file, "--output", tmp_path, "--one-class-per-point", pictures) == 2
    assert "give it to export.py" in capsys.readouterr().err


def test_the_usual_threshold_has_no_origin():
    assert (str(USUAL), USUAL.of(7)) == ("0.30", 0.3)
