"""What a run may vary without becoming another one, and the sizes of its batches."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train
from coco_example.data.augmentation import augmentation, scaled_augmentations, short_sides
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.engine import loaders
from coco_example.engine.distributed import ALONE
from coco_example.engine.loaders import loaded, spare_processes
from coco_example.models.saved_model import ModelSpec
from coco_example.options import ModelOptions
from torch import nn
from torchvision import tv_tensors

from crosskd_assign import EndToEndDetector
from tests.makers.training_runs import SIX_STEPS, assert_same_run, stop_in

SPEC = ModelSpec(ModelOptions(), one_to_many=False, categories=())
pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),  # Python 3.12 on forked workers
]


def test_scales_are_cocos_or_in_proportion():
    assert short_sides(1333, 800) == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert short_sides(160) == (96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(480, 640))
    sample = (torch.zeros(3, 480, 640, dtype=torch.uint8), {"boxes": boxes, "labels": torch.zeros(0)})
    shapes = {side: t(*sample)[0].shape[-2:] for side, t in scaled_augmentations(1333, "none", 800).items()}
    assert {side: min(shape) for side, shape in shapes.items()} == {side: side for side in short_sides(1333, 800)}
    assert shapes[800] == augmentation(1333, "none", 800)(*sample)[0].shape[-2:] == (800, 1066)


def test_batches_reach_the_network_at_the_sizes_that_were_drawn_and_a_resumed_run_draws_the_same(
    workshop, tmp_path, monkeypatch
):
    options = {**SIX_STEPS, "arm": "one-to-one", "multi_scale": True, "save_every": 1, "size": 96, "val_losses": 0}
    seen: list[tuple[int, ...]] = []
    original = EndToEndDetector.run

    def run(detector: Any, images: Any, *given: Any) -> Any:
        handle = detector.model.backbone.register_forward_pre_hook(
            lambda _, inputs: seen.append((max(images[0].shape), *inputs[0].shape[-2:]))
        )
        try:
            return original(detector, images, *given)
        finally:
            handle.remove()

    monkeypatch.setattr(EndToEndDetector, "run", run)
    assert workshop.train(tmp_path / "whole", **options) == 0
    sizes = [side for side, *_ in seen]
    assert len(set(sizes)) > 2
    assert set(sizes) <= set(short_sides(96))
    assert all(-(-side // 32) * 32 == height for side, height, _ in seen)  # padded to strides, not resized

    with monkeypatch.context() as patch:
        stop_in(patch, 4)
        assert workshop.train(tmp_path / "run", **options) == 128 + signal.SIGTERM
    assert workshop.train(tmp_path / "run", **options, resume=True) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(2, 1, 0), (3, 1, 0), (4, 1, 3), (64, 1, 4), (32, 8, 3), (8, 4, 0)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere this process loads")
def test_the_machine_decides_on_processes_that_load(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{processes}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 31))
    assert spare_processes() == expected
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 26))  # a container's
    assert spare_processes() == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluations_compute_in_their_own_precision_whatever_training_does(workshop, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(train, "evaluate", lambda *_, **given: given["precision"])
    monkeypatch.setattr(train, "_detector", lambda *_: None)
    options = workshop.options(tmp_path, precision="float16", eval_precision=precision)
    assert train._score(nn.Identity(), None, options, ALONE, SPEC) == getattr(torch, precision)
    assert workshop.options(tmp_path, precision="bfloat16").training.eval_precision == "float32"  # as recorded runs


@pytest.mark.parametrize(("workers", "spare"), [(2, 0), (-1, 2)])
def test_items_do_not_depend_on_who_loads_them(scenes_folder, monkeypatch, workers, spare):
    monkeypatch.setattr(loaders, "spare_processes", lambda: spare)
    index = read_coco(*locate_split(scenes_folder, "train"))
    keys = [[(epoch, i) for i in range(4 * epoch, 4 * epoch + 4)] for epoch in range(3)]
    taken = []
    for count in (0, workers):
        dataset = CocoDataset(index, augmentation(64, "full"), mosaic=0.5, seed=3)
        with loaded(dataset, keys, workers=count) as batches:
            taken.append([(images, [target["boxes"] for target in targets]) for images, targets in batches])
    for (mine, boxes), (theirs, their_boxes) in zip(*taken, strict=True):
        assert all(map(torch.equal, mine, theirs))
        assert all(map(torch.equal, boxes, their_boxes))
