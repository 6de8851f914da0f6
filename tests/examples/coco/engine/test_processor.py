"""A precision that the processor is slow in is noticed before the first step."""

from __future__ import annotations

import pytest
import torch
import train
from coco_example.engine.metrics_log import read_metrics
from coco_example.engine.processor import slow_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "said"), [(6.25, True), (1.2, False), (0.4, False)])
def test_a_precision_is_called_slow_where_it_takes_longer_than_float32(seconds, said):
    line = slow_precision("bfloat16", CPU, lambda dtype: seconds if dtype == torch.bfloat16 else 1.0)
    assert (line is not None) == said
    if line is not None:
        assert line.startswith("--precision bfloat16 is slow on this processor")
        assert "takes 6.2 times as long as in float32, so --precision float32 would be faster" in line
        assert torch.backends.cpu.get_cpu_capability() in line


def test_a_busy_machine_makes_no_precision_slow():
    """Another process has the processor in all measurements but one of each."""
    turns = iter([9.0, 1.0] * 5 + [0.5, 9.0] + [9.0, 9.0] * 99)
    assert slow_precision("bfloat16", CPU, lambda dtype: next(turns)) is None


def test_nothing_is_measured_in_float32_or_on_an_accelerator():
    for name, device in (("float32", CPU), ("bfloat16", torch.device("cuda"))):
        assert slow_precision(name, device, lambda dtype: pytest.fail("measured")) is None


def test_measuring_draws_no_random_number():
    state = torch.get_rng_state()
    slow_precision("bfloat16", CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_logs_the_line_once(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "slow_precision", lambda name, device: f"{name} on {device.type} is slow")
    assert workshop.train(tmp_path / "run", arm="one-to-one", precision="bfloat16") == 0
    messages = [line["message"] for line in read_metrics(tmp_path / "run") if line["kind"] == "event"]
    assert messages[1:] == ["bfloat16 on cpu is slow"]
