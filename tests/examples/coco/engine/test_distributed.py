"""Several processes: each evaluates its share, and none waits in a collective for another's long work."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.engine.distributed import ALONE, Worker
from coco_example.engine.signals import Interrupted, caught_signals
from coco_example.errors import RunError
from coco_example.evaluation.evaluation import Detector, evaluate
from coco_example.models.saved_model import load_model

from crosskd_assign import adapt

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Played(Worker):
    """One of several processes, played one after the other: the last one gathers what all have done."""

    shares: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.shares.append(copy.deepcopy(value))
        return [*self.shares, *[value] * (self.count - len(self.shares))]

    def first_does(self, work: Callable[[], Any]) -> Any:
        return work() if self.rank == self.count - 1 else None


@pytest.mark.parametrize("count", [2, 3, 7])
def test_evaluation_in_shares_has_one_processs_scores(student, scenes_folder, count):
    detector = Detector(adapt(load_model(student)[0]))
    index = read_coco(*locate_split(scenes_folder, "val"))  # 8 images: 3 batches of 3, 3 and 2
    alone = evaluate(detector, index, batch_size=3, worker=ALONE)
    shares: list[Any] = []
    for rank in range(count):
        played = evaluate(detector, index, batch_size=3, worker=Played(rank, count, CPU, shares=shares))
    assert [len(share) for share in shares] == [len(range(rank, 3, count)) for rank in range(count)]
    assert repr(played) == repr(alone)
    assert alone.plain.ap > 0


def pair() -> tuple[Worker, Worker, Any]:
    store = dist.HashStore()
    return Worker(0, 2, CPU, store), Worker(1, 2, CPU, store), store


def test_a_process_waits_until_the_other_comes_every_time():
    early, late, _ = pair()
    came: list[str] = []

    def wait() -> None:
        for n in range(3):
            early.wait()
            came.append(f"{n}")

    thread = threading.Thread(target=wait)
    thread.start()
    for n in range(3):
        time.sleep(0.15)
        assert came == [f"{m}" for m in range(n)]
        late.wait()
    thread.join(timeout=10)
    assert came == ["0", "1", "2"]


def test_waiting_ends_when_the_other_fails_or_a_signal_comes():
    early, _, store = pair()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), 15))
    with caught_signals():
        timer.start()
        with pytest.raises(Interrupted):
            early.wait()
    store.set("failed", "1")
    with pytest.raises(RunError, match="Expected every process of the run to go on, but got rank 1 failed"):
        early.wait()


SCRIPT = """
import sys, time
from datetime import timedelta
from types import SimpleNamespace
from coco_example.engine.distributed import join_workers
from coco_example.evaluation import evaluation

def score(*_, **__):
    time.sleep(3)
    return "scores"

evaluation.detect = lambda *_, worker, **__: worker.gather(time.sleep(3 * (1 - worker.rank)))
evaluation.score = score

try:
    with join_workers(timedelta(seconds=1)) as worker:
        values = evaluation.evaluate(SimpleNamespace(top_k=100), None, worker=worker)
        time.sleep(3 * worker.rank)
        print(worker.rank, values, worker.gather(worker.rank), flush=True)
        if worker.first:
            raise SystemExit(3)
        time.sleep(1)
        worker.gather(1)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_evaluation_longer_than_the_groups_time_out_is_waited_for_and_a_lost_process_is_a_sentence(
    tmp_path,
):
    path = tmp_path / "work.py"
    path.write_text(SCRIPT)
    examples = Path(sys.modules["train"].__file__ or "").parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(examples), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": f"{port}",
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(path)],
            env={**environment, "RANK": f"{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for rank, (output, errors) in enumerate(outputs):
        assert f"{rank} scores [0, 1]" in output, errors
    assert processes[0].returncode == 3
    assert "Expected every process of the run to go on" in outputs[1][0]
