"""`train.py`: what every arm learns from, and what it leaves in its folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import train
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.data.scenes import write_scenes
from coco_example.engine import inputs
from coco_example.engine.checkpoints import load_checkpoint
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.run_folder import environment
from coco_example.evaluation.evaluation import Detector, Ranking, evaluate
from coco_example.figures.report import assignment_views
from coco_example.files import write_json
from coco_example.models.detectors import build_detector
from coco_example.models.methods import METRICS, build_method, needs_teacher
from coco_example.models.saved_model import load_model
from coco_example.options import Arm, MethodOptions, Metric, ModelOptions
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import FCOS

import crosskd_assign
from crosskd_assign import CrossHeadDistiller, CrossHeadLoss, EndToEndDetector, adapt
from crosskd_assign.structures import Target

FILES = {
    *("run.lock", "run.json", "config.json", "environment.json", "metrics.jsonl", "last.pt"),
    *("model.safetensors", "model.json", "summary.json", "curves.png", "predictions.png", "batch0.png"),
}
WEIGHTS = "model.safetensors"
DETECTOR = {"one-to-many": "", "one-to-one": "adapter.model."}  # where it is in the method's state
OWN = {"classification", "bbox_regression"}
TERMS = {
    "one-to-many": OWN | {"bbox_ctrness"},
    "one-to-one": OWN,
    "cross-head": OWN | {"distill_classification", "distill_bbox_regression"},
    "weighted-imitation": OWN | {"distill_features"},
    "feature-imitation": OWN | {"distill_features"},
    "own-head-imitation": OWN | {"distill_classification", "distill_bbox_regression"},
}


@pytest.fixture(scope="module", params=get_args(Arm))
def arm_run(request, workshop, teacher, tmp_path_factory):
    """A finished run of one epoch of every arm."""
    folder = tmp_path_factory.mktemp("arms") / request.param
    options = {"teacher": teacher} if needs_teacher(request.param) else {}
    assert workshop.train(folder, arm=request.param, seed=3, **options) == 0
    return request.param, folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if line["kind"] == kind]


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested containers, and the containers."""
    yield value
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_every_arm_leaves_the_documented_files_and_nothing_else(arm_run):
    arm, folder = arm_run
    expected = FILES if arm == "one-to-many" else FILES | {"assignments.png"}
    assert {path.name for path in folder.iterdir()} == expected
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image.convert("L")).std() > 5, picture  # not blank


def test_every_arm_logs_each_step_with_its_own_finite_loss_terms_and_ends_with_an_evaluation(arm_run):
    arm, folder = arm_run
    steps = lines(folder, "train")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["losses"].keys() == TERMS[arm]
        assert all(value is not None and value > 0 for value in line["losses"].values())
    assert [line["step"] for line in lines(folder, "eval")] == [3]


def test_the_summary_says_what_was_run_with_which_code_and_what_it_cost(arm_run):
    arm, folder = arm_run
    summary = read(folder / "summary.json")
    assert (summary["arm"], summary["seed"]) == (arm, 3)
    assert summary["budget"].keys() == {"epochs", "images", "seconds"}
    assert (summary["budget"]["epochs"], summary["budget"]["images"]) == (1, 24)
    assert 0 < summary["budget"]["seconds"] < 300
    assert summary["environment"]["crosskd_assign"] == crosskd_assign.__version__
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"] == read(folder / "environment.json")
    assert summary["environment"]["commit"]
    assert summary["options"] == read(folder / "config.json")
    assert summary["options"]["arm"] == arm
    logged = lines(folder, "eval")[-1]["scores"]
    assert logged == {name: summary["scores"][name] for name in logged}


def test_the_checkpoint_holds_only_tensors_and_plain_types_without_the_teacher(arm_run):
    arm, folder = arm_run
    state = torch.load(folder / "last.pt", weights_only=True)
    assert {type(leaf).__name__ for leaf in leaves(state)} <= {
        *("dict", "OrderedDict", "list", "tuple", "str", "int", "float", "bool", "NoneType", "Tensor"),
    }
    own = {DETECTOR.get(arm, "detector.adapter.model.") + name for name in load_file(folder / WEIGHTS)}
    assert own <= state["method"].keys()
    assert state["method"].keys() == own
    size = sum(value.numel() for value in state["method"].values())
    assert (folder / "last.pt").stat().st_size < 1.1 * 4 * 3 * size  # weights and two moments, four bytes each


