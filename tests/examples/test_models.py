"""`models.py`: the example's detectors, and weights from files that nobody has to trust."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest
import torch
from models import ModelError, build_detector, load_weights, read_state_dict, torchvision_detector
from runs import ModelSpec, load_model, save_model
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops.misc import FrozenBatchNorm2d

from crosskd_assign import adapt

STRIDES = {"small": [8, 16, 32, 64], "resnet18": [8, 16, 32, 64, 128], "mobilenet_v2": [8, 16, 32, 64, 128]}


def build(*arguments: Any, **options: Any) -> Any:
    """A detector whose parts mypy does not know."""
    return build_detector(*arguments, **options)


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory):
    """A file with weights of a ResNet-18, and the weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.manual_seed(5)
    state = resnet18().state_dict()
    torch.save(state, path)
    return path, state


def frozen(model: Any) -> set[str]:
    """Names of the backbone's children without a trainable parameter, the body's by their own names."""
    children = [*model.backbone.body.named_children(), ("fpn", model.backbone.fpn)]
    return {name for name, child in children if list(child.parameters()) and not any_trainable(child)}


def any_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("backbone", STRIDES)
@pytest.mark.parametrize(("architecture", "kind"), [("fcos", FCOS), ("retinanet", RetinaNet)])
def test_every_architecture_on_every_backbone_has_the_strides_that_its_anchors_assume(architecture, kind, backbone):
    model = build(architecture, backbone, num_classes=4, size=64)
    assert type(model) is kind
    levels = adapt(model).pyramid()
    assert [level.stride for level in levels] == STRIDES[backbone]
    sizes = [scales[0] for scales in model.anchor_generator.sizes]
    assert sizes == [stride * (1 if kind is FCOS else 4) for stride in STRIDES[backbone]]
    [detection] = model.eval()([torch.rand(3, 48, 64)])
    assert detection.keys() == {"boxes", "scores", "labels"}
    losses = model.train()(
        [torch.rand(3, 64, 64)] * 2, [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}] * 2
    )
    assert all(loss.isfinite() for loss in losses.values())


def test_the_detector_resizes_to_the_size_it_was_built_for():
    batch, _ = adapt(build("fcos", "small", 4, size=96)).preprocess([torch.rand(3, 30, 60)])
    assert batch.sizes == ((48, 96),)


def test_building_leaves_the_batch_statistics_as_they_were():
    model = build("fcos", "mobilenet_v2", 4, size=64)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)
    for norm in norms:
        assert float(norm.state_dict()["num_batches_tracked"]) == 0
        assert bool((norm.state_dict()["running_var"] == 1).all())


def test_unknown_names_are_refused_with_the_known_ones():
    for names in (("yolo", "small"), ("fcos", "vgg16")):
        with pytest.raises(ModelError, match=f"an architecture of .*retinanet.*mobilenet_v2.* but got '{names[0]}'"):
            build(*names, 4, size=64)


# --- weights of the backbone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_backbone_gets_all_weights_of_a_file(resnet_weights, tmp_path, suffix):
    path, state = resnet_weights
    if suffix == ".safetensors":
        path = tmp_path / "resnet18.safetensors"
        save_file(state, path)
    model = build("fcos", "resnet18", 4, size=64, backbone_weights=str(path))
    body = model.backbone.body.state_dict()
    assert len(body) == 100  # 20 convolutions, and 20 norms with four tensors
    assert all(torch.equal(value, state[name]) for name, value in body.items())


def test_pretrained_backbones_keep_their_batch_statistics_and_fresh_ones_learn_theirs(resnet_weights):
    pretrained = build("fcos", "resnet18", 4, size=64, backbone_weights=str(resnet_weights[0]))
    fresh = build("fcos", "resnet18", 4, size=64)
    assert isinstance(pretrained.backbone.body.bn1, FrozenBatchNorm2d)
    assert isinstance(fresh.backbone.body.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("weights", "stages", "expected"),
    [
        (True, None, {"conv1", "layer1"}),
        (True, 5, set()),
        (True, 1, {"conv1", "layer1", "layer2", "layer3"}),
        (True, 0, {"conv1", "layer1", "layer2", "layer3", "layer4"}),
        (False, None, set()),
        (False, 4, {"conv1", "bn1"}),
    ],
)
def test_the_first_stages_are_frozen_and_the_pyramid_never(resnet_weights, weights, stages, expected):
    path = str(resnet_weights[0]) if weights else None
    model = build("fcos", "resnet18", 4, size=64, backbone_weights=path, trainable_stages=stages)
    assert frozen(model) == expected


