"""The options of `train.py`: groups in the program, flat on the command line and in files."""

from __future__ import annotations

import pytest
from coco_example.command_line import parse_options
from coco_example.commands import CommandParser
from coco_example.options import DataOptions, MethodOptions, ModelOptions, Options, TrainingOptions


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--epochs", "0"], "expected --epochs of at least 1, but got 0"),
        (["--batch-size", "-2"], "expected --batch-size of at least 1, but got -2"),
        (["--seed", "-1"], "expected --seed of at least 0, but got -1"),
        (["--distill-warmup", "1.5"], "expected --distill-warmup in 0…1, but got 1.5"),
        (["--auxiliary-head", "--detach", "--entry", "1"], "expected --entry 0 with --detach, but got 1"),
        (["--short-side", "32", "--augmentation", "full"], "expected --augmentation none or flip with --short-side"),
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
    [sentence, pointer] = capsys.readouterr().err.splitlines()  # and not the whole usage
    assert reason in sentence
    assert pointer == f"See --help, or {CommandParser.page}."


def test_options_need_an_output_and_otherwise_have_the_documented_defaults(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_options([])
    assert "--output" in capsys.readouterr().err
    assert parse_options(["--output", "x", "--data", "demo"]) == Options(output="x", dataset=DataOptions(data="demo"))
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0


def test_every_option_stands_on_the_command_line_and_in_the_flat_form_under_one_name(workshop, tmp_path):
    given = {"arm": "own-head-imitation", "backbone": "resnet18", "mosaic": 0.25, "warmup_steps": 7, "cache": True}
    options = workshop.options(tmp_path / "run", **given)
    assert options.method == MethodOptions(arm="own-head-imitation")
    assert options.model == ModelOptions(backbone="resnet18", size=64)
    assert options.dataset == DataOptions(data_path=str(workshop.data), mosaic=0.25, cache=True, workers=0)
    assert options.training == TrainingOptions(epochs=1, batch_size=8, warmup_steps=7, log_every=1)
    flat = options.as_flat()
    assert given.items() <= flat.items()
    assert not any(isinstance(value, dict) for value in flat.values())
    assert Options.from_flat(flat) == options


def test_a_run_of_an_older_version_had_the_default_of_options_that_came_later():
    now = Options.from_flat({"output": "a", "epochs": 3})
    then = {name: value for name, value in now.as_flat().items() if name != "short_side"}
    assert now.differences(then | {"output": "b"}) == []
    later = Options.from_flat({"epochs": 3, "short_side": 800})
    assert later.differences(then) == ["short_side: 0 then, 800 now"]
