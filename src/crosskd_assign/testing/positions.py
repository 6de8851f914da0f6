"""Checks of where predictions are: their points and their order, found out by changing maps and images."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..structures import DensePredictions
from ..symptoms import symptom_of_levels
from .examination import Examination, check, fields
from .report import Finding, wrong

__all__ = ["Level", "levels_of", "order", "places", "points"]

SMALLEST = 4  # cells on a side of a map on which places can be told apart
CORNERS = tuple(itertools.product((-1, 1), repeat=2))  # x, y: -1 for left and top, 1 for right and bottom


@dataclass(frozen=True)
class Level:
    """A feature map and the predictions of its stride."""

    index: int
    stride: tuple[float, float]  # x, y: image over map
    height: int
    width: int
    members: Tensor  # (A,) bool
    declared: float  # the stride the predictions have


def levels_of(exam: Examination, predictions: DensePredictions) -> list[Level]:
    """Pair every map with the predictions whose stride is nearest to its own.

    Left out are maps without any, which cannot be, and maps of a single row or column, whose predictions are not told
    apart by place.
    """
    declared = _distinct(predictions.strides)
    height, width = exam.image_size
    levels = []
    for i, (x, stride) in enumerate(zip(exam.maps, exam.probe.strides, strict=True)):
        step = (width / x.shape[-1], height / x.shape[-2])
        nearest = min(declared, key=lambda s: abs(s - stride))
        if min(x.shape[-2:]) > 1 and 0.6 * min(*step, stride) < nearest < 1.6 * max(*step, stride):
            levels.append(Level(i, step, x.shape[-2], x.shape[-1], predictions.strides == nearest, nearest))
    return levels


def _distinct(x: Tensor) -> list[float]:
    return sorted(set(x.tolist()))


# --- points -----------------------------------------------------------------------------------------------------------


@check("points", after=("strides",))
def points(exam: Examination) -> Finding:
    """Check that points cover the image in steps of their strides, and that strides are those of the maps."""
    # 1. The strides.
    predictions, (height, width) = exam.predictions, exam.image_size
    levels = levels_of(exam, predictions)
    if not levels or len({level.declared for level in levels}) != len(levels):
        expected = f"strides of the maps, {exam.probe.strides}, in pixels"
        got = f"{[round(s, 2) for s in _distinct(predictions.strides)]}"
        fix = "give every prediction the stride of its level"
        return wrong(expected, got, where=f"{exam.name}.head().strides", fix=fix)

    # 2. The grids, if the points are declared to be made of some.
    where = f"{exam.name}.head().points"
    if predictions.levels is not None:
        made = torch.cat([level.points(predictions.points.device) for level in predictions.levels])
        if not torch.allclose(made.to(predictions.points), predictions.points, atol=0.01):
            fix = "build predictions with DensePredictions.on_grid(...)"
            return wrong("points that levels describe", "others", where=where, fix=fix)

    # 3. The points of each level, along both axes.
    for level in levels:
        xy = predictions.points[level.members].double()
        for axis, name, extent in ((0, "x", width), (1, "y", height)):
            place = f"{where}, {name} at stride {level.declared:g}"
            steps = sorted((level.stride[axis], exam.probe.strides[level.index]))
            if fault := _off_the_grid(xy[:, axis], steps, extent, place):
                return fault
    covered = "points cover the image in steps of their strides"
    if symptom := symptom_of_levels(predictions):
        return Finding("note", f"{covered}; levels are {symptom.got}: {symptom.fix}")
    return Finding("ok", covered)


def _off_the_grid(values: Tensor, steps: list[float], extent: int, where: str) -> Finding | None:
    """Find out what is wrong with one coordinate of the points of one level.

    Its ``steps`` are the stride on these images and on blank ones, the smaller first: where a map reaches over the
    edge of its image, the two differ.
    """
    stride, most = steps
    distinct = _distinct(values)
    step = statistics.median(b - a for a, b in itertools.pairwise(distinct)) if len(distinct) > 1 else stride
    low, high = distinct[0], distinct[-1]
    grid = "use GridLevel.of(map, stride).points()"
    if high <= 1.5 and len(distinct) > 2:
        got, fix = f"{low:.3g}…{high:.3g}, which looks like fractions", "multiply by the image's size"
    elif abs(step - 1) < 0.1 and stride > 1.6:
        got, fix = f"{low:g}…{high:g} in steps of 1, which looks like cells", "multiply by the stride"
    elif not 0.6 * stride < step < 1.6 * most:
        got, fix = f"steps of {step:.3g}", grid
    elif low < -most or high > extent + most or high - low < 0.5 * (extent - 2 * most):
        got, fix = f"{low:.3g}…{high:.3g}", f"x comes first, then y; {grid}"
    else:
        return None
    return wrong(f"steps of {stride:.3g} pixels within 0…{extent}", got, where=where, fix=fix)


# --- order ------------------------------------------------------------------------------------------------------------

ORDER_FIXES = {
    "column by column": "flatten maps row by row, x fastest: map.flatten(2).transpose(1, 2)",
    "bottom up": "begin with the top row",
    "right to left": "begin with the left column",
    "anchor by anchor": "put the anchors of a cell side by side: (N, anchors, C, H, W).permute(0, 3, 4, 1, 2)",
}


@check("order", after=("strides", "finite", "points", "batches"))
@torch.no_grad()
def order(exam: Examination) -> Finding:
    """Check that a changed cell of a map changes predictions of points near it, and of no other level."""
    # 1. Change one map after the other: do the predictions of its level change?
    plain = exam.head(exam.small_maps)
    levels = levels_of(exam, plain)
    for level in levels:
        changed = exam.small_maps
        changed[level.index] = changed[level.index] + torch.randn_like(changed[level.index]) * _noise(exam.maps, level)
        if fault := _wrong_level(exam, level, _changes(plain, exam.head(changed)), plain.strides):
            return fault

    # 2. Change single cells: how far from them do predictions change?
    largest = max(levels, key=lambda level: min(level.height, level.width), default=None)
    if largest is None or min(largest.height, largest.width) < SMALLEST:
        return Finding("skipped", f"needs a map of at least {SMALLEST} × {SMALLEST} cells; give larger images")
    wide = [level for level in levels if level is largest or min(level.height, level.width) >= 2 * SMALLEST]
    for field, distances in _distances(exam, plain, wide).items():
        if fault := _wrong_order(exam, field, distances):
            return fault
    return Finding("ok", "each cell predicts for the points around it, level by level, row by row")


def _changes(plain: DensePredictions, changed: DensePredictions) -> dict[str, Tensor]:
    """Compute how much every prediction ``(A,)`` of the first image has changed, field by field."""
    after = fields(changed)
    changes = {}
    for name, before in fields(plain).items():
        difference = (after[name][0] - before[0]).double().abs().nan_to_num(posinf=0)
        changes[name] = difference.reshape(len(difference), -1).sum(1)
    return changes


def _noise(maps: list[Tensor], level: Level) -> Tensor:
    """Compute how much the values of a level's map vary, ``(1, *, 1, 1)``: noise of this size is as strong as they."""
    x = maps[level.index][:2]
    spread = x.float().std(dim=(0, 2, 3), keepdim=True) if x.shape[-2:].numel() > 1 else x.float().abs()
    return (spread + 0.1 * x.float().std(correction=0) + 1e-3).to(x)


