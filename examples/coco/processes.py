"""The processes of a run, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["Interrupted", "Ranks", "Signals", "any_rank", "caught_signals", "processes"]


class Interrupted(RuntimeError):  # noqa: N818  # not an error: the run was saved and can go on
    """SIGINT or SIGTERM came; the run was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0


@contextmanager
def processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun started; a single process otherwise."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


class Signals:
    """The last signal that asked to stop, 0 before."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        del frame
        self.number = number


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """While training, SIGINT and SIGTERM wait for the end of the step."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(number: int, ranks: Ranks) -> int:
    """The signal that reached any process, so that all stop at the same step."""
    if ranks.count == 1:
        return number
    value = torch.tensor(number, device=ranks.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
