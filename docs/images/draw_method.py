"""Draw the picture of the method: `python docs/images/draw_method.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

mpl.use("agg")

import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart; dark on light in either theme.
STUDENT, TEACHER, LOSS = "#0072B2", "#E69F00", "#444444"
WIDTH, HEIGHT = 1.9, 0.8


def box(axes: Axes, x: float, y: float, text: str, colour: str, *, dashed: bool = False, width: float = WIDTH) -> None:
    """Draw a box whose left edge is at ``x`` and whose middle is at ``y``."""
    shape = FancyBboxPatch(
        (x, y - HEIGHT / 2),
        width,
        HEIGHT,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor=mpl.colors.to_rgba(colour, 0.14),
        edgecolor=colour,
        linewidth=2,
        linestyle="--" if dashed else "-",
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=12, color="#111111")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "mutation_scale": 16})


def main() -> None:
    """Draw the picture beside this file."""
    figure, axes = plt.subplots(figsize=(12, 4.3), layout="constrained")
    top, middle, bottom = 3.4, 2.0, 0.6

    # 1. The student's row: what remains after training.
    box(axes, 0, middle, "images", "#777777", width=1.2)
    box(axes, 2.1, top, "student:\nbackbone, neck", STUDENT)
    box(axes, 5.0, top, "student's head", STUDENT)
    box(axes, 7.9, top, "one point\nan object", LOSS, width=1.7)
    box(axes, 10.6, top, "one-to-one losses", LOSS, width=2.2)
    arrow(axes, (1.25, middle + 0.2), (2.05, top - 0.2), STUDENT)
    arrow(axes, (4.05, top), (4.95, top), STUDENT)
    arrow(axes, (6.95, top), (7.85, top), STUDENT)
    arrow(axes, (9.65, top), (10.55, top), LOSS)

    # 2. The teacher's row.
    box(axes, 2.1, bottom, "teacher:\nbackbone, neck", TEACHER, dashed=True)
    box(axes, 5.0, (middle + bottom) / 2, "teacher's head\n(frozen, twice)", TEACHER, dashed=True)
    box(axes, 10.6, (middle + bottom) / 2, "distillation losses", LOSS, width=2.2)
    arrow(axes, (1.25, middle - 0.2), (2.05, bottom + 0.2), TEACHER)
    arrow(axes, (4.05, bottom), (4.95, 1.1), TEACHER)
    arrow(axes, (3.1, top - 0.45), (4.95, 1.5), STUDENT)
    arrow(axes, (6.95, 1.5), (10.55, 1.5), STUDENT)
    arrow(axes, (6.95, 1.1), (10.55, 1.1), TEACHER)
    axes.text(8.75, 1.68, "its predictions on the student's features", ha="center", fontsize=10.5, color=STUDENT)
    axes.text(8.75, 0.78, "its predictions on its own features", ha="center", fontsize=10.5, color="#8A5F00")
    axes.text(
        0,
        4.25,
        "blue: what remains after training, and needs no NMS    dashed: the frozen teacher, in training only",
        fontsize=10.5,
    )

    # 3. The file.
    axes.set_xlim(-0.1, 13.0)
    axes.set_ylim(0.0, 4.45)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("method.png"), dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
