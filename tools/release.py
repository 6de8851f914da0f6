"""Build what would be released and check it as a user meets it; nothing is uploaded.

``python tools/release.py --dry-run``, or ``make release``. A sentence is printed for each thing that was checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ReleaseError(RuntimeError):
    """Something that must not be released."""


def version() -> str:
    """Read the version where hatchling does."""
    (found,) = re.findall(r'__version__ = "(.+)"', (ROOT / "src/crosskd_assign/version.py").read_text(encoding="utf-8"))
    return str(found)


def check_notes(number: str, changelog: str, citation: str) -> None:
    """Refuse a version that the changelog or the citation does not know."""
    heading = re.search(rf"^## \[?{re.escape(number)}\b.*$", changelog, re.MULTILINE)
    if heading is None:
        raise ReleaseError(f"Expected a heading for {number} in CHANGELOG.md, but got none. Fix: rename [Unreleased].")
    if "unreleased" in heading[0]:
        raise ReleaseError(
            f"Expected a date in CHANGELOG.md, but got {heading[0]!r}. Fix: write the day of the release."
        )
    if not re.search(rf"^version: {re.escape(number)}$", citation, re.MULTILINE):
        raise ReleaseError(f"Expected version {number} in CITATION.cff, but got another. Fix: write it there.")


def run(*command: str | Path, where: Path = ROOT, **variables: str) -> str:
    """Run a command without this project on its path; return what it printed, and stop where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(number: str, folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and of it the wheel; check metadata and contents of both."""
    # 1. Nothing of an earlier build.
    for old in folder.glob(f"crosskd_assign-{number}*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    wheel = folder / f"crosskd_assign-{number}-py3-none-any.whl"
    sdist = folder / f"crosskd_assign-{number}.tar.gz"

    # 2. What an index would refuse.
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    print("metadata: twine finds nothing")

    # 3. What must be in them, and what must not.
    tests: list[str | Path] = [
        "-m",
        "pytest",
        "-m",
        "slow",
        "-k",
        "the_wheel or the_sdist",
        ROOT / "tests/test_package.py",
    ]
    run(sys.executable, *tests, PYTHONPATH=str(ROOT / "src"), DISTRIBUTIONS=str(folder))
    print(f"contents: as tests/test_package.py says ({wheel.name}, {sdist.name})")
    return wheel, sdist


def claimed(wheel: Path) -> list[str]:
    """Read the versions of Python that a wheel claims, oldest first."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [x for x in file.namelist() if x.endswith(".dist-info/METADATA")]
        entries = message_from_bytes(file.read(name)).get_all("Classifier") or []
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", str(entry)) for entry in entries]
    return sorted((match[1] for match in found if match), key=lambda x: int(x.partition(".")[2]))


def pythons(versions: Sequence[str]) -> list[str]:
    """Find the oldest and the newest on this machine; if there is neither, the Python that runs this."""
    found = []
    for number in dict.fromkeys((versions[0], versions[-1])):
        path = shutil.which(f"python{number}")
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            found.append(path)
        else:  # a version manager may have a name for a Python that it has not installed
            print(f"Python {number}: skipped, there is no python{number} on this machine")
    return found or [sys.executable]


def try_out(python: str, wheel: Path, source: Path) -> None:
    """Install a wheel in an empty environment and use it there, with README and examples of the unpacked sdist."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 1. The library alone, and the README's three lines.
        run(python, "-m", "venv", folder / "environment")
        own = folder / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        number = run(own, "-c", "import platform; print(platform.python_version())", where=folder).strip()
        run(own, "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel, where=folder)
        place = Path(run(own, "-c", "import crosskd_assign; print(crosskd_assign.__file__)", where=folder).strip())
        if folder / "environment" not in place.parents:
            raise ReleaseError(f"Expected the installed package, but got {place}. Fix: unset what points there.")
        run(own, "-c", first_block(source / "README.md"), where=folder)
        print(f"Python {number}: the README's three lines run with the installed wheel")

        # 2. What the examples need, too, and the demo's first epoch.
        run(own, "-m", "pip", "install", "--quiet", "--no-cache-dir", f"{wheel}[coco]", where=folder)
        demo: list[str | Path] = [
            source / "examples/coco/demo.py",
            "--epochs",
            "1",
            "--output",
            folder / "runs",
            "--data-path",
        ]
        table = run(own, *demo, folder / "data", where=folder).strip().splitlines()
        print(f"Python {number}: the demo runs for an epoch with it", *(f"  {line}" for line in table[-6:]), sep="\n")


def first_block(page: Path) -> str:
    """Return the first block of Python on a page."""
    block = re.search(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if block is None:
        raise ReleaseError(f"Expected Python in {page.name}, but got none. Fix: show the three lines.")
    return block[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="do without a heading in CHANGELOG.md")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for wheel and sdist (dist)")
    parser.add_argument("--python", nargs="+", default=[], help="to install for (the oldest and newest claimed)")
    options = parser.parse_args(arguments)
    number = version()
    try:
        if not options.dry_run:
            notes = [(ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")]
            check_notes(number, *notes)
        wheel, sdist = build(number, options.output.resolve())
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(sdist) as file:
                file.extractall(folder, filter="data")
            for python in options.python or pythons(claimed(wheel)):
                try_out(python, wheel, Path(folder) / f"crosskd_assign-{number}")
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"crosskd_assign {number}: {'this could be released' if options.dry_run else 'ready to be released'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
