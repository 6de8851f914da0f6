"""`best/`: the detector with the best AP of a run's evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import export
import pytest
import torch
from coco_example.command_line import parse_options
from coco_example.engine.best import Best
from coco_example.engine.signals import Interrupted
from coco_example.files import write_whole
from coco_example.models import saved_model
from coco_example.models.saved_model import load_model
from safetensors.torch import load_file
from torch import Tensor

from tests.makers.training_runs import stop_in

pytestmark = pytest.mark.usefixtures("no_pictures")

AP = {"one-to-many": "ap_nms"}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes evaluations of the same step have these scores, and keeps the weights that were scored."""
    weights: dict[int, dict[str, Tensor]] = {}

    def start(arm: str, *scores: float) -> dict[int, dict[str, Tensor]]:
        given = {3 * n: value for n, value in enumerate(scores, start=1)}
        original = Best.offer

        def offer(best: Best, network: Any, found: Any, step: int, thresholds: Any = None) -> None:
            weights[step] = {name: value.clone() for name, value in network.state_dict().items()}
            value = given[step]
            original(best, network, {**found, "ap": 0.0, "ap_nms": 0.0, AP.get(arm, "ap"): value}, step, thresholds)

        monkeypatch.setattr(Best, "offer", offer)
        return weights

    return start


def kept(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "best" / "model.safetensors")  # type: ignore[no-any-return]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("arm", "scores", "step"),
    [
        ("one-to-one", (0.2, 0.5, 0.4), 6),
        ("one-to-many", (0.5, 0.4, 0.3), 3),
        ("one-to-one", (0.2, 0.5, 0.5), 9),  # the last counts, too, and is preferred
    ],
)
def test_the_best_is_kept_and_named(workshop, scenes_folder, tmp_path, capsys, scored, arm, scores, step):
    weights = scored(arm, *scores)
    run = tmp_path / "run"
    assert workshop.train(run, arm=arm, epochs=3, eval_every=1, ema=0.5) == 0
    assert same(kept(run), weights[step])
    assert same(load_file(run / "model.safetensors"), weights[9])
    name = AP.get(arm, "ap")
    expected = {"step": step, name: scores[step // 3 - 1]}
    assert json.loads((run / "summary.json").read_text())["best"] == expected
    assert f"best: step {step} of 9, {name} {100 * expected[name]:.1f}, in {run / 'best'}" in capsys.readouterr().err


def test_every_command_takes_it_as_a_run(workshop, scenes_folder, tmp_path, scored, monkeypatch):
    scored("one-to-one", 0.5, 0.4)
    run = tmp_path / "run"
    assert workshop.train(run, arm="one-to-one", epochs=2, eval_every=1) == 0
    best = run / "best"
    assert evaluate.main(["--run", str(best), "--data-path", str(scenes_folder), "--limit", "2"]) == 0
    monkeypatch.setattr(export, "export_onnx", lambda detector, *_, **__: detector.model.state_dict())
    assert same(export.export(best, tmp_path / "model.onnx"), kept(run))  # type: ignore[arg-type]
    arguments = ["--convert", str(best), "--data-path", str(scenes_folder), "--output", "x"]
    assert parse_options(arguments).training.epochs == 1
    assert replace(load_model(best)[1], thresholds=None) == replace(load_model(run)[1], thresholds=None)


def test_a_run_that_goes_on_knows_the_best_and_one_without_evaluations_keeps_none(
    workshop, tmp_path, scored, monkeypatch
):
    weights = scored("one-to-one", 0.5, 0.4, 0.3)
    run = tmp_path / "run"
    options = {"arm": "one-to-one", "epochs": 3, "eval_every": 1}
    with monkeypatch.context() as patch:
        stop_in(patch, 5)
        assert workshop.train(run, **options) == 143
    first = weights[3]
    weights.clear()
    assert workshop.train(run, **options, resume=True) == 0
    assert sorted(weights) == [6, 9]
    assert same(kept(run), first)
    assert workshop.train(tmp_path / "other", arm="one-to-one") == 0
    assert not (tmp_path / "other" / "best").exists()
    assert "best" not in json.loads((tmp_path / "other" / "summary.json").read_text())


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_weights_and_score_belong_together_whenever_it_is_killed(workshop, student, tmp_path, monkeypatch, moment):
    network, spec = load_model(student)
    best = Best(tmp_path, spec, workshop.options(tmp_path, eval_every=1))
    best.offer(network, {"ap": 0.25}, 3)
    before = load_file(best.folder / "model.safetensors")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)

    def dying(calls: Iterator[int], function: Any) -> Any:
        def write(*arguments: Any, **options: Any) -> None:
            if next(calls) == moment:
                raise Interrupted(15, "killed")
            function(*arguments, **options)
            if next(calls) == moment:
                raise Interrupted(15, "killed")

        return write

    with monkeypatch.context() as patch:
        calls = iter(range(100))
        patch.setattr(saved_model, "write_whole", dying(calls, write_whole))
        patch.setattr(saved_model, "write_json", dying(calls, saved_model.write_json))
        with pytest.raises(Interrupted):
            best.offer(network, {"ap": 0.5}, 6)
    written = moment > 0
    assert best.found() == ({"step": 6, "ap": 0.5} if written else {"step": 3, "ap": 0.25})
    assert same(load_model(best.folder)[0].state_dict(), network.state_dict() if written else before)
    (best.folder / "model.safetensors").write_bytes(b"damaged")
    assert best.found() is None


def test_scores_that_are_not_better_write_nothing_and_a_missing_score_is_the_worst(workshop, student, tmp_path):
    network, spec = load_model(student)
    best = Best(tmp_path, spec, workshop.options(tmp_path, eval_every=1))
    scores: Sequence[float] = (math.nan, 0.25, 0.2, math.nan, 0.25)
    found = []
    for step, score in enumerate(scores, start=1):
        best.offer(network, {"ap": score}, step)
        found.append((best.found() or {})["step"])
    assert found == [1, 2, 2, 2, 5]
