"""`fade`: the weight of distillation over a run, against a table and the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosskd_assign import fade
from crosskd_assign.errors import OptionError

shares = st.floats(0, 1)
decays = st.sampled_from(["none", "linear", "cosine"])


def formula(done: float, warmup: float, decay: str) -> float:
    warm = min(1, done / warmup) if warmup > 0 else 1
    left = {"none": 1, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return warm * max(0.01, left[decay])


@pytest.mark.parametrize(
    ("options", "weights"),  # at 0, a quarter, a half, three quarters and the end of a run
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup": 0.5}, [0, 0.5, 1, 1, 1]),
        ({"warmup": 1.0}, [0, 0.25, 0.5, 0.75, 1]),
        ({"decay": "linear"}, [1, 0.75, 0.5, 0.25, 0.01]),
        ({"decay": "cosine"}, [1, 0.853553, 0.5, 0.146447, 0.01]),
        ({"decay": "linear", "warmup": 0.5}, [0, 0.375, 0.5, 0.25, 0.01]),
        ({"decay": "cosine", "floor": 0.2}, [1, 0.853553, 0.5, 0.2, 0.2]),
        ({"decay": "linear", "floor": 0.0}, [1, 0.75, 0.5, 0.25, 0]),
    ],
    ids=str,
)
def test_the_weight_follows_the_table(options, weights):
    found = [fade(progress, **options) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(weights, abs=1e-6)


@given(shares, shares, decays)
def test_the_weight_is_warm_up_times_what_the_decay_leaves(progress, warmup, decay):
    assert fade(progress, warmup=warmup, decay=decay) == formula(progress, warmup, decay)


@given(shares, shares, shares, decays)
def test_after_warm_up_the_weight_never_rises_and_never_falls_below_the_floor(one, other, floor, decay):
    sooner, later = (fade(progress, decay=decay, floor=floor) for progress in sorted((one, other)))
    assert floor <= later <= sooner <= 1


@pytest.mark.parametrize(
    ("progress", "options", "message"),
    [
        (-0.1, {}, "progress"),
        (1.1, {}, "progress"),
        (float("nan"), {}, "progress"),
        (0.5, {"warmup": -0.1}, "warmup"),
        (0.5, {"warmup": 2}, "warmup"),
        (0.5, {"floor": -0.01}, "floor"),
        (0.5, {"floor": 1.5}, "floor"),
        (0.5, {"decay": "step"}, 'decay "none", "linear" or "cosine"'),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(progress: float, options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        fade(progress, **options)
