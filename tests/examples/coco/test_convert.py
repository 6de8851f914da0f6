"""`--convert`: from a detector that needs NMS to the same one without, and what may stay frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import evaluate
import predict
import pytest
import torch
import train
from coco_example.engine.metrics_log import read_metrics
from coco_example.errors import RunError
from coco_example.models.detectors import selection_of
from coco_example.models.saved_model import load_model
from safetensors.torch import load_file

from crosskd_assign import EndToEndDetector
from tests.makers.pages import leads_somewhere
from tests.makers.training_runs import assert_same_run, stop_in

pytestmark = pytest.mark.usefixtures("no_pictures")


def arguments(data: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    """What a user types."""
    return ["--convert", str(teacher), "--data-path", str(data), "--output", str(output), "--teacher-floor", "0", *more]


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def converted(scenes_folder, teacher, tmp_path_factory):
    """A finished conversion; not to be written to."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert train.main(arguments(scenes_folder, teacher, folder)) == 0
    return folder


def test_a_conversion_takes_detector_and_schedule_of_the_run_and_a_quarter_of_its_epochs(converted, teacher):
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (converted, teacher))
    own = {"workers", "arm", "metric", "selection", "epochs", "convert", "output", "eval_every", "log_every"}
    own |= {"lr", "warmup_steps"}
    assert {name for name in mine if mine[name] != theirs[name]} <= own
    assert (mine["arm"], mine["metric"], mine["selection"], mine["epochs"]) == ("cross-head", "balanced", True, 1)
    assert mine["lr"] == pytest.approx(0.3 * theirs["lr"])
    assert mine["warmup_steps"] == 10
    spec = json.loads((converted / "model.json").read_text())
    assert spec["selection"] is True
    assert spec["one_to_many"] is False
    losses = next(line for line in read_metrics(converted) if line["kind"] == "train")["losses"]
    assert {"distill_classification", "distill_bbox_regression"} <= losses.keys()


def test_it_ends_with_what_was_before_and_what_is_after(converted, teacher, scenes_folder, tmp_path, capsys):
    for folder, key in ((teacher, "before"), (converted, "scores")):
        output = tmp_path / f"{key}.json"
        command = [
            "--run",
            str(folder),
            "--data-path",
            str(scenes_folder),
            "--batch-size",
            "8",
            "--output",
            str(output),
        ]
        assert evaluate.main(command) == 0
        expected = json.loads(output.read_text())["scores"]
        assert summary(converted)[key] == pytest.approx(expected, nan_ok=True)
    assert {way: ms > 0 for way, ms in summary(converted)["milliseconds_per_image"].items()} == {
        "before": True,
        "after": True,
    }
    capsys.readouterr()
    assert predict.main(["--run", str(converted), "--output", str(tmp_path / "found"), str(scenes_folder / "val")]) == 0


def test_it_starts_as_the_detector_it_was(scenes_folder, teacher, tmp_path):
    assert train.main(arguments(scenes_folder, teacher, tmp_path / "run", "--lr", "0")) == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", teacher))
    added = mine.keys() - theirs.keys()
    assert added
    assert all(name.startswith("selection.") for name in added)
    trained = {name for name, _ in load_model(teacher)[0].named_parameters()}
    assert all(torch.equal(mine[name], theirs[name]) for name in trained)


def test_nothing_need_be_trained(converted, scenes_folder, teacher, tmp_path, capsys):
    assert train.main(arguments(scenes_folder, teacher, tmp_path / "run", "--epochs", "0")) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "run"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    scores = summary(tmp_path / "run")
    assert scores["before"] == pytest.approx(summary(converted)["before"], nan_ok=True)
    assert scores["scores"]["duplicates"] < scores["before"]["duplicates"]
    found = ["--output", str(tmp_path / "found"), str(scenes_folder / "val")]
    assert predict.main(["--run", str(tmp_path / "run"), *found]) == 0
    # Without the branch there is nothing that would take NMS out.
    with pytest.raises(SystemExit):
        train.main(arguments(scenes_folder, teacher, tmp_path / "other", "--epochs", "0", "--no-selection"))
    assert "--epochs of at least 1" in capsys.readouterr().err


def test_its_score_can_be_that_of_the_class_alone(scenes_folder, teacher, tmp_path, capsys):
    assert train.main(arguments(scenes_folder, teacher, tmp_path / "run", "--epochs", "0", "--class-score")) == 0
    model, spec = load_model(tmp_path / "run")
    assert spec.model.class_score
    assert selection_of(model).class_score
    # A maximum keeps 0.88 of its class score, whatever its centerness.
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        plain = EndToEndDetector(load_model(teacher)[0].eval()).eval().run(images).predictions.logits
        found = EndToEndDetector(model.eval(), selection=selection_of(model)).eval().run(images).predictions.logits
    assert float((found.sigmoid() / plain.sigmoid()).max()) == pytest.approx(0.8808, abs=1e-3)
    with pytest.raises(SystemExit):
        train.main(["--arm", "one-to-one", "--data", "demo", "--output", str(tmp_path / "no"), "--class-score"])
    assert "expected --selection or --convert with --class-score" in capsys.readouterr().err


