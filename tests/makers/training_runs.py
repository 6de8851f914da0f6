"""Training runs of the COCO example: stopped in the middle, and compared."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.training import Training
from safetensors.torch import load_file
from torch import Tensor

SIX_STEPS = {"epochs": 2, "batch_size": 8}


def train_lines(folder: Path) -> list[dict[str, Any]]:
    """What the log says of every step, but for how long it took."""
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    return [{name: line[name] for name in ("step", "epoch", "lr", "losses")} for line in lines]


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert train_lines(resumed) == train_lines(whole)
    mine, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())


def stop_in(monkeypatch: pytest.MonkeyPatch, *steps: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the middle of these steps."""
    original = Training._update

    def update(training: Training, losses: dict[str, Tensor]) -> None:
        if training.step + 1 in steps:
            signal.raise_signal(number)
        original(training, losses)

    monkeypatch.setattr(Training, "_update", update)
