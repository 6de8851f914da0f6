"""Signals beside the steps of training, and what a resumed run owes: each evaluation once, and the same inputs."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from coco_example.engine import training as engine
from coco_example.engine.metrics_log import read_metrics
from coco_example.errors import DataError, ModelError
from coco_example.models.saved_model import load_model
from safetensors.torch import load_file, save_file

from tests.makers.training_runs import SIX_STEPS, assert_same_run

pytestmark = pytest.mark.usefixtures("no_pictures")

OPTIONS: dict[str, Any] = {**SIX_STEPS, "arm": "one-to-many", "eval_every": 1}  # at steps 3 and 6


def evaluations(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if line["kind"] == "eval"]


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """A run without a stop; not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_draw_first_batch", lambda *_: None)
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, **OPTIONS) == 0
    return folder


def signalled(function: Callable[..., Any], call: int, *, after: bool = False) -> Callable[..., Any]:
    """The function, but a signal comes in its ``call``-th call (from 1), which then would take long."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        mine = next(calls) == call
        result = function(*arguments, **options) if after or not mine else None
        if mine:
            signal.raise_signal(signal.SIGTERM)
            if not after:
                time.sleep(60)
        return result

    return wrapped


@pytest.mark.parametrize(
    ("where", "name", "call", "step", "scored"),
    [
        (train, "evaluate", 1, 3, []),
        (engine, "save_checkpoint", 2, 6, [3]),  # the last save, which is not left half-done
        (train, "evaluate", 2, 6, [3]),
        (train, "draw_report", 1, 6, [3, 6]),
    ],
)
def test_a_signal_outside_the_steps_stops_at_once_and_loses_nothing(
    workshop, whole, tmp_path, monkeypatch, capsys, where, name, call, step, scored
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(where, name, signalled(getattr(where, name), call, after=name == "save_checkpoint"))
        begun = time.monotonic()
        assert workshop.train(run, **OPTIONS) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 30
    assert f"stopped at step {step}; go on with: train.py … --output {run} --resume" in capsys.readouterr().err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == step
    assert evaluations(run) == scored
    for _ in range(2):  # and a finished run repeats only its last evaluation, which is in the log already
        assert workshop.train(run, **OPTIONS, resume=True) == 0
        assert evaluations(run) == [3, 6]
    assert_same_run(run, whole)


def test_a_signal_before_the_first_step_leaves_no_folder(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "build_detector", signalled(train.build_detector, 1))
    assert workshop.train(tmp_path / "run", **OPTIONS) == 143
    assert "stopped before the first step; start it again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_model_is_saved_before_it_is_scored(workshop, whole, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise DataError("the images are gone")

    monkeypatch.setattr(train, "evaluate", fail)
    assert workshop.train(tmp_path / "run", **{**OPTIONS, "eval_every": 0}) == 2
    assert load_model(tmp_path / "run")[1].one_to_many
    assert_same_run(tmp_path / "run", whole)


# --- known by what they are -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(scenes_folder, tmp_path_factory) -> Path:
    """The images with annotations that differ in one thing each."""
    folder = Path(shutil.copytree(scenes_folder, tmp_path_factory.mktemp("other") / "data")) / "annotations"
    for split in ("train", "val"):
        document = json.loads((folder / f"instances_{split}.json").read_text())
        images, boxes = document["images"], document["annotations"]
        first = {**boxes[0], "bbox": [side + 1 for side in boxes[0]["bbox"]]}
        ids = {image["id"]: image["id"] + 100 for image in images}
        for name, change in {
            "fewer": {"images": images[1:], "annotations": [b for b in boxes if b["image_id"] != images[0]["id"]]},
            "moved": {"annotations": [first, *boxes[1:]]},
            "numbered": {
                "images": [{**image, "id": ids[image["id"]]} for image in images],
                "annotations": [{**box, "image_id": ids[box["image_id"]]} for box in boxes],
            },
        }.items():
            changed = folder.parent.parent / f"{split}-{name}"
            shutil.copytree(folder.parent, changed)
            (changed / "annotations" / f"instances_{split}.json").write_text(json.dumps(document | change))
    return folder.parent.parent


@pytest.fixture(scope="module")
def distilled(workshop, teacher, tmp_path_factory):
    """A run that learns from a teacher; not to be written to."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_draw_first_batch", lambda *_: None)
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, arm="cross-head", teacher=teacher) == 0
    return folder


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("train-fewer", "train images: 24 then, 23 now; train boxes: "),
        ("val-moved", "val: of other content"),
        ("train-numbered", "train: of other content"),
        ("teacher", "teacher: of other content"),
    ],
)
def test_a_run_goes_on_with_its_own_data_and_teacher_alone(
    workshop, teacher, distilled, data, tmp_path, capsys, other, difference
):
    options = {"arm": "cross-head", "teacher": shutil.copytree(teacher, tmp_path / "teacher"), "resume": True}
    if other == "teacher":
        weights = load_file(teacher / "model.safetensors")
        weights["head.regression_head.bbox_reg.bias"][0] += 1e-6
        save_file(weights, tmp_path / "teacher" / "model.safetensors")
    else:
        options["data_path"] = data / other
    before = {path.name: path.read_bytes() for path in distilled.iterdir() if path.name != "run.lock"}
    assert workshop.train(distilled, **options) == 2
    errors = capsys.readouterr().err
    assert "error: Expected the data and teacher the run was started with, but got others: " + difference in errors
    assert f"({distilled})" in errors
    assert {path.name: path.read_bytes() for path in distilled.iterdir() if path.name != "run.lock"} == before


def test_a_run_goes_on_wherever_its_data_and_its_teacher_are_now(
    workshop, teacher, distilled, scenes_folder, tmp_path, capsys
):
    run = shutil.copytree(distilled, tmp_path / "run")
    moved = {"data_path": shutil.copytree(scenes_folder, tmp_path / "data")}
    moved["teacher"] = shutil.copytree(teacher, tmp_path / "teacher")
    assert workshop.train(run, arm="cross-head", **moved, resume=True) == 0
    (run / "run.json").unlink()  # as an earlier version left it
    assert workshop.train(run, arm="cross-head", **moved, resume=True) == 0


# --- files of a run that hold something else --------------------------------------------------------------------------

DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"3",
    "no text": lambda _: bytes(range(256)),
    "deep": lambda _: b"[" * 100_000,
    "an empty object": lambda _: b"{}",
    "other types": lambda data: data.replace(b'": "', b'": ["').replace(b'",\n', b'"],\n').replace(b": 6", b': "6"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl", "model.json"])
def test_a_file_of_a_run_that_holds_something_else_is_named(workshop, whole, tmp_path, capsys, name, damage):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(DAMAGE[damage]((run / name).read_bytes()))
    if name == "model.json":
        code = workshop.train(tmp_path / "other", arm="cross-head", teacher=run)
    else:
        code = workshop.train(run, **OPTIONS, resume=True)
    errors = capsys.readouterr().err
    if name == "metrics.jsonl" and damage in ("truncated", "a list", "a number", "deep"):
        assert code == 0, errors  # a torn last line, or nothing but one: logging goes on
        return
    assert code == 2
    assert "Traceback" not in errors
    assert errors.count("error: Expected ") == 1
    assert name in errors or str(run) in errors


def test_a_flipped_bit_in_a_finished_detector_is_found(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    content = bytearray((run / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="its content has changed since it was written"):
        load_model(run)
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors")  # changed on purpose, and written anew
    assert load_model(run)[1].one_to_many
