"""Signals stop what can be stopped at once, wait where they must, and are never lost."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager
from typing import Any

import pytest
from coco_example.engine.signals import Interrupted, Signals, caught_signals, deferred_signals


def come(number: int = signal.SIGTERM, *, within: AbstractContextManager[Any], log: list[str]) -> None:
    """A signal comes within a block."""
    with within:
        signal.raise_signal(number)
        log.append("went on")
    log.append("after")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_once_or_after_a_block_that_holds_it(number):
    before, log = signal.getsignal(number), list[str]()
    with caught_signals() as signals:
        signals.place = "at step 3"
        with pytest.raises(Interrupted, match="stopped at step 3") as stop:
            signal.raise_signal(number)
        assert stop.value.number == number
        for within in (signals.held(), deferred_signals()):
            with pytest.raises(Interrupted):
                come(number, within=within, log=log)
    assert log == ["went on"] * 2
    assert signal.getsignal(number) == before


def test_a_held_signal_comes_where_it_is_released_and_not_before():
    log = list[str]()

    def work(signals: Signals) -> None:
        with signals.held():
            come(within=signals.held(), log=log)
            come(within=signals.released(), log=log)

    with caught_signals() as signals, pytest.raises(Interrupted):
        work(signals)
    assert log == ["went on", "after"]


def test_no_handler_of_errors_takes_a_signal_for_one():
    assert not issubclass(Interrupted, Exception)


class Leaving:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_destructor_is_not_lost_and_prints_nothing(capsys):
    def wait() -> None:
        leaving = Leaving()
        del leaving
        time.sleep(10)

    begun = time.monotonic()
    with caught_signals(), pytest.raises(Interrupted):
        wait()
    assert time.monotonic() - begun < 5
    assert capsys.readouterr() == ("", "")
