"""Signals that ask a run to stop, and what waits for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Signals", "caught_signals", "leave_signals_alone"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RuntimeError):  # noqa: N818  # not an error: the run was saved and can go on
    """SIGINT or SIGTERM came; the run was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """The last signal that asked to stop, 0 before."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        del frame
        self.number = number


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Note SIGINT and SIGTERM instead of dying of them, so that training stops at the end of a step."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in _STOPPING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_alone(worker: int) -> None:
    """Make a loader's process outlive a signal to the whole group; the process that it works for decides when to stop.

    Args:
        worker: Its number, which ``DataLoader(worker_init_fn=…)`` passes.
    """
    del worker
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
