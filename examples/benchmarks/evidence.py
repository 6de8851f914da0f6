"""Trains every variant of a study and records its scores; what is recorded already is skipped, so short runs add up.

python examples/benchmarks/evidence.py --data-root ../shared/data --study main --sets bccd pcb --seeds 0 1 2 --jobs 2

Each finished run is one line of ``docs/results/runs.jsonl``. A run that was killed goes on where it was. Everything is
chosen with ``--split tune``, which holds out a quarter of the training images; ``--split final`` scores on the
validation images. ``evidence_tables.py`` makes tables and plots of the lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence_plan import SETS, STUDIES, VARIANTS, Option, Run, planned

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "coco"
sys.path.insert(0, str(SCRIPTS))

from scenes import write_scenes  # noqa: E402  # found by the path above

RESULTS = ROOT / "docs" / "results" / "runs.jsonl"
HELD_OUT = 0.25  # of the training images, for choosing


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script; the exit code is the number of runs that failed, 9 at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines to read and add to")
    parser.add_argument("--study", nargs="+", default=["main"], choices=[*STUDIES, *VARIANTS], metavar="NAME")
    parser.add_argument("--sets", nargs="+", default=["bccd"], choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("tune", "final"), default="final")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread")
    parser.add_argument("--dry-run", action="store_true", help="only list what is left to do")
    options = parser.parse_args(arguments)
    runs = list(
        dict.fromkeys(r for name in options.study for r in planned(name, options.sets, options.split, options.seeds))
    )
    bench = Bench(options.data_root.resolve(), options.work.resolve(), options.results.resolve())
    left = bench.left(runs)
    print(f"{len(runs)} runs planned, {len(runs) - len(left)} recorded, {len(left)} left")
    if options.dry_run:
        print("\n".join(run.key for run in left))
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(bench.execute, left))
    return min(9, done.count(False))


class Bench:
    """Executes runs, several at once, and keeps their record."""

    def __init__(self, data_root: Path, work: Path, results: Path) -> None:
        self.data_root, self.work, self.results = data_root, work, results
        self.lock = threading.Lock()
        self.finished: dict[Run, threading.Event] = {}
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        self.lines: dict[str, dict[str, Any]] = {line["run"]: line for line in map(json.loads, lines)}

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not recorded, and recorded ones that they need and whose weights are gone."""
        missing = [run for run in runs if not self._recorded(run)]
        needed = {need for run in missing for need in run.needs}
        return [run for run in runs if run in missing or (run in needed and not self._has_weights(run))]

    def _recorded(self, run: Run) -> bool:
        line = self.lines.get(run.key)
        if line is not None and line["options"] != run.options:
            raise SystemExit(
                f"Expected {run.key} with the options {run.options}, but got {line['options']} ({self.results}). Fix: "
                "give the variant another name, or remove its lines."
            )
        return run.key in self.lines

    def _has_weights(self, run: Run) -> bool:
        return (self.work / run.key / "model.json").exists()

    def execute(self, run: Run) -> bool:
        """Train, score and record a run, after those it needs; whether that went well."""
        with self.lock:
            done = self.finished.setdefault(run, threading.Event())
        try:
            for need in run.needs:
                while not self._has_weights(need):
                    with self.lock:
                        event = self.finished.setdefault(need, threading.Event())
                    if event.is_set():
                        print(f"left out: {run.key}, for {need.key} failed", flush=True)
                        return False
                    event.wait(1.0)
            return self._train(run)
        finally:
            done.set()

    def _train(self, run: Run) -> bool:
        folder = self.work / run.key
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume = (folder / "last.pt").exists()
        if not resume and folder.exists():
            for leftover in folder.iterdir():  # of a run that was killed before its first checkpoint
                leftover.unlink()
        command = [str(SCRIPTS / "train.py"), "--output", str(folder), *self._flags(run.options)]
        command += ["--data-path", str(self._data(run)), "--log-every", "100"]
        if run.teacher is not None:
            command += ["--teacher", str(self.work / run.teacher.key)]
        if run.origin is not None:
            command += ["--inherit-from", str(self.work / run.origin.key)]
        begun = time.time()
        code, seconds, memory = self._call(command + (["--resume"] if resume else []), folder.with_suffix(".log"))
        print(f"{run.key}: exit {code} after {time.time() - begun:.0f} s", flush=True)
        if code != 0:
            print(folder.with_suffix(".log").read_text(encoding="utf-8")[-2000:], flush=True)
            return False
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        line = {
            "run": run.key,
            **asdict(run),
            "options": run.options,
            "scores": _rounded(summary["scores"]),
            # Of a resumed run only the last part is known.
            "cpu_seconds": None if resume else round(seconds, 1),
            "memory_mb": round(memory, 1),
            "environment": summary["environment"],
        }
        if run.options["arm"] == "one-to-many":
            # On small objects centerness can cost it several AP: the baseline is the better of the two.
            line["scores_by_class_alone"] = self._scores(run, folder, "val", "--class-score")
            line["scores_on_training_images"] = self._scores(run, folder, "train")
        with self.lock:
            if run.key not in self.lines:
                self.lines[run.key] = line
                self.results.parent.mkdir(parents=True, exist_ok=True)
                with self.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return True

    def _scores(self, run: Run, folder: Path, split: str, *flags: str) -> dict[str, float] | None:
        """What `evaluate.py` says of a finished run."""
        output = folder / f"scores_{split}.json"
        command = [str(SCRIPTS / "evaluate.py"), "--run", str(folder), "--data-path", str(self._data(run)), *flags]
        command += ["--split", split, "--output", str(output)]
        annotations = run.options.get(f"{split}_annotations")
        code, _, _ = self._call(
            command + (["--annotations", str(annotations)] if annotations else []), output.with_suffix(".log")
        )
        scores: dict[str, float] | None = None
        if code == 0:
            scores = _rounded(json.loads(output.read_text(encoding="utf-8"))["scores"])
        return scores

    def _call(self, command: list[str], log: Path) -> tuple[int, float, float]:
        """Run a script on one thread; its exit code, processor seconds and peak memory in MiB."""
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **threads, "COCO_DETECTORS": str(self.data_root / "weights")}
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it, too
        return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

    def _flags(self, options: dict[str, Option]) -> list[str]:
        flags: list[str] = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif name == "backbone_weights":
                flags += [flag, str(self.data_root / str(value))]
            elif value is not False:
                flags += [flag, str(value)]
        return flags

    def _data(self, run: Run) -> Path:
        """The data set's folder; for choosing, one whose validation images are held out of the training images."""
        with self.lock:
            name = SETS[run.data].folder or run.data
            source = write_scenes(self.work / "data" / name) if name == "demo" else self.data_root / name
            if run.split == "final":
                return source
            folder = self.work / "data" / f"{name}-held-out"
            if not folder.exists():
                _hold_out(source, folder)
            return folder


def _hold_out(source: Path, folder: Path) -> None:
    """Split the training images of a COCO folder in two, without copying an image."""
    temporary = folder.with_name(folder.name + ".tmp")
    (temporary / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (temporary / split).symlink_to(source / "train")
    for path in sorted((source / "annotations").glob("instances_train*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = sorted(image["id"] for image in content["images"])
        random.Random(0).shuffle(ids)  # noqa: S311  # a split that can be made again
        held_out = set(ids[: round(HELD_OUT * len(ids))])
        for split in ("train", "val"):
            chosen = {i for i in ids if (i in held_out) == (split == "val")}
            part = {
                **content,
                "images": [image for image in content["images"] if image["id"] in chosen],
                "annotations": [box for box in content["annotations"] if box["image_id"] in chosen],
            }
            name = path.name.replace("train", split)
            (temporary / "annotations" / name).write_text(json.dumps(part), encoding="utf-8")
    temporary.replace(folder)


def _rounded(scores: dict[str, float | None]) -> dict[str, Any]:
    return {name: value if value is None else round(value, 5) for name, value in scores.items()}


if __name__ == "__main__":
    raise SystemExit(main())
