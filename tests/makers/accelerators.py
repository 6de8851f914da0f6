"""An accelerator that there is not: its tensors live on the host, and it writes down what the host waits for.

Under `FakeAccelerator` a tensor "on cuda" is an `Away`: PyTorch believes in another device, and every operation comes
by here, where it runs on the CPU. So a whole training step runs on it, with the very numbers of a CPU, and what would
make the host wait for the device is an event. Like any stub, it knows what it was told: copies wait unless they are
non-blocking and between pinned memory and the device; to read a value, to list what is nonzero and to compare waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.is_nonzero)


class Away(Tensor):
    """A tensor on the fake device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        # torch has no code for a device that it was built without, but knows what "meta" is.
        options: dict[str, Any] = {"strides": held.stride(), "dtype": held.dtype, "device": "meta"}
        away: Away = Tensor._make_wrapper_subclass(cls, held.size(), **options)  # type: ignore[attr-defined]
        away.held = held
        return away

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a fake device that is not there any more")


class FakeAccelerator:
    """A device to work on inside a ``with``.

    Args:
        kind: "cuda", which copies without waiting, or "mps", which does not and refuses float64.
    """

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)
        self.events: list[str] = []
        self._modes = (_Names(self), _Operations(self))

    def __enter__(self) -> FakeAccelerator:
        # As if they were: `x.device` and `x.is_cuda` are asked of the class.
        Away.device = property(lambda _: self.device)  # type: ignore[assignment, misc]
        Away.is_cuda = property(lambda _: self.device.type == "cuda")  # type: ignore[assignment, misc]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        del Away.device, Away.is_cuda

    def carry(self, model: nn.Module) -> nn.Module:
        """Move a module here, in place."""
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    here = nn.Parameter(Away(parameter.detach().clone()), parameter.requires_grad)
                    module._parameters[name] = here
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = Away(buffer.clone())
        return model


class _Names(TorchFunctionMode):
    """What is called by name: devices get the name that torch takes, and pinned memory is memory with a mark."""

    def __init__(self, accelerator: FakeAccelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self.accelerator.device.type

        def name(x: Any) -> Any:
            here = isinstance(x, torch.device | str) and str(x).split(":")[0] == kind
            return torch.device("meta") if here else x

        args, kwargs = tree_map(name, (args, kwargs or {}))
        if func is Tensor.pin_memory:
            args[0].is_marked_as_pinned = True
            return args[0]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == torch.device("meta"):
            del kwargs["device"]
            return func(*args, **kwargs).to("meta")
        if func is Tensor.new_tensor and isinstance(args[0], Away):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to("meta")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """What is computed: on the CPU, whatever the device."""

    def __init__(self, accelerator: FakeAccelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # 1. The operation on the tensors that are held.
        away: list[Away] = []

        def take(x: Away) -> Tensor:
            away.append(x)
            return x.held

        given, options = tree_map_only(Away, take, (args, dict(kwargs or {})))
        device = options.get("device")
        here = bool(away) if device is None else torch.device(device).type == "meta"
        if device is not None:
            options["device"] = "cpu"
        result = func(*given, **options)

        # 2. What the host waits for.
        self._note(func, args, options, bool(away), here)

        # 3. What it is on the device: the same tensor, where an operation works in place.
        known = {id(x.held): x for x in away}

        def put(x: Tensor) -> Tensor:
            if self.accelerator.device.type == "mps" and x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
            return known[id(x)] if id(x) in known else Away(x)

        return tree_map_only(Tensor, put, result) if here else result

    def _note(self, func: Any, args: Any, options: dict[str, Any], away: bool, here: bool) -> None:
        """Write down what makes the host wait."""
        copied = func.overloadpacket in (aten._to_copy, aten.copy_) and away != here
        if copied:
            free = options.get("non_blocking", False) and self.accelerator.device.type == "cuda"
            if free and (away or getattr(args[0], "is_marked_as_pinned", False)):
                return
            self.accelerator.events.append(f"waits for a copy to the {'device' if here else 'host'}")
        elif away and func.overloadpacket in WAITS:
            self.accelerator.events.append(f"waits for {func.overloadpacket.__name__}")
