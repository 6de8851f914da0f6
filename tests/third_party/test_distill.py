"""`distill.py`: a teacher, a student and a table, of every detector that is at hand."""

from __future__ import annotations

import sys

import distill
import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.data.scenes import write_scenes

from tests.third_party.makers import MAKERS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes of 64 pixels: 8 to train on, 4 to evaluate on."""
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=8, val=4, size=64)


@pytest.mark.parametrize("start", ["teacher", "fresh"])
@pytest.mark.parametrize("detector", ["ssdlite", "effdet", "yolov8n", "yolo26n"])
def test_a_short_run_prints_its_scores_and_saves_a_network_of_its_package(detector, start, data, tmp_path, capsys):
    MAKERS[detector]()  # skips what is not installed
    output = tmp_path / "student.pt"
    arguments = ["--data-path", str(data), "--size", "64", "--batch-size", "4", "--steps", "2", "--teacher-steps", "2"]
    torch.manual_seed(0)
    assert distill.main(["--detector", detector, *arguments, "--start", start, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [line.split(":")[0] for line in lines if "in the first" in line]
    assert losses == ["classification", "bbox_regression", "distill_classification", "distill_bbox_regression"]
    rows = [line[:20].strip() for line in lines[-4:]]
    assert rows == ["teacher, without NMS", "teacher, with NMS", "student, without NMS", "student, with NMS"]
    file, settings, more = distill.DETECTORS[detector]
    network = __import__(file).build(6, size=64, **settings, **more).model
    network.load_state_dict(torch.load(output, weights_only=True), strict=True)


def test_labels_of_targets_are_channels_of_the_logits(data):
    index = read_coco(*locate_split(data, "train"))
    channels = {label: 10 + label for label in index.label_to_category}
    for _, (_, targets) in zip(range(2), distill.batches(index, channels, size=64, batch_size=4), strict=False):
        for target in targets:
            assert bool((target["labels"] > 10).all())
            assert target["labels"].dtype == torch.int64
            assert len(target["labels"]) == len(target["boxes"])


def test_training_lowers_a_loss_and_reports_every_step():
    layer = torch.nn.Linear(2, 1)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    history = distill.train(
        layer, lambda *_: {"square": (layer(x) - 3).square().mean()}, iter([([], [])] * 40), steps=40, lr=0.3
    )
    assert len(history) == 40
    assert history[-1]["square"] < 0.5 * history[0]["square"]


def test_a_folder_without_data_and_a_package_that_is_not_there_end_with_a_sentence(data, tmp_path, capsys, monkeypatch):
    assert distill.main(["--detector", "ssdlite", "--data-path", str(tmp_path)]) == 2
    assert "error: Expected an image folder and its annotation file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "effdet", None)
    assert distill.main(["--detector", "effdet", "--data-path", str(data)]) == 2
    assert "error: import of effdet halted" in capsys.readouterr().err
