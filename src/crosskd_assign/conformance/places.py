"""Checks of where predictions are: their points and their order, found out by shaking the maps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..structures import Batch, DensePredictions
from .examination import Examination, Finding, Skip, wrong

__all__ = ["Level", "levels_of", "order", "places", "points"]

SMALLEST = 4  # cells on a side of a map on which places can be told apart
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # right, down
FIELDS = ("logits", "boxes", "quality", "distribution")


@dataclass(frozen=True)
class Level:
    """A feature map and the predictions of its stride."""

    index: int
    stride: tuple[float, float]  # x, y: image over map
    height: int
    width: int
    members: Tensor  # (A,) bool
    declared: float  # the stride the predictions say they have


def levels_of(e: Examination, predictions: DensePredictions) -> list[Level]:
    """Every map with the predictions whose stride is nearest to its own.

    Left out are maps without any, which cannot be, and maps of a single row or column, whose predictions are not told
    apart by place.
    """
    declared = _distinct(predictions.strides)
    height, width = e.batch.images.shape[-2:]
    levels = []
    for i, (x, stride) in enumerate(zip(e.maps, e.strides, strict=True)):
        step = (width / x.shape[-1], height / x.shape[-2])
        nearest = min(declared, key=lambda s: abs(s - stride))
        if min(x.shape[-2:]) > 1 and 0.6 * min(*step, stride) < nearest < 1.6 * max(*step, stride):
            levels.append(Level(i, step, x.shape[-2], x.shape[-1], predictions.strides == nearest, nearest))
    return levels


def _distinct(x: Tensor) -> list[float]:
    return sorted(set(x.tolist()))


# --- points -----------------------------------------------------------------------------------------------------------


def points(e: Examination) -> Finding:
    """Points cover the image in steps of their strides, and strides are those of the maps."""
    predictions, (height, width) = e.predictions, e.batch.images.shape[-2:]
    where = f"{e.name}.head().points"
    levels = levels_of(e, predictions)
    if not levels or len({level.declared for level in levels}) != len(levels):
        got = f"{[round(s, 2) for s in _distinct(predictions.strides)]}"
        expected = f"strides of the maps, {e.strides}, in pixels"
        raise wrong(expected, got, f"{e.name}.head().strides", "give every prediction the stride of its level")
    if predictions.levels is not None:
        made = torch.cat([level.points(predictions.points.device) for level in predictions.levels])
        if not torch.allclose(made.to(predictions.points), predictions.points, atol=0.01):
            raise wrong(
                "points that levels describe", "others", where, "build predictions with DensePredictions.on_grid(...)"
            )
    for level in levels:
        xy = predictions.points[level.members].double()
        for axis, name, extent in ((0, "x", width), (1, "y", height)):
            _check_axis(xy[:, axis], level.stride[axis], extent, f"{where}, {name} at stride {level.declared:g}")
    return "points cover the image in steps of their strides"


def _check_axis(values: Tensor, stride: float, extent: int, where: str) -> None:
    """One coordinate of the points of one level."""
    distinct = _distinct(values)
    step = statistics.median(b - a for a, b in pairwise(distinct)) if len(distinct) > 1 else stride
    low, high = distinct[0], distinct[-1]
    expected = f"steps of {stride:.3g} pixels within 0…{extent}"
    if high <= 1.5 and len(distinct) > 2:
        raise wrong(
            expected, f"{low:.3g}…{high:.3g}, which looks like fractions", where, "multiply by the image's size"
        )
    if abs(step - 1) < 0.1 and stride > 1.6:
        raise wrong(
            expected, f"{low:g}…{high:g} in steps of 1, which looks like cells", where, "multiply by the stride"
        )
    if not 0.6 * stride < step < 1.6 * stride:
        raise wrong(expected, f"steps of {step:.3g}", where, "use GridLevel.of(map, stride).points()")
    if low < -stride or high > extent + stride or high - low < 0.5 * (extent - 2 * stride):
        fix = "x comes first, then y; use GridLevel.of(map, stride).points()"
        raise wrong(expected, f"{low:.3g}…{high:.3g}", where, fix)


# --- order ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def order(e: Examination) -> Finding:
    """A cell of a map that changes, changes the predictions of points near it, and of no other level."""
    maps, batch = e.pair()
    plain = e.head(maps, batch)
    levels = levels_of(e, plain)
    for level in levels:
        changed = list(maps)
        changed[level.index] = _shaken(maps[level.index])
        _check_level(e, level, _responses(plain, e.head(changed, batch)), plain.strides)
    largest = max(levels, key=lambda level: min(level.height, level.width), default=None)
    if largest is None or min(largest.height, largest.width) < SMALLEST:
        raise Skip(f"needs a map of at least {SMALLEST} × {SMALLEST} cells; give larger images")
    wide = [level for level in levels if level is largest or min(level.height, level.width) >= 2 * SMALLEST]
    offsets = _offsets(e, maps, batch, plain, wide)
    _check_offsets(e, offsets)
    return "each cell speaks for the points around it, level by level, row by row"


def _responses(plain: DensePredictions, changed: DensePredictions) -> dict[str, Tensor]:
    """How much every prediction of every field has changed, ``(A,)``."""
    responses = {}
    for field in FIELDS:
        before, after = getattr(plain, field), getattr(changed, field)
        if before is not None:
            difference = (after[0] - before[0]).double().abs().nan_to_num(posinf=0)
            responses[field] = difference.reshape(len(difference), -1).sum(1)
    return responses


def _shaken(x: Tensor) -> Tensor:
    """A map with as much noise as it has signal."""
    return x + torch.randn_like(x) * _spread(x)


def _spread(x: Tensor) -> Tensor:
    spread = x.float().std(dim=(0, 2, 3), keepdim=True) if x.shape[-2:].numel() > 1 else x.float().abs()
    return (spread + 0.1 * x.float().std(correction=0) + 1e-3).to(x)


def _check_level(e: Examination, level: Level, responses: dict[str, Tensor], strides: Tensor) -> None:
    for field, response in responses.items():
        mean = {s: float(response[strides == s].mean()) for s in _distinct(strides)}
        strongest = max(mean, key=lambda s: mean[s])
        where = f"{e.name}.head().{field}"
        if mean[strongest] == 0:
            if field == "logits":  # distances may be shut by a ReLU
                fix = "predict from the maps that head() is given, all of them"
                raise wrong(f"{field} that depend on features()[{level.index}]", "none that does", where, fix)
        elif mean[level.declared] < 0.1 * mean[strongest]:
            got = f"those of stride {strongest:g}"
            fix = "concatenate the levels of every field in the order of features()"
            raise wrong(f"features()[{level.index}] to change {field} of stride {level.declared:g}", got, where, fix)


def _offsets(
    e: Examination, maps: list[Tensor], batch: Batch, plain: DensePredictions, levels: list[Level]
) -> dict[str, dict[str, float]]:
    """For each field and each order one could mean: how far from a changed cell predictions change; 1: anywhere."""
    totals: dict[str, dict[str, list[float]]] = {}
    for corner in CORNERS:
        cells = {level.index: _cell(level, corner) for level in levels}
        # Twice, lest one direction meets a ReLU that is shut.
        shaken = [_responses(plain, e.head(_with_cells_shaken(maps, cells), batch)) for _ in range(2)]
        for field in shaken[0]:
            response = shaken[0][field] + shaken[1][field]
            for level in levels:
                for name, offset in _offset(level, cells[level.index], plain.points, response).items():
                    totals.setdefault(field, {}).setdefault(name, []).append(offset)
    return {field: {name: statistics.fmean(v) for name, v in named.items()} for field, named in totals.items()}


def _with_cells_shaken(maps: list[Tensor], cells: dict[int, tuple[int, int]]) -> list[Tensor]:
    """Maps with strong noise in one cell each."""
    changed = [x.clone() for x in maps]
    for i, (row, column) in cells.items():
        cell = changed[i][:, :, row, column]
        cell += 3 * torch.randn_like(cell) * _spread(maps[i])[..., 0, 0]
    return changed


def _offset(level: Level, cell: tuple[int, int], points: Tensor, response: Tensor) -> dict[str, float]:
    """Mean distance of changed predictions from a cell, in every order, over that of all predictions of the level."""
    weight = response[level.members].square().cpu()
    if float(weight.sum()) == 0:
        return {}
    row, column = cell
    place = torch.tensor([(column + 0.5) * level.stride[0], (row + 0.5) * level.stride[1]])
    offsets = {}
    for name, there in _orders(level, points[level.members]).items():
        distance = (there.double().cpu() - place).norm(dim=1)
        offsets[name] = float((weight * distance).sum() / weight.sum() / distance.mean())
    return offsets


def _cell(level: Level, corner: tuple[int, int]) -> tuple[int, int]:
    """Row and column of a cell near a corner of a map."""
    (right, down), row, column = corner, level.height // 8, level.width // 8
    return (level.height - 1 - row if down else row), (level.width - 1 - column if right else column)


def _orders(level: Level, declared: Tensor) -> dict[str, Tensor]:
    """Where each prediction of a level would be if their order were another, ``(len(declared), 2)`` each."""
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


FIXES = {
    "column by column": "flatten maps row by row, x fastest: map.flatten(2).transpose(1, 2)",
    "bottom up": "begin with the top row",
    "right to left": "begin with the left column",
    "anchor by anchor": "put the anchors of a cell side by side: (N, anchors, C, H, W).permute(0, 3, 4, 1, 2)",
}


def _check_offsets(e: Examination, offsets: dict[str, dict[str, float]]) -> None:
    for field, named in offsets.items():
        here = named["as declared"]
        best = min(named, key=lambda name: named[name])
        if here < 0.75 and here < named[best] + 0.1:
            continue
        where = f"{e.name}.head().{field} against its points"
        expected = f"a changed cell to change {field} of points around it"
        if best != "as declared" and named[best] < 0.75:
            raise wrong(expected, f"an order that looks like {best}", where, FIXES[best])
        fix = "order predictions level by level, row by row, x fastest, the anchors of a cell side by side"
        raise wrong(expected, "changes all over the level, as if shuffled", where, fix)


# --- places -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def places(e: Examination) -> Finding:
    """What changes in a corner of the image changes predictions towards that corner."""
    batch = e.batch
    plain = e.head(e.adapter.features(batch), batch)
    height, width = batch.sizes[0]
    finest = min(levels_of(e, plain), key=lambda level: max(level.stride), default=None)
    if finest is None or min(height / finest.stride[1], width / finest.stride[0]) < SMALLEST:
        raise Skip(f"needs a map of at least {SMALLEST} × {SMALLEST} cells on the image; give larger images")
    shown = finest.members & (plain.points[:, 0] < width) & (plain.points[:, 1] < height)
    xy = plain.points[shown].double() / plain.points.new_tensor([width, height])
    moved = xy.new_zeros(2, 2)  # how far right and down (rows) changes go, for a cause far right and far down (columns)
    for right, down in CORNERS:
        changed = e.batch
        patch = changed.images[0, :, _third(height, down), _third(width, right)]
        patch.copy_(1 - patch.round())
        weight = _responses(plain, e.head(e.adapter.features(changed), changed))["logits"][shown].square()
        if float(weight.sum()) > 0:
            centre = (weight[:, None] * xy).sum(0) / weight.sum()
            moved += centre[:, None] * xy.new_tensor([2 * right - 1, 2 * down - 1]) / len(CORNERS)
    (rr, rd), (dr, dd) = moved.tolist()
    scores = {"": rr + dd, "transposed": rd + dr, "mirrored": dd - rr, "upside down": rr - dd, "turned": -rr - dd}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > scores[""] + 0.05:
        fix = "keep maps as (N, *, H, W) and images as they come"
        expected = "a change in a corner of the image to change predictions there"
        raise wrong(expected, f"what looks like images or maps {best}", f"{e.name}, features() and head()", fix)
    return "a change in a corner of the image changes predictions there"


def _third(n: int, far: int) -> slice:
    """A third of ``n`` pixels, near the beginning or near the end."""
    start = n // 10 + far * n // 2
    return slice(start, start + n // 3)
