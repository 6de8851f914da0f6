"""`docs/quickstart.ipynb`: its outputs are stored, and it still shows the like."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
KEY = re.compile(r"^(step \d|.*: found |detector\.onnx|the same boxes|\d+ s in all)")
RATES = re.compile(r"^(.*): found (\d+) of (\d+), (\S+) duplicates each$", re.MULTILINE)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def printed(notebook: Any) -> str:
    return "".join("".join(x["text"]) for x in outputs(notebook) if x["output_type"] == "stream")


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def key_lines(notebook: Any) -> list[str]:
    """Lines whose words are the same on every machine, with # in place of numbers."""
    return [re.sub(r"\d+(\.\d+)?", "#", line) for line in printed(notebook).splitlines() if KEY.match(line)]


def check_what_it_shows(notebook: Any) -> None:
    """NMS is needed before conversion, and not after; the file repeats the detector; nothing goes wrong on the way."""
    rates = {
        name: (int(found) / int(objects), float(rate))
        for name, found, objects, rate in RATES.findall(printed(notebook))
    }
    after = {"with the filter", "after, without NMS"}
    assert set(rates) == {"with NMS", "without NMS", "before, without NMS", *after}
    assert rates["without NMS"] == rates["before, without NMS"]
    for name in after:
        assert rates["without NMS"][1] > 10 * rates[name][1]
        assert rates[name][0] > rates["with NMS"][0] - 0.1
    assert "the same boxes as in PyTorch: True" in printed(notebook)
    assert pictures(notebook) == 3
    assert not [x for x in outputs(notebook) if x["output_type"] == "error" or x.get("name") == "stderr"]


def test_its_outputs_are_stored_in_order():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    check_what_it_shows(notebook)
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_and_shows_what_is_stored(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("onnxruntime")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = copy.deepcopy(stored)
    begun = time.perf_counter()
    nbclient.NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    print(f"{time.perf_counter() - begun:.0f} s")
    assert key_lines(fresh) == key_lines(stored)
    check_what_it_shows(fresh)
