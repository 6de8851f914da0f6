"""The random state of a process, which checkpoints hold and nothing beside training may move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["random_state", "set_random_state", "untouched_random_state"]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Copy the state of torch's generators: the CPU's, and the device's by its type."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` copied; a state of another type of device leaves this one's generator alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif "mps" in state and device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Let a block draw random numbers that training does not miss."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
