"""Pictures are read back and looked at where something must be: on an edge, a dot, a curve."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_example.figures.draw import AssignmentView, draw_assignments, draw_curves, draw_predictions
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

SKY, ORANGE, GREEN, BLUE = (86, 180, 233), (230, 159, 0), (0, 158, 115), (0, 114, 178)  # boxes of class 1, 2, 3
RED, GREY, WHITE = (227, 33, 28), (118, 118, 118), (255, 255, 255)
CELL, GAP, CAPTION = 480, 14, 36
NAMES = {1: "cat", 2: "dog", 3: r"$\nomaths$"}
NOTHING = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def read(path: Path) -> NDArray[np.int16]:
    """The PNG's pixels, (H, W, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB")).astype(np.int16)


def close(pixels: NDArray[np.int16], colour: tuple[int, int, int], tolerance: int = 12) -> NDArray[np.bool_]:
    return np.asarray(np.abs(pixels - np.array(colour, dtype=np.int16)).max(-1) <= tolerance)


def count(pixels: NDArray[np.int16], colour: tuple[int, int, int]) -> int:
    return int(close(pixels, colour).sum())


def cell(pixels: NDArray[np.int16], row: int, column: int, height: int) -> NDArray[np.int16]:
    """The image part of a cell in a grid of cells of one height."""
    top, left = row * (CAPTION + height + GAP) + CAPTION, GAP + column * (CELL + GAP)
    return pixels[top : top + height, left : left + CELL]


def boxes(*rows: tuple[float, float, float, float, int, float]) -> dict[str, torch.Tensor]:
    """A detection from (x1, y1, x2, y2, label, score)."""
    table = torch.tensor(rows)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


def grey_image(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 0.5)


def test_boxes_lie_where_they_should_in_their_colours(tmp_path):
    # 240 px of the image are 480 px of the picture
    images = [grey_image(120, 240), grey_image(120, 240)]
    truth = {"boxes": torch.tensor([[20.0, 40, 100, 100]]), "labels": torch.tensor([1])}
    found = [boxes((20, 40, 100, 100, 2, 0.9), (140, 40, 220, 100, 3, 0.29)), NOTHING]
    path = draw_predictions(tmp_path / "a/b.png", images, [("truth", [truth, truth]), ("student", found)], NAMES)
    assert path == tmp_path / "a/b.png"
    pixels = read(path)
    assert pixels.shape == (2 * (CAPTION + 240 + GAP), 2 * (CELL + GAP) + GAP, 3)
    for row, column, colour in [(0, 0, SKY), (1, 0, SKY), (0, 1, ORANGE)]:
        part = cell(pixels, row, column, 240)
        for y, x in [(140, 40), (140, 200), (200, 120), (80, 180)]:  # the middles of the sides, in picture pixels
            assert close(part[y - 1 : y + 2, x - 1 : x + 2], colour).any(), (row, column, y, x)
        assert abs(part[140, 120] - 128).max() <= 1  # inside, the image
    assert count(cell(pixels, 0, 1, 240), GREEN) == 0  # scores 0.29, below the threshold
    assert len(np.unique(cell(pixels, 1, 1, 240).reshape(-1, 3), axis=0)) == 1  # no box, nothing but the image


def test_threshold_and_order_of_drawing(tmp_path):
    image, box = grey_image(240, 240), (40, 60, 200, 200)
    found = boxes((*box, 2, 0.9), (*box, 1, 0.5), (*box, 3, 0.1))

    def side(threshold: float) -> NDArray[np.int16]:
        path = draw_predictions(tmp_path / "a.png", [image], [("x", [found])], NAMES, score_threshold=threshold)
        return cell(read(path), 0, 0, CELL)[200:300, 76:85]

    assert count(side(0.05), ORANGE) >= 100  # the best lies on top
    assert count(side(0.05), SKY) == count(side(0.05), GREEN) == 0
    assert count(side(0.95), ORANGE) == 0


def test_tags_stay_inside_the_picture_and_are_plain_text(tmp_path):
    found = boxes((20, 120, 60, 200, 3, 0.9), (200, 120, 230, 200, 3, 0.9))
    path = draw_predictions(tmp_path / "a.png", [grey_image(240, 240)], [(NAMES[3], [found])], NAMES)
    above = cell(read(path), 0, 0, CELL)[222:238]  # the tags are wider than the boxes
    assert [count(part, GREEN) > 50 for part in (above[:, :36], above[:, 124:160])] == [False, True]
    assert [count(part, GREEN) > 50 for part in (above[:, 360:396], above[:, 464:])] == [True, False]


