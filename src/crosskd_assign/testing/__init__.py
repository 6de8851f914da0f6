"""Tests of a user's adapter: `check_adapter` tries everything the library relies on, and reports what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..detectors import DetectorAdapter, adapt
from ..structures import Target
from ..validation import validate_images, validate_targets
from . import gradients, inputs, positions, robustness, shapes, units
from .examination import Check, Examination, untouched
from .report import AdapterCheck, AdapterReport

__all__ = ["AdapterCheck", "AdapterReport", "check_adapter"]

# Every function that is decorated with `@check`, file by file, from top to bottom.
CHECKS: tuple[Check, ...] = tuple(
    member
    for module in (shapes, inputs, robustness, positions, units, gradients)
    for member in vars(module).values()
    if isinstance(member, Check)
)


def check_adapter(
    adapter: nn.Module | DetectorAdapter,
    images: Sequence[Tensor] | Tensor,
    targets: Sequence[Target] | None = None,
    *,
    progress: Callable[[AdapterCheck], object] | None = None,
) -> AdapterReport:
    """Check that an adapter does everything the library relies on.

    Nothing an adapter does makes this function fail: what it raises is reported. The adapter comes out as it went in:
    modes, weights, buffers, gradients, ``requires_grad``, plain attributes and random state.

    Two images of some 256 pixels are plenty: a ResNet-50 detector takes some 10 seconds for them on two cores.

    Args:
        adapter: What to check, its network on the device of the images; trained or not. Of any other model, the adapter
            that `adapt` returns.
        images: N tensors ``(3, H, W)`` in 0…1. The finest feature map should have 4 cells or more on both sides.
        targets: N targets, best from the data set to be trained on; without them neither boxes nor labels are checked.
        progress: Called with every check as soon as it is done, e.g. ``print``.

    Returns:
        What was found; ``print`` it, ask ``report.ok``, or call ``report.raise_for_problems()``.

    Raises:
        ImageError: The images are not float ``(3, H, W)`` tensors.
        TargetError: Targets have wrong shapes or dtypes.
        UnknownDetectorError: It is no adapter, and no built-in one fits it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from crosskd_assign import DensePredictions, GridLevel, adapt
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.Conv2d(16, 3 + 4, 3, padding=1))
        >>> def head(model, maps):
        ...     out = model[1](maps[0]).flatten(2).transpose(1, 2)  # (N, A, C + 4)
        ...     levels = [GridLevel.of(maps[0], stride=8)]
        ...     return DensePredictions.from_sides(out[..., :3], out[..., 3:], levels)  # raw sides
        >>> adapter = adapt(model, features=lambda model, images: [model[0](images)], head=head)
        >>> report = check_adapter(adapter, [torch.rand(3, 64, 64)])
        >>> [problem.fix for problem in report.problems]
        ['keep sides positive, e.g. with exp or relu, and corners in order']
    """
    validate_images(images)
    if targets is not None:
        validate_targets(targets, images)
    adapter = adapt(adapter)
    with untouched(adapter):
        exam = Examination.of(adapter, list(images), targets)
        results: dict[str, AdapterCheck] = {}
        for check in CHECKS:
            results[check.name] = check.run(exam, results)
            if progress is not None:
                progress(results[check.name])
    return AdapterReport(exam.name, tuple(results.values()))
