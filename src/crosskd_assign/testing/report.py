"""What `check_adapter` found: one `Finding` a check, and the report of them all."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from ..errors import CrossKDError, DetectorError

__all__ = ["AdapterCheck", "AdapterReport", "Finding", "wrong"]

Outcome = Literal["ok", "note", "wrong", "skipped"]

WIDTH = 110  # columns of a printed report
BUILDS_ON = "builds on"  # how the sentence of a check begins that has to wait for another


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        outcome: "ok"; "note", worth knowing; "wrong", to be mended; or "skipped", because it needs what is wrong
            already or was not given.
        sentence: What was found and, if it is wrong, how to mend it.
        expected: If it is wrong: what was expected. This and the next three are the parts of the sentence.
        got: What came instead.
        where: Where.
        fix: What to do about it.
    """

    outcome: Outcome
    sentence: str
    expected: str = ""
    got: str = ""
    where: str = ""
    fix: str = ""

    @classmethod
    def of(cls, error: CrossKDError) -> Finding:
        """Build the finding that an error of this library describes."""
        return Finding("wrong", str(error), error.expected, error.got, error.where, error.fix)


def wrong(expected: str, got: str, *, where: str, fix: str) -> Finding:
    """Build the finding that the contract is broken."""
    return Finding.of(DetectorError(expected=expected, got=got, where=where, fix=fix))


@dataclass(frozen=True, kw_only=True)
class AdapterCheck(Finding):
    """One check of an adapter: its `Finding` and its name.

    Attributes:
        name: Name of the check.

    Example:
        >>> print(AdapterCheck(name="finite", outcome="ok", sentence="all values are finite"))
          ok      finite             all values are finite
    """

    name: str

    def __str__(self) -> str:
        """Format the lines of a report, a problem in capitals."""
        outcome = self.outcome.upper() if self.outcome == "wrong" else self.outcome
        start = f"  {outcome:8}{self.name:18} "
        return textwrap.fill(self.sentence, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


@dataclass(frozen=True)
class AdapterReport:
    """All checks of an adapter, readable with ``print``.

    Attributes:
        adapter: Its class.
        checks: In the order they ran. The first that is wrong is the one to mend first.

    Example:
        >>> check = AdapterCheck(name="finite", outcome="ok", sentence="all values are finite")
        >>> print(AdapterReport("TinyAdapter", (check,)))
        TinyAdapter: 1 checks, no problems
          ok      finite             all values are finite
    """

    adapter: str
    checks: tuple[AdapterCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def problems(self) -> tuple[AdapterCheck, ...]:
        """The checks that found something wrong."""
        return tuple(check for check in self.checks if check.outcome == "wrong")

    def raise_for_problems(self) -> None:
        """Raise `DetectorError` with the whole report if something is wrong."""
        if not self.ok:
            raise DetectorError(str(self))

    def __str__(self) -> str:
        """Format a line for every check, and one for all that build on a problem."""
        # 1. How many problems there are.
        count = len(self.problems)
        first = f"{self.adapter}: {len(self.checks)} checks, {count or 'no'} problem{'' if count == 1 else 's'}"
        # 2. The checks.
        waiting = [
            check for check in self.checks if check.outcome == "skipped" and check.sentence.startswith(BUILDS_ON)
        ]
        lines = [first, *(str(check) for check in self.checks if check not in waiting)]
        if waiting:
            lines.append(f"  skipped {len(waiting)} checks, which build on what is wrong")
        return "\n".join(lines)
