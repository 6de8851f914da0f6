"""Assignment: which point learns which object."""

from __future__ import annotations

from .assigner import Solver, TaskAwareOneToOneAssigner
from .one_to_many import TaskAwareOneToManyAssigner

__all__ = ["Solver", "TaskAwareOneToManyAssigner", "TaskAwareOneToOneAssigner"]
