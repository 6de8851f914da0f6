"""The folder of a training run: what is in it, how a crash loses nothing, how it is read back.

``config.json`` how the run was started · ``run.json`` its id and what it learns from · ``environment.json`` with what ·
``metrics.jsonl`` its log · ``last.pt`` and ``previous.pt`` everything needed to go on · ``model.safetensors`` and
``model.json`` the finished detector · ``summary.json`` its scores · ``best/`` the best detector of its evaluations ·
``*.png`` pictures · ``tensorboard/`` its log for that · ``run.lock`` keeps others out.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision

import crosskd_assign
from coco_example.engine.checkpoints import CHECKPOINTS
from coco_example.engine.distributed import Worker
from coco_example.engine.identity import differences
from coco_example.engine.loggers import TENSORBOARD
from coco_example.engine.run_lock import LOCK, locked_folder
from coco_example.errors import RunError
from coco_example.files import read_json, write_json
from coco_example.options import Options

__all__ = ["check_folder", "check_options", "claimed_folder", "environment", "goes_on", "open_folder", "same_step"]

# What a run that was killed before its first checkpoint may leave: nothing that anybody would miss.
_FIRST = {LOCK, "config.json", "run.json", "environment.json", "metrics.jsonl", "batch0.png"}
_FIRST |= {TENSORBOARD}
_FIRST |= {f"{name}.tmp" for name in (*_FIRST, "last.pt")} | {".batch0.png.tmp"}


def goes_on(folder: Path) -> bool:
    """Return whether a folder holds a run that ``--resume`` would go on with, from its first step at least."""
    names = _names(folder)
    return bool(names & set(CHECKPOINTS)) or ("config.json" in names and names <= _FIRST)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def check_folder(folder: Path, *, resume: bool) -> None:
    """See that a run can start in, or continue in, a folder.

    Raises:
        RunError: It holds a run already and none is to be resumed, or the other way round.
    """
    if resume and not goes_on(folder):
        raise RunError(
            expected="a run to resume",
            got="a folder without one" if folder.is_dir() else "no such folder",
            where=f"--output {folder}",
            fix="leave out --resume, or name the run's folder with --output",
        )
    names = _names(folder)
    claimed = LOCK in names and names <= _FIRST
    if not resume and names and not claimed:
        raise RunError(
            expected="a new or empty folder",
            got="one in use",
            where=f"{folder}",
            fix="choose another --output, add --resume to go on with it, or remove it yourself",
        )


@contextmanager
def claimed_folder(folder: Path, options: Options, worker: Worker) -> Iterator[bool]:
    """Hold the folder of a run that starts, or goes on, for this run alone.

    Yields:
        Whether there is a checkpoint to go on from. Without one, a run that is resumed begins.

    Raises:
        RunError: Another run works in it or holds it, or there is none to resume, or one of other options.
    """
    with ExitStack() as held:

        def claim() -> bool:
            check_folder(folder, resume=options.resume)  # once without a trace, and once when nobody else can change it
            if options.resume:
                check_options(folder, options, worker.count)
            held.enter_context(locked_folder(folder))
            check_folder(folder, resume=options.resume)
            return options.resume and any((folder / name).exists() for name in CHECKPOINTS)

        yield worker.first_does(claim)


def open_folder(
    folder: Path, options: Options, inputs: dict[str, Any], processes: int = 1, *, begun: bool
) -> str | None:
    """Write what a run starts with into its folder, or see that a run that goes on has the same inputs.

    Args:
        folder: The folder, claimed.
        options: The run's.
        inputs: Descriptions of its data and its teacher, by name.
        processes: Number of processes.
        begun: Whether there is a checkpoint; else what a run left that never got one is replaced.

    Returns:
        The run's id, which its checkpoints have, too; None where an earlier version started it.

    Raises:
        RunError: The inputs are others, and what differs is named.
    """
    # 1. Compare with what was noted; earlier versions noted nothing.
    path = folder / "run.json"
    then = read_json(path) if options.resume and path.exists() else None
    if then is not None:
        _refuse(folder, "data and teacher", differences(then, inputs), "name those")
    if begun:
        return None if then is None else str(then.get("id"))

    # 2. Start.
    for name in _FIRST - {LOCK, TENSORBOARD}:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    identity = uuid.uuid4().hex
    write_json(folder / "environment.json", environment(options.device))
    write_json(path, {"id": identity, "step_images": options.step_images(processes), **inputs})
    write_json(folder / "config.json", options.as_flat())  # last: with it, the run can be resumed
    return identity


def same_step(folder: Path, options: Options, processes: int) -> bool:
    """Return whether the steps of a run have as many images as when it was started, on however many processes.

    Where a share of every batch has no labels, they have as many of each kind only with the same batches.
    """
    if options.dataset.unlabelled:
        return False
    path = folder / "run.json"  # earlier versions noted nothing, or less
    return path.exists() and read_json(path).get("step_images") == options.step_images(processes)


def check_processes(then: int, now: int, folder: Path, options: Options) -> None:
    """See that a run goes on with as many processes as its checkpoint is of, or with steps of as many images.

    Raises:
        RunError: There are more or fewer.
    """
    if then != now and not same_step(folder, options, now):
        raise RunError(
            expected=f"{then} processes, as the run was started with",
            got=f"{now}",
            where=f"{folder}",
            fix="resume with as many, or change --batch-size so that a step has as many images as before",
        )


def check_options(folder: Path, options: Options, processes: int = 1) -> None:
    """See that a resumed run has the options it was started with.

    Images a process may differ where the images a step do not.

    Raises:
        RunError: It has others, which are named with both values.
    """
    path = folder / "config.json"
    then = read_json(path)
    if "arm" not in then:  # an empty list of differences would only mean that all have their defaults
        raise RunError(expected="the options of a run", got="something else", where=f"{path}", fix="restore that file")
    if same_step(folder, options, processes):
        then |= {"batch_size": options.training.batch_size}
    _refuse(folder, "options", options.differences(then), "repeat them")


def _refuse(folder: Path, what: str, differences: list[str], fix: str) -> None:
    if differences:
        raise RunError(
            expected=f"the {what} the run was started with",
            got=f"others: {'; '.join(differences)}",
            where=f"{folder}",
            fix=f"{fix}, or start a new run",
        )


def environment(device: str = "") -> dict[str, str | int]:
    """List versions and hardware, so that a result can be traced to what made it.

    Args:
        device: What a run was told to compute on; empty: CUDA if there is one.
    """
    cuda = torch.cuda.is_available() and (not device or device.startswith("cuda"))
    hardware = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {
        "crosskd_assign": crosskd_assign.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": hardware,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """Describe the commit of the code that runs; "unknown" outside a repository or without git."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
