"""Any point set: its candidates against every box with every point, and what is kept of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosskd_assign import GridLevel
from crosskd_assign.assignment import TaskAwareOneToManyAssigner, TaskAwareOneToOneAssigner, lookup, points
from crosskd_assign.assignment.lattices import recognized
from crosskd_assign.assignment.points import point_pairs
from tests.makers.builders import GRIDS, KINDS, grid, random_boxes, random_predictions, random_targets
from tests.makers.priors import all_pairs

PYRAMID = grid(64, (8, 16, 32))
FIELDS = ("image", "point", "target", "metric", "fallback")
PointSet = tuple[Tensor, Tensor]


def of_levels(*levels: GridLevel) -> PointSet:
    strides = [torch.full((len(level),), float(level.stride)) for level in levels]
    return torch.cat([level.points() for level in levels]), torch.cat(strides)


def anchors_outside(*levels: GridLevel) -> PointSet:
    """Several predictions a point as heads number them that keep anchors before the map: (anchors, H, W)."""
    return of_levels(*(level for level in levels for _ in range(3)))


def by_columns(*levels: GridLevel) -> PointSet:
    turned = (GridLevel(v.width, v.height, v.stride, v.step[::-1], v.origin[::-1], v.anchors) for v in levels)
    points, strides = of_levels(*turned)
    return points.flip(1), strides


def by_halves(*levels: GridLevel) -> PointSet:
    """As (i + ½) · step, which rounds otherwise than i · step + step / 2 where no float holds the step."""
    grids = []
    for level in levels:
        step = torch.tensor([level.step[0] / 1.1, level.step[1] / 0.7])
        y, x = torch.meshgrid(torch.arange(level.height), torch.arange(level.width), indexing="ij")
        grids.append((torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * step)
    return torch.cat(grids), of_levels(*levels)[1]


REGULAR: dict[str, Callable[[], PointSet]] = {
    "a pyramid": lambda: of_levels(*PYRAMID),
    "its levels the other way round": lambda: of_levels(*PYRAMID[::-1]),
    "anchors at each point": lambda: of_levels(*grid(64, (8, 16, 32, 64), anchors=3)),
    "anchors outside": lambda: anchors_outside(*PYRAMID),
    "by columns": lambda: by_columns(*GRIDS[3]),
    "points between the floats": lambda: by_halves(*PYRAMID),
    "steps unlike strides": lambda: of_levels(*GRIDS[3]),
    "two equal strides": lambda: of_levels(PYRAMID[0], replace(PYRAMID[0], origin=(0.0, 0.0)), PYRAMID[1]),
    "float64": lambda: tuple(x.double() / 3 for x in of_levels(*PYRAMID)),  # type: ignore[dict-item]
    "all but one at one place": lambda: (torch.tensor([[9.0, 9], *[[20.0, 20]] * 40]), torch.full((41,), 16.0)),
    "one point": lambda: (torch.tensor([[7.0, 9.0]]), torch.tensor([16.0])),
}


def scattered(seed: int = 0, count: int = 300) -> PointSet:
    generator = torch.Generator().manual_seed(seed)
    strides = torch.tensor([8.0, 16, 32])[torch.randint(3, (count,), generator=generator)]
    return 64 * torch.rand(count, 2, generator=generator), strides


def with_holes(seed: int = 0) -> PointSet:
    points, strides = of_levels(*PYRAMID)
    kept = torch.rand(len(points), generator=torch.Generator().manual_seed(seed)) > 0.2
    return points[kept], strides[kept]


def spoilt(value: float) -> PointSet:
    """Numbers that are no places, and strides that are no lengths."""
    points, strides = scattered()
    points[::7, 0], points[3::7, 1], strides[5::7] = value, -value, value
    strides[6::14] = -8.0
    return points, strides


IRREGULAR: dict[str, Callable[[], PointSet]] = {
    "scattered": scattered,
    "with holes": with_holes,
    "a stride of its own for each": lambda: (scattered()[0], torch.linspace(1, 64, 300)),
    "shuffled": lambda: tuple(
        x[torch.randperm(256, generator=torch.manual_seed(0))] for x in of_levels(*grid(128, [8]))
    ),  # type: ignore[dict-item]
    "uneven columns": lambda: (of_levels(PYRAMID[0])[0] ** 1.5 / 8, torch.full((64,), 8.0)),
    "one far away": lambda: (torch.cat([scattered()[0], torch.tensor([[1e30, -1e30]])]), torch.full((301,), 8.0)),
    "not a number": lambda: spoilt(float("nan")),
    "infinite": lambda: spoilt(float("inf")),
    "half precision": lambda: tuple(x.to(torch.bfloat16) for x in scattered()),  # type: ignore[dict-item]
}
SETS = REGULAR | IRREGULAR


def some_boxes(seed: int, points: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Boxes of every kind, and some whose borders are points."""
    rng = np.random.default_rng(seed)
    boxes = [random_boxes(kind, 4, 64, rng) for kind in KINDS]
    finite = points.detach().float().numpy()
    corner = finite[np.isfinite(finite).all(axis=1)]
    corner = corner[rng.integers(0, len(corner), 8)].clip(-1e6, 1e6)
    span = rng.choice([0.5, 8.0, 24.0, 100.0], (8, 2)).astype(np.float32)
    return np.concatenate([*boxes, np.hstack([corner, corner + span]), np.hstack([corner - span, corner])])


