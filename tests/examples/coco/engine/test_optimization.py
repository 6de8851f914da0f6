"""Learning rate, average of the weights, precision."""

from __future__ import annotations

import pytest
import torch
from coco_example.engine.checkpoints import load_checkpoint
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.training import Training
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Cosine from 1 to 0.01 over nine steps, times 1/4, 2/4, 3/4 of warm-up.
        ("cosine", [(1, 0.25), (2, 0.4850739), (3, 0.6631440), (4, 0.7525), (5, 0.5909559), (9, 0.0398521)]),
        ("step", [(1, 0.25), (3, 0.75), (4, 1.0), (6, 1.0), (7, 0.1), (8, 0.1), (9, 0.01)]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(workshop, tmp_path, monkeypatch, schedule, expected):
    used = []
    original = Training._update

    def update(training: Training, losses: dict[str, Tensor]) -> None:
        used.append({group["lr"] for group in training.optimization.optimizer.param_groups})
        original(training, losses)

    monkeypatch.setattr(Training, "_update", update)
    options = {"arm": "one-to-one", "epochs": 3, "warmup_steps": 4, "lr": 2e-3, "schedule": schedule}
    assert workshop.train(tmp_path / "run", **options) == 0
    logged = [line["lr"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert used == [{rate} for rate in logged]
    for step, factor in expected:
        assert logged[step - 1] == pytest.approx(2e-3 * factor, rel=1e-5)


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(student):
    state = load_checkpoint(student)
    saved = load_file(student / "model.safetensors")
    assert all(torch.equal(value, state["average"][f"module.{name}"]) for name, value in saved.items())
    name = "head.classification_head.cls_logits.weight"
    assert not torch.equal(saved[name], state["method"][f"adapter.model.{name}"])
    assert int(state["average"]["n_averaged"]) == 6


def test_bfloat16_trains(workshop, teacher, tmp_path):
    options = {"arm": "cross-head", "teacher": teacher}
    for precision in ("bfloat16", "float32"):
        assert workshop.train(tmp_path / precision, **options, precision=precision) == 0
    first, exact = (
        next(line for line in read_metrics(tmp_path / name) if line["kind"] == "train")["losses"]
        for name in ("bfloat16", "float32")
    )
    assert first != exact
    assert first == pytest.approx(exact, rel=0.1)
    assert {value.dtype for value in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }
