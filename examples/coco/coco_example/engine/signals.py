"""Signals that ask a run to stop: at once where nothing is lost by it, at the end of a step while it trains."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Signals", "caught_signals", "deferred_signals", "leave_signals_alone"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. As a `KeyboardInterrupt`, it passes by whatever handles errors on the way."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """What becomes of signals that ask to stop: each raises `Interrupted` at once, or is held until that is safe.

    Attributes:
        number: The last signal, 0 before.
        place: Where the work is, for the message.
    """

    def __init__(self) -> None:
        self.number, self.place, self._held = 0, "", False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        del frame
        self.number = number
        if not self._held:
            self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.number:
            raise Interrupted(self.number, f"stopped {self.place}".rstrip())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals until the block ends: what happens in it is whole, or fails on its own."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if not before:
            self.check()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals through again, within a block that holds them."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        finally:
            self._held = before


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Handle SIGINT and SIGTERM by `Signals` instead of dying of them."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in _STOPPING}
    hook, sys.unraisablehook = sys.unraisablehook, _once_more
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _once_more(unraisable: sys.UnraisableHookArgs) -> None:
    """Let a signal come again that was raised where Python only prints errors, such as a destructor."""
    if isinstance(unraisable.exc_value, Interrupted):
        again = threading.Timer(0.05, _send, (unraisable.exc_value.number,))  # at once would be in the same place
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _send(number: int) -> None:
    if not isinstance(signal.getsignal(number), Signals):
        return  # the work has ended
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let signals come after the block, whoever handles them: what starts or ends processes must not be half done."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda late, _: came.append(late)) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def leave_signals_alone(worker: int) -> None:
    """Make a loader's process outlive a signal to the whole group; the process that it works for decides when to stop.

    Args:
        worker: Its number, which ``DataLoader(worker_init_fn=…)`` passes.
    """
    del worker
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
