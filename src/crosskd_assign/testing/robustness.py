"""Checks of how an adapter behaves when it is called again, copied, cast, or given other images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch

from ..detectors.probing import first_line
from ..validation import validate_predictions
from .examination import Examination, check, close, untouched
from .report import Finding, wrong

__all__ = ["arguments", "batches", "copies", "dtype", "entry", "sizes"]


@check("arguments", after=("head",))
@torch.no_grad()
def arguments(exam: Examination) -> Finding:
    """Check that the head predicts the same on the same maps, whatever ran before."""
    # 1. After features() has run on other images.
    exam.wake()  # what is looked at from here on may be blind in a fresh head
    where, maps, first = f"{exam.name}.head()", exam.small_maps, exam.head(exam.small_maps)
    other = exam.small_batch
    exam.adapter.features(replace(other, images=torch.rand_like(other.images)))
    second = exam.head(maps)
    if close(first, second, 1e-6):
        return Finding("ok", "head() reads nothing but its arguments")

    # 2. What made the difference?
    if close(second, exam.head(maps), 1e-6):
        expected, got = "predictions that depend on the arguments alone", "others after another features() call"
        fix = "let features() remember nothing: head() will be run on another detector's maps"
        return wrong(expected, got, where=where, fix=fix)
    expected, got = "equal predictions on equal maps", "different ones in two calls"
    return wrong(expected, got, where=where, fix="let nothing random or counted into head() in evaluation mode")


@check("batches", after=("arguments",))
def batches(exam: Examination) -> Finding:
    """Check that predictions of an image are the same beside any others, and alone."""
    # 1. The first image beside noise, and alone if a norm does not refuse it.
    b, _ = exam.preprocessed
    beside = replace(b, images=torch.cat([b.images[:1], torch.rand_like(b.images[1:2])]), sizes=b.sizes[:2])
    shown = [beside, exam.small_batch] if exam.few == 1 else [beside]

    # 2. Is the same predicted on it as beside the given ones?
    if not all(close(exam.predict(batch), exam.predictions, 1e-3, images=slice(1)) for batch in shown):
        expected, got = "predictions of an image that depend on no other image", "others beside others"
        fix = "keep images apart when reshaping, (N, C, H, W) to (N, H * W, C), and norms in evaluation mode"
        return wrong(expected, got, where=exam.name, fix=fix)
    return Finding("ok", "predictions of an image do not depend on the others")


@check(
    "sizes",
    after=("head", "strides"),
    hint="give size_divisible the largest stride, or make the network take any size",
)
def sizes(exam: Examination) -> Finding:
    """Check that images may have sizes that nothing divides, unless all have one and the network takes no other."""
    # 1. Images of two sizes, and one alone.
    height, width = exam.images[0].shape[-2:]
    shapes = [(height + 5, width - width // 4 + 3), (height - height // 4 + 1, width + 7)]
    try:
        _run_on(exam, shapes)
        if exam.few == 1:  # or group norm would refuse it
            _run_on(exam, shapes[:1])

    # 2. None but the given one?
    except Exception:  # whatever a stranger's network raises
        further = 2 * ceil(max(exam.adapter.size_divisible, *exam.probe.strides))
        if len({image.shape for image in exam.images}) > 1 or _takes(exam, (height + further, width + further)):
            raise
        sentence = f"takes images of {height} × {width} alone; where yours differ, let a ResizingAdapter resize them"
        return Finding("note", sentence)
    return Finding("ok", f"images of {' and '.join(f'{h} × {w}' for h, w in shapes)} work, and one alone")


@torch.no_grad()
def _run_on(exam: Examination, shapes: Sequence[tuple[int, int]]) -> None:
    """Run the adapter on random images of these sizes."""
    batch, _ = exam.adapter.preprocess([torch.rand(3, *shape).to(exam.images[0]) for shape in shapes])
    validate_predictions(exam.predict(batch), where=f"{exam.name}.head()", images=len(shapes))


def _takes(exam: Examination, shape: tuple[int, int]) -> bool:
    try:
        _run_on(exam, [shape, shape])
    except Exception:  # likewise
        return False
    return True


@check("entry", after=("head",))
@torch.no_grad()
def entry(exam: Examination) -> Finding:
    """Check that a head that can be split predicts the same in two parts."""
    deepest = exam.adapter.max_entry
    if deepest == 0:
        return Finding("ok", "the head is not split; entry=0 works without")
    whole = exam.head(exam.small_maps)
    for k in range(1, deepest + 1):
        maps = exam.adapter.head_stem([x.clone() for x in exam.small_maps], k)
        predictions = exam.adapter.head_rest(maps, k, exam.image_size)
        complete = all(len(branch) == len(exam.maps) for branch in maps.values())
        if not complete or not close(predictions, whole, 1e-5):
            expected = "head_rest(head_stem(maps, k), k, size) to equal head(maps, size)"
            fix = "run exactly what head() runs, in two parts, with a map for every level of every branch"
            return wrong(expected, f"others, k={k}", where=exam.name, fix=fix)
    return Finding("ok", f"the head can be entered behind 1…{deepest} convolutions")


@check("copy", after=("batches",))
def copies(exam: Examination) -> Finding:
    """Check that a deep copy is a detector of its own."""
    # 1. Copy it after a pass with a graph, as in training: what an adapter keeps of it cannot be copied.
    where, maps = f"copy.deepcopy({exam.name})", exam.small_maps
    exam.adapter.head(exam.adapter.features(exam.small_batch), exam.image_size)
    try:
        twin = replace(exam, adapter=copy.deepcopy(exam.adapter))
    except Exception as error:  # torch and pickle raise a dozen types
        fix = "keep no tensor of a call in an attribute; averaged weights need a copy"
        return wrong("a copy", first_line(error), where=where, fix=fix)

    # 2. The copy predicts the same on the same maps.
    before, same = exam.head(maps), twin.head(maps, exam.image_size)
    if not close(same, before, 1e-6):
        expected, fix = "a copy that predicts what the original predicts", "copy all of the state"
        return wrong(expected, "other predictions", where=where, fix=fix)

    # 3. With other weights it predicts something else, and the original does not.
    with torch.no_grad():
        for parameter in twin.adapter.parameters():
            parameter.add_(torch.rand_like(parameter) if parameter.is_floating_point() else 0)
        changed = twin.head(maps, exam.image_size)
        again = twin.adapter.features(exam.small_batch)
        still = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(maps, again, strict=True))
    if not close(exam.head(maps), before, 1e-6):
        expected, got = "a copy with weights of its own", "one that changes the original"
        return wrong(expected, got, where=where, fix="share no parameters with it")
    if still or (close(changed, same, 0) and _head_has_weights(exam)):
        fix = "reach the network through self.model, not through a variable or a function outside the adapter"
        return wrong("a copy that runs its own weights", "one that runs the original's", where=where, fix=fix)
    return Finding("ok", "a deep copy predicts the same, with weights of its own")


def _head_has_weights(exam: Examination) -> bool:
    with untouched(exam.adapter):
        exam.adapter.requires_grad_(True)
        return exam.adapter.head([x.clone() for x in exam.small_maps], exam.image_size).logits.requires_grad


@check("dtype", after=("copy",), hint="make constants with x.new_tensor(...), or register them as buffers")
def dtype(exam: Examination) -> Finding:
    """Check that an adapter can be cast, and predicts the same afterwards."""
    twin = replace(exam, adapter=copy.deepcopy(exam.adapter).double())
    shown = exam.small_batch
    predictions = twin.predict(replace(shown, images=shown.images.double()))
    if not close(predictions, exam.predict(shown), 1e-2):
        where, fix = (
            f"{exam.name}.to(torch.float64)",
            "make constants with x.new_tensor(...), or register them as buffers",
        )
        return wrong("the same predictions in float64", "others", where=where, fix=fix)
    return Finding("ok", "works in float64 and predicts the same")
