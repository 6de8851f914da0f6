"""Runs are scored once on crowds of every overlap, and tables and curves show what the lines hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import made
import overlap
import plan
import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.data.scenes import write_scenes
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import ModelSpec, save_model
from coco_example.options import ModelOptions
from overlap import OVERLAPS, PERFECT
from plan import Protocol, Run
from torchvision.ops import box_iou

from crosskd_assign.structures import Detection

NAMES = ["mixed", *(f"{x:g}" for x in OVERLAPS)]


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A small set of crowds of two overlaps, and two untrained runs on it: one-to-many and a student."""
    monkeypatch.setattr(overlap, "OVERLAPS", (0.3, 0.8))
    monkeypatch.setitem(plan.SETS, "overlap_tiny", Protocol(1, {}))

    def crowds(_: Path, folder: Path, train: int, ious: tuple[float, float]) -> Path:
        return write_scenes(folder, train=train, val=3, size=64, overlap=ious)

    monkeypatch.setitem(made._CROWDS, "overlap_tiny", crowds)
    monkeypatch.setitem(made._TRAINING, "overlap_tiny", 0)
    torch.manual_seed(0)
    for name, many in (("one-to-many", True), ("one-to-one-inherit", False)):
        folder = tmp_path / Run("overlap_tiny", "final", name, 0).key
        folder.mkdir(parents=True)
        options = ModelOptions(size=64)
        categories = tuple((k, str(k)) for k in range(1, 7))
        save_model(folder, build_detector(options, 7), ModelSpec(options, many, categories))
        (folder / "summary.json").touch()
    return tmp_path


def test_finished_runs_are_scored_once_in_every_way(tiny, capsys):
    lines = tiny / "overlap.jsonl"
    arguments = ["--data-root", tiny, "--work", tiny, "--lines", lines, "--images", tiny, "--sets", "overlap_tiny"]
    arguments += ["--seeds", "0", "--study", "one-to-one-inherit", "convert", "--documents", tiny / "page.md"]
    (tiny / "page.md").write_text("<!-- curves: overlap_tiny ap -->\nold\n<!-- end -->\n")
    overlap.main([str(argument) for argument in arguments])
    page = (tiny / "page.md").read_text()
    assert page.startswith("<!-- curves: overlap_tiny ap -->\n\n| AP | 0.3 | 0.8 | ahead from | seeds |")
    assert page.endswith("|\n\n<!-- end -->\n")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    many = [row for row in rows if row["variant"] == "one-to-many"]
    assert {(row["ranking"], row["selection"]) for row in many} == {
        (ranking, selection)
        for ranking in ("class_quality", "class")
        for selection in ("no NMS", "NMS 0.5", "NMS 0.6", "NMS 0.7", "Soft-NMS", "linear Soft-NMS")
    }
    students = [row["selection"] for row in rows if row["variant"] == "one-to-one-inherit"]
    assert students == ["no NMS", "NMS 0.6"]
    for row in rows:
        assert list(row["scores"]) == ["mixed", "0.3", "0.8"]
        if row["run"] != PERFECT:
            for name, numbers in row["scores"].items():
                folder = "overlap_tiny" if name == "mixed" else f"overlap_tiny-{name}"
                file = tiny / "data" / folder / "annotations" / "instances_val.json"
                truth = json.loads(file.read_text())
                assert numbers["objects"] == len(truth["annotations"])
                assert numbers["lost"] == round(numbers["objects"] * (1 - numbers["recall"]))
    assert "scored overlap_tiny/final/one-to-many/0" in capsys.readouterr().out
    before, picture = lines.read_text(), (tiny / "overlap_tiny.png").read_bytes()
    overlap.main([str(argument) for argument in arguments])
    assert lines.read_text() == before
    assert "scored" not in capsys.readouterr().out
    assert (tiny / "overlap_tiny.png").read_bytes() == picture
    lines.write_text("".join(before.splitlines(keepends=True)[:-1]))  # stopped before its last line
    overlap.main([str(argument) for argument in arguments])
    assert lines.read_text() == before
    assert (tiny / "page.md").read_text() == page


