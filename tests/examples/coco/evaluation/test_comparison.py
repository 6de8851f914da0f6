"""The table of before and after: its order, its columns, and how times are taken."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.evaluation.comparison import Times, comparison_table, median_times
from coco_example.evaluation.evaluation import Detector, evaluate
from coco_example.models.saved_model import load_model

from crosskd_assign import adapt


def test_ways_are_timed_in_turn_and_the_first_pass_is_left_out(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def way(name, seconds):
        def run(image):
            order.append((name, int(image)))
            clock[0] += seconds[int(image)] * (100 if len(order) <= 2 else 1)

        return run

    ways = [way("a", [1.0, 5.0, 2.0]), way("b", [0.5, 0.5, 9.0])]
    assert median_times(ways, list(torch.arange(3))) == [2000.0, 500.0]
    assert order == [(name, n) for n in (0, 0, 1, 2) for name in ("a", "b")]


def test_the_table_has_both_detectors_without_and_with_nms(teacher, scenes_folder):
    index = read_coco(*locate_split(scenes_folder, "val"))
    after = evaluate(Detector(adapt(load_model(teacher)[0]), "class_quality"), index)
    before = replace(after, plain=replace(after.plain, ap=0.125), nms=replace(after.nms, ap=0.25))
    head, *rows = comparison_table(before, after, Times(12.34, 5.67)).split("\n")
    numbers = ["AP", "AP50", "AP75", "APs", "APm", "APl", "duplicates", "across", "classes", "threshold", "ms/image"]
    assert head.split() == numbers
    names = ["before, with NMS", "before, without NMS", "after, without NMS", "after, with NMS"]
    assert [row[:20].strip() for row in rows] == names
    cells = [row[20:].split() for row in rows]
    assert [row[0] for row in cells[:2]] == ["25.0", "12.5"]
    assert cells[2][0] == f"{100 * after.plain.ap:.1f}"
    assert [row[-4] for row in cells[1:]] == [
        f"{report.rate:.3f}" for report in (after.duplicates, after.duplicates, after.duplicates_nms)
    ]
    assert cells[2][-2] == f"{after.thresholds.overall.score:.2f}"
    assert [row[-1] for row in cells] == ["12.3", "–", "5.7", "–"]
