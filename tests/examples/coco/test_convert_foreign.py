"""`--convert` of detectors that no run trained: a function of a Python file, and torchvision's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import evaluate
import export
import predict
import pytest
import torch
import train
from coco_example.command_line import parse_options
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.models.conversion import Source, in_labels_of, trained_labels
from coco_example.models.detectors import torchvision_detector
from coco_example.models.saved_model import ModelSpec, load_model
from coco_example.options import ModelOptions
from safetensors.torch import load_file
from torchvision.models import WeightsEnum, get_model

from crosskd_assign import adapt
from crosskd_assign.detectors.probing import evaluation_mode
from tests.makers.training_runs import assert_same_run, stop_in

pytestmark = pytest.mark.usefixtures("no_pictures")

# The detector of a run as other code bases have theirs: no background channel, so that labels begin with 0.
DETECTOR = """
from dataclasses import replace
from pathlib import Path
from coco_example.models.saved_model import load_model
from crosskd_assign.detectors.torchvision import FCOSAdapter

class FromZero(FCOSAdapter):
    def head(self, features, image_size):
        found = super().head(features, image_size)
        return replace(found, logits=found.logits[..., 1:])

def trained():
    model, spec = load_model(Path({run!r}))
    return FromZero(model), {{label - 1: category for label, category in spec.label_to_category.items()}}

def without_parts():
    adapter, labels = trained()
    adapter.parts = dict
    return adapter, labels
"""


@pytest.fixture(scope="module")
def detector(teacher, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("mine") / "detector.py"
    file.write_text(DETECTOR.format(run=str(teacher)))
    return f"python:{file}:trained"


def arguments(data: Path, reference: str, output: Path, *more: str) -> list[str]:
    """What a user types."""
    common = ["--teacher-floor", "0", "--epochs", "1", "--batch-size", "8", "--log-every", "1", "--warmup-steps", "2"]
    return ["--convert", reference, "--data-path", str(data), "--output", str(output), *common, *more]


@pytest.fixture(scope="module")
def converted(scenes_folder, detector, tmp_path_factory) -> Path:
    """A finished conversion; not to be written to."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*__import__("sys").path])
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert train.main(arguments(scenes_folder, detector, folder)) == 0
    return folder


def summary(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())


def scores(tmp_path: Path, data: Path, *which: str) -> Any:
    output = tmp_path / "scores.json"
    assert evaluate.main([*which, "--data-path", str(data), "--batch-size", "8", "--output", str(output)]) == 0
    return json.loads(output.read_text())["scores"]


def test_it_has_stated_defaults_and_the_size_of_the_detector(converted, detector):
    options = parse_options(["--convert", detector, "--data", "demo", "--output", "x"])
    assert (options.training.epochs, options.training.lr, options.model.size) == (12, 1e-4, 0)
    frozen = parse_options(["--convert", detector, "--data", "demo", "--output", "x", "--freeze", "all"])
    assert (frozen.training.lr, frozen.method.arm) == (1e-3, "one-to-one")
    spec = json.loads((converted / "model.json").read_text())
    assert (spec["size"], spec["selection"], spec["one_to_many"]) == (64, True, False)  # the run's detector has 64
    options = parse_options(["--convert", "torchvision:fcos_resnet50_fpn", "--data", "demo", "--output", "x"])
    assert (options.model.size, options.model.short_side) == (1333, 800)


def test_before_is_what_the_detector_scores_and_after_what_the_run_does(
    converted, detector, teacher, scenes_folder, tmp_path
):
    before, after = summary(converted)["before"], summary(converted)["scores"]
    assert before["ap_nms"] > 0.005
    assert before == pytest.approx(scores(tmp_path, scenes_folder, "--detector", detector), nan_ok=True)
    assert before == pytest.approx(scores(tmp_path, scenes_folder, "--run", str(teacher)), nan_ok=True)
    assert after == pytest.approx(scores(tmp_path, scenes_folder, "--run", str(converted)), nan_ok=True)


def test_labels_and_names_are_those_of_detector_and_data(converted, scenes_folder, tmp_path):
    _, spec = load_model(converted)
    names = {category.id: category.name for category in read_coco(*locate_split(scenes_folder, "val")).categories}
    assert spec.label_to_category == dict(enumerate(names))
    assert spec.label_to_name == dict(enumerate(names.values()))
    assert predict.main(["--run", str(converted), "--output", str(tmp_path / "a"), str(scenes_folder / "val")]) == 0