def test_a_mobilenets_stages_end_where_its_resolution_does():
    model = build("retinanet", "mobilenet_v2", 4, size=64, trainable_stages=2)
    strides, stride = {}, 1
    for name, block in model.backbone.body.named_children():
        halvings = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        stride *= 2 ** len(halvings)
        strides[name] = stride
    assert frozen(model) == {name for name, stride in strides.items() if stride < 16}


@pytest.mark.parametrize("stages", [-1, 6])
def test_stages_that_do_not_exist_are_refused(stages):
    with pytest.raises(ModelError, match=f"Expected 0 to 5 stages to train, but got {stages}"):
        build("fcos", "resnet18", 4, size=64, trainable_stages=stages)


@pytest.mark.parametrize("options", [{"backbone_weights": "imagenet"}, {"trainable_stages": 3}])
def test_the_small_backbone_has_no_imagenet_weights_and_no_frozen_stages(options):
    with pytest.raises(ModelError, match="Expected a torchvision backbone for ImageNet weights or frozen stages"):
        build("fcos", "small", 4, size=64, **options)


def test_the_small_backbone_takes_weights_from_a_file(tmp_path):
    trunk = build("fcos", "small", 4, size=64).backbone
    torch.save(trunk.state_dict(), tmp_path / "trunk.pt")
    other = build("retinanet", "small", 9, size=64, backbone_weights=str(tmp_path / "trunk.pt")).backbone
    assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in other.state_dict().items())


# --- files that do not fit, or should not be trusted ------------------------------------------------------------------


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_whole_and_the_first_is_named(tmp_path, change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if change == "missing":
        del state["1.bias"]
    else:
        state["1.bias" if change == "shape" else "2.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "a.pt")
    name = "2.bias" if change == "unexpected" else "1.bias"
    with pytest.raises(ModelError, match=rf"weights of Sequential, but got 1 tensors .* such as {name} \(.*a\.pt"):
        load_weights(model, tmp_path / "a.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pickled_object_is_refused_and_not_executed(tmp_path, suffix, bomb):
    torch.save({"weight": bomb}, tmp_path / f"a{suffix}")
    with pytest.raises(ModelError, match="Expected a state dict of plain tensors, but got a file that cannot be read"):
        read_state_dict(tmp_path / f"a{suffix}")
    assert not bomb.exploded
    with (tmp_path / f"a{suffix}").open("rb") as file:
        torch.load(file, weights_only=False)
    assert bomb.exploded  # it is a real one


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"model": {"weight": torch.zeros(1)}}])
def test_something_else_than_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a state dict of plain tensors, but got .* Fix: save model\.state_dict"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_missing_and_damaged_files_are_refused_by_name(tmp_path, name):
    with pytest.raises(ModelError, match=f"Expected a weights file, but got none .*{name}"):
        read_state_dict(tmp_path / name)
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ModelError, match=f"cannot be read as one .*{name}"):
        read_state_dict(tmp_path / name)


def test_a_teacher_that_torchvision_does_not_have_or_cannot_fetch_is_refused(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, reason in {"fcos_resnet5": "Unknown model", "fcos_resnet50_fpn": "no network"}.items():
        with pytest.raises(ModelError, match=f"Expected a detector of torchvision .*{name}.*{reason}"):
            torchvision_detector(name, size=64)


def test_a_finished_detector_with_frozen_batch_statistics_comes_back_as_it_was(resnet_weights, tmp_path):
    path, _ = resnet_weights
    spec = ModelSpec("fcos", "resnet18", 64, 32, 1, one_to_many=True, categories=((1, "a"),))
    trained = build("fcos", "resnet18", 2, size=64, backbone_weights=str(path), channels=32, head_convs=1).eval()
    save_model(tmp_path, trained, spec)
    loaded, loaded_spec = load_model(tmp_path)
    assert loaded_spec == spec
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dict(trained.backbone(pixels)), dict(loaded.backbone(pixels)))
