"""Labels are taken away from whole images, and pseudo-labels are what the teacher detects in those."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import labels
import pytest
import torch
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import ModelSpec, save_model
from coco_example.options import ModelOptions
from labels import keep_labels, pseudo_label
from plan import SETS, Run
from run import Runner

from crosskd_assign.diagnostics import Threshold, Thresholds
from crosskd_assign.structures import Detection


def read(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_labels_stay_on_a_share_of_the_images_and_the_others_are_linked(scenes_folder, tmp_path):
    whole = read(scenes_folder)
    parts = [keep_labels(scenes_folder, tmp_path / str(share), share) for share in (0.25, 0.5)]
    kept = [{image["id"] for image in read(part)["images"]} for part in parts]
    assert [len(ids) for ids in kept] == [6, 12]
    assert kept[0] < kept[1]
    for part, ids in zip(parts, kept, strict=True):
        assert read(part)["annotations"] == [x for x in whole["annotations"] if x["image_id"] in ids]
        assert read(part, "val") == read(scenes_folder, "val")
        others = {image["file_name"] for image in whole["images"] if image["id"] not in ids}
        assert {path.name for path in (part / "unlabelled").iterdir()} == others
        for name in others:
            assert (part / "unlabelled" / name).read_bytes() == (scenes_folder / "train" / name).read_bytes()


def test_pseudo_labels_are_detections_above_the_threshold_in_images_without_labels(
    scenes_folder, tmp_path, monkeypatch
):
    """A teacher that detects one box of known score a picture: only those of the better pictures become labels."""
    torch.manual_seed(0)
    run, options = tmp_path / "run", ModelOptions(size=64)
    run.mkdir()
    categories = tuple((k, str(k)) for k in range(1, 7))
    save_model(run, build_detector(options, 7), ModelSpec(options, True, categories))
    part = keep_labels(scenes_folder, tmp_path / "part", 0.5)

    def detect(_, index) -> list[Detection]:
        count = len(index.records)
        twice = torch.tensor([[1.0, 2, 31, 42]] * 2)  # NMS leaves one
        return [
            {"boxes": twice, "scores": torch.tensor([k / count, 0.01]), "labels": torch.tensor([2, 2])}
            for k in range(count)
        ]

    monkeypatch.setattr(labels, "detected", detect)
    limit = Threshold(score=0.9, f1=1.0, precision=1.0, recall=1.0, objects=1)
    own = Thresholds(limit, {2: replace(limit, score=0.5)})
    monkeypatch.setattr(labels, "best_thresholds", lambda detections, targets: own)
    folder = pseudo_label(part, scenes_folder, run, tmp_path / "pseudo")
    before, after = read(part), read(folder)
    assert {image["id"] for image in after["images"]} == {image["id"] for image in read(scenes_folder)["images"]}
    assert after["annotations"][: len(before["annotations"])] == before["annotations"]
    added = after["annotations"][len(before["annotations"]) :]
    assert len(added) == 6  # of twelve images
    assert not {entry["image_id"] for entry in added} & {image["id"] for image in before["images"]}
    assert {(tuple(entry["bbox"]), entry["category_id"]) for entry in added} == {((1, 2, 30, 40), 2)}
    assert len({entry["id"] for entry in after["annotations"]}) == len(after["annotations"])
    assert read(folder, "val") == read(part, "val")


@pytest.mark.parametrize(("split", "labelled"), [("final", 6), ("tune", 4)])
def test_runs_get_the_images_of_their_protocol(scenes_folder, tmp_path, monkeypatch, split, labelled):
    """Of 24 training images, or of the 18 that are not held out, a quarter keeps its labels."""
    monkeypatch.setitem(SETS, "few", type(SETS["bccd"])(1, {}, folder=scenes_folder.name, labelled=0.25))
    runner = Runner(scenes_folder.parent, tmp_path, tmp_path / "runs.jsonl")
    folder = runner._data(Run("few", split, "one-to-many", 0))
    assert len(read(folder)["images"]) == labelled
    assert len(list((folder / "unlabelled").iterdir())) == (24 if split == "final" else 18) - labelled
