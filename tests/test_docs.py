"""README and docs: the code they show runs, and what they name exists."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crosskd_assign import CrossHeadDistiller, errors
from tests.makers.pages import leads_somewhere
from tests.makers.small_models import scene, small_fcos

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


# Guides that show output: their blocks build on one another.
GUIDES = [page for page in PAGES if page.parent.name == "how-to" and blocks(page, "text")]
PYTHON = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    if page not in GUIDES
    for i, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run_by_themselves(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "block", "exec", dont_inherit=True), {"__name__": "block"})  # noqa: S102


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs_from_top_to_bottom_and_prints_what_it_shows(guide, tmp_path, monkeypatch, capsys):
    if guide.stem == "export":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("guide")  # a module, as a script is one
    monkeypatch.setitem(sys.modules, "guide", module)
    compared = 0
    for language, code in FENCE.findall(guide.read_text(encoding="utf-8")):
        if language == "python":
            capsys.readouterr()
            exec(compile(code, guide.name, "exec", dont_inherit=True), vars(module))  # noqa: S102
        elif language == "text":
            assert capsys.readouterr().out == code
            compared += 1
    assert compared


def test_the_readme_shows_python_that_is_run():
    assert len(blocks(ROOT / "README.md", "python")) >= 2


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_shown_change_to_a_training_loop_runs_on_both_sides(side):
    (diff,) = blocks(ROOT / "README.md", "diff")
    drop = {"before": "+", "after": "-"}[side]
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(drop))
    model, teacher = small_fcos(1), small_fcos(2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images, targets = scene(((64, 64), (64, 64)))
    names = {"torch": torch, "CrossHeadDistiller": CrossHeadDistiller, "model": model, "teacher": teacher}
    exec(code, {**names, "device": torch.device("cpu"), "loader": [(images, targets)] * 2})  # noqa: S102
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_some(page):
    text = page.read_text(encoding="utf-8")
    for name, heading in re.findall(r"\]\((?!https?:)([^)#\s]*\.md)?#([^)]+)\)", text):
        target = (page.parent / name if name else page).resolve().relative_to(ROOT).as_posix()
        assert leads_somewhere(f"{target}#{heading}"), f"{target}#{heading}"


def shown_commands() -> dict[str, set[str]]:
    """Options that the pages use, for each script."""
    used: dict[str, set[str]] = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    script = re.search(r"(?:examples|benchmarks|experiments)/\S+\.py", command)
                    if script:
                        flags = re.findall(r"\s(--[a-z-]+)", command[script.end() :])
                        used.setdefault(script.group(), set()).update(flags)
    return used


@pytest.mark.parametrize("script", sorted(shown_commands()))
def test_shown_commands_use_options_that_exist(script, monkeypatch, capsys):
    if script == "benchmarks/onnx_latency.py":
        pytest.importorskip("onnx")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    known = set(re.findall(r"(--[a-z-]+)", capsys.readouterr().out))
    assert not shown_commands()[script] - known


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"automodule:: (\S+)", pages))
    surface = json.loads((ROOT / "tests" / "api_surface.json").read_text(encoding="utf-8"))
    assert len(shown) > 20
    for room in surface:
        module = importlib.import_module(f"crosskd_assign.{room}".rstrip("."))
        for name in module.__all__:
            home = getattr(getattr(module, name), "__module__", module.__name__)
            if home.startswith("crosskd_assign"):  # an alias of a type has none of its own
                assert shown & {home, module.__name__}, f"{name} of {home}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "distillation.html").read_text(encoding="utf-8")
    troubles = (tmp_path / "site" / "troubleshooting.html").read_text(encoding="utf-8")
    for name in errors.__all__[1:]:
        assert f'id="{getattr(errors, name).page.partition("#")[2]}"' in troubles
    assert 'id="crosskd_assign.distillation.cross_head.CrossHeadDistiller"' in page


def test_the_readme_can_be_read_to_its_end():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.split()) <= 900
