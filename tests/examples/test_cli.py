"""`evaluate.py`, `predict.py` and the options of `train.py`: right numbers, and a sentence where something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import evaluate
import predict
import pytest
import torch
import train
from arms import Arm
from coco_reader import locate_split, read_coco
from logbook import read_metrics
from options import Options, parse_options
from PIL import Image
from runs import RunError, load_checkpoint, load_model
from safetensors.torch import load_file, save_file
from scenes import write_scenes
from torch import Tensor
from training import Training

from crosskd_assign import EndToEndDetector, adapt
from crosskd_assign.diagnostics import one_to_many_detections

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def student(workshop, tmp_path_factory):
    """A finished one-to-one run of two epochs with an average of its weights; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, arm="one-to-one", epochs=2, ema=0.5, lr=2e-3) == 0
    return folder


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
        assert row[-1] == f"{expected['duplicates' + suffix]:.3f}"


def test_a_limit_leaves_the_other_images_out(student, scenes_folder, tmp_path):
    for limit in (3, 100):
        output = tmp_path / f"{limit}.json"
        assert call(evaluate, "--run", student, "--data-path", scenes_folder, "--limit", limit, "--output", output) == 0
        assert read(output)["scores"]["images"] == min(limit, 8)


def test_evaluation_leaves_random_state_and_training_mode_alone(student, scenes_folder):
    model, spec = load_model(student)
    arm = Arm(model, adapt(model), one_to_many=spec.one_to_many).train()
    index = read_coco(*locate_split(scenes_folder, "val"))
    state = torch.get_rng_state()
    evaluate.evaluate(arm, index, limit=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in arm.modules())


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
    assert json.loads(capsys.readouterr().out) == {"pictures": 8, "objects": 800, "in": str(tmp_path / "out")}


def test_a_one_to_many_run_predicts_with_nms(teacher, scenes_folder, tmp_path):
    run, image = shutil.copytree(teacher, tmp_path / "run"), scenes_folder / "val" / "000000.png"
    weights = load_file(run / "model.safetensors")
    weights["head.regression_head.bbox_reg.bias"] += 2  # large boxes, which overlap their neighbours'
    save_file(weights, run / "model.safetensors")
    assert call(predict, "--run", run, "--output", tmp_path / "out", "--score-threshold", 0, image) == 0
    model, _ = load_model(run)
    arm = Arm(model, adapt(model), one_to_many=True)
    found = [
        one_to_many_detections(arm.adapter, *arm.predict([predict.read_image(image)]), nms_threshold=threshold)[0]
        for threshold in (0.6, None)
    ]
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


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_evaluation_of_what_is_not_there_or_not_finished_ends_with_a_sentence(student, scenes_folder, tmp_path, capsys):
    unfinished = shutil.copytree(student, tmp_path / "unfinished")
    (unfinished / "model.json").unlink()
    damaged = shutil.copytree(student, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:9999])
    for run, data, reason in (
        (tmp_path / "none", scenes_folder, "a finished run, but got no model.json"),
        (unfinished, scenes_folder, "a finished run, but got no model.json"),
        (damaged, scenes_folder, "cannot be read as one"),
        (student, tmp_path / "none", "an image folder and its annotation file but got"),
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
        (tmp_path / "text.png", "a readable image, but got cannot identify"),
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


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--epochs", "0"], "expected --epochs of at least 1, but got 0"),
        (["--batch-size", "-2"], "expected --batch-size of at least 1, but got -2"),
        (["--seed", "-1"], "expected --seed of at least 0, but got -1"),
        (["--detach"], "expected --auxiliary-head for --detach, but got none"),
        (["--arm", "best"], "invalid choice: 'best'"),
        (["--data-path", "/none/at/all"], "got no folder at --data-path /none/at/all"),
        (["--inherit"], "expected a --teacher for --inherit"),
        (["--teacher", "t", "--inherit", "--inherit-from", "o"], "expected --inherit or --inherit-from, but got both"),
    ],
)
def test_options_that_mean_nothing_are_refused(workshop, tmp_path, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        parse_options([*workshop.arguments(tmp_path / "run"), *arguments])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_options_need_an_output_and_otherwise_have_the_documented_defaults(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_options([])
    assert "--output" in capsys.readouterr().err
    assert parse_options(["--output", "x", "--data", "demo"]) == Options(output="x", data="demo")
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0


def test_drawn_scenes_need_no_data_and_are_drawn_once(workshop, tmp_path, monkeypatch):
    def small_scenes(root: Path) -> None:
        write_scenes(root, train=8, val=2, size=64)

    monkeypatch.setattr(train, "write_scenes", small_scenes)
    for run in ("a", "b"):
        options = {"arm": "one-to-one", "data": "demo", "data_path": tmp_path / "data", "batch_size": 4}
        assert workshop.train(tmp_path / run, **options) == 0
    assert len(list((tmp_path / "data" / "train").iterdir())) == 8


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Cosine from 1 to 0.01 over nine steps, times 1/4, 2/4, 3/4 of warm-up.
        ("cosine", [(1, 0.25), (2, 0.4850739), (3, 0.6631440), (4, 0.7525), (5, 0.5909559), (9, 0.0398521)]),
        ("step", [(1, 0.25), (3, 0.75), (4, 1.0), (6, 1.0), (7, 0.1), (8, 0.1), (9, 0.01)]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(workshop, tmp_path, monkeypatch, schedule, expected):
    used = []
    original = Training._update

    def update(training: Training, losses: dict[str, Tensor]) -> None:
        used.append({group["lr"] for group in training.optimizer.param_groups})
        original(training, losses)

    monkeypatch.setattr(Training, "_update", update)
    options = {"arm": "one-to-one", "epochs": 3, "warmup_steps": 4, "lr": 2e-3, "schedule": schedule}
    assert workshop.train(tmp_path / "run", **options) == 0
    logged = [line["lr"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert used == [{rate} for rate in logged]
    for step, factor in expected:
        assert logged[step - 1] == pytest.approx(2e-3 * factor, rel=1e-5)


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(student):
    state = load_checkpoint(student)
    saved = load_file(student / "model.safetensors")
    assert all(torch.equal(value, state["average"][f"module.{name}"]) for name, value in saved.items())
    name = "head.classification_head.cls_logits.weight"
    assert not torch.equal(saved[name], state["arm"][f"trainee.adapter.model.{name}"])
    assert int(state["average"]["n_averaged"]) == 6


def test_bfloat16_trains(workshop, teacher, tmp_path):
    options = {"arm": "cross-head", "teacher": teacher}
    for precision in ("bfloat16", "float32"):
        assert workshop.train(tmp_path / precision, **options, precision=precision) == 0
    first, exact = (
        next(line for line in read_metrics(tmp_path / name) if line["kind"] == "train")["losses"]
        for name in ("bfloat16", "float32")
    )
    assert first != exact
    assert first == pytest.approx(exact, rel=0.1)
    assert {value.dtype for value in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }
