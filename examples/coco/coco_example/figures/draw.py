"""Draw the figures of a run: its curves, its predictions side by side, and the point assigned to each box.

They are twice as large as a README shows them, in colours that colour-blind readers can distinguish (Okabe and Ito's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from coco_example.errors import DataError
from coco_example.figures.names import Names
from crosskd_assign.structures import Detection, Target

_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _YELLOW = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
_LINES = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _YELLOW)
_BOXES = (_SKY, _ORANGE, _GREEN, _YELLOW, _PINK, _BLUE)  # the dark ones, hard to see on photographs, late
_RED, _INK, _GREY = "#E3211C", "#222222", "#767676"
_MARKERS = "osD^Pv*"  # one per pyramid level, finest first
_DPI = 100
_CELL, _GAP, _CAPTION = 480, 14, 36  # pixels
_TITLE: dict[str, Any] = {"fontsize": 15, "fontweight": "bold", "color": _INK, "pad": 7}
_NOTE: dict[str, Any] = {"fontsize": 15, "color": _GREY, "pad": 7}
_MANY_BOXES = 40  # in one cell: from here on, names would hide the picture


@dataclass(frozen=True)
class AssignmentView:
    """One image's one-to-one assignment, ready to draw; all coordinates are pixels of that image."""

    boxes: Tensor  # (G, 4) float, xyxy
    labels: Tensor  # (G,) int64
    points: Tensor  # (M, 2) float, xy of the matched points
    strides: Tensor  # (M,) stride of each point's pyramid level
    targets: Tensor  # (M,) int64, index of each point's box
    fallback: Tensor  # (M,) bool, whether no point of the spatial prior was left for the box
    heat: Tensor  # (H, W) float in 0..1, the task-aware metric, best over boxes and levels


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the loss terms over steps, and AP with and without NMS over epochs.

    Args:
        metrics: Lines of ``metrics_log.read_metrics``. The scores ``ap``, ``ap_nms`` and ``duplicates`` of
            evaluations are drawn where present, all in 0..1.
        path: PNG to write.

    Returns:
        ``path``.
    """
    # 1. Draw the curves.
    figure = Figure(figsize=(16, 6.6), dpi=_DPI)
    panels = figure.subplots(1, 2)
    trained, evaluated = ([line for line in metrics if line.get("kind") == kind] for kind in ("train", "eval"))
    drawn = _draw_losses(panels[0], trained), _draw_scores(panels[1], evaluated)
    # 2. Make room for the legends, then style each panel.
    rows = math.ceil(max(*drawn, 2) / 2)  # of the legends, which stand between title and data
    figure.subplots_adjust(left=0.055, right=0.945, top=0.9 - 0.049 * rows, bottom=0.12, wspace=0.2)
    for axes, title, unit, curves in zip(panels, ("Loss terms", "COCO AP, %"), ("step", "epoch"), drawn, strict=True):
        axes.set_title(title, loc="left", fontsize=19, fontweight="bold", color=_INK, pad=10 + 23.5 * rows)
        axes.set_xlabel(unit, fontsize=16, color=_INK)
        axes.set_xlim(0, 1.03 * max([1.0, *(line[unit] for line in metrics if unit in line)]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
        axes.tick_params(labelsize=15, colors=_INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=1)
        if curves:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=2, fontsize=15, frameon=False)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", fontsize=16, color=_GREY)
    return _save(figure, path)


def draw_predictions(
    path: Path,
    images: Sequence[Tensor],
    columns: Sequence[tuple[str, Sequence[Detection | Target]]],
    class_names: Mapping[int, str],
    score_threshold: float = 0.3,
) -> Path:
    """Draw each image in a row, once per column, with that column's boxes.

    Args:
        path: PNG to write.
        images: (3, H, W) float in 0..1 each, of any sizes.
        columns: Title and one detection or target per image, such as ``("student, no NMS", detections)``.
        class_names: Name of each label; a label without one is shown as its number.
        score_threshold: Detections that score less are not drawn. Targets have no scores and are drawn in full.

    Returns:
        ``path``.

    Raises:
        DataError: If there is no image or no column, or a column has not one entry per image.
    """
    # 1. Check that every column has an entry per image.
    lengths = [len(entries) for _, entries in columns]
    if not images or not columns or any(length != len(images) for length in lengths):
        raise DataError(
            expected="at least one column, each with one entry per image",
            got=f"{len(images)} images and columns of {lengths}",
            where="draw_predictions",
            fix="pass as many detections or targets as images",
        )
    # 2. Draw a row per image.
    figure, cells = _grid([image for image in images for _ in columns], len(columns), footer=0)
    for i, image in enumerate(images):
        for j, (title, entries) in enumerate(columns):
            axes = cells[i * len(columns) + j]
            _show(axes, image)
            count = _draw_boxes(axes, entries[i], class_names, score_threshold)
            axes.set_title(title, loc="left", **_TITLE, parse_math=False)
            axes.set_title(count, loc="right", **_NOTE)
    return _save(figure, path)


def draw_assignments(
    path: Path, images: Sequence[Tensor], views: Sequence[AssignmentView], class_names: Mapping[int, str]
) -> Path:
    """Draw the point assigned to each box, over a heat map of the task-aware metric.

    Args:
        path: PNG to write.
        images: (3, H, W) float in 0..1 each.
        views: One per image.
        class_names: Name of each label.

    Returns:
        ``path``.

    Raises:
        DataError: If there is no image, or not one view per image.
    """
    if not images or len(images) != len(views):
        raise DataError(
            expected="one view per image",
            got=f"{len(images)} images and {len(views)} views",
            where="draw_assignments",
            fix="build an AssignmentView for each image that is drawn",
        )
    # 1. Collect what all images share: levels, the hottest point, the legend.
    strides = sorted({int(stride) for view in views for stride in view.strides.tolist()})
    fallbacks = [int(view.fallback.sum()) for view in views]
    best = max((float(view.heat.max()) for view in views if view.heat.numel()), default=0.0)
    columns = 2 if len(images) in (2, 4) else min(3, len(images))
    markers = _explained_markers(strides, any(fallbacks), best)
    legend_rows = math.ceil(len(markers) / (2 * columns))
    # 2. Draw a cell per image.
    figure, cells = _grid(images, columns, footer=28 * legend_rows + 36)
    for axes, image, view, count in zip(cells, images, views, fallbacks, strict=True):
        _show(axes, image, view.heat, best)
        title = _draw_boxes(axes, {"boxes": view.boxes, "labels": view.labels}, class_names)
        _draw_points(axes, view, strides)
        axes.set_title(title, loc="left", **_TITLE)
        axes.set_title(f"{count} by fallback" if count else "", loc="right", **_NOTE)
    # 3. Explain the markers.
    if markers:
        style = {"fontsize": 14, "frameon": False, "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0)}}
        across = math.ceil(len(markers) / legend_rows)
        figure.legend([*markers.values()], [*markers], loc="lower center", ncols=across, **style)
    return _save(figure, path)


def _draw_losses(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> int:
    """Draw each loss term, faint as recorded and bold as smoothed; return the number of terms."""
    # 1. Draw the terms.
    terms = list(dict.fromkeys(name for line in lines for name in line["losses"]))
    lowest, highest = math.inf, 0.0
    for i, name in enumerate(terms):
        pairs = [(line["step"], line["losses"][name]) for line in lines if line["losses"].get(name) is not None]
        if not pairs:
            continue
        steps, values = np.array(pairs, dtype=float).T
        colour, dashes = _LINES[i % len(_LINES)], "-" if i < len(_LINES) else "--"
        smooth = _smooth(values)
        axes.plot(steps, values, color=colour, alpha=0.25, lw=1)
        axes.plot(steps, smooth, dashes, color=colour, lw=2.6, label=name, marker="o" if len(steps) == 1 else "")
        lowest, highest = min([lowest, *smooth]), max([highest, *smooth])
    # 2. Scale the axis: logarithmic where positive values span more than a decade.
    if 0 < lowest < highest / 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    elif lowest >= 0:
        axes.set_ylim(bottom=0)
    return len(axes.get_legend_handles_labels()[1])


def _draw_scores(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> int:
    """Draw AP with and without NMS, and duplicates against a second axis; return the number of curves."""

    def curve(on: Axes, key: str, label: str, factor: float, digits: int, **style: Any) -> float:
        pairs = [(line["epoch"], factor * line["scores"][key]) for line in lines if line["scores"].get(key) is not None]
        if not pairs:
            return 0.0
        on.plot(*np.array(pairs, dtype=float).T, **style)
        axes.plot([], [], label=f"{label}, last {pairs[-1][1]:.{digits}f}", **style)
        return float(max(score for _, score in pairs))

    # 1. Draw AP.
    best = max(
        curve(axes, "ap_nms", "with NMS", 100, 1, color=_ORANGE, marker="s", ms=8, lw=2.6),
        curve(axes, "ap", "without NMS", 100, 1, color=_BLUE, marker="o", ms=8, lw=2.6),
    )
    axes.set_ylim(0, 1.06 * best or 1)
    # 2. Draw duplicates on the right.
    twin = axes.twinx()
    most = curve(twin, "duplicates", "duplicates", 1, 2, color=_GREY, marker="D", ms=6, ls=":")
    twin.set(ylim=(0, 1.06 * most or 1), visible=bool(twin.get_lines()))
    twin.set_ylabel("duplicates per found object", fontsize=16, color=_GREY)
    twin.tick_params(labelsize=15, colors=_GREY, length=0)
    twin.spines[:].set_visible(False)
    return len(axes.get_legend_handles_labels()[1])


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over a window of a twentieth of the (S,) values, centred, shorter at the ends."""
    window = np.ones(1 + 2 * (len(values) // 40))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _grid(images: Sequence[Tensor], columns: int, footer: int) -> tuple[Figure, list[Axes]]:
    """Lay out one cell per image, row by row, all of one width and each as high as its image requires.

    Images that are very thin are stretched: a strip a thousand times as high as wide would fill the memory.
    """
    # 1. Compute the size of the figure in pixels.
    heights = [_CELL * min(max(image.shape[-2] / image.shape[-1], 1 / 32), 8) for image in images]
    rows = [heights[i : i + columns] for i in range(0, len(heights), columns)]
    width = columns * (_CELL + _GAP) + _GAP
    height = round(sum(max(row) + _CAPTION + _GAP for row in rows)) + footer
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    # 2. Add the cells from top to bottom.
    cells, top = [], float(height)
    for row in rows:
        top -= _CAPTION
        for j, h in enumerate(row):
            left = _GAP + j * (_CELL + _GAP)
            cells.append(figure.add_axes((left / width, (top - h) / height, _CELL / width, h / height)))
        top -= max(row) + _GAP
    return figure, cells


def _show(axes: Axes, image: Tensor, heat: Tensor | None = None, best: float = 0.0) -> None:
    """Fill the cell with the (3, H, W) image, so that data coordinates are its pixels.

    With (H, W) heat, darken it and lay the heat over it, the more opaque the nearer to ``best``.
    """
    height, width = image.shape[-2:]
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    if heat is not None:
        share = (heat.detach().float() / max(best, 1e-12)).clamp(0, 1).cpu().numpy()
        opacity = 0.9 * np.sqrt(share)[..., None]
        pixels = 0.4 * pixels * (1 - opacity) + colormaps["inferno"](0.15 + 0.85 * share)[..., :3] * opacity
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="bicubic")
    axes.set_axis_off()


def _draw_boxes(
    axes: Axes, entry: Mapping[str, Any], class_names: Mapping[int, str], score_threshold: float = 0.0
) -> str:
    """Draw boxes in their classes' colours with names and scores, the best on top; return their number as text."""
    # 1. Order the boxes: the best is drawn last.
    boxes, labels = entry["boxes"].tolist(), entry["labels"].tolist()
    scores = entry["scores"].tolist() if "scores" in entry else [math.inf] * len(boxes)
    shown = sorted((i for i, score in enumerate(scores) if score >= score_threshold), key=scores.__getitem__)
    _, width, _, _ = axes.get_images()[0].get_extent()
    colours = [_BOXES[(label - 1) % len(_BOXES)] for label in labels]
    for i in shown:
        # 2. Draw the box.
        x1, y1, x2, y2 = boxes[i]
        halo = [withStroke(linewidth=3.6, foreground="#00000066")]  # keeps the colour apart from a light picture's
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[i], lw=2.2, path_effects=halo))
    names = Names(axes)
    for rank, i in enumerate(reversed(shown if len(shown) <= _MANY_BOXES else [])):
        # 3. Name it, the best first and on top, unless names would hide a crowd.
        x1, y1, x2, _ = boxes[i]
        name = class_names.get(labels[i], str(labels[i]))
        text = f"{name} {scores[i]:.2f}" if "scores" in entry else name
        # at the other corner where the text would leave the picture
        x, ha = (x2, "right") if x1 > 0.75 * width else (x1, "left")
        va = "top" if y1 < 0.06 * width else "bottom"
        ink = "white" if colours[i] in (_GREEN, _BLUE) else _INK
        style: dict[str, Any] = {
            "fontsize": 11.5 if len(shown) <= 15 else 10,
            "color": ink,
            "zorder": 4 - (rank + 1) / 99,
        }
        tag = {"facecolor": colours[i], "edgecolor": "none", "pad": 1.2}
        names.add(axes.text(x, y1, text, ha=ha, va=va, bbox=tag, clip_on=True, parse_math=False, **style))
    return f"{len(shown)} box{'es' * (len(shown) != 1)}"


