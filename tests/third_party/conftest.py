"""The detectors that the tests of this folder run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from crosskd_assign import DetectorAdapter
from tests.third_party.makers import MAKERS, make_detector


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[], DetectorAdapter]:
    """Builds the same detector at every call."""
    return partial(make_detector, request.param)
