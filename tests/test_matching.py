"""Candidates against a loop over all points, matchings against all matchings there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import linear_sum_assignment

from crosskd_assign import GridLevel
from crosskd_assign.matching import (
    Floats,
    Ints,
    grid_candidates,
    match_exact,
    match_greedy,
    nearest_free_point,
    point_candidates,
)
from tests.builders import grid

# --- candidates -------------------------------------------------------------------------------------------------------

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


@settings(max_examples=300)
@given(
    boxes=any_boxes(), levels=st.lists(any_level(), min_size=1, max_size=3), radius=st.sampled_from([0.5, 1, 1.5, 2.5])
)
@example(boxes=torch.tensor([[0.0, 0, 24, 24]]), levels=[GridLevel(3, 3, 8, (8, 8), (0, 0))], radius=1.5)
def test_candidates_are_exactly_the_points_inside_the_prior(boxes, levels, radius):
    points = torch.cat([level.points() for level in levels])
    strides = torch.cat([torch.full((len(level),), level.stride) for level in levels])
    expected = [prior_by_loop(box, levels, radius) for box in boxes.double().tolist()]
    by_arithmetic = grid_candidates(boxes, levels, radius)
    by_comparison = point_candidates(boxes, points, strides, radius, chunk=2)
    for point, valid in (by_arithmetic, by_comparison):
        assert point.dtype == torch.int64
        assert [row[keep].tolist() for row, keep in zip(point, valid, strict=True)] == expected  # ascending, too
        assert (point[~valid] == 0).all()


def test_the_number_of_candidates_does_not_grow_with_the_image():
    boxes = torch.tensor([[0.0, 0, 50, 50], [3, 3, 1000, 1000]])
    small, _ = grid_candidates(boxes, grid(64), 1.5)
    large, _ = grid_candidates(boxes, grid(4096), 1.5)
    assert small.shape == large.shape
    assert small.shape[1] <= 3 * 5**2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_boxes_that_are_no_boxes_have_no_candidates(value):
    boxes = torch.tensor([[0.0, 0, value, 9], [value] * 4])
    for point, valid in (
        grid_candidates(boxes, grid(64), 1.5),
        point_candidates(boxes, grid(64)[0].points(), torch.full((64,), 8.0), 1.5),
    ):
        assert not valid.any()
        assert (point == 0).all()


def test_no_boxes_have_no_candidates():
    none = torch.zeros(0, 4)
    for point, valid in (
        grid_candidates(none, grid(64), 1.5),
        point_candidates(none, grid(64)[0].points(), torch.full((64,), 8.0), 1.5),
    ):
        assert len(point) == len(valid) == 0


def test_a_radius_of_zero_admits_no_point_not_even_the_centre():
    _, valid = grid_candidates(torch.tensor([[0.0, 0, 8, 8]]), grid(64), 0.0)
    assert not valid.any()


@given(steps=st.tuples(st.integers(1, 300), st.integers(1, 300)), column=st.integers(0, 9), row=st.integers(0, 9))
def test_a_point_on_the_border_of_a_box_is_outside_for_steps_that_no_float_holds(steps, column, row):
    step = (steps[0] / 10, steps[1] / 10)
    level = GridLevel(10, 10, 30.0, step, (0.0, 0.0))
    points, strides = level.points(), torch.full((100,), 30.0)
    x, y = points[row * 10 + column].tolist()
    boxes = torch.tensor([[x, y, x + 40, y + 40], [x - 40, y - 40, x, y]])
    point, valid = grid_candidates(boxes, [level], 1.5)
    reference, reference_valid = point_candidates(boxes, points, strides, 1.5)
    for b in range(2):
        assert point[b, valid[b]].tolist() == reference[b, reference_valid[b]].tolist()


# --- nearest free point -----------------------------------------------------------------------------------------------


def test_the_nearest_free_point_skips_taken_ones_and_prefers_the_lower_index():
    points = np.array([[0.0, 0], [4, 0], [0, 4], [4, 4], [9, 9]])
    center = np.array([2.0, 2])
    taken: list[int] = []
    for expected in (0, 1, 2, 3, 4, -1):
        assert nearest_free_point(points, center, np.array(taken, dtype=np.int64)) == expected
        taken.append(expected)


# --- matchings --------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw, boxes=6, columns=9, values=None):
    """``metric`` and ``column`` of some boxes; each row names distinct columns, some of them infeasible."""
    b, a = draw(st.integers(1, boxes)), draw(st.integers(1, columns))
    k = draw(st.integers(1, a))
    few = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0])  # ties and holes everywhere
    value = values or draw(st.sampled_from([few, st.floats(0, 1, width=32)]))
    metric = draw(npst.arrays(np.float64, (b, k), elements=value))
    column = [sorted(draw(st.permutations(range(a)))[:k]) for _ in range(b)]
    return metric, np.array(column, dtype=np.int64)


def best_sum(metric: Floats, column: Ints) -> float:
    """The greatest sum over all one-to-one partial matchings, by trying every choice of every box."""

    @cache
    def best(box: int, used: frozenset[int]) -> float:
        if box == len(metric):
            return 0.0
        total = best(box + 1, used)
        for m, c in zip(metric[box].tolist(), column[box].tolist(), strict=True):
            if m > 0 and c not in used:
                total = max(total, m + best(box + 1, used | {c}))
        return total

    return best(0, frozenset())


def taken_pairs(choice: Ints, metric: Floats, column: Ints) -> float:
    """Sum of the metrics of a choice, after checking that it is a matching of feasible pairs."""
    chosen = np.flatnonzero(choice >= 0)
    assert (metric[chosen, choice[chosen]] > 0).all()
    taken = column[chosen, choice[chosen]]
    assert len(np.unique(taken)) == len(taken)
    return float(metric[chosen, choice[chosen]].sum())


@settings(max_examples=300)
@given(pairs())
def test_the_exact_matching_has_the_greatest_sum_of_all_matchings(case):
    metric, column = case
    before = metric.copy()
    choice = match_exact(metric, column)
    assert taken_pairs(choice, metric, column) == pytest.approx(best_sum(metric, column), abs=1e-9)
    assert (metric == before).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), boxes=st.sampled_from([40, 120, 300]), crowd=st.sampled_from([0.3, 1, 3]))
def test_the_exact_matching_equals_scipy_on_the_full_matrix(seed, boxes, crowd):
    rng = np.random.default_rng(seed)
    columns = max(12, int(boxes / crowd))
    column = rng.permuted(np.tile(np.arange(columns), (boxes, 1)), axis=1)[:, :12]
    metric = np.where(rng.random((boxes, 12)) < 0.2, -1, rng.random((boxes, 12)) ** 3)
    full = np.zeros((boxes, columns))
    np.put_along_axis(full, column, np.maximum(metric, 0), axis=1)
    row, name = linear_sum_assignment(full, maximize=True)
    choice = match_exact(metric, column)
    assert taken_pairs(choice, metric, column) == pytest.approx(full[row, name].sum(), rel=1e-12)


def test_boxes_that_rob_each_other_in_a_chain_are_still_matched_best():
    # 0 and 1 want column 0; the loser would take column 1, which 2 wants; 2's second is column 2, which 3 wants; …
    metric = np.array([[0.9, 0.85], [0.9, 0.1], [0.8, 0.79], [0.7, 0.69], [0.6, 0.59]])
    column = np.array([[0, 1], [0, 9], [1, 2], [2, 3], [3, 4]])
    assert match_exact(metric, column).tolist() == [1, 0, 1, 1, 1]


def test_of_equal_metrics_a_box_takes_the_first_also_when_it_has_a_rival():
    metric = np.array([[0.5, 0.5, 0.5]] * 2)
    column = np.array([[3, 5, 7]] * 2)
    for solve in (match_exact, match_greedy):
        assert solve(metric[:1], column[:1]).tolist() == [0]
        assert sorted(solve(metric, column).tolist()) == [0, 1]


@settings(max_examples=300)
@given(pairs(boxes=8))
def test_greedy_is_what_sorting_all_pairs_gives(case):
    metric, column = case
    before = metric.copy()
    expected = np.full(len(metric), -1)
    taken = set()
    ranked = sorted((-metric[b, k], b, k) for b, k in np.ndindex(*metric.shape) if metric[b, k] > 0)
    for _, b, k in ranked:
        if expected[b] < 0 and column[b, k] not in taken:
            expected[b] = k
            taken.add(column[b, k])
    assert match_greedy(metric, column).tolist() == expected.tolist()
    assert (metric == before).all()


@pytest.mark.parametrize("solve", [match_exact, match_greedy])
@given(case=pairs(boxes=6), data=st.data())
def test_ranked_boxes_get_the_same_columns_in_any_order(solve, case, data):
    metric, column = case
    order = np.array(data.draw(st.permutations(range(len(metric)))))
    rank = np.arange(len(metric))
    ordered = solve(metric, column, rank)
    assert solve(metric, column).tolist() == ordered.tolist()
    assert solve(metric[order], column[order], rank[order]).tolist() == ordered[order].tolist()


@given(pairs(boxes=8))
def test_greedy_never_beats_exact(case):
    metric, column = case
    greedy = taken_pairs(match_greedy(metric, column), metric, column)
    assert greedy <= taken_pairs(match_exact(metric, column), metric, column) + 1e-9


def test_greedy_is_not_exact():
    metric, column = np.array([[0.9, 0.8], [0.85, 0.1]]), np.array([[0, 1], [0, 1]])
    assert match_greedy(metric, column).tolist() == [0, 1]
    assert match_exact(metric, column).tolist() == [1, 0]


@pytest.mark.parametrize("solve", [match_exact, match_greedy])
@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_feasible_pair_nothing_is_matched(solve, rows):
    metric = np.array([[0.0, -1.0]] * rows).reshape(rows, 2)
    assert solve(metric, np.zeros((rows, 2), dtype=np.int64)).tolist() == [-1] * rows