@pytest.mark.slow
def test_an_export_has_its_labels_and_names(converted, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    spec = load_model(converted)[1]
    file = tmp_path / "model.onnx"
    assert export.main([str(converted), "--output", str(file), "--top-k", "20"]) == 0
    assert predict.OnnxDetector(file).class_names == spec.label_to_name


def test_it_starts_as_the_detector_and_ranks_alike_until_the_branch_has_learnt(
    scenes_folder, detector, teacher, tmp_path
):
    run = tmp_path / "run"
    assert train.main(arguments(scenes_folder, detector, run, "--lr", "0", "--freeze", "all")) == 0
    mine, theirs = load_file(run / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert {name for name in mine if not name.startswith("selection.")} == {f"model.{name}" for name in theirs}
    assert all(torch.equal(mine[f"model.{name}"], value) for name, value in theirs.items())
    assert summary(run)["scores"]["ap"] == pytest.approx(summary(run)["before"]["ap"], abs=1e-3)


def test_all_of_a_detector_can_be_frozen_that_names_no_parts(scenes_folder, detector, teacher, tmp_path, capsys):
    reference = detector.replace(":trained", ":without_parts")
    assert train.main(arguments(scenes_folder, reference, tmp_path / "run", "--freeze", "all")) == 0
    mine, theirs = load_file(tmp_path / "run" / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert all(torch.equal(mine[f"model.{name}"], value) for name, value in theirs.items())
    assert train.main(arguments(scenes_folder, reference, tmp_path / "no", "--freeze", "backbone")) == 2
    assert 'a module named "backbone" in parts()' in capsys.readouterr().err


def test_a_stopped_conversion_goes_on_as_if_it_had_not_been(converted, scenes_folder, detector, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 2)
        assert train.main(arguments(scenes_folder, detector, tmp_path / "run")) == 143
    assert train.main(arguments(scenes_folder, detector, tmp_path / "run", "--resume")) == 0
    assert_same_run(tmp_path / "run", converted)


def test_a_file_that_is_gone_and_a_description_that_cannot_be_are_named(converted, scenes_folder, tmp_path, capsys):
    run = Path(shutil.copytree(converted, tmp_path / "run"))
    path = run / "model.json"
    spec = json.loads(path.read_text())
    for change, words in (
        ({"detector": f"python:{tmp_path}/gone.py:trained"}, f"but got none at {tmp_path}/gone.py"),
        ({"detector": "nothing"}, "detector 'nothing'"),
        ({"labels": [0]}, "labels [0]"),
        ({"labels": ["a"] * 6}, "labels ["),
    ):
        path.write_text(json.dumps(spec | change))
        assert predict.main(["--run", str(run), "--output", str(tmp_path / "x"), str(scenes_folder / "val")]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--teacher", "x"], "expected --convert without --teacher"),
        (["--backbone", "resnet18"], "without --backbone: its form is its own"),
        (["--channels", "32", "--head-convs", "1"], "without --channels, --head-convs: its form is its own"),
        (["--freeze", "backbone-neck", "--arm", "cross-head"], "expected --arm one-to-one or an --entry"),
        (["--size", "-1"], "expected --size of at least 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(scenes_folder, detector, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit):
        train.main(arguments(scenes_folder, detector, tmp_path / "run", *more))
    assert sentence in capsys.readouterr().err


# --- classes ----------------------------------------------------------------------------------------------------------


def with_categories(data: Path, folder: Path, change: Any) -> Path:
    """A copy of a data set, its annotation files changed."""
    copy = Path(shutil.copytree(data, folder))
    for split in ("train", "val"):
        path = copy / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
    return copy


def drop_four(document: Any) -> None:
    document["categories"] = document["categories"][:2]
    kept = {category["id"] for category in document["categories"]}
    document["annotations"] = [box for box in document["annotations"] if box["category_id"] in kept]


def test_a_class_that_the_detector_lacks_is_refused_by_id_and_name(scenes_folder, detector, tmp_path, capsys):
    def add(document: Any) -> None:
        document["categories"].append({"id": 99, "name": "zebra"})
        document["annotations"][0]["category_id"] = 99

    data = with_categories(scenes_folder, tmp_path / "data", add)
    assert train.main(arguments(data, detector, tmp_path / "run")) == 2
    assert "expected classes of the detector that is converted, but got 'zebra' (id 99)" in (
        capsys.readouterr().err.replace("Expected", "expected")
    )
    assert not (tmp_path / "run" / "config.json").exists()


def test_fewer_classes_are_learnt_and_the_others_kept(scenes_folder, detector, teacher, tmp_path):
    # Of a head whose last layer alone learns, the channels of the other classes stay bit for bit.
    data = with_categories(scenes_folder, tmp_path / "data", drop_four)
    more = ("--weight-decay", "0", "--freeze", "backbone-neck", "--no-selection")
    weights = {}
    for name, reference in (("run", str(teacher)), ("python", detector)):
        assert train.main(arguments(data, reference, tmp_path / name, *more)) == 0
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    theirs = load_file(teacher / "model.safetensors")["head.classification_head.cls_logits.bias"]
    for mine in (
        weights["run"]["head.classification_head.cls_logits.bias"],
        weights["python"]["model.head.classification_head.cls_logits.bias"],
    ):
        assert torch.equal(mine[3:], theirs[3:])
        assert not torch.equal(mine[1:3], theirs[1:3])
    spec = load_model(tmp_path / "python")[1]
    assert len(spec.categories) == 6
    assert scores(tmp_path, data, "--run", str(tmp_path / "python"))["ap"] == pytest.approx(
        summary(tmp_path / "python")["scores"]["ap"]
    )


def test_objects_get_the_labels_of_the_detector(scenes_folder, tmp_path):
    index = read_coco(*locate_split(scenes_folder, "train"))
    ids = [category.id for category in index.categories]
    labels = {40: ids[1], 7: ids[0], **dict(enumerate(ids[2:], 80)), 3: 1234}
    spec = Source("python:x.py:f", torch.nn.Identity(), labels, {}).spec(ModelOptions(), index)
    moved = in_labels_of(index, spec)
    own = {category: label for label, category in labels.items()}
    for before, after in zip(index.records, moved.records, strict=True):
        assert after.labels.tolist() == [own[ids[label - 1]] for label in before.labels.tolist()]
    assert spec.label_to_name[40] == index.categories[1].name
    assert spec.label_to_name[3] == "1234"
    assert trained_labels(index, spec) == (40, 7, 80, 81, 82, 83)
    plain = ModelSpec(ModelOptions(), False, tuple((c.id, c.name) for c in index.categories))
    assert in_labels_of(index, plain) is index
    assert trained_labels(index, plain) is None


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch) -> None:
    """Random weights where torchvision would fetch its own."""

    def state(weights: WeightsEnum, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        name = type(weights).__name__.removesuffix("_Weights").lower()
        model = get_model(name, weights=None, weights_backbone=None)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.001, 2)  # type: ignore[union-attr]
        return {key: x for key, x in model.state_dict().items() if not key.endswith("num_batches_tracked")}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", state)


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_a_detector_of_torchvision_is_built_again_without_fetching(hub, monkeypatch, name):
    fetched = torchvision_detector(name, size=64)
    monkeypatch.delattr(WeightsEnum, "get_state_dict")
    again = torchvision_detector(name, size=64, fetch=False)
    again.load_state_dict(fetched.state_dict(), strict=False)  # but for counts of batches
    image = [torch.rand(3, 64, 64)]
    for part in ("logits", "boxes"):
        found = []
        for model in (fetched, again):
            with evaluation_mode(adapt(model)):
                batch, _ = adapt(model).preprocess(image)
                found.append(getattr(adapt(model).head(adapt(model).features(batch), batch.image_size), part))
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
def test_a_detector_of_torchvision_is_converted_and_loaded_again(hub, scenes_folder, tmp_path, capsys):
    def rename(document: Any) -> None:
        for category, name in zip(
            document["categories"], ("Person", "bicycle", "car", "motorcycle", "airplane", "bus"), strict=True
        ):
            category["name"] = name

    reference, more = "torchvision:fcos_resnet50_fpn", ("--size", "64", "--batch-size", "12")
    assert train.main(arguments(scenes_folder, reference, tmp_path / "no", *more)) == 2
    assert "classes of the detector that is converted, but got 'circle' (id 1)" in capsys.readouterr().err
    data = with_categories(scenes_folder, tmp_path / "data", rename)
    assert train.main(arguments(data, reference, tmp_path / "run", *more, "--freeze", "backbone")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(WeightsEnum, "get_state_dict")  # nothing is fetched again
        _, spec = load_model(tmp_path / "run")
        assert scores(tmp_path, data, "--run", str(tmp_path / "run")) == pytest.approx(
            summary(tmp_path / "run")["scores"], nan_ok=True
        )
    assert len(spec.categories) == 80
    assert (spec.label_to_category[90], spec.label_to_name[90], spec.label_to_name[1]) == (90, "toothbrush", "Person")
