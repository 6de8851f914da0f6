"""`evaluate.py` and `predict.py`: right numbers, and a sentence where something is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import predict
import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.errors import RunError
from coco_example.evaluation.evaluation import Detector
from coco_example.evaluation.evaluation import evaluate as score
from coco_example.models.saved_model import load_model
from PIL import Image
from safetensors.torch import load_file, save_file

from crosskd_assign import EndToEndDetector, adapt

pytestmark = pytest.mark.usefixtures("no_pictures")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def call(script: Any, *arguments: object) -> int:
    """Run a script in this process; the exit code."""
    code: int = script.main([str(argument) for argument in arguments])
    return code


def sentence(errors: str) -> str:
    """The one error that was printed, which is no traceback."""
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Expected" in line
    assert "Fix: " in line
    return line


# --- evaluate.py ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_finished_run_scores_again_what_its_summary_says(request, scenes_folder, tmp_path, capsys, kind):
    run = request.getfixturevalue(kind)
    output = tmp_path / "scores.json"
    assert call(evaluate, "--run", run, "--data-path", scenes_folder, "--batch-size", 8, "--output", output) == 0
    expected = read(run / "summary.json")["scores"]
    assert expected["ap"] > 0
    assert read(output)["scores"] == expected
    assert read(output)["spec"] == read(run / "model.json")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, suffix in (("without", ""), ("with", "_nms")):
        [row] = [row for row in rows if row[:2] == [name, "NMS"]]
        assert row[2] == f"{100 * expected['ap' + suffix]:.1f}"
        assert row[-2] == f"{expected['duplicates' + suffix]:.3f}"
        assert row[-1] == f"{expected['across_classes' + suffix]:.3f}"
    thresholds = read(run / "summary.json")["thresholds"]
    assert read(output)["thresholds"] == thresholds
    [row] = [row for row in rows if row[:2] == ["all", "classes"]]
    assert row[2:4] == [f"{thresholds['overall'][name]:.3f}" for name in ("score", "f1")]


def test_a_limit_leaves_the_other_images_out(student, scenes_folder, tmp_path):
    for limit in (3, 100):
        output = tmp_path / f"{limit}.json"
        assert call(evaluate, "--run", student, "--data-path", scenes_folder, "--limit", limit, "--output", output) == 0
        assert read(output)["scores"]["images"] == min(limit, 8)


def test_evaluation_leaves_random_state_and_training_mode_alone(student, scenes_folder):
    model, _ = load_model(student)
    detector = Detector(adapt(model).train())
    index = read_coco(*locate_split(scenes_folder, "val"))
    state = torch.get_rng_state()
    score(detector, index, limit=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in detector.adapter.modules())


# --- predict.py -------------------------------------------------------------------------------------------------------


def test_predictions_are_the_detectors_and_every_image_gets_a_picture(student, scenes_folder, tmp_path, capsys):
    folder = scenes_folder / "val"
    output = tmp_path / "out"
    assert call(predict, "--run", student, "--output", output, "--score-threshold", 0, "--batch-size", 3, folder) == 0
    paths = sorted(folder.iterdir())
    rows = read(tmp_path / "out" / "detections.json")
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    model, spec = load_model(student)
    detector = EndToEndDetector(model).eval()
    for path, row in zip(paths, rows, strict=True):
        with torch.no_grad():
            [expected] = detector([predict.read_image(path)])
        torch.testing.assert_close(torch.tensor(row["boxes"]), expected["boxes"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor(row["scores"]), expected["scores"], rtol=1e-3, atol=1e-5)
        assert row["names"] == [spec.label_to_name.get(n, str(n)) for n in expected["labels"].tolist()]
        with Image.open(tmp_path / "out" / path.name) as picture:
            assert min(picture.size) > 64
    said = json.loads(capsys.readouterr().out)
    assert said == {"pictures": 8, "objects": 800, "in": str(tmp_path / "out"), "score_threshold": "0.00"}


def test_a_one_to_many_run_predicts_with_nms(teacher, scenes_folder, tmp_path):
    run, image = shutil.copytree(teacher, tmp_path / "run"), scenes_folder / "val" / "000000.png"
    weights = load_file(run / "model.safetensors")
    weights["head.regression_head.bbox_reg.bias"] += 2  # large boxes, which overlap their neighbours'
    save_file(weights, run / "model.safetensors")
    assert call(predict, "--run", run, "--output", tmp_path / "out", "--score-threshold", 0, image) == 0
    model, _ = load_model(run)
    detector = Detector(adapt(model), ranking="class_quality")
    found = [detector.detect([predict.read_image(image)], nms_threshold=threshold)[0] for threshold in (0.6, None)]
    boxes = torch.tensor(read(tmp_path / "out" / "detections.json")[0]["boxes"])
    torch.testing.assert_close(boxes, found[0]["boxes"])
    assert not torch.equal(boxes, found[1]["boxes"][: len(boxes)])


def test_weak_detections_are_left_out(student, scenes_folder, tmp_path):
    rows: list[Any] = []
    image = scenes_folder / "val" / "000000.png"
    for place in (None, 40):
        threshold = 0 if place is None else rows[0]["scores"][place]
        assert call(predict, "--run", student, "--output", tmp_path, "--score-threshold", threshold, image) == 0
        rows += read(tmp_path / "detections.json")
    assert len(rows[0]["scores"]) == 100
    assert 41 <= len(rows[1]["scores"]) < 100
    for name in ("boxes", "scores", "names"):
        assert rows[1][name] == rows[0][name][: len(rows[1]["scores"])]


def test_images_of_one_name_get_pictures_of_their_own(student, scenes_folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(scenes_folder / "val" / "000000.png", tmp_path / name / "x.png")
    shutil.copy(scenes_folder / "val" / "000001.png", tmp_path / "b" / "x-2.png")
    assert call(predict, "--run", student, "--output", tmp_path / "out", tmp_path / "a", tmp_path / "b") == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"x.png", "x-2.png", "x-3.png"}


def test_predictions_never_replace_the_images(student, scenes_folder, tmp_path, capsys):
    shutil.copytree(scenes_folder / "val", tmp_path / "mine")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert call(predict, "--run", student, "--output", tmp_path / "mine" / ".." / "mine", tmp_path / "mine") == 2
    assert "would replace images" in sentence(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_a_bad_picture_does_not_cost_the_others(student, scenes_folder, tmp_path, capsys):
    folder = shutil.copytree(scenes_folder / "val", tmp_path / "mine")
    (folder / "000001.png").write_text("no picture")
    Image.fromarray(np.full((30, 40), 1000, np.uint16)).save(folder / "000004.png")
    (folder / "folder.png").mkdir()
    for name in ("._000000.png", ".hidden.png"):  # what macOS leaves beside a file
        (folder / name).write_text("no picture")
    assert call(predict, "--run", student, "--output", tmp_path / "out", "--batch-size", 3, folder) == 2
    output, errors = capsys.readouterr()
    assert json.loads(output)["pictures"] == 6
    [first, second, page] = errors.splitlines()
    assert page == "See docs/troubleshooting.md#dataerror."
    assert first.startswith("error: Expected a readable image, but got ")
    assert second.startswith("error: Expected 8 bits per channel, but got mode I;16")
    found = {Path(row["image"]).name: row for row in read(tmp_path / "out" / "detections.json")}
    assert sorted(found) == [f"00000{n}.png" for n in (0, 2, 3, 5, 6, 7)]
    assert call(predict, "--run", student, "--output", tmp_path / "all", scenes_folder / "val") == 0
    for row in read(tmp_path / "all" / "detections.json"):
        mine = found.get(Path(row["image"]).name, row)
        assert mine["names"] == row["names"]
        assert torch.tensor(mine["scores"]) == pytest.approx(torch.tensor(row["scores"]), abs=1e-5)


def test_rows_are_written_as_they_come(student, scenes_folder, tmp_path, monkeypatch):
    original, counts = predict.draw_predictions, list[int]()

    def draw(*arguments: Any) -> Any:
        counts.append(len(read(tmp_path / "detections.json")))
        if len(counts) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(predict, "draw_predictions", draw)
    with pytest.raises(KeyboardInterrupt):
        call(predict, "--run", student, "--output", tmp_path, "--batch-size", 3, scenes_folder / "val")
    assert counts == [1, 2, 3, 4, 5]
    assert len(read(tmp_path / "detections.json")) == 5


def test_a_file_name_that_is_no_text_does_not_cost_the_others(student, scenes_folder, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"a.png", b"b\xff.png", "ß.png".encode())]
    for name in names:
        shutil.copy(scenes_folder / "val" / "000000.png", folder / name)
    assert call(predict, "--run", student, "--output", tmp_path / "out", folder) == 0
    assert [Path(row["image"]).name for row in read(tmp_path / "out" / "detections.json")] == sorted(names)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_evaluation_of_what_is_not_there_or_not_finished_ends_with_a_sentence(student, scenes_folder, tmp_path, capsys):
    unfinished = shutil.copytree(student, tmp_path / "unfinished")
    (unfinished / "model.json").unlink()
    damaged = shutil.copytree(student, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:9999])
    for run, data, reason in (
        (tmp_path / "none", scenes_folder, "a finished run, but got no such folder"),
        (unfinished, scenes_folder, "a finished run, but got a folder without model.json"),
        (damaged, scenes_folder, "cannot be read as one"),
        (student, tmp_path / "none", "an image folder and its annotation file, but got"),
    ):
        assert call(evaluate, "--run", run, "--data-path", data) == 2
        assert reason in sentence(capsys.readouterr().err)


def damage_images(folder: Path) -> None:
    """Every other image is cut, the rest has a broken chunk."""
    for n, path in enumerate(sorted(folder.iterdir())):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if n % 2 else data[:37] + b"\0" + data[38:])


@pytest.mark.parametrize("name", ["000000.png", "000001.png"])
def test_broken_images_are_named(student, scenes_folder, tmp_path, capsys, name):
    shutil.copytree(scenes_folder, tmp_path / "data")
    damage_images(tmp_path / "data" / "val")
    image = tmp_path / "data" / "val" / name
    assert call(predict, "--run", student, "--output", tmp_path / "out", image) == 2
    line = sentence(capsys.readouterr().err)
    assert "Expected a readable image" in line
    assert str(image) in line
    assert call(evaluate, "--run", student, "--data-path", tmp_path / "data") == 2
    assert "Expected a readable image" in sentence(capsys.readouterr().err)


def test_training_on_broken_images_ends_with_a_sentence(workshop, scenes_folder, tmp_path, capsys):
    shutil.copytree(scenes_folder, tmp_path / "data")
    damage_images(tmp_path / "data" / "train")
    assert workshop.train(tmp_path / "run", arm="one-to-one", data_path=tmp_path / "data") == 2
    assert "Expected a readable image" in sentence(capsys.readouterr().err)


def test_a_head_that_cannot_imitate_the_teachers_ends_with_a_sentence(workshop, teacher, tmp_path, capsys):
    options = {"arm": "own-head-imitation", "architecture": "retinanet", "teacher": teacher}
    assert workshop.train(tmp_path / "run", **options) == 2
    assert "a student with the points and classes of its teacher, but got (765, 7) and (85, 7)" in sentence(
        capsys.readouterr().err
    )


def test_predictions_of_nothing_end_with_a_sentence(student, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "text.png").write_text("no picture")
    for path, reason in (
        (tmp_path / "none", "pictures or folders, but got nothing there"),
        (tmp_path / "empty", "pictures, but got none"),
        (tmp_path / "text.png", "a readable image, but got "),
    ):
        assert call(predict, "--run", student, "--output", tmp_path / "out", path) == 2
        assert reason in sentence(capsys.readouterr().err)
    with pytest.raises(RunError, match="Expected pictures, but got none"):
        predict.find_images([])


def test_the_script_itself_ends_with_code_2_and_a_sentence(script, tmp_path):
    process = script("predict.py", "--run", str(tmp_path / "none"), "--output", str(tmp_path / "out"), str(tmp_path))
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert "Expected pictures, but got none" in sentence(errors)
    assert not (tmp_path / "out").exists()