def _draw_points(axes: Axes, view: AssignmentView, strides: Sequence[int]) -> None:
    """Draw each point, in the shape and size of its level, on a line from the centre of its box."""
    centres = ((view.boxes[:, :2] + view.boxes[:, 2:]) / 2).tolist()
    per_point = (view.points, view.strides, view.targets, view.fallback)
    for (x, y), stride, target, fallback in zip(*(values.tolist() for values in per_point), strict=True):
        axes.plot([centres[target][0], x], [centres[target][1], y], color="white", linewidth=1.5, zorder=4)
        axes.plot([x], [y], **_marker(None if fallback else strides.index(int(stride))), zorder=5)


def _marker(level: int | None) -> dict[str, Any]:
    """Choose the marker of a point on a pyramid level, 0 the finest, or of a fallback."""
    if level is None:
        outline = [withStroke(linewidth=6, foreground="white")]
        return {"marker": "x", "ms": 11, "color": _RED, "mew": 3.2, "ls": "none", "path_effects": outline}
    shape = _MARKERS[level % len(_MARKERS)]
    return {"marker": shape, "ms": 7 + 1.8 * level, "mfc": "white", "mec": "black", "mew": 1.5, "ls": "none"}


def _explained_markers(strides: Sequence[int], fallback: bool, best: float) -> dict[str, Any]:
    """List the legend entries of :func:`draw_assignments`; the heat's is a gradient, a tuple of patches."""
    markers: dict[str, Any] = {f"stride {s}": Line2D([], [], **_marker(level)) for level, s in enumerate(strides)}
    if fallback:
        markers["fallback: prior had none left"] = Line2D([], [], **_marker(None))
    if best > 0:
        gradient = tuple(Patch(color=colormaps["inferno"](0.15 + 0.85 * i / 15)) for i in range(16))
        markers[f"task-aware metric, 0 to {best:.2f}"] = gradient
    return markers


def _save(figure: Figure, path: Path) -> Path:
    """Write the PNG in one piece: a reader finds the old picture or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
