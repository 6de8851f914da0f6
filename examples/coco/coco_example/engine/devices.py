"""The device of a run: which there are, and which one a process computes on."""

from __future__ import annotations

import torch

from coco_example.errors import RunError

__all__ = ["choose_device"]


def choose_device(name: str, *, local: int = 0, processes: int = 1) -> torch.device:
    """Choose the device of this process.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps"; empty: CUDA if there is one, else the CPU.
        local: This process's number on its machine, and its GPU's where there are several processes.
        processes: How many there are.

    Raises:
        RunError: There is no such device here, or several processes are to share it.
    """
    # 1. What is there.
    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    there += ["mps"] if torch.backends.mps.is_available() else []

    # 2. What is meant: a GPU without a number is the one of this process.
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda":
        chosen = f"cuda:{local}"
    if chosen not in there:
        raise RunError(
            expected=f"a device that is here: {', '.join(there)}",
            got=repr(chosen if torch.cuda.is_available() else name),
            where="--device",
            fix="choose one of these, or leave it out",
        )
    if processes > 1 and name not in ("", "cpu", "cuda"):
        raise RunError(
            expected="a device for each of several processes",
            got=repr(name),
            where="--device",
            fix="write cuda, which gives each its own, or cpu",
        )
    return torch.device(chosen)
