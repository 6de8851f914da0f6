"""What `check_adapter` found."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from ..errors import DetectorError

__all__ = ["AdapterCheck", "AdapterReport"]

Outcome = Literal["ok", "note", "wrong", "skipped"]

WIDTH = 110  # columns of a printed report


@dataclass(frozen=True)
class AdapterCheck:
    """One check of an adapter.

    Attributes:
        name: Which.
        outcome: "ok"; "note", worth knowing; "wrong", to be mended; or "skipped", because it needs what is wrong
            already or was not given.
        sentence: What was found and, if it is wrong, how to mend it.
    """

    name: str
    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class AdapterReport:
    """All checks of an adapter, readable with ``print``.

    Attributes:
        adapter: Its class.
        checks: In the order they ran. The first that is wrong is the one to mend first.
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
        """A line for every check, problems in capitals."""
        count = len(self.problems)
        lines = [f"{self.adapter}: {len(self.checks)} checks, {count or 'no'} problem{'' if count == 1 else 's'}"]
        for check in self.checks:
            outcome = check.outcome.upper() if check.outcome == "wrong" else check.outcome
            start = f"  {outcome:8}{check.name:18} "
            lines += textwrap.wrap(check.sentence, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join(lines)
