"""Transfers between the host and a device that neither waits for before it needs them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Transfer", "send"]


class Transfer:
    """A tensor on its way to the host, which goes on with other work meanwhile.

    Args:
        x: On any device; on the host already, there is nothing to do.

    Example:
        >>> import torch
        >>> transfer = Transfer(torch.ones(2))
        >>> transfer.wait()
        tensor([1., 1.])
    """

    def __init__(self, x: Tensor) -> None:
        # Into pinned memory, where torch does not wait for the copy. Other accelerators than CUDA may not say when it
        # has arrived, so there it is waited for at once.
        self._copy = x.detach().to("cpu", non_blocking=x.is_cuda)
        self._arrival = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def wait(self) -> Tensor:
        """Return the tensor on the host, as soon as it is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy


def send(x: Tensor, device: torch.device) -> Tensor:
    """Send a tensor from the host to a device, behind the work that is queued there and without waiting for it.

    Example:
        >>> send(torch.ones(2), torch.device("cpu"))
        tensor([1., 1.])
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from other memory torch would wait for the copy
