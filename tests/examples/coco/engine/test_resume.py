"""Stopping, being killed, and going on: a resumed run is the run that was not interrupted."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from coco_example.engine.checkpoints import load_checkpoint, save_checkpoint
from coco_example.engine.run_folder import check_folder
from coco_example.engine.run_lock import LOCK
from coco_example.errors import RunError
from coco_example.files import read_json, write_json
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import load_model, save_model
from coco_example.options import ModelOptions
from torch import nn

from tests.makers.training_runs import SIX_STEPS, assert_same_run, stop_in, train_lines

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),  # Python 3.12 on forked workers
]

# 48 steps, long enough to be killed in.
LONG = {"epochs": 2, "batch_size": 1, "arm": "one-to-many", "schedule": "step", "ema": 0.9}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def stopped(workshop, tmp_path_factory):
    """A run of six steps that was stopped after the fourth, and its options; not to be written to."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    options = {**SIX_STEPS, "arm": "one-to-one", "save_every": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_draw_first_batch", lambda *_: None)
        stop_in(patch, 4)
        assert workshop.train(folder, **options) == 128 + signal.SIGTERM
    return folder, options


@pytest.fixture(scope="module")
def whole(workshop, stopped, tmp_path_factory):
    """The same run without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, **stopped[1]) == 0
    return folder


@pytest.fixture(scope="module")
def long_run(workshop, tmp_path_factory):
    """A run of 48 steps without a stop."""
    folder = tmp_path_factory.mktemp("long") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, **LONG) == 0
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run, to damage and to resume."""
    return shutil.copytree(stopped[0], tmp_path / "run")


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(workshop, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    stop_in(monkeypatch, 2, number=number)
    assert workshop.train(tmp_path / "run", arm="one-to-one") == 128 + number
    message = f"stopped at step 2; go on with: train.py … --output {tmp_path / 'run'} --resume"
    assert message in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert signal.getsignal(number) == before


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"arm": "one-to-one"},
    "distilled, averaged": {"arm": "cross-head", "ema": 0.9, "schedule": "step", "mosaic": 0.5},
    "momentum, cosine, crops": {"arm": "one-to-many", "optimizer": "sgd", "lr": 0.01, "augmentation": "full"},
    "auxiliary head": {"arm": "one-to-one", "auxiliary_head": True, "ema": 0.5, "cache": True},
    "scheduled": {"arm": "cross-head", "distill_warmup": 0.5, "distill_decay": "cosine", "ranking": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(workshop, teacher, tmp_path, monkeypatch, variant):
    def forgetful_detector(*arguments: Any, **options: Any) -> nn.Module:
        model: Any = build_detector(*arguments, **options)
        model.backbone.body.stem.append(nn.Dropout(0.2))  # the example's own detectors draw no random numbers
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(train, "build_detector", forgetful_detector)
    options = {**SIX_STEPS, "eval_every": 1, "teacher": teacher, **VARIANTS[variant]}
    assert workshop.train(tmp_path / "whole", **options) == 0
    stop_in(monkeypatch, 2, 3, 5)  # within and at the end of an epoch
    codes = [workshop.train(tmp_path / "run", **options, resume=n > 0) for n in range(4)]
    assert codes == [143, 143, 143, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_workers_stop_with_their_process_and_a_resumed_run_may_have_fewer_of_them(workshop, long_run, tmp_path):
    process = workshop.start(tmp_path / "run", **LONG, workers=1)
    wait_for_steps(process, tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster's scheduler does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"go on with: train.py … --output {tmp_path / 'run'} --resume" in errors
    assert "Traceback" not in errors
    assert workshop.train(tmp_path / "run", **LONG, workers=0, resume=True) == 0
    assert_same_run(tmp_path / "run", long_run)


# --- killed -----------------------------------------------------------------------------------------------------------


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Returns when the log has that many lines more than now."""
    begun, start = time.monotonic(), len(train_lines(folder))
    while len(train_lines(folder)) < start + steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < 120
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(workshop, long_run, tmp_path):
    for attempt, save_every in enumerate((3, 1)):
        process = workshop.start(tmp_path / "run", **LONG, save_every=save_every, resume=attempt > 0)
        wait_for_steps(process, tmp_path / "run", 5)
        time.sleep(random.SystemRandom().uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert 0 < load_checkpoint(tmp_path / "run")["step"] < 48
    assert workshop.train(tmp_path / "run", **LONG, save_every=2, resume=True) == 0
    assert_same_run(tmp_path / "run", long_run)


def fail_at_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, but its ``number``-th call (from 0) raises before doing anything."""
    calls = iter(range(1000))

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("moment", ["writing", "flushing", "first move", "second move"])
def test_a_whole_checkpoint_is_there_at_every_moment_of_saving(tmp_path, monkeypatch, moment):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    with monkeypatch.context() as patch:
        if moment == "writing":

            def half(state, file):
                file.write(b"PK")
                raise KeyboardInterrupt

            patch.setattr(torch, "save", half)
        elif moment == "flushing":
            patch.setattr(os, "fsync", fail_at_call(os.fsync, 0))
        else:
            patch.setattr(Path, "replace", fail_at_call(Path.replace, 0 if moment == "first move" else 1))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)["step"] == 2
    check_folder(tmp_path, resume=True)
    save_checkpoint(tmp_path, {"step": 4})
    assert load_checkpoint(tmp_path)["step"] == 4


# --- damaged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(workshop, stopped, whole, run, share):
    data = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(data[: int(share * len(data))])
    assert workshop.train(run, **stopped[1], resume=True) == 0
    assert_same_run(run, whole)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(run):
    (run / "last.pt").write_bytes(b"damaged")
    assert load_checkpoint(run)["step"] == 3
    save_checkpoint(run, {"step": 4})
    (run / "last.pt").unlink()  # as after a kill between the two moves
    assert load_checkpoint(run)["step"] == 3
    assert (run / "damaged.pt").read_bytes() == b"damaged"


def test_without_a_readable_checkpoint_both_reasons_are_given(workshop, stopped, run, capsys):
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:1000])
    before = contents(run)
    with pytest.raises(RunError, match=r"a readable checkpoint of this run, but got none: last\.pt: .*previous\.pt: "):
        load_checkpoint(run)
    assert workshop.train(run, **stopped[1], resume=True) == 2
    assert capsys.readouterr().err.startswith("error: Expected a readable checkpoint")
    assert contents(run) == before


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path, bomb):
    torch.save({"step": bomb}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="a readable checkpoint"):
        load_checkpoint(tmp_path)
    assert not bomb.exploded


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_resumed_with_other_options_which_are_named_with_both_values(workshop, stopped, run, capsys):
    before = contents(run)
    assert workshop.train(run, **{**stopped[1], "lr": 0.5, "epochs": 3}, resume=True) == 2
    errors = capsys.readouterr().err
    assert f"epochs: 2 then, 3 now; lr: 0.001 then, 0.5 now ({run}). Fix: repeat them" in errors
    assert "save_every" not in errors
    assert contents(run) == before


