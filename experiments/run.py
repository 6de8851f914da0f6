"""Train every variant of a study and record its scores. Recorded runs are skipped, so short sessions add up.

python experiments/run.py --data-root ../shared/data --study main --sets bccd pcb --seeds 0 1 2 --jobs 2

Each finished run is one line of ``experiments/runs.jsonl``. A run that was killed is resumed. Options are chosen with
``--split tune``, which holds out a quarter of the training images; ``--split final`` scores on the validation images.
``plan.py`` explains the names of variants; ``tables.py`` turns the lines into tables and plots.
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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from plan import SETS, STUDIES, Option, Options, PlanError, Run, planned, variant

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "coco"
sys.path.insert(0, str(SCRIPTS))

from coco_example.engine.processor import slow_precision  # noqa: E402  # found by the path above, as the next three are
from coco_example.evaluation.comparison import one_thread  # noqa: E402
from labels import UNLABELLED, keep_labels, pseudo_label  # noqa: E402
from made import make  # noqa: E402

RESULTS = ROOT / "experiments" / "runs.jsonl"
HELD_OUT = 0.25  # share of the training images that --split tune scores on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the number of runs that failed, 9 at most, as the exit code."""
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, default=Path("../shared/data"), help="folder that holds the data sets"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder to keep the runs in")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to read and append to")
    studies = f"studies ({', '.join(STUDIES)}) or variants, such as cross-head-large-inherit-decay-2x"
    parser.add_argument("--study", nargs="+", default=["main"], type=_study, metavar="NAME", help=studies)
    parser.add_argument("--sets", nargs="+", default=["bccd"], choices=list(SETS), help="data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    parser.add_argument("--split", choices=("tune", "final"), default="final", help="images to score on")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at once, each on one thread")
    parser.add_argument("--dry-run", action="store_true", help="list the runs that are left, and stop")
    options = parser.parse_args(arguments)
    # 2. Plan the runs, and leave out those that are recorded.
    runs = list(
        dict.fromkeys(r for name in options.study for r in planned(name, options.sets, options.split, options.seeds))
    )
    runner = Runner(options.data_root.resolve(), options.work.resolve(), options.results.resolve())
    left = runner.left(runs)
    print(f"{len(runs)} runs planned, {len(runs) - len(left)} recorded, {len(left)} left")
    if options.dry_run:
        print("\n".join(run.key for run in left))
        return 0
    # 3. Train the others.
    return min(9, runner.execute(left, options.jobs))


def _study(name: str) -> str:
    """Check the name of a study or of a variant, for argparse."""
    if name not in STUDIES:
        try:
            variant(name)
        except PlanError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return name


