"""An adapter of two functions, for those who would rather not subclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DetectorError
from ..structures import Batch, DensePredictions
from .base import DetectorAdapter

__all__ = ["FunctionAdapter"]


class FunctionAdapter(DetectorAdapter):
    """The adapter that `adapt` builds of two functions; the arguments are described there."""

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Any, Tensor], Sequence[Tensor]],
        head: Callable[[Any, list[Tensor]], DensePredictions],
        *,
        parts: Mapping[str, nn.Module] | None = None,
        unused_parameters: Iterable[nn.Parameter] = (),
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        unused = tuple(unused_parameters)
        _validate_function("features", "features(model, images) -> list of maps", features)
        _validate_function("head", "head(model, maps) -> DensePredictions", head)
        own_modules = set(map(id, model.modules()))
        for name, module in (parts or {}).items():
            if id(module) not in own_modules:
                raise _foreign(f'parts["{name}"]', type(module).__name__)
        own = {id(parameter) for parameter in model.parameters()}
        if not own.issuperset(map(id, unused)):
            raise _foreign("unused_parameters", f"{sum(id(p) not in own for p in unused)} others")
        # In tuples, nn.Module does not register modules and parameters a second time, and copies follow the model.
        self._functions = (features, head)
        self._parts = (None if parts is None else tuple(parts.items()), unused)

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the maps of the normalised images."""
        return list(self._functions[0](self.model, self.normalize(batch)))

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Predict on them."""
        return self._functions[1](self.model, features)

    def parts(self) -> dict[str, nn.Module]:
        """Return the given parts, or the model's attributes of these names."""
        return super().parts() if self._parts[0] is None else dict(self._parts[0])

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """Return the given parameters."""
        return self._parts[1]


def _validate_function(name: str, form: str, function: Callable[..., Any]) -> None:
    """Raise `DetectorError` for what cannot be called with two arguments."""
    fix = "give the model as the first argument, so that a copy of the adapter runs the copied model"
    where = f"adapt, {name}"
    if not callable(function):
        raise DetectorError(expected=form, got=type(function).__name__, where=where, fix=fix)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        got = f"a function with another signature: {error}"
        raise DetectorError(expected=form, got=got, where=where, fix=fix) from None
    except ValueError:  # a builtin without a signature; it will be seen when it runs
        return


def _foreign(name: str, got: str) -> DetectorError:
    return DetectorError(
        expected="parts of the model", got=got, where=f"adapt, {name}", fix="take them from this model"
    )