def test_the_saved_weights_are_the_trained_ones_and_load_strictly_into_torchvisions_model(arm_run):
    arm, folder = arm_run
    weights = load_file(folder / WEIGHTS)
    model = build_detector(ModelOptions(size=64), num_classes=7)
    assert type(model) is FCOS
    model.load_state_dict(weights, strict=True)
    trained = torch.load(folder / "last.pt", weights_only=True)["method"]
    for name, value in weights.items():
        assert torch.equal(value, trained[DETECTOR.get(arm, "detector.adapter.model.") + name]), name
    [detection] = model.eval()([torch.rand(3, 64, 64)])
    assert detection.keys() == {"boxes", "scores", "labels"}


def test_a_finished_run_is_read_back_with_its_labels_names(arm_run, scenes_folder):
    arm, folder = arm_run
    model, spec = load_model(folder)
    assert not model.training
    assert spec.one_to_many == (arm == "one-to-many")
    categories = read_coco(*locate_split(scenes_folder, "val")).categories
    assert spec.label_to_name == {n: category.name for n, category in enumerate(categories, start=1)}
    assert spec.label_to_category == {n: category.id for n, category in enumerate(categories, start=1)}


# --- what a run learns from -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_the_seed_decides_on_weights_and_on_the_order_of_images(workshop, tmp_path, monkeypatch):
    original, seen = EndToEndDetector.forward, list[list[int]]()

    def forward(method: EndToEndDetector, images: list[Tensor], targets: list[Any]) -> Any:
        seen.append([int(target["image_id"]) for target in targets])
        return original(method, images, targets)

    monkeypatch.setattr(EndToEndDetector, "forward", forward)
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        assert workshop.train(tmp_path / name, arm="one-to-one", seed=seed, val_losses=0) == 0
    for a, b, c in (((tmp_path / name / WEIGHTS).read_bytes() for name in "abc"), (seen[:3], seen[3:6], seen[6:])):
        assert a == b
        assert a != c


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("by", ["teacher and inherit", "inherit_from"])
def test_an_inheriting_student_starts_with_the_teachers_backbone_and_its_own_head(workshop, teacher, tmp_path, by):
    options = {"inherit_from": teacher} if by == "inherit_from" else {"teacher": teacher, "inherit": True}
    assert workshop.train(tmp_path / "run", arm="one-to-one", lr=0.0, **options) == 0
    mine, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "run", teacher))
    parameters = [name for name, _ in build_detector(ModelOptions(size=64), 7).named_parameters()]
    same = {name for name in parameters if torch.equal(mine[name], theirs[name])}
    assert {name for name in parameters if name.startswith("backbone.")} <= same
    assert "head.classification_head.cls_logits.weight" not in same


@pytest.mark.usefixtures("no_pictures")
def test_the_options_of_distillation_reach_the_distiller(workshop, teacher, tmp_path, monkeypatch):
    built = []

    def build(*arguments: Any) -> nn.Module:
        built.append(build_method(*arguments))
        return built[0]

    monkeypatch.setattr(train, "build_method", build)
    options = {"distill_classification": 0.5, "distill_box": 0.25, "distill_quality": 2.0, "distill_features": 3.0}
    options |= {"alignment": "none", "entry": 1, "metric": "yolo"}
    assert workshop.train(tmp_path / "run", arm="cross-head", teacher=teacher, **options) == 0
    distiller = built[0]
    assert isinstance(distiller, CrossHeadDistiller)
    assert distiller.loss == CrossHeadLoss(classification=0.5, box=0.25, quality=2.0)
    assert distiller.feature_weight == 3.0
    assert (distiller.aligner.alignment, distiller.student_entry.convolutions) == ("none", 1)
    assert distiller.detector.assigner == METRICS["yolo"]
    assert {"distill_quality", "distill_features"} <= set(lines(tmp_path / "run", "train")[0]["losses"])