def test_a_frozen_detector_keeps_every_weight_and_statistic(scenes_folder, teacher, tmp_path):
    assert train.main(arguments(scenes_folder, teacher, tmp_path / "run", "--freeze", "all", "--epochs", "1")) == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", teacher))
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert any(mine[name].any() for name in mine if name.startswith("selection.output"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["arm"] == "one-to-one"


def test_a_frozen_backbone_stays_while_the_neck_learns(workshop, teacher, tmp_path):
    options = {"arm": "one-to-one", "inherit_from": teacher, "freeze": "backbone"}
    assert workshop.train(tmp_path / "run", **options) == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", teacher))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs if name.startswith("backbone.body."))
    assert not torch.equal(*(x["backbone.fpn.layer_blocks.0.0.weight"] for x in (mine, theirs)))


def test_a_conversion_that_is_stopped_goes_on_as_if_it_had_not_been(converted, scenes_folder, teacher, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 2)
        assert train.main(arguments(scenes_folder, teacher, tmp_path / "run")) == 143
    moved = shutil.copytree(teacher, tmp_path / "elsewhere")
    assert train.main(arguments(scenes_folder, moved, tmp_path / "run", "--resume")) == 0
    assert_same_run(tmp_path / "run", converted)


def test_average_weights_hold_the_branch(scenes_folder, teacher, tmp_path):
    assert train.main(arguments(scenes_folder, teacher, tmp_path / "run", "--ema", "0.5")) == 0
    model, _ = load_model(tmp_path / "run")
    branch = selection_of(model)
    assert branch is not None
    assert branch.output.weight.any()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--teacher", "x"], "expected --convert without --teacher"),
        (["--inherit-from", "x"], "expected --convert without --teacher"),
        (["--arm", "one-to-many"], "expected an arm without NMS for --convert"),
        (["--arm", "cross-head", "--freeze", "all"], "expected --selection and --arm one-to-one with --freeze all"),
        (["--backbone", "resnet18"], "leave out --architecture, --backbone"),
    ],
)
def test_what_does_not_go_with_a_conversion_is_refused(scenes_folder, teacher, tmp_path, capsys, more, sentence):
    try:
        code = train.main(arguments(scenes_folder, teacher, tmp_path / "run", *more))
    except SystemExit as ended:  # as argparse ends
        code = int(str(ended.code))
    assert code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("option", ["--convert", "--teacher", "--inherit-from"])
@pytest.mark.parametrize(
    ("named", "got", "fix"),
    [
        ("nowhere", "no such folder", "check the path"),
        ("torchvison:fcos_resnet50_fpn", "no such folder", "check the path"),
        ("empty", "a folder without model.json", "train it to the end first"),
    ],
)
def test_what_is_no_detector_is_refused_by_the_option_that_names_it(
    scenes_folder, tmp_path, capsys, monkeypatch, option, named, got, fix
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arm = [] if option == "--convert" else ["--arm", "cross-head" if option == "--teacher" else "one-to-one"]
    try:
        code = train.main(["--data-path", f"{scenes_folder}", "--output", "run", option, named, *arm, "--size", "64"])
    except SystemExit as ended:  # as argparse ends
        code = int(str(ended.code))
    sentence, page = capsys.readouterr().err.splitlines()[-2:]
    assert code == 2
    expected = f"Expected a finished run, torchvision:NAME or python:FILE:FUNCTION, but got {got} ({option} {named})."
    assert f"error: {expected} Fix: {fix}" in sentence
    place = page.removeprefix("See ").removeprefix("--help, or ").removesuffix(".")
    guide = "docs/how-to/convert.md#on-a-coco-folder"
    assert place == (guide if option == "--convert" else RunError.page)
    assert leads_somewhere(place)
    assert not Path("run").exists()


def test_a_file_that_a_conversion_cannot_read_has_a_page_of_its_own(scenes_folder, tmp_path, capsys):
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(SystemExit):
        train.main(arguments(scenes_folder, tmp_path, tmp_path / "run"))
    assert capsys.readouterr().err.endswith(f"restore that file.\nSee --help, or {RunError.page}.\n")


def test_fewer_classes_are_fine_and_others_are_refused_by_name(scenes_folder, teacher, tmp_path, capsys):
    # Without one class of the detector, which is kept; then with a class that it does not know.
    data = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        gone = document["categories"].pop()["id"]
        document["annotations"] = [box for box in document["annotations"] if box["category_id"] != gone]
        path.write_text(json.dumps(document))
    assert train.main(arguments(data, teacher, tmp_path / "fewer")) == 0
    assert len(load_model(tmp_path / "fewer")[1].categories) == len(load_model(teacher)[1].categories)
    capsys.readouterr()

    path = data / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 99, "name": "zebra"})
    document["annotations"][0]["category_id"] = 99
    path.write_text(json.dumps(document))
    assert train.main(arguments(data, teacher, tmp_path / "more")) == 2
    assert "but got 'zebra' (id 99)" in capsys.readouterr().err
