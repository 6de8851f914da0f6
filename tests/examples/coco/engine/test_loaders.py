"""Processes that load images end with the work, in seconds, and send no traceback."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch
from coco_example.engine.loaders import loaded
from coco_example.errors import DataError, FileError, RunError
from torch.utils.data import Dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12 on forks

BROKEN = DataError(expected="a readable image", got="none", where="a.png", fix="replace it")


def no_room(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm)")


class Images(Dataset[Any]):
    """Four images, the last of which does what it is told in the process that loads it."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __getitem__(self, key: int) -> Any:
        if key == 3:
            self.last()
        return torch.zeros(3, 2, 2), {"image_id": torch.tensor(key)}

    def last(self) -> None:
        if self.what == "broken":
            raise BROKEN
        if self.what == "unreadable":
            raise PermissionError(errno.EACCES, "Permission denied", "a.png")
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "crowded":  # in this process alone, which is the loader's
            torch.Tensor.share_memory_ = no_room  # type: ignore[method-assign]
        if self.what == "stuck":
            time.sleep(1000)


def ids(batches: Any) -> list[list[int]]:
    return [[int(target["image_id"]) for target in targets] for _, targets in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_the_processes_end(workers):
    with loaded(Images("fine"), [[2, 0], [3, 1]], workers=workers) as batches:
        assert ids(batches) == [[2, 0], [3, 1]]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("broken", DataError, "Expected a readable image, but got none (a.png). Fix: replace it."),
        ("unreadable", FileError, "but got Permission denied (a.png). Fix: choose a place that you may read"),
        ("killed", RunError, "Expected the processes that load images to live and to pass them on, but got "),
        (
            "crowded",
            RunError,
            "but got unable to allocate shared memory(shm) (--workers)",
        ),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_sentence(what, kind, reason):
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(kind) as error, loaded(Images(what), [[0], [1], [3], [2]], workers=1) as batches:
        ids(batches)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []
    assert callable(before) or signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN


def fail_after_one(loading: Any) -> None:
    with loading as batches:
        next(batches)
        raise OSError(errno.ENOSPC, "full")


def test_a_process_that_is_stuck_does_not_hold_up_an_error():
    begun = time.monotonic()
    batches = loaded(Images("stuck"), [[0], [3], [3]], workers=2)
    with pytest.raises(OSError, match="full"):
        fail_after_one(batches)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - begun < 5