def _wrong_level(exam: Examination, level: Level, changes: dict[str, Tensor], strides: Tensor) -> Finding | None:
    """Find out whether other predictions than those of a level have changed with its map."""
    for field, change in changes.items():
        where = f"{exam.name}.head().{field}"
        mean = {s: float(change[strides == s].mean()) for s in _distinct(strides)}
        strongest = max(mean, key=lambda s: mean[s])
        if mean[strongest] == 0:
            if field == "logits":  # distances may be shut by a ReLU
                expected = f"{field} that depend on features()[{level.index}]"
                fix = "predict from the maps that head() is given, all of them"
                return wrong(expected, "none that does", where=where, fix=fix)
        elif mean[level.declared] < 0.1 * mean[strongest]:
            expected = f"features()[{level.index}] to change {field} of stride {level.declared:g}"
            fix = "concatenate the levels of every field in the order of features()"
            return wrong(expected, f"those of stride {strongest:g}", where=where, fix=fix)
    return None


def _distances(exam: Examination, plain: DensePredictions, levels: list[Level]) -> dict[str, dict[str, float]]:
    """Measure how far from a changed cell predictions change, for each field and each order they may be in.

    Returns:
        Mean distances; 1 for changes anywhere on the level.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for corner in CORNERS[1:3]:  # bottom left and top right: every other order takes one elsewhere
        # 1. Change a cell near this corner of every map, twice, lest one direction meets a ReLU that is shut.
        cells = {level.index: _cell(level, corner) for level in levels}
        once, again = (_changes(plain, exam.head(_with_changed_cells(exam, levels, cells))) for _ in (1, 2))

        # 2. How far away are the predictions that have changed, in each order?
        for field, level in itertools.product(once, levels):
            weight = (once[field] + again[field])[level.members].square().cpu()
            if float(weight.sum()) > 0:
                row, column = cells[level.index]
                cell = torch.tensor([(column + 0.5) * level.stride[0], (row + 0.5) * level.stride[1]])
                for name, there in _orders(level, plain.points[level.members]).items():
                    distance = (there.double().cpu() - cell).norm(dim=1)
                    relative = float((weight * distance).sum() / weight.sum() / distance.mean())
                    found.setdefault(field, {}).setdefault(name, []).append(relative)
    return {field: {name: statistics.fmean(v) for name, v in named.items()} for field, named in found.items()}


def _cell(level: Level, corner: tuple[int, ...]) -> tuple[int, int]:
    """Row and column of a cell near a corner of a map."""
    (x, y), row, column = corner, level.height // 8, level.width // 8
    return (level.height - 1 - row if y > 0 else row), (level.width - 1 - column if x > 0 else column)


def _with_changed_cells(exam: Examination, levels: list[Level], cells: dict[int, tuple[int, int]]) -> list[Tensor]:
    """Copy the maps with strong noise in one cell of each level."""
    changed = [x.clone() for x in exam.small_maps]
    for level in levels:
        row, column = cells[level.index]
        cell = changed[level.index][:, :, row, column]
        cell += 3 * torch.randn_like(cell) * _noise(exam.maps, level)[..., 0, 0]
    return changed


def _orders(level: Level, declared: Tensor) -> dict[str, Tensor]:
    """List where each prediction of a level would be if their order were another, ``(len(declared), 2)`` each."""
    orders = {"as declared": declared}
    anchors, remainder = divmod(len(declared), level.height * level.width)
    if remainder == 0:
        y, x = torch.meshgrid(torch.arange(level.height), torch.arange(level.width), indexing="ij")
        grid = torch.stack([(x + 0.5) * level.stride[0], (y + 0.5) * level.stride[1]], dim=-1)  # (H, W, 2)
        ordered = {"column by column": grid.transpose(0, 1), "bottom up": grid.flip(0), "right to left": grid.flip(1)}
        orders |= {name: g.reshape(-1, 2).repeat_interleave(anchors, 0) for name, g in ordered.items()}
        if anchors > 1:
            orders["anchor by anchor"] = grid.reshape(-1, 2).repeat(anchors, 1)
    return orders


def _wrong_order(exam: Examination, field: str, distances: dict[str, float]) -> Finding | None:
    """Find out which order the predictions are in, if not in the declared one."""
    best = min(distances, key=lambda name: distances[name])
    if distances["as declared"] < 0.75 and distances["as declared"] < distances[best] + 0.1:
        return None
    if best != "as declared" and distances[best] < 0.75:
        got, fix = f"an order that looks like {best}", ORDER_FIXES[best]
    else:
        got = "changes all over the level, as if shuffled"
        fix = "order predictions level by level, row by row, x fastest, the anchors of a cell side by side"
    expected = f"a changed cell to change {field} of points around it"
    return wrong(expected, got, where=f"{exam.name}.head().{field} against its points", fix=fix)


# --- places -----------------------------------------------------------------------------------------------------------

# In which corner (x, y) of the predictions a change shows that was made in a corner of the image.
ORIENTATIONS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "as they are": lambda x, y: (x, y),
    "transposed": lambda x, y: (y, x),
    "mirrored": lambda x, y: (-x, y),
    "upside down": lambda x, y: (x, -y),
    "turned": lambda x, y: (-x, -y),
}


@check("places", after=("order",))
@torch.no_grad()
def places(exam: Examination) -> Finding:
    """Check that a change in a corner of the image changes predictions towards that corner."""
    # 1. The points of the finest level that lie on the first image, as shares of its size.
    plain = exam.predict(exam.small_batch)
    height, width = exam.small_batch.sizes[0]
    finest = min(levels_of(exam, plain), key=lambda level: max(level.stride), default=None)
    if finest is None or min(height / finest.stride[1], width / finest.stride[0]) < SMALLEST:
        return Finding(
            "skipped", f"needs a map of at least {SMALLEST} × {SMALLEST} cells on the image; give larger images"
        )
    shown = finest.members & (plain.points[:, 0] < width) & (plain.points[:, 1] < height)
    xy = plain.points[shown].double() / plain.points.new_tensor([width, height])

    # 2. Change one corner of the image after the other: towards which corner of the predictions do they change?
    towards = dict.fromkeys(ORIENTATIONS, 0.0)
    for x, y in CORNERS:
        changed = exam.small_batch
        patch = changed.images[0, :, _third(height, y), _third(width, x)]
        patch.copy_(1 - patch.round())
        weight = _changes(plain, exam.predict(changed))["logits"][shown].square()
        if float(weight.sum()) > 0:
            centre_x, centre_y = ((weight[:, None] * xy).sum(0) / weight.sum()).tolist()
            for name, orientation in ORIENTATIONS.items():
                corner_x, corner_y = orientation(x, y)
                towards[name] += (centre_x * corner_x + centre_y * corner_y) / len(CORNERS)

    # 3. Which orientation explains it best?
    best = max(towards, key=lambda name: towards[name])
    if towards[best] > towards["as they are"] + 0.05:
        expected, got = (
            "a change in a corner of the image to change predictions there",
            "what looks like images or maps",
        )
        fix = "keep maps as (N, *, H, W) and images as they come"
        return wrong(expected, f"{got} {best}", where=f"{exam.name}, features() and head()", fix=fix)
    return Finding("ok", "a change in a corner of the image changes predictions there")


def _third(n: int, side: int) -> slice:
    """Choose a third of ``n`` pixels, near the beginning (``side`` -1) or near the end (1)."""
    start = n // 10 + (n // 2 if side > 0 else 0)
    return slice(start, start + n // 3)
