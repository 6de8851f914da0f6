"""How every command ends: with 0, or with one sentence and a code that says why."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

import torch
from typing_extensions import override

from coco_example.engine.signals import Interrupted, caught_signals
from coco_example.errors import FileError, RunError, first_line, printable
from crosskd_assign.errors import CrossKDError

__all__ = ["CommandParser", "run_command", "say", "warn"]


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are a sentence, without the usage and what a terminal would obey."""

    page = "docs/troubleshooting.md#an-option-is-refused"

    @override
    def error(self, message: str) -> NoReturn:
        self.refuse(message, self.page)

    def refuse(self, message: str, page: str) -> NoReturn:
        """End with a sentence, and the page that explains it."""
        self.exit(2, printable(f"{self.prog}: error: {message}\nSee --help, or {page}.\n"))


def run_command(work: Callable[[], object]) -> int:
    """Do the work of a command and return its exit code.

    Returns:
        0; 2 after a sentence about what the user can mend, an error of the system among it, and the page that explains
        it; 128 and the number of the signal that stopped it.
    """
    try:
        with caught_signals():
            work()
            sys.stdout.flush()  # a full disk or a closed pipe shows here, and not when Python ends
    except CrossKDError as error:
        return _end(2, f"error: {error}", f"See {error.page}.")
    except OSError as error:
        return _end(2, f"error: {FileError.of(error)}", f"See {FileError.page}.")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        short = RunError(
            expected="enough memory", got=first_line(error), where="this process", fix="lower --batch-size or --workers"
        )
        return _end(2, f"error: {short}", f"See {short.page}.")
    except Interrupted as stop:
        return _end(128 + stop.number, str(stop))
    return 0


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)  # what torch raises on a CPU


def _end(code: int, *sentences: str) -> int:
    with suppress(OSError):  # nobody may be reading
        say("\n".join(sentence.replace("\n", " ") for sentence in sentences))
    try:
        sys.stdout.flush()
    except OSError:  # or Python would try once more when it ends, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def say(text: str) -> None:
    """Print lines for somebody who watches, on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def warn(warnings: Iterable[str], page: str) -> None:
    """Print warnings, and the page that explains them where there are any."""
    lines = [f"warning: {warning}" for warning in warnings]
    if lines:
        say("\n".join([*lines, f"See {page}."]))
