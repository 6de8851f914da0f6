"""However a command ends, it is one sentence, a code, and nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import demo
import evaluate
import export
import predict
import pytest
import torch
import train
from coco_example import errors
from coco_example.commands import CommandParser, run_command, warn
from coco_example.engine import loggers
from coco_example.engine.metrics_log import MetricsLog
from coco_example.engine.signals import Interrupted
from coco_example.errors import DataError, RunError, printable
from coco_example.files import write_json, write_whole
from coco_example.models.saved_model import load_model
from coco_example.models.score_thresholds import CUTS_PAGE
from coco_example.models.teachers import load_teacher
from coco_example.options import ModelOptions

from tests.makers.pages import leads_somewhere

COMMANDS = {"train": train, "demo": demo, "evaluate": evaluate, "predict": predict, "export": export}
RED = "\x1b[31mred\x9b\u202e"


def sentence(errors: str) -> str:
    """The one line of an error, which is no traceback and has its page behind it."""
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    assert re.search(rf"{re.escape(line)}\nSee docs/troubleshooting\.md#\w+\.$", errors.rstrip())
    assert line.startswith("error: Expected ")
    assert " Fix: " in line
    return line


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RunError(expected="a", got=f"b {RED}", where="c", fix="d"), 2, r"b \x1b[31mred\x9b\u202e (c)"),
        (RunError("two\nlines"), 2, "error: two lines"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "got No space left on device (a file or pipe). Fix: free",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), 2, "got No such file (a/b). Fix: check the path"),
        (OSError("broken"), 2, "got broken (a file or pipe)"),
        (MemoryError(), 2, "Expected enough memory"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"),
            2,
            "got CUDA out of memory. Tried to (",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "Expected enough memory"),
        (Interrupted(signal.SIGTERM, "stopped at step 3"), 143, "stopped at step 3"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(capsys, error, code, words):
    assert run_command(failing(error)) == code
    output, errors = capsys.readouterr()
    assert words in errors
    lines = errors.splitlines()
    assert (output, len(lines)) == ("", 2 if code == 2 else 1)
    assert code != 2 or re.fullmatch(r"See docs/troubleshooting\.md#(run|file)error\.", lines[1])


@pytest.mark.parametrize("kind", [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)])
def test_every_kind_of_error_ends_with_a_section_of_its_own(capsys, kind):
    assert run_command(failing(kind(expected="a", got="b", where="c", fix="d"))) == 2
    assert capsys.readouterr().err == f"error: Expected a, but got b (c). Fix: d.\nSee {kind.page}.\n"
    assert kind.page.partition("#")[2] == kind.__name__.lower()
    assert leads_somewhere(kind.page)


def sentence_of(capsys: pytest.CaptureFixture[str], work: Callable[[], object]) -> tuple[str, str]:
    """The one sentence that a command ends with, which has no other in it, and the page."""
    assert run_command(work) == 2
    sentence, page = capsys.readouterr().err.splitlines()
    assert [sentence.count(word) for word in ("Expected", "but got", "Fix:")] == [1, 1, 1], sentence
    return sentence, page.removeprefix("See ").removesuffix(".")


def test_files_that_an_example_misses_are_one_sentence(capsys, monkeypatch, tmp_path):
    (tmp_path / "coco_detectors.py").touch()
    monkeypatch.setenv("COCO_DETECTORS", f"{tmp_path}")
    file = Path(train.__file__).parents[1] / "third_party" / "nanodet_yolox.py"
    sentence, page = sentence_of(capsys, lambda: load_teacher(f"python:{file}:yolox_nano", ModelOptions()))
    assert f"but got no yolox_nano_coco.pth ({tmp_path}). Fix: name their folder in the environment" in sentence
    assert leads_somewhere(page)


@pytest.mark.parametrize(
    ("change", "got"),
    [({"channels": 7}, "7 instead of channels in"), ({"backbone": "tiny"}, "'fcos' on 'tiny' instead")],
)
def test_a_detector_that_cannot_be_built_is_one_sentence_about_its_file(student, tmp_path, capsys, change, got):
    values = json.loads((student / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**values, **change}))
    sentence, _ = sentence_of(capsys, lambda: load_model(tmp_path))
    assert f"got another: {got}" in sentence
    assert f"({tmp_path / 'model.json'})" in sentence


def test_warnings_end_with_a_section_that_is_there(capsys):
    warn([], DataError.page)
    assert capsys.readouterr().err == ""
    warn(["a", "b"], CUTS_PAGE)
    assert capsys.readouterr().err == f"warning: a\nwarning: b\nSee {CUTS_PAGE}.\n"
    assert leads_somewhere(CUTS_PAGE)
    assert leads_somewhere(loggers.PAGE)
    assert leads_somewhere(CommandParser.page)


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(failing(RuntimeError("shapes do not fit")))


class Full(io.StringIO):
    """A stream to a full disk, as buffered as stdout is."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self) -> int:
        return 9999


