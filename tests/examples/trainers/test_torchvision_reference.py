"""`examples/trainers/torchvision_reference.py`: the loop trains either kind of model, and its detections are scored."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision_reference
from rectangles import Rectangles, collate
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS
from torchvision_reference import evaluate, mean_over_processes, train_one_epoch

from crosskd_assign import CrossHeadDistiller
from tests.makers.small_models import small_fcos, snapshot

CPU = torch.device("cpu")


def loader(count: int = 8, seed: int = 1) -> DataLoader:
    return DataLoader(Rectangles(count, seed=seed), 4, collate_fn=collate)


@pytest.mark.parametrize("scaled", [False, True])
def test_one_loop_trains_a_plain_detector_and_a_distiller(scaled):
    # Three levels: torch's bfloat16 convolution of a map of one pixel has gradients that are not finite now and then.
    plain, other = small_fcos(1, levels=3), small_fcos(2, levels=3)
    distiller = CrossHeadDistiller(small_fcos(1, levels=3), other)
    teacher, names = snapshot(distiller.teacher), {"classification", "bbox_regression"}
    expected = {FCOS: names | {"bbox_ctrness"}, CrossHeadDistiller: names | {f"distill_{name}" for name in names}}
    for model in (plain, distiller):
        before = snapshot(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=True) if scaled else None
        history = train_one_epoch(model, optimizer, loader(), CPU, warmup=2, scaler=scaler)
        assert [set(losses) for losses in history] == [expected[type(model)]] * 2
        changed = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
        assert sum(changed) > 0.8 * len(changed)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # the warm-up is over
    assert all(torch.equal(value, teacher[name]) for name, value in distiller.teacher.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched():
    model = small_fcos(1)
    model.head.regression_head.bbox_reg.bias.data.fill_(math.nan)
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match="nan"):
        train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), loader(), CPU)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_losses_are_averaged_over_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    other = torch.tensor([1.0, 5.0])  # of the other process: a, b
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(other))
    assert mean_over_processes({"b": torch.tensor(3.0), "a": torch.tensor(2.0)}) == {"a": 1.5, "b": 4.0}


def test_detections_are_what_torchvisions_evaluation_takes():
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    distiller = CrossHeadDistiller(small_fcos(1), small_fcos(2))
    data = loader(6, seed=2)
    found = evaluate(distiller, data, CPU)
    assert not distiller.training
    truth, images = [], []
    for i, target in enumerate(data.dataset.targets):
        images.append({"id": i, "height": 64, "width": 64})
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            area = (x2 - x1) * (y2 - y1)
            row = {"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": 0}
            truth.append({"id": len(truth) + 1, **row})
    gt = coco.COCO()
    gt.dataset = {"images": images, "annotations": truth, "categories": [{"id": c} for c in range(3)], "info": {}}
    gt.createIndex()
    rows = [
        {"image_id": i, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for i, detection in enumerate(found)
        for (x1, y1, x2, y2), label, score in zip(
            *(detection[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
        )
    ]
    assert len(rows) == 6 * 100
    evaluation = COCOeval(gt, gt.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[8] > 0  # of 100 boxes in each picture, some lie on objects


def test_the_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(torchvision_reference, "fcos_resnet50_fpn", lambda **_: small_fcos(1))  # a minute less
    torchvision_reference.main(["--epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 0", "epoch 1"]
    assert lines[2] == "1600 detections in 16 pictures"