def test_nothing_is_resumed_where_there_is_no_run(workshop, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, got in (("none", "no such folder"), ("empty", "a folder without one")):
        assert workshop.train(tmp_path / name, resume=True) == 2
        sentence = (
            f"Expected a run to resume, but got {got} (--output {tmp_path / name}). Fix: leave out --resume, or name"
        )
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_run_without_its_options_is_not_resumed(workshop, stopped, run, capsys):
    (run / "config.json").unlink()
    assert workshop.train(run, **stopped[1], resume=True) == 2
    assert "Expected a JSON file of a run" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_and_untouched(workshop, stopped, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("three years of work")
    for folder in (stopped[0], tmp_path / "notes"):
        before = contents(folder)
        assert workshop.train(folder, **stopped[1]) == 2
        assert f"Expected a new or empty folder, but got one in use ({folder})" in capsys.readouterr().err
        assert contents(folder) == before


def test_an_empty_folder_is_fine(workshop, tmp_path):
    (tmp_path / "run").mkdir()
    assert workshop.train(tmp_path / "run", arm="one-to-one") == 0


def test_a_teacher_that_detects_nothing_is_refused_and_leaves_no_folder(workshop, teacher, tmp_path, capsys):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    torch.manual_seed(1)
    save_model(fresh, build_detector(ModelOptions(size=64), 7), load_model(teacher)[1])
    options = {"arm": "cross-head", "teacher": fresh, "teacher_floor": 0.01}
    assert workshop.train(tmp_path / "run", **options) == 2
    errors = capsys.readouterr().err
    assert "teacher on 8 validation images: AP 0." in errors
    assert "Expected a teacher with an AP of at least 0.01, but got 0.00" in errors
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_none_is_refused_and_leaves_no_folder(workshop, whole, stopped, tmp_path, capsys):
    reasons = {
        whole: "Expected a one-to-many teacher, but got a one-to-one detector",
        stopped[0]: "but got a folder without model.json",
        tmp_path / "none": "but got no such folder",
        "": "Expected a teacher for the arm 'cross-head', but got none",
    }
    for candidate, reason in reasons.items():
        assert workshop.train(tmp_path / "run", arm="cross-head", teacher=candidate) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("replaced", [("last.pt",), ("last.pt", "previous.pt")])
def test_a_checkpoint_of_another_run_is_passed_over(workshop, stopped, whole, teacher, run, capsys, replaced):
    for name in replaced:
        shutil.copy(teacher / "last.pt", run / name)
    log = (run / "metrics.jsonl").read_bytes()
    if len(replaced) == 1:
        assert workshop.train(run, **stopped[1], resume=True) == 0
        assert_same_run(run, whole)
        return
    assert workshop.train(run, **stopped[1], resume=True) == 2
    reason = f"last.pt: it is another run's; previous.pt: it is another run's ({run})"
    assert f"error: Expected a readable checkpoint of this run, but got none: {reason}" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == log


def test_a_run_of_two_processes_is_resumed_by_one_where_a_step_has_as_many_images(
    workshop, stopped, whole, run, capsys
):
    state = load_checkpoint(run)
    save_checkpoint(run, {**state, "random": state["random"] * 2})
    write_json(run / "config.json", {**read_json(run / "config.json"), "batch_size": 4})  # on each of two
    assert workshop.train(run, **{**stopped[1], "batch_size": 4}, resume=True) == 2
    assert "Expected 2 processes, as the run was started with, but got 1" in capsys.readouterr().err
    assert workshop.train(run, **stopped[1], resume=True) == 0
    assert_same_run(run, whole)


def test_a_run_of_an_older_version_on_two_processes_is_not_resumed_by_one(workshop, stopped, run, capsys):
    older = {name: value for name, value in read_json(run / "run.json").items() if name != "step_images"}
    write_json(run / "run.json", older)
    state = load_checkpoint(run)
    save_checkpoint(run, {**state, "random": state["random"] * 2})
    assert workshop.train(run, **stopped[1], resume=True) == 2
    assert "Expected 2 processes, as the run was started with, but got 1" in capsys.readouterr().err
