"""Losses on validation images: what they are, and that training does not notice them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.engine.distributed import ALONE, Worker
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.validation import ValidationLosses
from coco_example.models.detectors import build_detector
from coco_example.models.methods import build_method
from coco_example.options import MethodOptions, ModelOptions, Options
from torch import nn

from tests.makers.training_runs import assert_same_run

OPTIONS = Options.from_flat({"batch_size": 3, "size": 64})


@pytest.fixture(scope="module")
def index(scenes_folder: Path) -> CocoIndex:
    return read_coco(*locate_split(scenes_folder, "val"))


def method_of(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    student, teacher = (build_detector(ModelOptions(size=64), 7) for _ in range(2))
    return build_method(MethodOptions(**options), student, teacher).train()


METHODS = [{"arm": "one-to-many"}, {"arm": "one-to-one", "auxiliary_head": True}, {"arm": "cross-head"}]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["arm"])
def test_they_are_the_losses_of_training_with_batch_norm_as_it_is_and_move_nothing(index, options):
    method = method_of(**options)
    state, seed = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    modes = [module.training for module in method.modules()]
    found = ValidationLosses(OPTIONS, index, ALONE)(method)
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert [module.training for module in method.modules()] == modes
    assert all(parameter.grad is None for parameter in method.parameters())

    # By hand: 8 images in batches of 3, 3 and 2.
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dataset, expected = CocoDataset(index), dict.fromkeys(found, 0.0)
    for start in (0, 3, 6):
        images, targets = zip(*(dataset[i] for i in range(start, min(8, start + 3))), strict=True)
        for name, loss in method(list(images), list(targets)).items():
            expected[name] += len(images) * loss.item() / 8
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("count", "limit"), [(1, 5), (2, 256), (3, 8), (9, 256)])
def test_processes_take_equally_many_batches_and_images_which_join_to_those_of_one(index, count, limit):
    options = Options.from_flat({"batch_size": 2, "val_losses": limit})
    shares = [ValidationLosses(options, index, Worker(n, count, ALONE.device)) for n in range(count)]
    batches = [share._batches for share in shares]
    assert len({tuple(map(len, own)) for own in batches}) == 1
    joined = [[i for own in parts for i in own] for parts in zip(*batches, strict=True)]
    drawn = [i for batch in joined for i in batch]
    assert drawn == sorted(drawn)
    assert len(drawn) == shares[0].images
    assert len(set(drawn)) == min(limit, 8) // count * count or count > 8
    assert all(len(own) <= 2 for batch in batches for own in batch)


@pytest.mark.usefixtures("no_pictures")
def test_training_does_not_notice_them_and_each_is_logged_once(workshop, teacher, tmp_path):
    options = {"arm": "cross-head", "teacher": teacher, "epochs": 2, "ema": 0.5, "eval_every": 1}
    options |= {"auxiliary_head": True, "distill_decay": "cosine"}
    assert workshop.train(tmp_path / "with", **options) == 0
    assert workshop.train(tmp_path / "without", **{**options, "val_losses": 0, "eval_every": 0}) == 0
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert not [line for line in read_metrics(tmp_path / "without") if line["kind"] == "validation"]
    lines = [line for line in read_metrics(tmp_path / "with") if line["kind"] == "validation"]
    assert [(line["step"], line["images"]) for line in lines] == [(3, 8), (6, 8)]
    trained = next(line for line in read_metrics(tmp_path / "with") if line["kind"] == "train")
    assert all(line["losses"].keys() == trained["losses"].keys() for line in lines)
    # The weight of distillation is that of the step: 0.01 at the end.
    first, last = (line["losses"]["distill_classification"] for line in lines)
    assert last < first / 10
