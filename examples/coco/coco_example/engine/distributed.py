"""The processes of a run, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Worker", "join_workers"]


@dataclass(frozen=True)
class Worker:
    """This process among the processes of a run.

    Attributes:
        rank: Its number.
        count: How many there are.
        device: Where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

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
        dist.all_gather_object(values, value)
        return values

    def distribute(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that gradients are averaged over the processes; a single process needs no wrapper."""
        if self.count == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)


@contextmanager
def join_workers() -> Iterator[Worker]:
    """Join the processes that torchrun started; without it there is a single one."""
    # 1. The device of this process.
    count = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Worker(0, 1, device)
        return

    # 2. Its group.
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Worker(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()
