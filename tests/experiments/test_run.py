"""Runs are recorded once, with their scores and cost, after those they need."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import plan
import pytest
import run as runs
from plan import Protocol, Run
from run import Runner


def test_an_unfinished_teacher_keeps_its_students_waiting_and_a_lost_one_is_trained_again(tmp_path):
    results = tmp_path / "runs.jsonl"
    teacher, student = Run("bccd", "final", "one-to-many", 0), Run("bccd", "final", "cross-head", 0)
    results.write_text(json.dumps({"run": teacher.key, "options": teacher.options}) + "\n")
    assert Runner(tmp_path, tmp_path, results).left([teacher, student]) == [teacher, student]
    (tmp_path / teacher.key).mkdir(parents=True)
    (tmp_path / teacher.key / "model.json").touch()
    assert Runner(tmp_path, tmp_path, results).left([teacher, student]) == [student]


def test_a_line_made_with_other_options_is_refused(tmp_path):
    run = Run("bccd", "final", "one-to-many", 0)
    (tmp_path / "runs.jsonl").write_text(json.dumps({"run": run.key, "options": {**run.options, "lr": 7.0}}) + "\n")
    with pytest.raises(SystemExit, match=r"Expected bccd/final/one-to-many/0 with the options .* Fix: "):
        Runner(tmp_path, tmp_path, tmp_path / "runs.jsonl").left([run])


def test_images_held_out_are_a_quarter_of_the_training_images_and_no_others(scenes_folder, tmp_path):
    runs._hold_out(scenes_folder, tmp_path / "held-out")
    parts = [
        json.loads((tmp_path / "held-out" / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train", "val")
    ]
    whole = json.loads((scenes_folder / "annotations" / "instances_train.json").read_text())
    names = [{image["file_name"] for image in part["images"]} for part in parts]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {image["file_name"] for image in whole["images"]}
    assert len(names[1]) == round(len(whole["images"]) / 4)
    assert sum(len(part["annotations"]) for part in parts) == len(whole["annotations"])
    for part in parts:
        ids = {image["id"] for image in part["images"]}
        assert all(box["image_id"] in ids for box in part["annotations"])


def test_whatever_can_start_starts_and_students_of_a_failed_teacher_do_not(tmp_path, monkeypatch):
    runner = Runner(tmp_path, tmp_path, tmp_path / "runs.jsonl")
    teacher, student, other = (
        Run("bccd", "final", name, 0) for name in ("one-to-many", "cross-head-large-inherit", "one-to-one")
    )
    large, other_began, order = Run("bccd", "final", "one-to-many-large", 0), threading.Event(), list[Run]()

    def train(run: Run) -> bool:
        order.append(run)
        if run == other:
            other_began.set()
        elif run == large:
            assert other_began.wait(20)  # the second worker has not waited behind the student for this teacher
        return run != large

    monkeypatch.setattr(runner, "_train", train)
    assert runner.execute([teacher, large, student, other], jobs=2) == 2
    assert set(order) == {teacher, large, other}
    assert runner.failed == {large, student}


def test_runs_are_in_float32_where_their_precision_is_slow_unless_they_began_in_another(tmp_path, monkeypatch):
    recorded, begun, new = (Run("bccd", "final", name, 0) for name in ("one-to-many", "one-to-one", "auxiliary-head"))
    line = {"run": recorded.key, "options": recorded.options}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / begun.key).mkdir(parents=True)
    (tmp_path / begun.key / "last.pt").touch()
    (tmp_path / begun.key / "config.json").write_text(json.dumps(begun.options))
    runner = Runner(tmp_path, tmp_path, tmp_path / "runs.jsonl")
    commands: dict[str, list[str]] = {}

    def call(command: list[str], log: Path) -> tuple[int, float, float]:
        commands[command[command.index("--output") + 1]] = command
        log.touch()
        return 1, 0.0, 0.0

    monkeypatch.setattr(runner, "_call", call)
    monkeypatch.setattr(runner, "_data", lambda run: tmp_path)
    monkeypatch.setattr(runs, "_is_slow", lambda precision: precision == "bfloat16")
    for run in (recorded, begun, new):
        assert not runner._train(run)
    chosen = [command[command.index("--precision") + 1] for command in commands.values()]
    assert chosen == ["bfloat16", "bfloat16", "float32"]
    # A line in float32 is the run's, too.
    line = {"run": new.key, "options": {**new.options, "precision": "float32"}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    assert Runner(tmp_path, tmp_path, tmp_path / "runs.jsonl").left([new]) == []


@pytest.mark.slow
def test_runs_are_recorded_once_with_their_scores_and_cost(scenes_folder, tmp_path, monkeypatch):
    tiny: dict[str, Any] = {"size": 64, "batch_size": 8, "warmup_steps": 2, "teacher_floor": 0.0}
    monkeypatch.setitem(plan.SETS, "tiny", Protocol(1, tiny, folder=scenes_folder.name))
    results = tmp_path / "runs.jsonl"
    arguments = ["--data-root", scenes_folder.parent, "--work", tmp_path / "work", "--results", results]
    arguments += ["--sets", "tiny", "--seeds", "1", "--study", "cross-head", "--jobs", "2"]
    texts = [str(argument) for argument in arguments]
    assert runs.main(texts) == 0
    lines = sorted((json.loads(line) for line in results.read_text().splitlines()), key=lambda line: -len(line["run"]))
    assert [line["run"] for line in lines] == ["tiny/final/one-to-many/1", "tiny/final/cross-head/1"]
    for line in lines:
        summary = json.loads((tmp_path / "work" / line["run"] / "summary.json").read_text())
        known = {name: value for name, value in summary["scores"].items() if value is not None}
        assert {name: line["scores"][name] for name in known} == pytest.approx(known, abs=1e-5)
        assert line["cpu_seconds"] > 0.5
        assert line["memory_mb"] > 100
    assert lines[0]["scores_on_training_images"].keys() == lines[0]["scores"].keys()
    assert lines[0]["scores_by_class_alone"]["ap_nms"] != lines[0]["scores"]["ap_nms"]
    before = results.read_text()
    assert runs.main(texts) == 0
    assert results.read_text() == before


def test_studies_and_variants_are_asked_for_by_name(tmp_path, capsys):
    arguments = ["--results", str(tmp_path / "none.jsonl"), "--work", str(tmp_path), "--dry-run", "--seeds", "0"]
    assert runs.main([*arguments, "--study", "main", "cross-head-unaligned-3x"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert planned[0] == f"{len(planned) - 1} runs planned, 0 recorded, {len(planned) - 1} left"
    assert {"bccd/final/own-head-imitation/0", "bccd/final/cross-head-unaligned-3x/0"} < set(planned)
    with pytest.raises(SystemExit):
        runs.main([*arguments, "--study", "mian"])
    assert "Expected one of the words one-to-many" in capsys.readouterr().err
