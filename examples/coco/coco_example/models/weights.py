"""Weights from files that nobody has to trust."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from coco_example.errors import ModelError, first_line
from coco_example.files import digest

__all__ = ["load_weights", "read_state_dict"]


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict file into a module, all of it or nothing.

    Raises:
        ModelError: No such file, not a state dict, or one of another network.
    """
    # 1. Read. BatchNorm2d counts batches and FrozenBatchNorm2d does not; either takes the other's weights without that.
    state, own = read_state_dict(path), module.state_dict()
    counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if name in own or not name.endswith("num_batches_tracked")}
    state = counts | state

    # 2. Compare names and shapes.
    wrong = list(own.keys() ^ state.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ModelError(
            expected=f"weights of {type(module).__name__}",
            got=f"{len(wrong)} tensors that do not fit, such as {sorted(wrong)[0]}",
            where=f"{path}",
            fix="give the file that belongs to this network",
        )

    # 3. Load.
    module.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, from safetensors or from ``torch.save``, without unpickling code.

    Raises:
        ModelError: No such file, or something else in it.
    """
    if not path.is_file():
        raise ModelError(expected="a weights file", got="none", where=f"{path}", fix="check the path")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a damaged or unsafe file
        raise ModelError(
            expected="a state dict of plain tensors",
            got=f"a file that cannot be read as one: {first_line(error)}",
            where=f"{path}",
            fix="save it with torch.save(model.state_dict(), path)",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            expected="a state dict of plain tensors",
            got=f"{type(state).__name__} of other things",
            where=f"{path}",
            fix="save model.state_dict() alone",
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("digest")  # `save_model` writes it
    state: dict[str, Tensor] = load_file(path)
    if written is not None and written != digest(dict(sorted(state.items()))):
        raise ValueError("its content has changed since it was written")
    return state
