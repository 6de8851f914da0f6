"""The benchmarks still run, and time what they name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import library_cost
import point_sets
import pytest
import torch

from crosskd_assign.assignment.lattices import recognized

SCRIPTS = Path(library_cost.__file__).parent


def test_ways_are_timed_in_turn_after_a_warm_up(monkeypatch):
    calls = []
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def way(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    rows = library_cost.compare("case", {"a": way("a", 0.25), "b": way("b", 0.5)}, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    assert rows == [
        {"case": "case", "arm": "a", "ms": 250.0, "ratio": 1.0},
        {"case": "case", "arm": "b", "ms": 500.0, "ratio": 2.0},
    ]


def test_scenes_hold_what_the_table_says():
    predictions, targets = library_cost.scene(2, 30, torch.device("cpu"))
    assert predictions.logits.shape == (2, sum(map(len, library_cost.pyramid())), library_cost.CLASSES)
    assert [len(target["boxes"]) for target in targets] == [30, 30]
    sides = torch.cat([target["boxes"][:, 2:] - target["boxes"][:, :2] for target in targets])
    assert sides.min() > 12
    assert sides.max() < 602


def test_irregular_points_are_no_grids_and_as_many_as_the_table_says():
    predictions, _ = library_cost.scene(1, 1, torch.device("cpu"))
    for kind, share in (("scattered", 1.0), ("holes", 0.9)):
        given = point_sets.irregular(predictions, kind)
        assert len(given.points) == given.logits.shape[1] == pytest.approx(share * len(predictions.points), rel=0.01)
        assert recognized(given.points.double().numpy(), given.strides.double().numpy()) is None
    assert recognized(predictions.points.double().numpy(), predictions.strides.double().numpy()) is not None


@pytest.mark.slow
@pytest.mark.parametrize("part", ["losses", "postprocessing"])
def test_figures_are_printed_and_written(tmp_path, part):
    file = tmp_path / "figures.json"
    arguments = ["--only", part, "--runs", "1", "--threads", "1", "--device", "cpu", "--output", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "library_cost.py"), *arguments], capture_output=True, text=True, check=True
    )
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(done.stdout.splitlines()) == 2
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        assert line.startswith(row["case"])
        assert row["arm"] in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["library_cost", "point_sets", "recipe", "onnx_latency"])
def test_every_script_explains_its_options(name):
    if name == "onnx_latency":
        pytest.importorskip("onnx")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert f"python benchmarks/{name}.py" in done.stdout
    assert "--output" in done.stdout
