"""`examples/trainers/accelerate_loop.py`: prepared, accumulated, saved, resumed, and on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration, set_seed

import accelerate_loop
from rectangles import Rectangles, collate, new_distiller

from tests.makers.small_models import snapshot

pytestmark = pytest.mark.filterwarnings("ignore")  # Accelerate's own

SCRIPT = Path(accelerate_loop.__file__)


def run(folder: Path, *, epochs: int, accumulate: int = 1, precision: str = "no", seed: int = 0) -> nn.Module:
    """Train on 12 pictures of a run of two epochs; the distiller, unwrapped."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one accelerator a process is what the package is made for
    set_seed(0)
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate, project_config=project
    )
    loader = DataLoader(Rectangles(12, seed=1), 4, shuffle=True, collate_fn=collate)
    trained = accelerate_loop.train(accelerator, new_distiller(seed), loader, epochs=epochs, total=2)
    report = accelerate_loop.evaluate(accelerator, trained, Rectangles(4, seed=2))
    assert report.objects > 0
    plain: nn.Module = accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    return plain


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_did_and_no_file_holds_a_teacher(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    whole = run(tmp_path / "whole", epochs=2)
    run(tmp_path / "parts", epochs=1)
    resumed = run(tmp_path / "parts", epochs=2, seed=9)  # other weights at first: all come from the file
    expected = snapshot(whole)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == [
        "checkpoint_0",
        "checkpoint_1",
    ]
    saved = safetensors.load_file(tmp_path / "parts" / "checkpoints" / "checkpoint_1" / "model.safetensors")
    assert set(saved) == set(expected)
    teacher = new_distiller().teacher.state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in resumed.teacher.state_dict().items())


def test_accumulation_takes_one_step_for_several_batches(tmp_path, monkeypatch):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
    run(tmp_path, epochs=1, accumulate=3)
    assert len(steps) == 1


def test_mixed_precision_runs_both_networks_in_bfloat16(tmp_path, monkeypatch):
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    real = Accelerator.prepare

    def prepare(self: Accelerator, distiller: nn.Module, *rest: object) -> object:
        for name, network in (("student", distiller.detector.model), ("teacher", distiller.teacher.model)):
            network.head[-1].register_forward_hook(lambda *a, n=name: seen[n].add(a[2].dtype))
        return real(self, distiller, *rest)

    monkeypatch.setattr(Accelerator, "prepare", prepare)
    trained = run(tmp_path, epochs=1, precision="bf16")
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert {p.dtype for p in [*trained.parameters(), *trained.teacher.parameters()]} == {torch.float32}


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), "--output", str(tmp_path), "--epochs", "1"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"found \d+ of \d+", done.stdout)) == 1  # the first process alone prints
    states = tmp_path / "checkpoints" / "checkpoint_0"
    assert {path.name for path in states.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}