def test_rows_of_different_shapes_and_a_crowd(tmp_path, caplog):
    crowd = boxes(*[(2.0 * i, 10, 2 * i + 30, 60, 1 + i % 7, 0.9) for i in range(45)])
    few = {name: values[:4] for name, values in crowd.items()}
    images = [grey_image(100, 200), torch.rand(3, 300, 150, generator=torch.Generator().manual_seed(0)) * 3 - 1]
    path = draw_predictions(tmp_path / "a.png", images, [("everything", [crowd, few])], {})
    pixels = read(path)
    assert pixels.shape == ((CAPTION + 240 + GAP) + (CAPTION + 960 + GAP), CELL + 2 * GAP, 3)
    assert count(pixels[:CAPTION], (34, 34, 34)) > 50  # a title in ink
    assert not caplog.records  # matplotlib would complain of colours outside 0..1


def test_a_strip_is_stretched_and_not_drawn_in_its_proportions(tmp_path):
    for height, width in ((2, 3000), (3000, 2), (1, 1)):
        found = {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([1])}
        path = draw_predictions(tmp_path / "a.png", [torch.rand(3, height, width)], [("a", [found])], {1: "a"})
        with Image.open(path) as picture:
            assert max(picture.size) < 6000  # 3,000 times as high as wide would be gigabytes


@pytest.mark.parametrize("top", [0, 60, 219])  # at the upper edge, inside, and with no room below
def test_the_name_of_a_duplicate_can_be_read(tmp_path, top):
    found = boxes((60, top, 180, top + 20, 2, 0.9), (64, top, 184, top + 20, 1, 0.8), (60, top, 180, top + 20, 3, 0.7))

    def tags(shown: list[int]) -> list[int]:
        """Columns in which the tag of each class shows, which is higher than a side of a box is thick."""
        part = {key: values[shown] for key, values in found.items()}
        path = draw_predictions(tmp_path / "a.png", [grey_image(240, 240)], [("x", [part])], {})
        pixels = cell(read(path), 0, 0, CELL)
        windows = [sliding_window_view(close(pixels, colour), 12, axis=0) for colour in (ORANGE, SKY, GREEN)]
        return [int(window.all(-1).any(0).sum()) for window in windows]

    alone = np.sum([tags([i]) for i in range(3)], axis=0)
    assert (alone > 10).all()
    assert (tags([0, 1, 2]) >= 0.75 * alone).all()


@pytest.mark.parametrize(("number", "has_names"), [(40, True), (41, False)])
def test_names_give_way_to_a_crowd(tmp_path, number, has_names):
    found = boxes(*[(150.0, 150, 200, 200, 1, 0.9)] * number)
    path = draw_predictions(tmp_path / "a.png", [grey_image(240, 240)], [("x", [found])], NAMES)
    above = cell(read(path), 0, 0, CELL)[280:295, 300:400]  # where a tag stands
    assert (count(above, SKY) > 200) == has_names


def assignment(**changes: torch.Tensor) -> AssignmentView:
    """Two boxes of a 240 px image; the first has a point of stride 8, the second one of stride 32."""
    heat = torch.zeros(240, 240)
    heat[60:80, 60:80] = 0.5
    fields = {
        "boxes": torch.tensor([[30.0, 30, 110, 110], [130, 130, 230, 230]]),
        "labels": torch.tensor([1, 2]),
        "points": torch.tensor([[100.0, 100], [150, 150]]),
        "strides": torch.tensor([8.0, 32.0]),
        "targets": torch.tensor([0, 1]),
        "fallback": torch.tensor([False, False]),
        "heat": heat,
    }
    return AssignmentView(**(fields | changes))


