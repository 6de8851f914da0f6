"""Order of the tests."""

from __future__ import annotations

import pytest

FIRST = ("test_demo.py",)  # minutes long: begun last, it would keep one process busy while the others are done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(FIRST))
