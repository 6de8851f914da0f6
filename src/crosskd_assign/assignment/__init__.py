"""Assignment: which point learns which object."""

from __future__ import annotations

from .assigner import Solver, TaskAwareOneToOneAssigner
from .begin import Assigner, how_to_begin
from .one_to_many import TaskAwareOneToManyAssigner

__all__ = ["Assigner", "Solver", "TaskAwareOneToManyAssigner", "TaskAwareOneToOneAssigner", "how_to_begin"]
