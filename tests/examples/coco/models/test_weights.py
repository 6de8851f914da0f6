"""Weights from files that nobody has to trust, and the saved detector of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from coco_example.errors import ModelError
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import ModelSpec, load_model, save_model
from coco_example.models.weights import load_weights, read_state_dict
from coco_example.options import ModelOptions
from torch import nn


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
    with pytest.raises(ModelError, match=f"cannot be read as one: .*{name}"):
        read_state_dict(tmp_path / name)


def test_a_finished_detector_with_frozen_batch_statistics_comes_back_as_it_was(resnet_weights, tmp_path):
    path, _ = resnet_weights
    options = ModelOptions("fcos", "resnet18", channels=32, head_convs=1, size=64)
    spec = ModelSpec(options, one_to_many=True, categories=((1, "a"),))
    trained: Any = build_detector(replace(options, backbone_weights=str(path)), 2).eval()
    save_model(tmp_path, trained, spec)
    loaded: Any
    loaded, loaded_spec = load_model(tmp_path)
    assert loaded_spec == spec
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dict(trained.backbone(pixels)), dict(loaded.backbone(pixels)))


def test_what_started_the_training_is_not_stored_with_the_detector(tmp_path):
    options = ModelOptions(size=64)
    start = replace(options, backbone_weights="/nowhere/weights.pt", trainable_stages=2)
    save_model(tmp_path, build_detector(options, 2), ModelSpec(start, one_to_many=False, categories=((1, "a"),)))
    stored = json.loads((tmp_path / "model.json").read_text())
    assert stored.keys() == {
        *("architecture", "backbone", "size", "channels", "head_convs", "short_side", "top_k", "selection"),
        *("one_class_per_point", "class_score"),
        *("one_to_many", "categories"),
    }
    assert load_model(tmp_path)[1].model == options
