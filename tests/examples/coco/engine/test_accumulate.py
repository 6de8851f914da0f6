"""`--accumulate`: several batches a step, as if they were one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.engine.distributed import ALONE, Worker
from coco_example.engine.loading import TrainingData
from coco_example.engine.metrics_log import MetricsLog, read_metrics
from coco_example.engine.signals import Signals
from coco_example.engine.training import Training
from coco_example.models.detectors import build_detector
from coco_example.models.methods import build_method
from coco_example.options import ModelOptions, Options
from torch import Tensor, nn

from tests.makers.training_runs import assert_same_run, stop_in


class Linear(nn.Module):
    """A method whose loss is a mean over images, and linear in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3))

    def forward(self, images: list[Tensor], targets: list[Any]) -> dict[str, Tensor]:
        pixels = torch.stack([image.mean(dim=(1, 2)) for image in images])
        objects = torch.tensor([float(len(target["boxes"])) for target in targets])
        return {"loss": (objects[:, None] * pixels * self.weight).sum(dim=1).mean()}


@pytest.fixture(scope="module")
def index(scenes_folder: Path) -> CocoIndex:
    return read_coco(*locate_split(scenes_folder, "train"))


def options_of(batch_size: int, accumulate: int, **more: Any) -> Options:
    values = {"arm": "one-to-one", "size": 64, "epochs": 1, "log_every": 1, "optimizer": "sgd", "lr": 0.01, **more}
    return Options.from_flat({**values, "batch_size": batch_size, "accumulate": accumulate, "warmup_steps": 0})


def train(folder: Path, options: Options, method: nn.Module, model: nn.Module, index: CocoIndex, **more: Any) -> Any:
    """Train and return the weights, and the losses of every step."""
    training = Training(options, folder, method, model, index, ALONE, **more)
    with MetricsLog(folder, total_steps=training.total_steps, batch_size=8, interval=1) as log:
        training.fit(log, lambda _: {}, Signals())
    losses = [line["losses"] for line in read_metrics(folder) if line["kind"] == "train"]
    return torch.cat([p.detach().flatten() for p in method.parameters()]), losses


def test_a_linear_loss_learns_what_it_learns_of_one_large_batch(index, tmp_path):
    whole, parts = ((options_of(8, 1), "whole"), (options_of(2, 4), "parts"))
    (expected, losses), (found, more) = (
        train(tmp_path / name, options, method := Linear(), method, index) for options, name in (whole, parts)
    )
    assert len(losses) == len(more) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().min() > 0
    for mine, theirs in zip(more, losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_one_to_one_losses_do_too_where_batches_have_equally_many_boxes_and_batch_norm_stays(index, tmp_path):
    equal = replace(index, records=[replace(r, boxes=r.boxes[:1], labels=r.labels[:1]) for r in index.records])
    results = []
    for options, name in ((options_of(8, 1, max_grad_norm=0), "whole"), (options_of(4, 2, max_grad_norm=0), "parts")):
        torch.manual_seed(0)
        model = build_detector(ModelOptions(size=64), 7)
        method = build_method(options.method, model)
        results.append(train(tmp_path / name, options, method, model, equal, frozen=[model]))
    (expected, losses), (found, more) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(more, losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_images_come_in_the_order_of_batches_as_large_as_a_step(index, rank):
    worker = Worker(rank, 2, ALONE.device)
    orders = []
    for size, accumulate in ((6, 1), (2, 3)):
        data = TrainingData(options_of(size, accumulate), index, worker)
        assert data.steps_per_epoch == 2
        with data.batches(1) as batches:  # from the second step on, into another epoch
            drawn = [[int(t["image_id"]) for t in targets] for _, targets in islice(batches, 2 * accumulate)]
        assert all(len(batch) == size for batch in drawn)
        orders.append([i for batch in drawn for i in batch])
    assert orders[0] == orders[1]


@pytest.mark.usefixtures("no_pictures")
def test_steps_schedule_checkpoints_and_resume_count_steps_of_the_optimizer(workshop, teacher, tmp_path, monkeypatch):
    options = {"arm": "cross-head", "teacher": teacher, "epochs": 2, "batch_size": 4, "accumulate": 2, "ema": 0.9}
    assert workshop.train(tmp_path / "whole", **options) == 0
    lines = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert [(line["step"], line["epoch"]) for line in lines] == [(n, n / 3) for n in range(1, 7)]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["budget"]["images"] == 48
    stop_in(monkeypatch, 2)
    codes = [workshop.train(tmp_path / "run", **options, resume=n > 0) for n in range(2)]
    assert codes == [143, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert workshop.train(tmp_path / "run", **{**options, "accumulate": 1}, resume=True) == 2  # another run
