"""Checkpoints that are damaged or of something else are found and passed over."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train
from coco_example.engine import training as engine
from coco_example.engine.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from coco_example.files import digest

from tests.makers.training_runs import stop_in

Check = Callable[[dict[str, Any]], str | None]


def test_no_flipped_bit_changes_what_is_read(tmp_path):
    state = {"step": 2, "weights": {"a": torch.arange(64.0), "b": [1, 2.5, None, "x"]}}
    save_checkpoint(tmp_path, {**state, "step": 1})
    save_checkpoint(tmp_path, state)
    whole = (tmp_path / "last.pt").read_bytes()
    found = 0
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=300).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "last.pt").write_bytes(damaged)
        loaded = load_checkpoint(tmp_path)
        assert digest(loaded) == digest({**state, "step": loaded["step"]})
        found += loaded["step"] == 1
    assert found > 100  # the rest hit padding, which means nothing


def test_a_digest_depends_on_content_alone():
    value = {"a": torch.ones(2, 3), "b": [1, (2.0, None)], "c": torch.zeros(0)}
    assert digest(value) == digest(copy.deepcopy(value))
    assert digest(torch.ones(2, 3).T.contiguous().T) == digest(torch.ones(2, 3))
    others = [
        {**value, "a": torch.ones(3, 2)},
        {**value, "a": torch.ones(2, 3).double()},
        {**value, "b": [1, (2, None)]},
    ]
    assert len({digest(other) for other in [value, *others, {**value, "d": 0}, [value]]}) == 6


# --- what reads, but is something else --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(workshop, tmp_path_factory) -> tuple[dict[str, Any], Check]:
    """The last state of a run with an average of its weights, and what a resumed run checks states with."""
    folder, checks = tmp_path_factory.mktemp("checkpoints") / "run", list[Check]()

    def record(path: Path, check: Check) -> dict[str, Any]:
        checks.append(check)
        return load_checkpoint(path, check)

    options = {"arm": "one-to-one", "ema": 0.9, "epochs": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_draw_first_batch", lambda *_: None)
        patch.setattr(train, "draw_report", lambda *_, **__: [])
        patch.setattr(engine, "load_checkpoint", record)
        stop_in(patch, 4)
        assert workshop.train(folder, **options) == 143
        state = read_checkpoint(folder / "last.pt")
        assert workshop.train(folder, **options, resume=True) == 0
    return state, checks[0]


def wrong_states(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The state with something else in one place, for many places and things."""
    # 1. Every entry is missing, or of another kind.
    for name in state:
        yield f"no {name}", {key: value for key, value in state.items() if key != name}
        for other in (None, "x", [], {}, {"a": 1}, [1, 2], -1, math.nan, torch.zeros(2), True, [None], 10**9):
            yield f"{name} = {other!r}", {**state, name: other}
    yield "more", {**state, "more": 1}

    # 2. A weight is missing, of another shape, type or value; so is a moment.
    weight = next(iter(state["method"]))
    moments = state["optimizer"]["state"]
    for odd in (None, torch.zeros(1), state["method"][weight].double(), state["method"][weight] * math.nan):
        yield f"weight {odd!r:.30}", {**state, "method": {**state["method"], weight: odd}}
        average = {**state["average"], f"module.{weight.removeprefix('adapter.model.')}": odd}
        yield f"average {odd!r:.30}", {**state, "average": average}
    yield "fewer weights", {**state, "method": {k: v for k, v in state["method"].items() if k != weight}}
    for odd in (None, 3, {"exp_avg": torch.zeros(3, 3, 3)}, {"exp_avg": "x"}):
        yield f"moment {odd!r:.30}", {**state, "optimizer": {**state["optimizer"], "state": {**moments, 0: odd}}}
    yield "moments", {**state, "optimizer": {**state["optimizer"], "state": {**moments, 9999: moments[0]}}}
    for groups in ([], [{}], [{}] * 2, [{"lr": 1.0, "params": [0]}] * 2, "ab"):
        yield f"groups {groups}", {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
    yield "scheduler", {**state, "scheduler": {**state["scheduler"], "last_epoch": 1}}
    yield "random", {**state, "random": [{"cpu": torch.zeros(3)}]}


def test_a_checkpoint_that_holds_something_else_is_found_before_it_is_loaded(stopped):
    state, check = stopped
    assert check(state) is None
    earlier = {key: value for key, value in state.items() if key != "run"}
    assert check(earlier) is None  # of an earlier version
    passed = {name for name, wrong in wrong_states(state) if check(wrong) is None}
    assert passed == {"no run", "scaler = {}", "scaler = {'a': 1}"}  # one without float16 has no state, and reads none
