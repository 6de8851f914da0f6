"""An adapter made of two functions, for those who would rather not subclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import DetectorError, problem
from ..structures import Batch, DensePredictions
from .base import DetectorAdapter

__all__ = ["FunctionAdapter"]


class FunctionAdapter(DetectorAdapter):
    """What `DetectorAdapter.from_functions` builds."""

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[Any, Tensor], Sequence[Tensor]],
        head: Callable[[Any, list[Tensor]], DensePredictions],
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        size_divisible: int,
        trunk: nn.Module | None,
        unused_parameters: Iterable[nn.Parameter],
    ) -> None:
        super().__init__(model, image_mean=image_mean, image_std=image_std, size_divisible=size_divisible)
        unused = tuple(unused_parameters)
        _check_function("features", "features(model, images) -> list of maps", features)
        _check_function("head", "head(model, maps) -> DensePredictions", head)
        if trunk is not None and not any(module is trunk for module in model.modules()):
            raise _foreign("trunk", type(trunk).__name__)
        own = {id(parameter) for parameter in model.parameters()}
        if not own.issuperset(map(id, unused)):
            raise _foreign("unused_parameters", f"{sum(id(p) not in own for p in unused)} others")
        # In tuples, nn.Module does not register modules and parameters a second time, and copies follow the model.
        self._functions = (features, head)
        self._parts = (trunk, unused)

    def features(self, batch: Batch) -> list[Tensor]:
        """The maps of the normalised images."""
        return list(self._functions[0](self.model, self.normalize(batch)))

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """The predictions on them."""
        return self._functions[1](self.model, features)

    def trunk(self) -> nn.Module:
        """The given one, or the whole model."""
        return self.model if self._parts[0] is None else self._parts[0]

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """The given ones."""
        return self._parts[1]


def _check_function(name: str, form: str, function: Callable[..., Any]) -> None:
    """Raise `DetectorError` for what cannot be called with two arguments."""
    fix = "give the model as the first argument, so that a copy of the adapter runs the copied model"
    if not callable(function):
        raise DetectorError(problem(form, type(function).__name__, f"from_functions, {name}", fix))
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        got = f"a function that says {error}"
        raise DetectorError(problem(form, got, f"from_functions, {name}", fix)) from None
    except ValueError:  # a builtin without a signature; it will be seen when it runs
        return


def _foreign(name: str, got: str) -> DetectorError:
    return DetectorError(problem("parts of the model", got, f"from_functions, {name}", "take them from this model"))