def test_assignments_show_boxes_points_lines_and_heat(tmp_path):
    path = draw_assignments(tmp_path / "a.png", [torch.ones(3, 240, 240)], [assignment()], NAMES)
    pixels = read(path)
    assert pixels.shape == (CAPTION + CELL + GAP + 28 * 2 + 36, CELL + 2 * GAP, 3)
    part = cell(pixels, 0, 0, CELL)
    assert close(part[140, 59:62], SKY).any()
    assert close(part[360, 259:262], ORANGE).any()
    assert abs(part[20, 20] - 102).max() <= 2  # darkened to 0.4 of white
    assert count(part[198:203, 198:203], WHITE) == 25  # the dot of the first box
    assert close(part[170, 170], WHITE).any()  # the line from the first box's centre (140, 140) to its point
    assert part[130, 130].min() > 102 + 20  # hot: the colour map's bright end
    small, large = count(part[185:215, 185:215], WHITE), count(part[280:320, 280:320], WHITE)
    assert large > 1.9 * small  # a coarser level has a larger marker
    assert count(part, RED) == 0
    assert count(pixels[-92:], (0, 0, 0)) > 50  # a legend below


def test_fallback_points_are_red_crosses(tmp_path):
    view = assignment(fallback=torch.tensor([True, False]))
    part = cell(read(draw_assignments(tmp_path / "a.png", [torch.ones(3, 240, 240)], [view], NAMES)), 0, 0, CELL)
    assert close(part[200, 200], RED).all()
    assert count(part[190:211, 190:211], RED) > 40
    assert count(part[290:311, 290:311], RED) == 0


def test_points_belong_to_the_boxes_that_targets_names(tmp_path):
    view = assignment(targets=torch.tensor([1, 0]))
    part = cell(read(draw_assignments(tmp_path / "a.png", [torch.ones(3, 240, 240)], [view], NAMES)), 0, 0, CELL)
    assert close(part[330, 330], WHITE)  # from (360, 360), the second box's centre, to the first point
    assert close(part[165, 165], WHITE)  # from (140, 140), the first box's centre, to the second point


@pytest.mark.parametrize("number", [1, 4, 5])
def test_assignments_of_several_images_and_of_none_without_boxes(tmp_path, number):
    empty = {"boxes": (0, 4), "labels": (0,), "points": (0, 2), "strides": (0,), "targets": (0,), "fallback": (0,)}
    nothing = {name: torch.zeros(shape) for name, shape in empty.items()}
    view = assignment(**nothing, heat=torch.zeros(240, 240))
    path = draw_assignments(tmp_path / "a.png", [grey_image(240, 240)] * number, [view] * number, NAMES)
    columns = {1: 1, 4: 2, 5: 3}[number]
    rows = math.ceil(number / columns)
    pixels = read(path)
    assert pixels.shape == (rows * (CAPTION + CELL + GAP) + 36, columns * (CELL + GAP) + GAP, 3)
    assert np.ptp(cell(pixels, 0, 0, CELL)) == 0  # the darkened image, nothing on it
    assert abs(cell(pixels, rows - 1, (number - 1) % columns, CELL)[5, 5] - 51).max() <= 1
    every = draw_assignments(tmp_path / "b.png", [grey_image(240, 240)] * number, [assignment()] * number, NAMES)
    assert count(read(every), ORANGE) > number * 500


def train_line(step: int, **losses: float | None) -> dict[str, object]:
    return {"kind": "train", "step": step, "epoch": step / 100, "losses": losses}


def eval_line(epoch: float, **scores: float | None) -> dict[str, object]:
    return {"kind": "eval", "step": int(epoch * 100), "epoch": epoch, "scores": scores}


def halves(pixels: NDArray[np.int16], top: int = 128) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """The data areas of both panels, below a legend of two rows."""
    assert pixels.shape == (660, 1600, 3)
    return pixels[top:580, 90:740], pixels[top:580, 867:1512]


def test_curves_of_a_whole_run(tmp_path):
    metrics: list[dict[str, object]] = [{"kind": "event", "step": 0, "message": "hello"}]
    metrics += [train_line(step, a=10 / step, b=1 / step) for step in range(1, 400, 5)]
    metrics += [eval_line(e, ap=0.1 * e, ap_nms=0.1 * e + 0.02, duplicates=0.3 / e) for e in range(1, 5)]
    path = draw_curves(metrics, tmp_path / "curves.png")
    assert path == tmp_path / "curves.png"
    left, right = halves(read(path))
    for area, colour in [(left, BLUE), (left, ORANGE), (right, BLUE), (right, ORANGE), (right, GREY)]:
        assert count(area, colour) > 200
    rows, columns = np.nonzero(close(right, BLUE))
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # AP rises from left to right
    rows, columns = np.nonzero(close(right, GREY))
    assert np.corrcoef(rows, columns)[0, 1] > 0.5  # duplicates fall


