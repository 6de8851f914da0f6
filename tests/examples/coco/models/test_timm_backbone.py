"""`--backbone timm:NAME`: timm's networks under the pyramid that torchvision's have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import export
import pytest
import torch
import train
from coco_example.command_line import parse_options
from coco_example.errors import ModelError
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import load_model
from coco_example.options import ModelOptions
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

timm = pytest.importorskip("timm")

NAMES = ["resnet18", "mobilenetv3_small_100", "convnext_atto"]


def detector(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_detector(ModelOptions(backbone=f"timm:{name}", size=64, channels=32, head_convs=1, **options), 4)


def learning(model: nn.Module) -> set[str]:
    return {name for name, p in model.backbone.body.named_parameters() if p.requires_grad}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_the_pyramid_stands_on_the_networks_own_maps_and_every_weight_that_learns_gets_a_gradient(name):
    model: Any = detector(name)
    x = torch.rand(2, 3, 128, 96)
    network = timm.create_model(name, features_only=True).eval()
    network.load_state_dict(model.backbone.body.network.state_dict())
    own: dict[str, Tensor] = model.backbone.eval().body(x)
    for mine, theirs in zip(own.values(), network(x)[-3:], strict=True):
        torch.testing.assert_close(mine, theirs)
    pyramid = model.backbone(x)
    assert [128 // level.shape[-2] for level in pyramid.values()] == [8, 16, 32, 64, 128]
    sum(level.sum() for level in pyramid.values()).backward()
    assert [n for n, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_stages_are_frozen_from_the_first_and_batch_norm_where_there_are_weights(tmp_path):
    assert learning(detector("resnet18", trainable_stages=5)) == learning(detector("resnet18"))
    two = learning(detector("resnet18", trainable_stages=2))
    assert {name.split(".")[1] for name in two} == {"layer3", "layer4"}
    assert learning(detector("resnet18", trainable_stages=0)) == set()
    two = learning(detector("convnext_atto", trainable_stages=2))  # it has four
    assert {name.split(".")[1] for name in two} == {"stages_2", "stages_3"}

    # A file holds the whole network, its classifier included.
    torch.manual_seed(1)
    network = timm.create_model("resnet18")
    save_file(network.state_dict(), tmp_path / "resnet18.safetensors")
    model: Any = detector("resnet18", backbone_weights=str(tmp_path / "resnet18.safetensors"))
    assert {name.split(".")[1] for name in learning(model)} == {"layer2", "layer3", "layer4"}
    body = model.backbone.body.network.state_dict()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in body.items())
    kinds = {type(module).__name__ for module in model.backbone.body.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {FrozenBatchNorm2d.__name__}
    with pytest.raises(ModelError, match="tensors that do not fit"):
        detector("resnet34", backbone_weights=str(tmp_path / "resnet18.safetensors"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet81", r"a network of timm, but got 'resnet81' .* did you mean timm:resnet18"),
        ("vit_tiny_patch16_224", "a network for images of any size, but got AssertionError"),
        ("qqqq", r"see timm.list_models\(\)"),
    ],
)
def test_what_cannot_carry_a_pyramid_is_refused(name, sentence):
    with pytest.raises(ModelError, match=sentence):
        detector(name)


def test_weights_that_cannot_be_fetched_are_a_sentence(monkeypatch):
    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **o: no_network() if o.get("pretrained") else original(*a, **o)
    )
    with pytest.raises(ModelError, match=r"and its weights, but got OSError: no network .*--backbone-weights FILE"):
        detector("resnet18", backbone_weights="imagenet")


def test_a_missing_package_and_an_unknown_name_are_sentences(monkeypatch, workshop, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_options(workshop.arguments(tmp_path / "run", backbone="resnet81"))
    assert "or timm:NAME, but got resnet81; did you mean resnet18?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "timm", None)
    assert workshop.train(tmp_path / "run", arm="one-to-one", backbone="timm:resnet18") == 2
    assert (
        "Expected the package timm, but got none (--backbone timm:…). Fix: pip install timm." in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory) -> Path:
    """A one-to-many run on a backbone of timm."""
    folder = Path(tmp_path_factory.mktemp("timm") / "teacher")
    options = {"arm": "one-to-many", "backbone": "timm:mobilenetv3_small_100", "channels": 64, "head_convs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, **options) == 0
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_read_back_is_a_teacher_and_is_converted(trained, workshop, scenes_folder, tmp_path, monkeypatch):
    model, spec = load_model(trained)
    assert spec.model.backbone == "timm:mobilenetv3_small_100"
    weights = load_file(trained / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    run = tmp_path / "converted"
    arguments = ["--convert", str(trained), "--data-path", str(scenes_folder), "--teacher-floor", "0"]
    assert train.main([*arguments, "--output", str(run), "--lr", "0"]) == 0
    assert json.loads((run / "config.json").read_text())["backbone"] == "timm:mobilenetv3_small_100"
    converted = load_file(run / "model.safetensors")
    learned = {name for name, _ in model.named_parameters()}
    assert all(torch.equal(converted[name], weights[name]) for name in learned)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        load_model(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_exported_to_onnx_and_verified(name, workshop, tmp_path):
    pytest.importorskip("onnxruntime")
    options = {"arm": "one-to-one", "backbone": f"timm:{name}", "channels": 64, "head_convs": 1}
    assert workshop.train(tmp_path / "run", **options) == 0
    report = export.export(tmp_path / "run", tmp_path / "model.onnx")
    assert report.score_difference < 1e-3
    assert (tmp_path / "model.onnx").stat().st_size > 2**20
