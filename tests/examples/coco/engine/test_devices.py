"""`--device` and `--compile`: where a run computes, and with what."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from coco_example.engine import compilation
from coco_example.engine.compilation import compile_backbones
from coco_example.engine.devices import choose_device
from coco_example.errors import RunError
from coco_example.models.saved_model import load_model
from safetensors.torch import load_file
from torch import nn

from tests.makers.training_runs import stop_in, train_lines


@pytest.fixture
def gpus(monkeypatch):
    """Plays a machine with so many GPUs."""

    def play(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: count == 0)

    return play


@pytest.mark.parametrize(
    ("count", "name", "local", "processes", "expected"),
    [
        (0, "", 0, 1, "cpu"),
        (0, "mps", 0, 1, "mps"),
        (2, "", 0, 1, "cuda:0"),
        (2, "", 1, 2, "cuda:1"),
        (2, "cuda", 1, 2, "cuda:1"),
        (2, "cuda:1", 0, 1, "cuda:1"),
        (2, "cpu", 1, 2, "cpu"),
    ],
)
def test_a_device_is_the_one_that_is_named_or_a_gpu_of_its_own(gpus, count, name, local, processes, expected):
    gpus(count)
    assert choose_device(name, local=local, processes=processes) == torch.device(expected)


@pytest.mark.parametrize(
    ("count", "name", "local", "processes", "sentence"),
    [
        (0, "cuda", 0, 1, "a device that is here: cpu, mps, but got 'cuda'"),
        (2, "cuda:2", 0, 1, "a device that is here: cpu, cuda:0, cuda:1, but got 'cuda:2'"),
        (2, "gpu", 0, 1, "a device that is here: cpu, cuda:0, cuda:1, but got 'gpu'"),
        (2, "cuda", 2, 3, "a device that is here: cpu, cuda:0, cuda:1, but got 'cuda:2'"),
        (2, "cuda:1", 0, 2, "a device for each of several processes, but got 'cuda:1'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(gpus, count, name, local, processes, sentence):
    gpus(count)
    with pytest.raises(RunError, match=sentence):
        choose_device(name, local=local, processes=processes)


def test_a_run_with_a_wrong_device_leaves_no_folder(workshop, tmp_path, capsys):
    assert workshop.train(tmp_path / "run", arm="one-to-one", device="tpu") == 2
    assert "Expected a device that is here: cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="--compile needs torch 2.6")
@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
@pytest.mark.usefixtures("no_pictures")
def test_a_compiled_run_learns_the_same_and_goes_on_without(workshop, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(compilation, "_BACKEND", "aot_eager")
    compiled: list[Any] = []
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **o: compiled.append(self) or original(self, **o))
    options: dict[str, Any] = {"arm": "one-to-one", "device": "cpu", "ema": 0.5, "warmup_steps": 9}
    assert workshop.train(tmp_path / "plain", **options) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 2)
        assert workshop.train(tmp_path / "run", **options, compile=True) == 143
    assert [type(module).__name__ for module in compiled] == ["SmallBackbone"]
    assert workshop.train(tmp_path / "run", **options, resume=True) == 0  # or with it: it is free

    for mine, theirs in zip(train_lines(tmp_path / "run"), train_lines(tmp_path / "plain"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    assert mine.keys() == theirs.keys()
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run", "plain")]
    assert states[0]["method"].keys() == states[1]["method"].keys()
    assert load_model(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] is True


def test_what_cannot_be_compiled_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    with pytest.raises(RunError, match="a detector with a module backbone"):
        compile_backbones(nn.Linear(1, 1), None)
    detector = nn.Module()
    detector.backbone = nn.Linear(1, 1)
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(RunError, match=r"Expected torch 2\.6 or newer, but got 2\.4\.1"):
        compile_backbones(detector)

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "__version__", "2.14.0")
    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(RunError, match="a compiler that torch can use, but got Failed to find C compiler"):
        compile_backbones(detector)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_the_real_compiler_learns_the_same(workshop, tmp_path):
    torch.compiler.reset()
    options: dict[str, Any] = {"arm": "one-to-one", "warmup_steps": 9}
    for name, more in (("plain", {}), ("run", {"compile": True})):
        assert workshop.train(tmp_path / name, **options, **more) == 0
    for mine, theirs in zip(train_lines(tmp_path / "run"), train_lines(tmp_path / "plain"), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
