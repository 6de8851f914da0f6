"""A run's folder: one run at a time, and every folder goes on, whenever its run was killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from coco_example.engine.run_folder import goes_on
from coco_example.engine.run_lock import LOCK, locked_folder
from coco_example.errors import RunError

from tests.makers.training_runs import assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12 on forks

FORK = multiprocessing.get_context("fork")  # as loaders do; a process that imports torch takes seconds


def hold(folder: Path, begin: Any, results: Any) -> None:
    """Hold the folder's lock for ever, in a process of its own; or report who has it."""
    begin.wait()
    try:
        with locked_folder(folder):
            results.put((os.getpid(), "in"))
            time.sleep(1000)
    except RunError as error:
        results.put((os.getpid(), str(error)))


def holders(folder: Path, count: int) -> tuple[list[Any], list[tuple[int, str]]]:
    """Start processes that all want a folder at the same moment; they, and what became of each."""
    begin, results = FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=hold, args=(folder, begin, results), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    begin.set()
    return processes, [results.get(timeout=30) for _ in processes]


def test_of_many_starts_in_one_folder_one_gets_in_and_a_killed_one_leaves_no_lock(tmp_path):
    for n in range(3):
        folder = tmp_path / f"{n}"
        processes, outcomes = holders(folder, 6)
        [winner] = [number for number, outcome in outcomes if outcome == "in"]
        with pytest.raises(RunError, match=f"in use by process {winner} on .*{folder}"), locked_folder(folder):
            pytest.fail("it is held")
        for process in processes:
            process.kill()
            process.join()
        with locked_folder(folder):
            assert f"process {os.getpid()}" in (folder / LOCK).read_text()
        assert list(folder.iterdir()) == []


def test_a_lock_leaves_what_was_there_and_what_was_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with locked_folder(tmp_path / name):
            pass
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()
    with locked_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK, "config.json"}


def test_where_there_are_no_locks_a_run_works_and_says_so(tmp_path, monkeypatch, capsys):
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with locked_folder(tmp_path / "run"):
        assert f"no locks on the file system of {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_goes_on_whenever_its_run_was_killed_before_the_first_checkpoint(workshop, tmp_path, monkeypatch):
    # 1. The folder at every moment at which a file has been written and is moved to its place.
    replace, moments = Path.replace, list[Path]()

    def snapshot(path: Path, target: Path) -> Path:
        moment = tmp_path / f"moment {len(moments)}"
        if tmp_path / "run" in path.parents and not list((tmp_path / "run").glob("*.pt")):
            moments.append(Path(shutil.copytree(tmp_path / "run", moment)))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", snapshot)
        assert workshop.train(tmp_path / "run", arm="one-to-one") == 0
    assert (moments[-1] / "last.pt.tmp").exists()
    assert len(moments) == 4

    # 2. A new start is always possible, and so is going on as soon as the options are known.
    for moment in moments:
        again = shutil.copytree(moment, tmp_path / f"{moment.name} again")
        assert workshop.train(moment, arm="one-to-one") == 0
        assert_same_run(moment, tmp_path / "run")
        assert goes_on(again) == (again / "config.json").exists()
    assert workshop.train(again, arm="one-to-one", resume=True) == 0
    assert_same_run(again, tmp_path / "run")


def test_a_folder_of_somebody_else_or_of_a_finished_run_without_checkpoints_is_left_alone(
    workshop, student, tmp_path, capsys
):
    for name in ("theirs", "finished"):
        folder = tmp_path / name
        shutil.copytree(student, folder) if name == "finished" else folder.mkdir()
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()
        if name == "theirs":
            (folder / "config.json").write_text('{"hidden_size": 768}')
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for resume in (False, True):
            assert workshop.train(folder, arm="one-to-one", resume=resume) == 2
            assert "error: Expected " in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
