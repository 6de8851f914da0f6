"""The processes of a run, as torchrun starts them.

Collectives give up when one process comes much later than the others. So they are for steps of training, where all
are as fast; before any other, processes meet in `Worker.wait`, which has no time-out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count as counting
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from coco_example.engine.devices import choose_device
from coco_example.errors import RunError, first_line

__all__ = ["ALONE", "Worker", "join_workers"]

T = TypeVar("T")

_POLL = 0.05  # seconds
_FAILED = "failed"  # the key under which a process that fails leaves its rank


@dataclass(frozen=True)
class Worker:
    """This process among the processes of a run.

    Attributes:
        rank: Its number.
        count: How many there are.
        device: Where it computes.
        store: What they all can read and write, if they are several.
    """

    rank: int
    count: int
    device: torch.device
    store: Any = None
    _meetings: Iterator[int] = field(default_factory=counting, init=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have come here, however long that takes.

        Raises:
            RunError: One has failed, or is gone.
        """
        if self.count == 1:
            return
        key = f"meeting {next(self._meetings)}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.count:
            if self.store.check([_FAILED]):
                raise _lost(f"rank {self.store.get(_FAILED).decode()} failed")
            time.sleep(_POLL)

    def first_does(self, work: Callable[[], T]) -> T:
        """Let the first process do something that may take long, and give the result to all."""
        if self.count == 1:
            return work()
        result: list[Any] = [work() if self.first else None]
        self.wait()
        dist.broadcast_object_list(result, src=0, device=self.device)
        value: T = result[0]
        return value

    def largest(self, number: int) -> int:
        """Exchange a number for the largest of any process, such as a signal, so that all stop at the same step."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Collect a value of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self.wait()
        dist.all_gather_object(values, value)
        return values

    def share(self, module: nn.Module) -> None:
        """Give all processes the first one's state of a module: batch norms' means differ until the next step."""
        if self.count > 1:
            self.wait()
            for value in module.state_dict().values():
                received = value.contiguous()
                dist.broadcast(received, src=0)
                value.copy_(received)

    def distribute(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that gradients are averaged over the processes; a single process needs no wrapper."""
        if self.count == 1:
            return module
        self.wait()
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)


ALONE = Worker(0, 1, torch.device("cpu"))


def _lost(reason: str) -> RunError:
    return RunError(
        expected="every process of the run to go on",
        got=reason,
        where="torchrun",
        fix="see what it printed, and go on with --resume",
    )


@contextmanager
def join_workers(timeout: timedelta | None = None, *, device: str = "") -> Iterator[Worker]:
    """Join the processes that torchrun started; without it there is a single one.

    Args:
        timeout: How long a collective may take, if not as long as torch allows.
        device: What to compute on, as `choose_device` takes it.

    Raises:
        RunError: There is no such device, or another process was lost.
    """
    # 1. The device of this process.
    count = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, local=int(os.environ.get("LOCAL_RANK", "0")), processes=count)
    cuda = chosen.type == "cuda"
    if cuda:
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Worker(0, 1, chosen)
        return

    # 2. Its group.
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may start all again, with the same store
    worker = Worker(rank, count, chosen, PrefixStore(f"workers {attempt}", store))
    try:
        yield worker
    except BaseException as error:
        with suppress(RuntimeError):  # the store may be gone
            worker.store.set(_FAILED, f"{rank}")
        if isinstance(error, RuntimeError) and _of_the_group(error):
            raise _lost(f"one that is gone: {first_line(error):.90}") from error
        raise
    finally:
        dist.destroy_process_group()


def _of_the_group(error: RuntimeError) -> bool:
    """Tell an error of the group, as after another process died, from the program's own."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))
