"""A drawn data set and a teacher, both as small as can be, and a way to train more of their kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from coco_example.command_line import parse_options
from coco_example.data.scenes import write_scenes
from coco_example.options import Options

torch.set_num_threads(1)  # maps of a few points are slower on more, and much slower where cores are shared

SCRIPTS = Path(train.__file__).resolve().parent
DEFAULTS = {
    "size": 64,
    "epochs": 1,
    "batch_size": 8,
    "warmup_steps": 2,
    "log_every": 1,
    "teacher_floor": 0.0,
    "workers": 0,
}


class Workshop:
    """Trains detectors on 24 drawn scenes, three steps an epoch; options are the script's own, by name."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def arguments(self, output: Path, **options: Any) -> list[str]:
        """The command line, without the script."""
        arguments = []
        for name, value in {"output": output, "data_path": self.data, **DEFAULTS, **options}.items():
            flag = "--" + name.replace("_", "-")
            arguments += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
        return arguments

    def options(self, output: Path, **options: Any) -> Options:
        return parse_options(self.arguments(output, **options))

    def train(self, output: Path, **options: Any) -> int:
        """Train in this process; the exit code."""
        return train.main(self.arguments(output, **options))

    def start(self, output: Path, **options: Any) -> subprocess.Popen[str]:
        """Train in a process, which leads a group of its own."""
        return start("train.py", *self.arguments(output, **options))


def start(script: str, *arguments: str, module: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A script of the example as a process, which leads a group of its own."""
    return subprocess.Popen(
        [sys.executable, *module, str(SCRIPTS / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)

    @property
    def exploded(self) -> bool:
        return self.folder.exists()


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """An object that must not be unpickled."""
    return Bomb(tmp_path / "boom")


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes of 64 pixels to train on, and 8 to evaluate on."""
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=24, val=8, size=64)


@pytest.fixture(scope="session")
def workshop(scenes_folder: Path) -> Workshop:
    return Workshop(scenes_folder)


@pytest.fixture(scope="session")
def teacher(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished one-to-many run of two epochs; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    assert workshop.train(folder, arm="one-to-many", epochs=2, eval_every=1, lr=2e-3) == 0
    return folder


@pytest.fixture(scope="session")
def student(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished one-to-one run of two epochs with an average of its weights; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        assert workshop.train(folder, arm="one-to-one", epochs=2, ema=0.5, lr=2e-3) == 0
    return folder


@pytest.fixture(scope="session")
def script() -> Any:
    """`start`, for scripts other than the training."""
    return start


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out drawing, most of the time of so short a run."""
    monkeypatch.setattr(train, "draw_report", lambda *_, **__: [])
    monkeypatch.setattr(train, "_draw_first_batch", lambda *_: None)
