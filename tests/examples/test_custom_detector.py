"""`examples/custom_detector.py`: it runs by itself, and its adapter is short."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_detector.py"


def test_it_checks_trains_detects_and_ends_with_its_own_check(capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--steps", "16"]) == 0
    printed = capsys.readouterr().out
    assert "CellAdapter: " in printed
    assert "no problems" in printed
    assert "distill_classification" in printed
    found = {
        name: (int(n), float(rate))
        for name, n, rate in re.findall(r"(\w+, with\w* NMS) +found (\d+) of .*?, (\S+) dup", printed)
    }
    assert set(found) == {"teacher, without NMS", "teacher, with NMS", "student, without NMS"}
    assert found["student, without NMS"][1] < found["teacher, without NMS"][1]
    assert found["student, without NMS"][0] > 30
    assert printed.rstrip().endswith("repeats itself less than its teacher")


def test_a_training_that_goes_nowhere_fails_the_check(capsys, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    names, draw = script["main"].__globals__, script["draw"]
    monkeypatch.setitem(names, "train", lambda *_: 1.0)
    monkeypatch.setitem(names, "draw", lambda _, seed: draw(4, seed))
    assert script["main"]([]) == 1
    assert "sanity check failed" in capsys.readouterr().out


def test_the_adapter_is_20_lines_of_code_at_most():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    [adapter] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "CellAdapter"]
    lines = set(range(adapter.lineno, (adapter.end_lineno or 0) + 1))
    for node in ast.walk(adapter):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    code = [
        line for i, line in enumerate(SCRIPT.read_text(encoding="utf-8").splitlines(), 1) if i in lines and line.strip()
    ]
    assert len(code) <= 20