def test_output_that_nobody_can_take_is_an_error_too(capsys, monkeypatch):
    replaced = []
    monkeypatch.setattr("os.dup2", lambda *files: replaced.append(files[1]))
    monkeypatch.setattr(sys, "stdout", Full())
    assert run_command(lambda: print("scores")) == 2
    assert "No space left" in sentence(capsys.readouterr().err)
    assert replaced == [9999]  # or Python would try again, and complain, when it ends


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits how large a file may become, as a full disk would, where it cannot be made full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_is_named(tmp_path, small_files):
    path = tmp_path / "a.json"
    write_json(path, {"name": "\udc80", "other": "é"})
    before = path.read_bytes()
    assert json.loads(before) == {"name": "\udc80", "other": "é"}
    small_files(1000)
    with pytest.raises(OSError, match=r"File too large.*a\.json"):
        write_whole(path, bytes(2000))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == before


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_a_training_which_goes_on_when_there_is_space(
    workshop, tmp_path, capsys, small_files, workers
):
    options = {"arm": "one-to-one", "workers": workers}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    small_files(100_000)
    begun = time.monotonic()
    assert workshop.train(tmp_path / "run", **options) == 2
    assert time.monotonic() - begun < 30
    assert f"got File too large ({tmp_path / 'run' / 'last.pt'})" in sentence(capsys.readouterr().err)
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix in (".tmp", ".pt")]
    small_files(limit)
    assert workshop.train(tmp_path / "run", **options, resume=True) == 0


def break_in(command: str, run: Path, data: Path, place: Path) -> list[object]:
    """Arguments with which a command has to write below a file."""
    place.write_text("a file")
    return {
        "train": ["--output", place / "run", "--data-path", data],
        "demo": ["--output", place / "runs", "--data-path", data],
        "evaluate": ["--run", run, "--data-path", data, "--output", place / "scores.json"],
        "predict": ["--run", run, "--output", place / "out", data / "val"],
        "export": [run, "--output", place / "model.onnx"],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_a_folder_should_be_is_a_sentence_of_every_command(
    student, scenes_folder, tmp_path, monkeypatch, capsys, command
):
    place = tmp_path / "place"
    arguments = break_in(command, student, scenes_folder, place)
    monkeypatch.setattr(export, "export_onnx", lambda _, path, **__: write_whole(path, b""))  # takes a minute
    monkeypatch.setattr(train, "load_data", lambda *_: pytest.fail("later than needed"))
    assert COMMANDS[command].main([str(argument) for argument in arguments]) == 2  # type: ignore[attr-defined]
    assert str(place) in sentence(capsys.readouterr().err)
    assert place.read_text() == "a file"


# --- what a terminal would obey ---------------------------------------------------------------------------------------


def test_control_characters_are_escaped_and_all_others_stay():
    assert printable(RED) == r"\x1b[31mred\x9b\u202e"
    assert printable("a\tb\x7f\udcff") == r"a\tb\x7f\udcff"
    for text in ("Kätzchen 猫 🐈", "two\nlines"):
        assert printable(text) == text


def test_names_never_reach_a_terminal_raw(workshop, scenes_folder, tmp_path, capsys, monkeypatch):
    # 1. In arguments.
    for arguments in (["--data-path", RED], [RED]):
        with pytest.raises(SystemExit):
            train.main(["--output", str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit):
        CommandParser().error(RED)

    # 2. In the names of classes and files of a data set.
    document = json.loads((scenes_folder / "annotations" / "instances_train.json").read_text())
    document["categories"] *= 2
    document["categories"][0]["name"] = document["images"][0]["file_name"] = RED
    annotations = tmp_path / "data" / "annotations" / "odd.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text(json.dumps(document))
    (tmp_path / "data" / "train").symlink_to(scenes_folder / "train")
    assert workshop.train(tmp_path / RED, data_path=tmp_path / "data", train_annotations="odd.json") == 2

    # 3. In messages above the bar.
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with MetricsLog(tmp_path / "log", total_steps=1, batch_size=1) as log:
            log.message(f"data: {RED}")
    shown = capsys.readouterr().err + terminal.getvalue()
    assert RED not in shown
    assert "\x9b" not in shown
    assert shown.count(printable(RED)) >= 4