class Runner:
    """Train runs, several at once, and record them.

    Args:
        data_root: Folder that holds the data sets.
        work: Folder to keep the runs in.
        results: File of JSON lines, one a finished run.
    """

    def __init__(self, data_root: Path, work: Path, results: Path) -> None:
        self.data_root, self.work, self.results = data_root, work, results
        self.lock = threading.Lock()  # of files
        self.changed = threading.Condition()  # of the three below
        self.waiting: list[Run] = []
        self.running: set[Run] = set()
        self.failed: set[Run] = set()
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        self.lines: dict[str, dict[str, Any]] = {line["run"]: line for line in map(json.loads, lines)}

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """List the runs that are not recorded, and recorded ones that these need and whose weights are gone."""
        missing = [run for run in runs if not self._recorded(run)]
        needed = {need for run in missing for need in run.needs}
        return [run for run in runs if run in missing or (run in needed and not self._has_weights(run))]

    def _recorded(self, run: Run) -> bool:
        line = self.lines.get(run.key)
        # The precision may be another one: it is this processor's faster.
        if line is not None and {**line["options"], "precision": ""} != {**run.options, "precision": ""}:
            error = PlanError(
                expected=f"{run.key} with the options {run.options}",
                got=str(line["options"]),
                where=str(self.results),
                fix="give the variant another name, or remove its lines",
            )
            raise SystemExit(str(error))
        return run.key in self.lines

    def _has_weights(self, run: Run) -> bool:
        return (self.work / run.key / "model.json").exists()

    def execute(self, runs: Sequence[Run], jobs: int = 1) -> int:
        """Train, score and record runs, each after those it needs; return how many failed or lacked one they need."""
        self.waiting, self.failed = list(runs), set()
        with ThreadPoolExecutor(jobs) as pool:
            for worker in [pool.submit(self._work) for _ in range(jobs)]:
                worker.result()
        return len(self.failed)

    def _work(self) -> None:
        while (run := self._next()) is not None:
            succeeded = False
            try:
                succeeded = self._train(run)
            finally:
                with self.changed:
                    self.running.remove(run)
                    self.failed |= set() if succeeded else {run}
                    self.changed.notify_all()

    def _next(self) -> Run | None:
        """Wait until a run can start, and take the first that can: no worker idles while there is one."""
        with self.changed:
            while self.waiting:
                # 1. Give up those that need a failed one, and those that need these.
                for run in list(self.waiting):
                    if not self.failed.isdisjoint(run.needs):
                        print(f"skipped {run.key}: what it needs failed", flush=True)
                        self.waiting.remove(run)
                        self.failed.add(run)
                # 2. Take the first that needs nothing unfinished.
                unfinished = {*self.waiting, *self.running}
                for run in self.waiting:
                    if unfinished.isdisjoint(run.needs):
                        self.waiting.remove(run)
                        self.running.add(run)
                        return run
                if self.waiting:
                    self.changed.wait()
            return None

    def _train(self, run: Run) -> bool:
        """Train, score and record a run whose needs are there; return whether it succeeded."""
        # 1. Resume an interrupted run; one without a checkpoint starts again in an empty folder.
        folder = self.work / run.key
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume = any((folder / name).exists() for name in ("last.pt", "previous.pt"))
        if not resume and folder.exists():
            for leftover in folder.iterdir():
                leftover.unlink()
        # 2. Train.
        data = self._data(run)
        trained = options = {**run.options, "precision": self._precision(run, folder if resume else None)}
        if UNLABELLED in options:
            options = {**options, UNLABELLED: str(data / UNLABELLED)}
        command = [str(SCRIPTS / "train.py"), "--output", str(folder), *self._flags(options)]
        command += ["--data-path", str(data), "--log-every", "100"]
        if run.teacher is not None:
            flag = "--convert" if variant(run.variant).converts else "--teacher"
            command += [flag, str(self.work / run.teacher.key)]
        if run.origin is not None:
            command += ["--inherit-from", str(self.work / run.origin.key)]
        begun = time.time()
        code, seconds, memory = self._call(command + (["--resume"] if resume else []), folder.with_suffix(".log"))
        print(f"{run.key}: exit {code} after {time.time() - begun:.0f} s", flush=True)
        if code != 0:
            print(folder.with_suffix(".log").read_text(encoding="utf-8")[-2000:], flush=True)
            return False
        # 3. Read the scores, and score what only baselines need.
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        line = {
            "run": run.key,
            **asdict(run),
            "options": trained,
            "scores": _rounded(summary["scores"]),
            # unknown of a resumed run, which was measured in its last part only
            "cpu_seconds": None if resume else round(seconds, 1),
            "memory_mb": round(memory, 1),
            "environment": summary["environment"],
        }
        if run.options["arm"] == "one-to-many":
            # On small objects centerness can cost it several AP: the baseline is the better of the two.
            line["scores_by_class_alone"] = self._scores(run, folder, "val", "--class-score")
            line["scores_on_training_images"] = self._scores(run, folder, "train")
        # 4. Record the run, unless it is there and was trained again for its weights.
        with self.lock:
            if run.key not in self.lines:
                self.lines[run.key] = line
                self.results.parent.mkdir(parents=True, exist_ok=True)
                with self.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return True

    def _precision(self, run: Run, begun: Path | None) -> Option:
        """Choose a run's precision: that of its record or of its interrupted part, or float32 where that is faster."""
        if run.key in self.lines:
            return _precision(self.lines[run.key]["options"])
        if begun is not None:
            return _precision(json.loads((begun / "config.json").read_text(encoding="utf-8")))
        own = _precision(run.options)
        return "float32" if _is_slow(str(own)) else own

    def _scores(self, run: Run, folder: Path, split: str, *flags: str) -> dict[str, float] | None:
        """Score a finished run with `evaluate.py`; None if that fails."""
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
        """Run a script on one thread; return its exit code, processor seconds and peak memory in MiB."""
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **threads, "COCO_DETECTORS": str(self.data_root / "weights")}
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it, too
        return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

    def _flags(self, options: dict[str, Option]) -> list[str]:
        """Write options as arguments of ``train.py``."""
        flags: list[str] = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif name == "backbone_weights":
                flags += [flag, str(self.data_root / str(value))]
            elif value is False:
                flags.append(f"--no-{flag[2:]}")
            else:
                flags += [flag, str(value)]
        return flags

    def _data(self, run: Run) -> Path:
        """Return the run's data set, of the split "tune" one that holds out training images for validation."""
        protocol, teacher, pseudo = SETS[run.data], run.teacher, variant(run.variant).pseudo
        with self.lock:
            # 1. All labels.
            name = protocol.folder or run.data
            source = make(name, self.data_root, self.work)
            if run.split == "tune":
                held_out = self.work / "data" / f"{name}-held-out"
                if not held_out.exists():
                    _hold_out(source, held_out)
                source = held_out
            if protocol.labelled == 1 and not pseudo:
                return source
            # 2. Those of a part of the images, and a teacher's detections in the others.
            folder = self.work / "data" / f"{run.data}-{run.split}"
            part = keep_labels(source, folder, protocol.labelled)
            if teacher is None or not pseudo:
                return part
            labelled = folder.with_name(f"{folder.name}-{teacher.variant}-{teacher.seed}")
            return pseudo_label(part, source, self.work / teacher.key, labelled)


def _hold_out(source: Path, folder: Path) -> None:
    """Split the training images of a COCO folder in two, without copying an image."""
    # 1. Both parts see all training images.
    temporary = folder.with_name(folder.name + ".tmp")
    (temporary / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (temporary / split).symlink_to(source / "train")
    # 2. Draw the images to hold out, and write annotations of each part.
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
    # 3. The folder appears when it is complete.
    temporary.replace(folder)


def _precision(options: Options) -> Option:
    return options.get("precision", "float32")


@cache
def _is_slow(precision: str) -> bool:
    """Measure whether a precision is slower than float32 on this processor, once, on one thread as the runs have it."""
    with one_thread():
        line = slow_precision(precision, torch.device("cpu"))
    if line is not None:
        print(line, flush=True)
    return line is not None


def _rounded(scores: dict[str, float | None]) -> dict[str, Any]:
    return {name: value if value is None else round(value, 5) for name, value in scores.items()}


if __name__ == "__main__":
    raise SystemExit(main())
