"""Checks of how an adapter behaves when it is called again, copied, cast, or given other images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from ..structures import Batch, DensePredictions
from ..validation import check_predictions
from .examination import Examination, Finding, Note, cut, first_line, untouched, wrong

__all__ = ["arguments", "autocast", "batches", "copies", "dtype", "entry", "in_place", "inputs", "pickles", "sizes"]

FIELDS = ("logits", "boxes", "quality", "distribution")


def inputs(e: Examination) -> Finding:
    """Images, targets and batch are only read."""
    batch = e.batch
    given = [*e.images, *(target["boxes"] for target in e.targets), batch.images]
    kept = [x.clone() for x in given]
    with torch.no_grad():
        e.adapter.preprocess(e.images, e.targets)
        e.head(e.adapter.features(batch), batch)
    n = len(e.images)
    names = [*(f"images[{i}]" for i in range(n)), *(f'targets[{i}]["boxes"]' for i in range(n)), "batch.images"]
    for name, was, now in zip(names, kept, given, strict=True):
        if not torch.equal(was, now):
            fix = "work on a copy: student and teacher share one batch"
            raise wrong(f"{name} unchanged", "other values", f"{e.name}, {name}", fix)
    return "images, targets and batch are left as they are"


def arguments(e: Examination) -> Finding:
    """The head says the same of the same maps, whatever was seen before."""
    where, other = f"{e.name}.head()", _other_batch(e.batch)
    with torch.no_grad():
        maps = e.adapter.features(e.batch)
        fresh = e.head(maps, e.batch)
        again = e.head(maps, e.batch)
        if not _alike(fresh, again, 1e-6):
            fix = "let nothing random or counted into head() in evaluation mode"
            raise wrong("equal predictions on equal maps", "different ones in two calls", where, fix)
        kept = [x.clone() for x in maps]
        others = e.adapter.features(other)
        if not _alike(fresh, e.head(kept, e.batch), 1e-6):
            fix = "let features() remember nothing: head() will be run on another detector's maps"
            raise wrong(
                "predictions that depend on the arguments alone", "others after another features() call", where, fix
            )
        if not _alike(e.head(others, other), e.head(others, e.batch), 1e-6):
            return Note("head() reads more of the batch than its shape; a student's maps would be read with it")
    return "head() reads nothing but its arguments"


def batches(e: Examination) -> Finding:
    """An image is seen alike, alone and beside others."""
    where, fix = e.name, "keep images apart when reshaping, (N, C, H, W) to (N, H * W, C), and norms in evaluation mode"
    pictures = [e.batch, Batch(e.batch.images.clone(), e.batch.sizes, e.batch.original_sizes)]
    pictures[1].images[1:] = torch.rand_like(pictures[1].images[1:])
    if all(x.shape[-2:].numel() > 1 for x in e.maps):  # or group norm would refuse an image alone
        pictures.append(cut(e.batch, 1))
    with torch.no_grad():
        seen = [_first(e.head(e.adapter.features(batch), batch)) for batch in pictures]
    if not all(_alike(other, seen[0], 1e-3) for other in seen[1:]):
        raise wrong("predictions of an image that depend on no other image", "others beside others", where, fix)
    return "an image is seen alike beside any other"


def sizes(e: Examination) -> Finding:
    """Images of sizes that nothing divides."""
    height, width = e.images[0].shape[-2:]
    shapes = [(height + height // 3 + 5, width + 3), (height + 1, width + width // 2 + 7)]
    images = [torch.rand(3, *shape).to(e.images[0]) for shape in shapes]
    for shown in (images, images[:1]):
        batch, _ = e.adapter.preprocess(shown)
        with torch.no_grad():
            maps = e.adapter.features(batch)
            if len(shown) > 1 or all(x.shape[-2:].numel() > 1 for x in maps):  # or group norm would refuse it
                check_predictions(e.head(maps, batch), where=f"{e.name}.head()", images=len(shown))
    return f"images of {' and '.join(f'{h} × {w}' for h, w in shapes)} work, and one alone"


def in_place(e: Examination) -> Finding:
    """Whether the head edits the maps; allowed."""
    if e.adapter.edits_features():
        return Note("head() begins with an in-place operation; the library gives it copies where others need the maps")
    return "head() leaves the maps as they are"


def entry(e: Examination) -> Finding:
    """A head that says it can be split says the same in two parts."""
    deepest = e.adapter.max_entry
    if deepest == 0:
        return "the head is not split; entry=0 works without"
    whole = e.head(e.maps, e.batch)
    for k in range(1, deepest + 1):
        with torch.no_grad():
            maps = e.adapter.head_stem([x.clone() for x in e.maps], k)
            parts = e.adapter.head_rest(maps, k, e.batch)
        if any(len(branch) != len(e.maps) for branch in maps.values()) or not _alike(parts, whole, 1e-5):
            fix = "run exactly what head() runs, in two parts, with a map for every level of every branch"
            raise wrong(
                "head_rest(head_stem(maps, k), k, batch) to equal head(maps, batch)", f"others, k={k}", e.name, fix
            )
    return f"the head can be entered behind 1…{deepest} convolutions"


def copies(e: Examination) -> Finding:
    """A deep copy is a detector of its own."""
    where = f"copy.deepcopy({e.name})"
    try:
        twin = copy.deepcopy(e.adapter)
    except Exception as error:  # torch and pickle raise a dozen types
        fix = "keep no tensor of a call in an attribute; averaged weights need a copy"
        raise wrong("a copy", first_line(error), where, fix) from None
    batch = e.batch
    with torch.no_grad():
        before, maps = e.head(e.maps, batch), [x.clone() for x in twin.features(batch)]
        same = twin.head([x.clone() for x in e.maps], batch)
        if not _alike(same, before, 1e-6):
            raise wrong("a copy that says what the original says", "other predictions", where, "copy all of the state")
        for parameter in twin.parameters():
            parameter.add_(torch.rand_like(parameter) if parameter.is_floating_point() else 0)
        changed = twin.head([x.clone() for x in e.maps], batch)
        still = all(torch.equal(a, b) for a, b in zip(maps, twin.features(batch), strict=True))
        after = e.head(e.maps, batch)
    if not _alike(after, before, 1e-6):
        fix = "share no parameters with it"
        raise wrong("a copy with weights of its own", "one that changes the original", where, fix)
    if still or (_alike(changed, same, 0) and _head_has_weights(e)):
        fix = "reach the network through self.model, not through a variable or a function outside the adapter"
        raise wrong("a copy that runs its own weights", "one that runs the original's", where, fix)
    return "a deep copy says the same, with weights of its own"


def _head_has_weights(e: Examination) -> bool:
    with untouched(e.adapter):
        e.adapter.requires_grad_(True)
        return e.adapter.head([x.clone() for x in e.maps], e.batch).logits.requires_grad


def pickles(e: Examination) -> Finding:
    """torch.save of a whole detector, and processes that are spawned, need it."""
    try:
        size = len(pickle.dumps(e.adapter))
    except Exception as error:  # pickle raises what it likes
        return Note(f"cannot be pickled ({first_line(error)}); state_dict() and copies work without")
    return f"can be pickled, {size / 1e6:.1f} MB"


def dtype(e: Examination) -> Finding:
    """The adapter can be cast, and says the same afterwards."""
    twin = copy.deepcopy(e.adapter)
    double = Batch(e.batch.images.double(), e.batch.sizes, e.batch.original_sizes)
    twin.double()
    with torch.no_grad():
        predictions = twin.head(twin.features(double), double)
    if not _alike(predictions, e.predictions, 1e-2):
        fix = "make constants with x.new_tensor(...), or register them as buffers"
        raise wrong("the same predictions in float64", "others", f"{e.name}.to(torch.float64)", fix)
    return "works in float64 and says the same"


def autocast(e: Examination) -> Finding:
    """bfloat16, for information."""
    kind = e.batch.images.device.type
    try:
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16):
            predictions = e.adapter.head(e.adapter.features(e.batch), e.batch)
    except Exception as error:  # whatever it is, training without autocast does not need it
        return Note(f"fails under bfloat16 autocast ({first_line(error)}); train in float32")
    if predictions.boxes.dtype != torch.float32:
        return Note(f"boxes are {predictions.boxes.dtype} under autocast, off by pixels: decode with .float()")
    return "works under bfloat16 autocast, with boxes in float32"


def _other_batch(batch: Batch) -> Batch:
    """A batch of the same shape that shows something else."""
    return Batch(torch.rand_like(batch.images), batch.sizes, batch.original_sizes)


def _first(predictions: DensePredictions) -> DensePredictions:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:1]

    p = predictions
    return DensePredictions(p.logits[:1], p.boxes[:1], p.points, p.strides, cut(p.quality), cut(p.distribution))


def _alike(one: DensePredictions, other: DensePredictions, tolerance: float) -> bool:
    """Whether two predictions agree up to a share of their magnitude."""
    pairs: Sequence[tuple[Tensor | None, Tensor | None]] = [(getattr(one, f), getattr(other, f)) for f in FIELDS]
    return all(_close(a, b, tolerance) for a, b in pairs)


def _close(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    scale = float(b.nan_to_num(posinf=0, neginf=0).abs().mean()) + 1e-6
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