@pytest.mark.usefixtures("no_pictures")
def test_a_detector_of_another_width_and_depth_is_read_back_as_such(workshop, teacher, tmp_path):
    options = {"arm": "cross-head", "teacher": teacher, "channels": 32, "head_convs": 1}
    assert workshop.train(tmp_path / "run", **options) == 0
    head = load_model(tmp_path / "run")[0].state_dict()
    assert head["head.classification_head.cls_logits.weight"].shape[1] == 32
    assert len([name for name in head if name.startswith("head.regression_head.conv.")]) == 4  # a convolution, a norm


@pytest.mark.usefixtures("no_pictures")
def test_a_retinanet_student_learns_from_an_fcos_teacher(workshop, teacher, tmp_path):
    options = {"arm": "cross-head", "architecture": "retinanet", "teacher": teacher}
    assert workshop.train(tmp_path / "run", **options) == 0
    assert load_model(tmp_path / "run")[1].model.architecture == "retinanet"


@pytest.mark.usefixtures("no_pictures")
def test_images_without_boxes_are_trained_on_too(workshop, scenes_folder, tmp_path):
    shutil.copytree(scenes_folder, tmp_path / "data")
    document = json.loads((scenes_folder / "annotations" / "instances_train.json").read_text())
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] == 1]
    (tmp_path / "data" / "annotations" / "one.json").write_text(json.dumps(document))
    options = {"data_path": tmp_path / "data", "train_annotations": "one.json", "batch_size": 2}
    assert workshop.train(tmp_path / "run", arm="one-to-one", **options) == 0
    assert "23 images without boxes" in lines(tmp_path / "run", "event")[0]["message"]
    assert len(lines(tmp_path / "run", "train")) == 12


@pytest.mark.usefixtures("no_pictures")
def test_drawn_scenes_need_no_data_and_are_drawn_once(workshop, tmp_path, monkeypatch):
    def small_scenes(root: Path) -> None:
        write_scenes(root, train=8, val=2, size=64)

    monkeypatch.setattr(inputs, "write_scenes", small_scenes)
    for run in ("a", "b"):
        options = {"arm": "one-to-one", "data": "demo", "data_path": tmp_path / "data", "batch_size": 4}
        assert workshop.train(tmp_path / run, **options) == 0
    assert len(list((tmp_path / "data" / "train").iterdir())) == 8


def test_the_assignment_picture_shows_the_metric_that_was_trained_with(
    workshop, scenes_folder, tmp_path, monkeypatch, no_pictures
):
    calls = []
    monkeypatch.setattr(train, "draw_report", lambda *_, **options: calls.append(options))
    assert workshop.train(tmp_path / "run", arm="one-to-one", metric="task-aligned") == 0
    assert calls[0]["assigner"] == METRICS["task-aligned"]
    model, _ = load_model(tmp_path / "run")
    image, target = CocoDataset(read_coco(*locate_split(scenes_folder, "val")))[0]
    targets = [Target(boxes=target["boxes"], labels=target["labels"])]
    metrics: tuple[Metric, ...] = ("poto", "task-aligned")
    heats = [assignment_views(Detector(adapt(model)), [image], targets, METRICS[name])[0].heat for name in metrics]
    assert heats[0].shape == image.shape[-2:]
    assert float(heats[0].max()) > 10 * float(heats[1].max()) > 0  # p · IoU⁶ is far below p⁰·² · IoU⁰·⁸


@pytest.mark.usefixtures("no_pictures")
def test_evaluations_on_the_way_use_the_average_of_the_weights(workshop, tmp_path, monkeypatch):
    scored = []

    def record(detector: Detector, *arguments: Any, **options: Any) -> Any:
        scored.append({name: value.clone() for name, value in detector.adapter.model.state_dict().items()})
        return evaluate(detector, *arguments, **options)

    monkeypatch.setattr(train, "evaluate", record)
    assert workshop.train(tmp_path / "run", arm="one-to-one", epochs=2, ema=0.9, eval_every=1) == 0
    average = torch.load(tmp_path / "run" / "previous.pt", weights_only=True)["average"]
    assert len(scored) == 2
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in scored[0].items())