def check(boxes: np.ndarray[Any, np.dtype[np.float32]], point_set: PointSet, radius: float) -> None:
    expected = all_pairs(boxes, *point_set, radius)
    for found, pairs in zip(point_pairs(boxes, *point_set, radius), expected, strict=True):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, pairs)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("radius", [0.0, 0.5, 1.5, 4.0])
def test_candidates_are_those_of_comparing_every_box_with_every_point(name, radius):
    point_set = SETS[name]()
    check(some_boxes(3, point_set[0]), point_set, radius)
    check(np.zeros((0, 4), dtype=np.float32), point_set, radius)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 40),
    places=st.sampled_from([2, 5, 30]),
    strides=st.lists(st.sampled_from([4.0, 8.0, 9.5, 64.0]), min_size=1, max_size=3),
    turned=st.booleans(),
)
@example(seed=0, count=1, places=2, strides=[8.0], turned=False)
def test_points_at_few_places_make_every_kind_of_tie(seed, count, places, strides, turned):
    rng = np.random.default_rng(seed)
    position = np.sort(rng.integers(0, places, (count, 2)), axis=0) * 4.0
    position = position if turned else rng.permuted(position, axis=0)
    points, stride = torch.from_numpy(position).float(), torch.from_numpy(rng.choice(strides, count)).float()
    low = rng.integers(-4, 4 * places, (12, 2)) * 1.0
    boxes = np.hstack([low, low + rng.choice([2.0, 4.0, 12.0, 90.0], (12, 2))]).astype(np.float32)
    check(boxes, (points, stride), 1.5)


@pytest.mark.parametrize("name", SETS)
def test_grids_are_recognised_and_nothing_else(name):
    point_set = (x.double().numpy() for x in SETS[name]())
    assert (recognized(*point_set) is not None) == (name in REGULAR)


def test_no_points_have_no_candidates():
    box, point = point_pairs(np.array([[0, 0, 9, 9]], dtype=np.float32), torch.zeros(0, 2), torch.zeros(0), 1.5)
    assert len(box) == len(point) == 0


@pytest.mark.parametrize("assigner", [TaskAwareOneToOneAssigner(), TaskAwareOneToManyAssigner()], ids=["one", "many"])
@pytest.mark.parametrize("name", ["scattered", "with holes", "a pyramid", "shuffled"])
def test_assignments_are_those_of_comparing_every_box_with_every_point(monkeypatch, assigner, name):
    point_set = SETS[name]()
    targets = random_targets((5, 0, 30), kind="crowded", seed=1)
    base = random_predictions(targets, [GridLevel(1, len(point_set[0]), 8.0, (8.0, 8.0), (4.0, 4.0))])
    predictions = replace(base, points=point_set[0], strides=point_set[1], levels=None)
    found = assigner(predictions, targets)
    monkeypatch.setattr(lookup, "point_pairs", all_pairs)
    expected = assigner(predictions, targets)
    assert (found.unmatched, found.non_finite) == (expected.unmatched, expected.non_finite)
    for field in FIELDS:
        assert torch.equal(getattr(found, field), getattr(expected, field))


# --- what is kept of a point set --------------------------------------------------------------------------------------

BOXES = np.array([[10.0, 10, 30, 30], [1, 2, 60, 50]], dtype=np.float32)


@pytest.fixture
def built(monkeypatch):
    """The point sets that had to be looked at, by their number of points."""
    sizes: list[int] = []

    def looked_at(position: Any, strides: Any) -> Any:
        sizes.append(len(position))
        return recognized(position, strides)

    monkeypatch.setattr(points, "recognized", looked_at)
    monkeypatch.setattr(points, "_recent", ())
    return sizes


def test_a_new_tensor_with_the_same_points_is_not_looked_at_again(built):
    for _ in range(3):
        point_pairs(BOXES, *scattered(), 1.5)
        point_pairs(BOXES, *(x.double() for x in scattered()), 2.5)
    assert built == [300]


@pytest.mark.parametrize("edit", [lambda x: x.add_(1), lambda x: x.data.add_(1), lambda x: np.add(x, 1, out=x.numpy())])
@pytest.mark.parametrize("which", [0, 1])
def test_an_edit_of_the_points_or_strides_counts_however_it_is_made(built, edit, which):
    point_set = scattered()
    check(BOXES, point_set, 1.5)
    edit(point_set[which])
    check(BOXES, point_set, 1.5)
    assert built == [300, 300]


def test_other_points_in_memory_that_was_freed_are_other_points(built):
    addresses = set()
    for i in range(20):
        points_, strides = scattered(seed=i)
        addresses.add(points_.data_ptr())
        check(BOXES, (points_, strides), 1.5)
        del points_, strides
    assert len(built) == 20
    assert len(addresses) < 20  # the allocator has given the same memory again


def test_only_the_last_point_sets_are_kept_and_the_one_in_use_among_them(built):
    for i in range(40):
        point_pairs(BOXES, *scattered(), 1.5)
        point_pairs(BOXES, *scattered(seed=1, count=i + 1), 1.5)
    assert built.count(300) == 1
    assert len(points._recent) == points._KEPT


def test_threads_find_their_own_candidates():
    wrong: list[Exception | AssertionError] = []

    def work(seed: int) -> None:
        try:
            for i in range(30):
                check(BOXES, scattered(seed=(seed * i) % 25), 1.5)
        except (Exception, AssertionError) as error:  # raised again below
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
