"""Does an adapter keep its contract? `check_adapter` tries everything the library relies on and says it in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..detectors import DetectorAdapter
from ..structures import Target
from ..validation import check_images, check_targets
from . import behaviour, contract, places, training
from .examination import Examination, Finding, Note, Skip, Wrong, exception_sentence, untouched
from .report import AdapterCheck, AdapterReport
from .units import boxes

__all__ = ["AdapterCheck", "AdapterReport", "check_adapter"]

Check = Callable[[Examination], Finding]

# In this order. Each with the checks that it builds on: if one of them has failed, it would only say so again.
SHAPES = ("features", "strides", "head")
PLACES = (*SHAPES, "finite", "points")
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "preprocess": (contract.preprocess, ()),
    "features": (contract.features, ("preprocess",)),
    "strides": (contract.strides, ("features",)),
    "head": (contract.head, ("features",)),
    "finite": (contract.finite, ("head",)),
    "labels": (contract.labels, ("head",)),
    "points": (places.points, SHAPES),
    "order": (places.order, PLACES),
    "places": (places.places, (*PLACES, "order")),
    "boxes": (boxes, PLACES),
    "boxes and images": (contract.boxes_and_images, ("preprocess",)),
    "normalisation": (contract.normalisation, ("features",)),
    "inputs": (behaviour.inputs, ("head",)),
    "arguments": (behaviour.arguments, ("head",)),
    "batches": (behaviour.batches, ("head", "arguments")),
    "sizes": (behaviour.sizes, ("head", "strides")),
    "in-place": (behaviour.in_place, ("head",)),
    "entry": (behaviour.entry, ("head",)),
    "training mode": (training.modes, ("head", "arguments")),
    "gradient": (training.gradient, ("head", "training mode")),
    "unused parameters": (training.unused_parameters, ("head", "finite", "training mode", "gradient")),
    "trunk": (training.trunk, ()),
    "copy": (behaviour.copies, ("head", "arguments")),
    "pickle": (behaviour.pickles, ()),
    "dtype": (behaviour.dtype, ("head", "copy")),
    "autocast": (behaviour.autocast, ("head",)),
}


def check_adapter(
    adapter: DetectorAdapter, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
) -> AdapterReport:
    """Run an adapter through everything the library relies on.

    Nothing an adapter does makes this function fail: what it raises is reported. The adapter comes out as it went in:
    modes, weights, buffers, gradients, ``requires_grad``, plain attributes and random state.

    Every check runs features and head a few times, the slowest a dozen times: a handful of images of some 256 pixels
    is plenty.

    Args:
        adapter: What to check, its network on the device of the images; trained or not.
        images: N tensors ``(3, H, W)`` in 0…1. The finest feature map should have 4 cells or more on both sides.
        targets: N targets, best from the data set to be trained on; without them the label space is not checked.

    Returns:
        What was found; ``print`` it, ask ``report.ok``, or call ``report.raise_for_problems()``.

    Raises:
        ImageError: The images are not float ``(3, H, W)`` tensors.
        TargetError: Targets have wrong shapes or dtypes.
    """
    check_images(images)
    if targets is not None:
        check_targets(targets, images)
    with untouched(adapter):
        torch.manual_seed(0)
        examination = Examination.of(adapter, list(images), targets)
        checks: list[AdapterCheck] = []
        for name, (check, needs) in CHECKS.items():
            lacking = [c.name for c in checks if c.name in needs and c.outcome in ("wrong", "skipped")]
            checks.append(
                AdapterCheck(name, "skipped", f'builds on "{lacking[0]}"; see there')
                if lacking
                else _run(name, check, examination)
            )
    return AdapterReport(examination.name, tuple(checks))


def _run(name: str, check: Check, examination: Examination) -> AdapterCheck:
    """One check in evaluation mode; whatever it raises is its finding."""
    examination.adapter.eval()
    try:
        sentence = check(examination)
    except Wrong as error:
        return AdapterCheck(name, "wrong", str(error))
    except Skip as error:
        return AdapterCheck(name, "skipped", str(error))
    except Exception as error:  # whatever a stranger's code raises is what there is to report
        return AdapterCheck(name, "wrong", exception_sentence(name, error))
    return AdapterCheck(name, "note" if isinstance(sentence, Note) else "ok", str(sentence))
