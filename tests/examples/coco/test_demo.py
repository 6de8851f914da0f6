"""`demo.py`: what the README promises of it."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo
import pytest
import train
from coco_example.data.scenes import write_scenes
from coco_example.engine import inputs
from coco_example.options import Options

from tests.makers.training_runs import stop_in, train_lines

PICTURES = {
    "teacher": {"batch0.png", "curves.png", "predictions.png"},
    "student": {"batch0.png", "curves.png", "predictions.png", "assignments.png"},
}
ROWS = ("teacher (one-to-many), with NMS", "teacher (one-to-many), without NMS", "student (one-to-one, distilled)")


def pictures(output: Path) -> dict[str, set[str]]:
    return {folder: {path.name for path in (output / folder).glob("*.png")} for folder in PICTURES}


def scores(output: Path, name: str) -> Any:
    return json.loads((output / name / "summary.json").read_text())["scores"]


def small(options: Options) -> Options:
    model, teachers = replace(options.model, size=64), replace(options.teachers, teacher_floor=0.0)
    return replace(options, model=model, teachers=teachers)


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo on 16 scenes, and its arguments."""
    monkeypatch.setattr(inputs, "write_scenes", functools.partial(write_scenes, train=16, val=4, size=64))
    # After one epoch a teacher of so few scenes is worth nothing.
    monkeypatch.setattr(demo, "run", lambda options: train.run(small(options)))
    return ["--output", str(tmp_path / "runs"), "--data-path", str(tmp_path / "data"), "--epochs", "1"]


def test_the_demo_trains_both_and_prints_the_table_that_it_also_writes(tiny_demo, tmp_path, capsys):
    assert demo.main(tiny_demo) == 0
    output = capsys.readouterr().out
    for row in ROWS:
        assert output.count(row) == 1
    assert pictures(tmp_path / "runs") == PICTURES
    teacher, student = scores(tmp_path / "runs", "teacher"), scores(tmp_path / "runs", "student")
    table = json.loads((tmp_path / "runs" / "table.json").read_text())
    assert [row["ap"] for row in table.values()] == [teacher["ap_nms"], teacher["ap"], student["ap"]]
    duplicates = [teacher["duplicates_nms"], teacher["duplicates"], student["duplicates"]]
    assert [row["duplicates"] for row in table.values()] == duplicates


@pytest.mark.usefixtures("no_pictures")
def test_the_demo_does_not_write_over_an_earlier_one(tiny_demo, tmp_path, capsys):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "runs" / "teacher" / "mine.txt").write_text("mine")
    assert demo.main(tiny_demo) == 2
    assert "error: Expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["teacher", "mine.txt"]


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_demo_goes_on_with_the_same_command(tiny_demo, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in(patch, 1)  # of the teacher's training
        assert demo.main(tiny_demo) == 143
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    for _ in range(2):  # from where it was, and from its end
        assert demo.main(tiny_demo) == 0
    steps = [line["step"] for line in train_lines(tmp_path / "runs" / "teacher")]
    assert steps == [1, 2]
    assert len(json.loads((tmp_path / "runs" / "table.json").read_text())) == len(ROWS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_keeps_its_promise(script, tmp_path):
    # 5 epochs instead of 8 (17 minutes on processors without AVX-512): 14.3 and, with NMS, 23.0 AP, the student 24.4.
    arguments = ("--output", str(tmp_path / "runs"), "--data-path", str(tmp_path / "data"), "--epochs", "5")
    process = script("demo.py", *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert all(row in output for row in ROWS)
    teacher, student = scores(tmp_path / "runs", "teacher"), scores(tmp_path / "runs", "student")
    assert student["ap"] >= teacher["ap"] + 0.07
    assert student["ap"] >= teacher["ap_nms"] - 0.03
    assert student["duplicates"] < teacher["duplicates"]
    assert pictures(tmp_path / "runs") == PICTURES
