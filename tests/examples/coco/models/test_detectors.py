"""Detectors of the example: their parts, and which of them are trained."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest
import torch
from coco_example.errors import ModelError
from coco_example.models.detectors import build_detector, torchvision_detector
from coco_example.options import ModelOptions
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.ops.misc import FrozenBatchNorm2d

from crosskd_assign import adapt
from crosskd_assign.detectors import probe_detector

STRIDES = {"small": [8, 16, 32, 64], "resnet18": [8, 16, 32, 64, 128], "mobilenet_v2": [8, 16, 32, 64, 128]}


def build(architecture: Any, backbone: Any, num_classes: int, **options: Any) -> Any:
    """A detector whose parts mypy does not know."""
    return build_detector(ModelOptions(architecture, backbone, **options), num_classes)


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
    assert probe_detector(adapt(model)).strides == STRIDES[backbone]
    sizes = [scales[0] for scales in model.anchor_generator.sizes]
    assert sizes == [stride * (1 if kind is FCOS else 4) for stride in STRIDES[backbone]]
    [detection] = model.eval()([torch.rand(3, 48, 64)])
    assert detection.keys() == {"boxes", "scores", "labels"}
    losses = model.train()(
        [torch.rand(3, 64, 64)] * 2, [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}] * 2
    )
    assert all(loss.isfinite() for loss in losses.values())


def test_the_small_backbone_has_the_parts_that_torchvisions_have():
    parts = adapt(build("fcos", "small", 4, size=64)).parts()
    torchvisions = adapt(build("fcos", "resnet18", 4, size=64)).parts()
    assert parts.keys() == torchvisions.keys() == {"backbone", "neck", "head"}


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
        (True, -1, {"conv1", "layer1"}),
        (True, 5, set()),
        (True, 1, {"conv1", "layer1", "layer2", "layer3"}),
        (True, 0, {"conv1", "layer1", "layer2", "layer3", "layer4"}),
        (False, -1, set()),
        (False, 4, {"conv1", "bn1"}),
    ],
)
def test_the_first_stages_are_frozen_and_the_pyramid_never(resnet_weights, weights, stages, expected):
    path = str(resnet_weights[0]) if weights else ""
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


@pytest.mark.parametrize("stages", [-2, 6])
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


def test_a_teacher_that_torchvision_does_not_have_or_cannot_fetch_is_refused(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, reason in {"fcos_resnet5": "Unknown model", "fcos_resnet50_fpn": "no network"}.items():
        with pytest.raises(ModelError, match=f"Expected a detector of torchvision .*{name}.*{reason}"):
            torchvision_detector(name, size=64)