@pytest.mark.parametrize(("iou", "threshold"), [(0.5, 0.6), (0.8, 0.6), (0.9, 0.7)])
def test_perfect_detections_find_all_and_nms_loses_what_the_overlap_says(tmp_path, iou, threshold):
    folder = write_scenes(tmp_path / "crowds", train=0, val=30, size=64, overlap=(iou, iou))
    index = read_coco(*locate_split(folder, "val"))
    targets = overlap.targets_of(index)
    perfect: list[Detection] = [{**t, "scores": torch.linspace(1, 0.5, len(t["boxes"]))} for t in targets]
    numbers = overlap.scores(perfect, index, 0.5)
    assert numbers["ap"] == numbers["recall"] == numbers["precision"] == 1
    assert numbers["lost"] == 0
    # Of a chain whose neighbours overlap by more than the threshold, at most every other one stays; else all do.
    kept = overlap.kept_of_perfect(index, threshold)
    if iou < threshold:
        assert kept == 1
    else:
        most = [independent(t["boxes"], t["labels"], threshold) for t in targets]
        assert kept <= sum(most) / numbers["objects"] < 0.8
        assert kept > 0.3  # a chain has at most four members, and one remains


def independent(boxes: torch.Tensor, labels: torch.Tensor, threshold: float) -> int:
    """The most objects of which no two of a class overlap by more than a threshold, by trying all subsets."""
    overlaps = (box_iou(boxes, boxes) * (labels[:, None] == labels)).fill_diagonal_(0) > threshold
    subsets = itertools.product([False, True], repeat=len(boxes))
    return max(sum(s) for s in subsets if not overlaps[list(s)][:, list(s)].any())


def line(variant: str, selection: str, seed: int, ap: float, ranking: str = "class") -> dict[str, Any]:
    """A line whose AP falls from 0.8 by ``ap`` times the overlap."""
    scores = {name: 0.8 - ap * (0.5 if name == "mixed" else float(name)) + seed / 100 for name in NAMES}
    return {
        "run": Run("overlap_cells", "final", variant, seed).key, "data": "overlap_cells", "variant": variant,
        "seed": seed, "ranking": ranking, "selection": selection,
        "scores": {name: dict.fromkeys(overlap.SCORES, value) for name, value in scores.items()},
    }  # fmt: skip


def test_tables_compare_students_with_the_best_one_to_many_at_each_overlap():
    lines = [
        row
        for seed in (0, 1)
        for row in (
            line("one-to-many", "NMS 0.6", seed, 0.9),
            line("one-to-many", "NMS 0.6", seed, 0.6, "class_quality"),  # the better ranking
            line("one-to-many", "Soft-NMS", seed, 0.5),
            line("one-to-many", "no NMS", seed, 0.7),
            line("convert", "no NMS", seed, 0.4),
        )
    ]
    for row in lines:
        if row["variant"] == "convert":
            row["scores"]["0.3"]["ap"] -= 0.2
    text = overlap.table(overlap.best_rankings(lines, "overlap_cells"), "ap").splitlines()
    assert text[0].startswith("| AP | 0 | 0.3 |")
    assert text[2].startswith("| one-to-many, NMS 0.6 | 80.5 ± 0.7 | 62.5 ± 0.7 |")
    assert text[4].startswith("| one-to-many, no NMS | 80.5 ± 0.7 | 59.5 ± 0.7 |")
    assert text[5].startswith("| converted, no NMS | 80.5 ± 0.7 | 48.5 ± 0.7 |")
    assert text[5].endswith("| 0.4 | 2 |")
    assert text[6].startswith("| converted, over the best one-to-many | +0.0 | -17.0 | +4.0 |")
    assert len(text) == 7
