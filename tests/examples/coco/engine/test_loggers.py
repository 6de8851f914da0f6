"""`--log-to`: every record of the log goes to loggers of the user's choice, which cost the run nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import train
from coco_example.engine.loggers import Loggers
from coco_example.engine.metrics_log import read_metrics

from tests.makers.training_runs import assert_same_run, stop_in

pytestmark = pytest.mark.usefixtures("no_pictures")

WRITER = """
import json, torch
from pathlib import Path

def write(record):
    torch.rand(3)  # training must not miss it
    with (Path(__file__).parent / "records.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\\n")

def fail(record):
    raise {error}

def two(record, step):
    pass
"""


@pytest.fixture
def loggers(tmp_path: Path) -> Path:
    """A file with functions that log, one that fails, and one that takes something else."""
    file = tmp_path / "loggers.py"
    file.write_text(WRITER.format(error="SystemExit('no network')"))
    return file


def test_a_function_gets_every_line_and_one_that_fails_is_said_once(workshop, student, loggers, tmp_path, capsys):
    options = [*workshop.arguments(tmp_path / "run", arm="one-to-one", epochs=2, ema=0.5, lr=2e-3)]
    references = [f"python:{loggers}:{name}" for name in ("fail", "write")]
    assert train.main([*options, *(word for name in references for word in ("--log-to", name))]) == 0
    written = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert written == read_metrics(tmp_path / "run")
    assert {record["kind"] for record in written} == {"event", "train", "validation", "eval"}
    errors = capsys.readouterr().err
    assert errors.count(f"--log-to {references[0]} failed, and the run goes on: SystemExit: no network") == 1
    assert_same_run(tmp_path / "run", student)  # which was trained without any of this
    assert json.loads((tmp_path / "run" / "config.json").read_text())["log_to"] == references


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("wandb", "Expected tensorboard or python:FILE:FUNCTION, but got 'wandb'"),
        ("python:{file}:nothing", "Expected a function nothing in"),
        ("python:{file}:two", "Expected a function of one record, but got missing a required argument: 'step'"),
        ("python:nowhere.py:write", "Expected python:FILE:FUNCTION with a Python file"),
        ("python:{broken}:write", "Expected a Python file that can be run, but got ZeroDivisionError"),
    ],
)
def test_what_cannot_log_is_refused_before_anything(workshop, loggers, tmp_path, capsys, reference, sentence):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    reference = reference.format(file=loggers, broken=broken)
    assert workshop.train(tmp_path / "run", arm="one-to-one", log_to=reference) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_tensorboard_that_is_missing_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        Loggers(["tensorboard"])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_shows_every_number_once_also_of_a_run_that_was_killed(workshop, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    options: dict[str, Any] = {"arm": "one-to-one", "epochs": 2, "eval_every": 1, "log_to": "tensorboard"}
    with monkeypatch.context() as patch:
        stop_in(patch, 5)
        assert workshop.train(tmp_path / "run", **options) == 143
        # As if it had been killed: its last checkpoint is the one before, and TensorBoard knows steps that are lost.
        (tmp_path / "run" / "previous.pt").replace(tmp_path / "run" / "last.pt")
    assert workshop.train(tmp_path / "run", **options, resume=True) == 0

    expected: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(tmp_path / "run"):
        folder = {"train": "loss", "validation": "validation", "eval": "score"}.get(line["kind"])
        for name, value in {**line.get("losses", {}), **line.get("scores", {})}.items():
            if value is not None:
                expected.setdefault(f"{folder}/{name}", []).append((line["step"], pytest.approx(value)))
        if line["kind"] == "train":
            expected.setdefault("lr", []).append((line["step"], pytest.approx(line["lr"])))
    found = scalars(tmp_path / "run")
    assert {name: found[name] for name in expected} == expected
    assert [step for step, _ in found["loss/total"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["validation/total"]] == [3, 6]
