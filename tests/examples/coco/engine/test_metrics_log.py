"""What the training log shows, stores and survives."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_example.engine.metrics_log import MetricsLog, read_metrics

LOSSES = {"student_class": 0.5, "cross_box": 0.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(folder: Path, first: int, last: int, **options: Any) -> None:
    """Train from step ``first`` to ``last`` of 100 as a loop would, evaluating every 20 steps."""
    with MetricsLog(folder, total_steps=100, start_step=first - 1, batch_size=4, interval=10, **options) as log:
        log.message(f"starting at {first}")
        for step in range(first, last + 1):
            log.tick()
            if log.wants(step):
                log.step(step, LOSSES, {"gradient": 2.0}, epoch=step / 50, lr=0.01)
            if step % 20 == 0:
                log.evaluation(step, step / 50, {"ap": 0.3, "ap_nms": 0.31})


def steps(folder: Path, kind: str) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if line["kind"] == kind]


def test_lines_have_what_curves_need(tmp_path):
    run(tmp_path / "new/run", 1, 100)
    lines = read_metrics(tmp_path / "new/run")
    assert steps(tmp_path / "new/run", "train") == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert steps(tmp_path / "new/run", "eval") == [20, 40, 60, 80, 100]
    train = lines[2]
    assert set(train) == {
        *("kind", "step", "epoch", "losses", "lr", "images_per_second", "memory_mb", "extra", "seconds")
    }
    assert train["losses"] == LOSSES
    assert (train["step"], train["epoch"], train["lr"], train["extra"]) == (10, 0.2, 0.01, {"gradient": 2.0})
    assert 10 < train["memory_mb"] < 1e6  # a process with torch takes more than 10 MiB and less than a TiB
    assert lines[4]["scores"] == {"ap": 0.3, "ap_nms": 0.31}
    assert lines[0]["message"] == "starting at 1"
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert read_metrics(tmp_path / "elsewhere") == []


def test_wants_the_first_the_last_and_every_interval(tmp_path):
    def wanted(**options: Any) -> list[int]:
        log = MetricsLog(tmp_path, batch_size=1, **options)
        return [step for step in range(options.get("start_step", 0) + 1, options["total_steps"] + 1) if log.wants(step)]

    assert wanted(total_steps=11, interval=4) == [1, 4, 8, 11]
    assert wanted(total_steps=11, start_step=5, interval=4) == [6, 8, 11]
    assert wanted(total_steps=3, interval=1) == [1, 2, 3]
    assert wanted(total_steps=60) == [1, 50, 60]
    assert wanted(total_steps=11, interval=4, enabled=False) == []


def test_rate_counts_images_of_training_only(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = MetricsLog(tmp_path, total_steps=100, batch_size=8)
    for step, images in [(1, None), (2, 4), (3, None)]:
        now[0] += 0.5
        log.tick(images)
        if step == 2:
            log.step(2, LOSSES, epoch=0, lr=1)
    now[0] += 1000
    log.evaluation(3, 0, {"ap": 0.1})
    now[0] += 0.25
    log.tick()
    log.step(4, LOSSES, epoch=0, lr=1)
    rates = [line["images_per_second"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert rates == [12.0, 32.0]  # 8 + 4 images in 1 s; 8 in 0.25 s, the evaluation left out
    assert [line["seconds"] for line in read_metrics(tmp_path)] == [1.0, 1001.5, 1001.75]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    run(tmp_path, 1, 57)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run(tmp_path, 41, 100)  # the last checkpoint was of step 40
    assert steps(tmp_path, "train") == [1, 10, 20, 30, 40, 41, 50, 60, 70, 80, 90, 100]
    assert steps(tmp_path, "eval") == [20, 40, 60, 80, 100]
    assert steps(tmp_path, "event") == [0, 40]
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in before if json.loads(line)["step"] <= 40]
    assert after[: len(kept)] == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_goes_on_counting_seconds(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for start_step, text in [(0, "a"), (10, "b")]:
        log = MetricsLog(tmp_path, total_steps=20, start_step=start_step, batch_size=4)
        now[0] += 7
        log.step(start_step + 10, LOSSES, epoch=0, lr=1)
        log.message(text)
        now[0] += 1000  # between the runs
    assert [line["seconds"] for line in read_metrics(tmp_path)] == [7, 7, 14, 14]


def test_an_intact_log_is_not_rewritten(tmp_path):
    run(tmp_path, 1, 40)
    path = tmp_path / "metrics.jsonl"
    os.utime(path, (1, 1))
    MetricsLog(tmp_path, total_steps=100, start_step=40, batch_size=4)
    assert path.stat().st_mtime == 1
    MetricsLog(tmp_path, total_steps=100, start_step=30, batch_size=4)
    assert path.stat().st_mtime > 1


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_tolerated_and_removed(tmp_path, cut):
    run(tmp_path, 1, 40)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])  # cut 1: only the line's end is missing, the line itself is good
    survivors = len(whole.splitlines()) - (cut > 1)
    assert len(read_metrics(tmp_path)) == survivors
    with MetricsLog(tmp_path, total_steps=100, start_step=40, batch_size=4) as log:
        log.message("back")
    lines = path.read_text().splitlines()
    assert lines[:-1] == whole.decode().splitlines()[:survivors]
    assert json.loads(lines[-1])["message"] == "back"


def test_garbage_inside_the_log_is_an_error_that_says_where(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "step": 0}\nhello\n{"kind": "event", "step": 0}\n')
    with pytest.raises(ValueError, match=r"Expected a JSON object.*'hello'.*line 2 of .*metrics.jsonl.*Fix:"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="interval of at least 1"):
        MetricsLog(tmp_path / "new", total_steps=1, batch_size=1, interval=0)


def test_off_a_terminal_every_line_is_json(tmp_path, capsys):
    run(tmp_path, 1, 30)
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == read_metrics(tmp_path)
    assert err == ""


def test_on_a_terminal_a_bar_and_messages_above_it(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    run(tmp_path, 21, 40)
    assert capsys.readouterr().out == ""
    shown = terminal.getvalue()
    for part in ["40/100", "loss 0.750", "student_class 0.500", "gradient 2.000", "img/s", "epoch 0.8"]:
        assert part in shown.split("\r")[-1], part
    lines = shown.replace("\r", "\n").splitlines()
    assert "starting at 21" in [line.strip() for line in lines]
    assert any("step 40" in line and "ap 0.3000" in line and "ap_nms 0.3100" in line for line in lines)


def test_other_ranks_do_and_write_nothing(tmp_path, capsys):
    run(tmp_path / "run", 1, 100, enabled=False)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_numbers_json_lacks_become_null(tmp_path, capsys):
    with MetricsLog(tmp_path, total_steps=1, batch_size=1) as log:
        losses = {"a": math.nan, "b": np.float32(0.5), "c": torch.tensor(math.inf), "d": torch.tensor(2.0)}
        log.step(1, losses, epoch=0, lr=0.1)
        log.evaluation(1, 0, {"ap": math.nan})
    for text in (capsys.readouterr().out, (tmp_path / "metrics.jsonl").read_text()):
        train, evaluation = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
        assert train["losses"] == {"a": None, "b": 0.5, "c": None, "d": 2.0}
        assert evaluation["scores"] == {"ap": None}


def test_cuda_memory_is_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    log = MetricsLog(tmp_path, total_steps=1, batch_size=1)
    log.step(1, LOSSES, epoch=0, lr=0.1)
    assert read_metrics(tmp_path)[0]["memory_mb"] == 3.0
