"""Matchings against all matchings there are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.optimize import linear_sum_assignment

from crosskd_assign.assignment.candidates import Floats, Ints
from crosskd_assign.assignment.matching import match_exact, match_greedy


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
