"""Candidates against a loop over all points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd_assign import GridLevel
from crosskd_assign.assignment.candidates import Ints, grid_candidates, nearest_free_point
from crosskd_assign.assignment.lattices import grid_pairs
from crosskd_assign.assignment.points import point_pairs
from crosskd_assign.assignment.strips import Strips
from tests.makers.builders import grid
from tests.makers.priors import all_pairs

EIGHTHS = st.integers(1, 160).map(lambda n: n / 8)  # floats that every arithmetic holds exactly


@st.composite
def any_level(draw):
    """A grid whose steps differ from its stride and from each other, starting anywhere."""
    stride = draw(st.sampled_from([4.0, 8.0, 13.0, 32.0]))
    step = draw(st.sampled_from([(stride, stride), (stride, stride / 2)]) | st.tuples(EIGHTHS, EIGHTHS))
    origin = draw(st.sampled_from([(0.0, 0.0), (stride / 2, stride / 2), (-3.0, 5.25)]))
    return GridLevel(draw(st.integers(1, 6)), draw(st.integers(1, 6)), stride, step, origin, draw(st.integers(1, 3)))


@st.composite
def any_boxes(draw):
    """Boxes whose borders often hit points, partly or wholly outside the image, from half a pixel to huge."""
    whole = st.integers(-80, 240).map(lambda n: n / 2)
    anything = st.floats(-100, 200, width=32)
    corner = st.tuples(whole, whole) | st.tuples(anything, anything)
    side = st.sampled_from([0.5, 3.0, 8.0, 16.0, 24.0, 500.0])
    boxes = draw(st.lists(st.tuples(corner, side, side), min_size=1, max_size=5))
    return torch.tensor([(x, y, x + w, y + h) for (x, y), w, h in boxes])


def prior_by_loop(box: list[float], levels: Sequence[GridLevel], radius: float) -> list[int]:
    """Numbers of the points inside ``box`` and within ``radius`` strides of its centre, one point after the other."""
    x1, y1, x2, y2 = box
    inside, number = [], 0
    for level in levels:
        reach = radius * level.stride
        for row in range(level.height):
            for column in range(level.width):
                x, y = level.origin[0] + column * level.step[0], level.origin[1] + row * level.step[1]
                in_box = x1 < x < x2 and y1 < y < y2
                near = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
                inside += [number + k for k in range(level.anchors) if in_box and near]
                number += level.anchors
    return inside


Lists = list[list[int]]


def by_pairs(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> Lists:
    return per_box(*grid_pairs(boxes.numpy(), levels, radius), len(boxes))


def by_windows(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> Lists:
    point, valid = grid_candidates(boxes, levels, radius)
    assert point.dtype == torch.int64
    assert (point[~valid] == 0).all()
    return [row[keep].tolist() for row, keep in zip(point, valid, strict=True)]


def by_points(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> Lists:
    return per_box(*point_pairs(boxes.numpy(), *points_of(levels), radius), len(boxes))


def by_strips(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> Lists:
    points, strides = (x.double().numpy() for x in points_of(levels))
    return per_box(*Strips.of(points, strides).pairs(boxes.numpy(), radius), len(boxes))


def points_of(levels: Sequence[GridLevel]) -> tuple[Tensor, Tensor]:
    points = torch.cat([level.points() for level in levels])
    return points, torch.cat([torch.full((len(level),), float(level.stride)) for level in levels])


def per_box(box: Ints, point: Ints, boxes: int) -> Lists:
    assert (np.diff(box) >= 0).all()
    assert box.dtype == point.dtype == np.int64
    return [point[box == b].tolist() for b in range(boxes)]


WAYS = [by_pairs, by_windows, by_points, by_strips]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=100)
@given(
    boxes=any_boxes(), levels=st.lists(any_level(), min_size=1, max_size=3), radius=st.sampled_from([0.5, 1, 1.5, 2.5])
)
@example(boxes=torch.tensor([[0.0, 0, 24, 24]]), levels=[GridLevel(3, 3, 8, (8, 8), (0, 0))], radius=1.5)
def test_candidates_are_exactly_the_points_inside_the_prior(way, boxes, levels, radius):
    expected = [prior_by_loop(box, levels, radius) for box in boxes.double().tolist()]
    assert way(boxes, levels, radius) == expected  # ascending, too


def test_the_number_of_candidates_does_not_grow_with_the_image():
    boxes = torch.tensor([[0.0, 0, 50, 50], [3, 3, 1000, 1000]])
    small, _ = grid_candidates(boxes, grid(64), 1.5)
    large, _ = grid_candidates(boxes, grid(4096), 1.5)
    assert small.shape == large.shape
    assert small.shape[1] <= 3 * 5**2


@pytest.mark.parametrize("way", WAYS)
def test_boxes_beyond_all_measure_have_no_candidates(way):
    boxes = torch.tensor([[0.0, 0, 3e38, 9], [3e38] * 4, [-3e38, -3e38, -1e38, -1e38]])
    assert way(boxes, grid(64), 1.5) == [[], [], []]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_boxes_that_are_no_boxes_have_no_candidates_on_a_device(value):
    """There boxes are met before the host has checked them."""
    assert by_windows(torch.tensor([[0.0, 0, value, 9], [value] * 4]), grid(64), 1.5) == [[], []]


@pytest.mark.parametrize("way", WAYS)
def test_no_boxes_have_no_candidates(way):
    assert way(torch.zeros(0, 4), grid(64), 1.5) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_radius_of_zero_admits_no_point_not_even_the_centre(way):
    assert way(torch.tensor([[0.0, 0, 8, 8]]), grid(64), 0.0) == [[]]


@given(steps=st.tuples(st.integers(1, 300), st.integers(1, 300)), column=st.integers(0, 9), row=st.integers(0, 9))
def test_a_point_on_the_border_of_a_box_is_outside_for_steps_that_no_float_holds(steps, column, row):
    step = (steps[0] / 10, steps[1] / 10)
    level = GridLevel(10, 10, 30.0, step, (0.0, 0.0))
    x, y = level.points()[row * 10 + column].tolist()
    boxes = torch.tensor([[x, y, x + 40, y + 40], [x - 40, y - 40, x, y]])
    expected = per_box(*all_pairs(boxes.numpy(), *points_of([level]), 1.5), len(boxes))
    for way in WAYS:
        assert way(boxes, [level], 1.5) == expected


# --- nearest free point -----------------------------------------------------------------------------------------------


def test_the_nearest_free_point_skips_taken_ones_and_prefers_the_lower_index():
    points = np.array([[0.0, 0], [4, 0], [0, 4], [4, 4], [9, 9]])
    center = np.array([2.0, 2])
    taken: list[int] = []
    for expected in (0, 1, 2, 3, 4, -1):
        assert nearest_free_point(points, center, np.array(taken, dtype=np.int64)) == expected
        taken.append(expected)