# --- losses that are not finite ---------------------------------------------------------------------------------------


def finite(state: dict[str, Any]) -> bool:
    return all(bool(value.isfinite().all()) for value in state["method"].values())


@pytest.mark.usefixtures("no_pictures")
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_images(workshop, tmp_path, monkeypatch, capsys):
    original, seen = EndToEndDetector.forward, []

    def forward(method: EndToEndDetector, images: list[Tensor], targets: list[Any]) -> Any:
        losses: Any = original(method, images, targets)
        seen.append([1 + int(target["image_id"]) for target in targets])  # scenes have the ids 1, 2, … in their file
        return {**losses, "bbox_regression": losses["bbox_regression"] * (math.nan if len(seen) == 3 else 1)}

    monkeypatch.setattr(EndToEndDetector, "forward", forward)
    options = {"arm": "one-to-one", "save_every": 1, "log_every": 100}
    assert workshop.train(tmp_path / "run", **options) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: Expected finite losses")
    assert "'bbox_regression': nan" in line
    assert f"(step 3, images {seen[2]})" in line
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 2
    assert finite(state)


@pytest.mark.usefixtures("no_pictures")
def test_a_training_that_diverges_leaves_a_finite_checkpoint(workshop, tmp_path, capsys):
    assert workshop.train(tmp_path / "run", arm="one-to-one", lr=1e30, save_every=1) == 2
    assert "the last checkpoint is good" in capsys.readouterr().err
    assert finite(load_checkpoint(tmp_path / "run"))


@pytest.mark.usefixtures("no_pictures")
def test_a_gradient_that_is_not_finite_is_not_saved_either(workshop, tmp_path, monkeypatch, capsys):
    original, calls = EndToEndDetector.forward, list[EndToEndDetector]()

    def forward(method: EndToEndDetector, images: list[Tensor], targets: list[Any]) -> Any:
        losses: Any = original(method, images, targets)
        calls.append(method)
        root = (losses["classification"] * 0).sqrt()  # 0, with a derivative of 0 · ∞
        return {**losses, "root": root} if len(calls) == 2 else losses

    monkeypatch.setattr(EndToEndDetector, "forward", forward)
    assert workshop.train(tmp_path / "run", arm="one-to-one", save_every=1) == 2
    assert "Expected finite weights, but got NaN or infinity (step 2)" in capsys.readouterr().err
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 1
    assert finite(state)


# --- its parts --------------------------------------------------------------------------------------------------------


def test_a_detector_has_its_adapter_on_the_device_of_its_model():
    model = build_detector(ModelOptions(size=64), 3).to("meta")
    detector = Detector(adapt(model))
    assert {value.device.type for value in detector.adapter.buffers()} == {"meta"}
    assert detector.device.type == "meta"


def test_an_arm_that_needs_a_teacher_says_so():
    with pytest.raises(ValueError, match=r"a teacher for the arm 'cross-head', but got none \(--teacher\)"):
        build_method(MethodOptions(arm="cross-head"), build_detector(ModelOptions(size=64), 3))


def test_a_missing_git_makes_the_commit_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] == "unknown"


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), (1.5, float("inf"))], "b": -float("inf"), "c": "NaN", "d": 1})
    assert read(tmp_path / "a.json") == {"a": [None, [1.5, None]], "b": None, "c": "NaN", "d": 1}


def test_a_written_file_is_as_readable_for_others_as_any(arm_run, tmp_path):
    (tmp_path / "any").write_text("")
    modes = {path.stat().st_mode for path in arm_run[1].iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_the_quality_branch_counts_in_the_score_of_a_one_to_many_detector_alone():
    model = build_detector(ModelOptions(size=64), 3).eval()
    rankings: tuple[Ranking, ...] = ("class_quality", "class")
    for ranking in rankings:
        predictions, _ = Detector(adapt(model), ranking).predict([torch.rand(3, 64, 64)])
        assert (predictions.quality is not None) == (ranking == "class_quality")
