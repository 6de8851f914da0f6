"""What the processor makes of a precision, measured before hours are spent in it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["slow_precision"]

_SLOW = 1.5  # times as long as float32, beyond what a busy machine does to a measurement
_ROUNDS = 8  # of both in turn, of which the fastest count: another process may have the processor in some


def slow_precision(
    name: str, device: torch.device, measure: Callable[[torch.dtype], float] | None = None
) -> str | None:
    """Describe in one line that a precision is slower than float32 here; None if it is not.

    Autocast computes in any precision on any CPU, but fast only where the processor has instructions for it.

    Args:
        name: The precision of autocast.
        device: Where the run computes; accelerators are not measured.
        measure: Seconds of a convolution's forward and backward pass in a type.
    """
    if name == "float32" or device.type != "cpu":
        return None
    measure = measure or _convolution_seconds
    own, usual = zip(*((measure(getattr(torch, name)), measure(torch.float32)) for _ in range(_ROUNDS)), strict=True)
    ratio = min(own) / min(usual)
    if ratio < _SLOW:
        return None
    offers = torch.backends.cpu.get_cpu_capability()
    return (
        f"--precision {name} is slow on this processor ({offers}): a convolution takes {ratio:.1f} times as long as in "
        "float32, so --precision float32 would be faster"
    )


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Time a convolution as a small detector's head has it; draws no random number that a run would miss."""
    maps = torch.full((4, 64, 24, 24), 0.5, dtype=dtype, requires_grad=True)
    weight = torch.full((64, 64, 3, 3), 0.01, dtype=dtype, requires_grad=True)
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        F.conv2d(maps, weight, padding=1).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        seconds.append(time.perf_counter() - begun)
    return seconds[1]  # the first one prepares
