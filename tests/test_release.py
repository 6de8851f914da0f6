"""`tools/release.py`: what it refuses, and for which Pythons it installs. `make release` goes the whole way."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tools import release

ROOT = Path(__file__).parents[1]
CITATION = "type: software\nversion: 1.2.0\n"


@pytest.mark.parametrize("heading", ["## [1.2.0] - 2026-11-28", "## 1.2.0"])
def test_a_version_that_changelog_and_citation_name_can_be_released(heading):
    release.check_notes("1.2.0", f"# Changelog\n\n## [Unreleased]\n\n{heading}\n", CITATION)


@pytest.mark.parametrize(
    ("changelog", "citation", "words"),
    [
        ("## [Unreleased]\n", CITATION, r"a heading for 1\.2\.0 in CHANGELOG"),
        ("## [1.2.01]\n## 1x2.0\n# 1.2.0\ntext ## 1.2.0\n", CITATION, "a heading for"),
        ("## [1.2.0] - unreleased\n", CITATION, "a date in CHANGELOG"),
        ("## [1.2.0]\n", "version: 1.2.0.1\n", r"in CITATION\.cff"),
    ],
)
def test_another_is_refused(changelog, citation, words):
    with pytest.raises(release.ReleaseError, match=words):
        release.check_notes("1.2.0", changelog, citation)


def test_it_ends_before_it_builds_unless_it_is_a_dry_run(monkeypatch, capsys):
    def never(*_: object) -> None:
        raise release.ReleaseError("it builds")

    monkeypatch.setattr(release, "version", lambda: "9.9.9")
    monkeypatch.setattr(release, "build", never)
    assert release.main([]) == 2
    assert "Expected a heading for 9.9.9" in capsys.readouterr().err
    assert release.main(["--dry-run"]) == 2
    assert "it builds" in capsys.readouterr().err


def test_it_installs_for_the_oldest_and_newest_claimed_that_are_there(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "a.whl"
    lines = [f"Classifier: Programming Language :: Python :: {x}" for x in ("3", "3.9", "3.13", "3.10", "3 :: Only")]
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a-1.dist-info/METADATA", "Metadata-Version: 2.4\n" + "\n".join(lines) + "\n\nProgramming\n")
    versions = release.claimed(wheel)
    assert versions == ["3.9", "3.10", "3.13"]

    (broken := tmp_path / "python3.9").write_text("#!/bin/sh\nexit 127\n")  # as a version manager leaves there
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if name == "python3.13" else str(broken))
    assert release.pythons(versions) == [sys.executable]
    assert capsys.readouterr().out == "Python 3.9: skipped, there is no python3.9 on this machine\n"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "executable", "this one")
    assert release.pythons(versions) == ["this one"]


def test_a_command_that_fails_is_shown_with_all_that_it_printed():
    with pytest.raises(release.ReleaseError, match=r"(?s)-c.*a line.*a reason"):
        release.run(sys.executable, "-c", "print('a line'); raise SystemExit('a reason')")


def test_commands_do_not_see_this_project(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert release.run(sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))") == "None\n"


def test_the_readme_begins_with_the_three_lines():
    assert "distiller = CrossHeadDistiller(student, teacher)" in release.first_block(ROOT / "README.md")
