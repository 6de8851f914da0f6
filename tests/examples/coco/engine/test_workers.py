"""Training on several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from coco_example.engine.checkpoints import load_checkpoint
from coco_example.engine.metrics_log import read_metrics
from safetensors.torch import load_file


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_write_once_evaluate_in_shares_stop_together_and_resume(
    workshop, script, scenes_folder, teacher, tmp_path
):
    def start(folder: Path, *more: str) -> Any:
        options = {"arm": "cross-head", "teacher": teacher, "epochs": 2, "batch_size": 2, "save_every": 5, "ema": 0.9}
        options |= {"eval_every": 1}
        module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        return script("train.py", *workshop.arguments(folder, **options), *more, module=module)

    whole = start(tmp_path / "whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    lines = [line for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert errors.count("without NMS") == 1
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["budget"]["images"] == 2 * 24

    scores = [line["scores"] for line in read_metrics(tmp_path / "whole") if line["kind"] == "eval"]
    arguments = ["--run", tmp_path / "whole", "--data-path", scenes_folder, "--batch-size", 2]
    assert evaluate.main([*map(str, arguments), "--output", str(tmp_path / "scores.json")]) == 0
    alone = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["scores"] == alone

    stopped = start(tmp_path / "run")
    while len(read_metrics(tmp_path / "run")) < 4:
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGTERM)
    _, errors = stopped.communicate()
    assert errors.count("go on with: train.py") == 2
    assert len(load_checkpoint(tmp_path / "run")["random"]) == 2
    resumed = start(tmp_path / "run", "--resume")
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    again = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["losses"] for line in again] == [line["losses"] for line in lines]
    assert [line["scores"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"] == scores
    mine, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(mine[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_and_four_processes_are_one_with_synchronised_batch_norm_and_go_on_as_one_where_they_were_stopped(
    workshop, script, tmp_path, monkeypatch
):
    def options(count: int) -> dict[str, Any]:
        return {"arm": "one-to-one", "epochs": 2, "batch_size": 4 // count, "save_every": 1, "sync_batch_norm": True}

    def losses(folder: Path) -> torch.Tensor:
        lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
        return torch.tensor([list(line["losses"].values()) for line in lines])

    def start(folder: Path, count: int = 2, **more: Any) -> Any:
        module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
        return script("train.py", *workshop.arguments(folder, **{**options(count), **more}), module=module)

    # 1. A step of one process, of two, and of four. Later a tie may be decided otherwise. Each logs its own losses.
    step = {"epochs": 1, "optimizer": "sgd", "warmup_steps": 0}
    assert workshop.train(tmp_path / "step", **options(1) | step | {"batch_size": 24}) == 0
    expected = load_file(tmp_path / "step" / "model.safetensors")
    for count, folder in ((2, tmp_path / "two"), (4, tmp_path / "four")):
        several = start(folder, count, **step, batch_size=24 // count)
        _, errors = several.communicate()
        assert several.returncode == 0, errors
        mine = load_file(folder / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6, msg=name)

    # 2. Two are stopped, and one goes on.
    assert workshop.train(tmp_path / "one", **options(1)) == 0
    stopped = start(tmp_path / "run")
    while len(read_metrics(tmp_path / "run")) < 5:
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.communicate()
    done = len(losses(tmp_path / "run"))
    assert done < 12
    assert workshop.train(tmp_path / "run", **options(1), resume=True) == 0
    assert len(losses(tmp_path / "run")) == 12
    alone, expected_losses = losses(tmp_path / "run")[done:], losses(tmp_path / "one")[done:]
    torch.testing.assert_close(alone, expected_losses, rtol=1e-4, atol=1e-4)

    # 3. Without synchronisation they differ, and are told so.
    apart = start(tmp_path / "apart", sync_batch_norm=False, epochs=1)
    _, errors = apart.communicate()
    assert apart.returncode == 0, errors
    messages = [line["message"] for line in read_metrics(tmp_path / "apart") if line["kind"] == "event"]
    assert any("--sync-batch-norm" in message for message in messages)
    assert not any("--sync-batch-norm" in str(line) for line in read_metrics(tmp_path / "two"))
