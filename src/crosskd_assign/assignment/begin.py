"""Beginning an assignment before its result is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from ..structures import Assignment, DensePredictions, Target

__all__ = ["Assigner", "how_to_begin"]

Assigner = Callable[[DensePredictions, Sequence[Target]], Assignment]


class _Begun(Protocol):
    def begin(self, predictions: DensePredictions, targets: Sequence[Target]) -> Callable[[], Assignment]: ...


def how_to_begin(
    assigner: Assigner,
) -> Callable[[DensePredictions, Sequence[Target]], Callable[[], Assignment]] | None:
    """Return the ``begin`` of an assigner, as `TaskAwareOneToOneAssigner` has it; None for one that is only called.

    It must stand in the class that defines how the assigner is called: a subclass with another call is called.
    """
    owner = next(kind for kind in type(assigner).__mro__ if "__call__" in vars(kind))
    return cast("_Begun", assigner).begin if "begin" in vars(owner) else None