def test_scores_that_are_missing_leave_no_curve(tmp_path):
    metrics = [eval_line(e, ap=0.1 * e, ap_nms=None) for e in range(1, 5)]
    left, right = halves(read(draw_curves(metrics, tmp_path / "a.png")))
    assert count(right, BLUE) > 200
    assert count(right, ORANGE) == 0
    assert count(right, GREY) == 0
    assert count(read(tmp_path / "a.png")[:, 1512:], GREY) == 0  # nor an axis for it
    assert count(left, GREY) > 50  # "nothing yet"


@pytest.mark.parametrize(
    ("metrics", "left_colours", "right_colours"),
    [
        ([], {GREY}, {GREY}),
        ([train_line(1, a=1.0)], {BLUE}, {GREY}),
        ([train_line(1, a=1.0, b=None)], {BLUE}, {GREY}),
        ([train_line(1, a=None)], {GREY}, {GREY}),
        ([train_line(10, a=1.0), train_line(20, a=0.5, b=0.0)], {BLUE, ORANGE}, {GREY}),
        ([train_line(10, a=-1.0), train_line(20, a=2.0)], {BLUE}, {GREY}),
        ([eval_line(1, ap=0.25)], {GREY}, {BLUE}),
        ([eval_line(1, ap=0.0, ap_nms=0.0)], {GREY}, {BLUE, ORANGE}),
        ([eval_line(1, ap=0.2, duplicates=0.0)], {GREY}, {BLUE, GREY}),
        ([eval_line(1, other=0.3)], {GREY}, {GREY}),
    ],
)
def test_curves_with_next_to_nothing(tmp_path, metrics, left_colours, right_colours):
    left, right = halves(read(draw_curves(metrics, tmp_path / "a.png")), top=98)  # one row
    colours = (BLUE, ORANGE, GREY)
    assert {colour for colour in colours if count(left, colour) > 8} == left_colours
    assert {colour for colour in colours if count(right, colour) > 8} == right_colours


def test_a_noisy_loss_is_smoothed_without_lag(tmp_path):
    noisy = [train_line(step, a=1.0 + 0.5 * (-1) ** step + (step > 100)) for step in range(1, 201)]
    left, _ = halves(read(draw_curves(noisy, tmp_path / "a.png")))
    rows, columns = np.nonzero(close(left, BLUE))
    levels = [rows[(columns > low) & (columns < low + 100)] for low in (100, 450)]
    assert all(np.ptp(level) < 40 for level in levels)  # not the noise, which is a fifth of the axis
    assert levels[0].mean() - levels[1].mean() > 120  # the step from 1 to 2
    step = columns[np.abs(rows - (levels[0].mean() + levels[1].mean()) / 2) < 10]
    assert abs(step.mean() - 650 * 100 / 206) < 15  # half way up at step 100


def test_a_picture_is_replaced_in_one_piece(tmp_path, monkeypatch):
    path = draw_curves([train_line(1, a=1.0)], tmp_path / "a.png")
    before = path.read_bytes()
    assert draw_curves([train_line(1, a=1.0)], path).read_bytes() == before  # the same numbers, the same file

    def full_disk(_: Figure, target: Path, **options: object) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw_curves([], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_mistakes_are_explained(tmp_path):
    image = grey_image(8, 8)
    one: list[tuple[str, list[dict[str, torch.Tensor]]]] = [("x", [NOTHING])]
    for images, columns in [([], one), ([image], one[:0]), ([image], [*one, ("y", [])]), ([image] * 2, one)]:
        with pytest.raises(ValueError, match=r"Expected at least one column.*Fix:"):
            draw_predictions(tmp_path / "a.png", images, columns, NAMES)
    for images in ([], [image]):
        with pytest.raises(ValueError, match=r"Expected one view per image.*Fix:"):
            draw_assignments(tmp_path / "a.png", images, [], NAMES)
    assert not (tmp_path / "a.png").exists()
