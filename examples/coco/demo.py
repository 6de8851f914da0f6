"""The whole path in a few minutes on two CPU cores: draw scenes, train a teacher, distil a student, compare.

python examples/coco/demo.py --output runs/demo
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coco_example.commands import CommandParser, run_command, say
from coco_example.engine.run_folder import goes_on
from coco_example.engine.signals import Interrupted
from coco_example.errors import printable
from coco_example.evaluation.evaluation import table
from coco_example.files import write_json
from coco_example.options import Arm, DataOptions, MethodOptions, Options, TeacherOptions, TrainingOptions
from train import run

__all__ = ["main"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for both runs (runs/demo)")
    parser.add_argument("--data-path", type=Path, default=Path("data/demo"), help="folder for the scenes (data/demo)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each of the two trainings (8)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of both (0)")
    return parser.parse_args(arguments)


def run_options(arm: Arm, output: Path, teacher: Path | None, options: argparse.Namespace) -> Options:
    """Choose the options of one of the two trainings."""
    return Options(
        output=str(output),
        seed=options.seed,
        dataset=DataOptions(data="demo", data_path=str(options.data_path), cache=True),
        teachers=TeacherOptions(teacher="" if teacher is None else str(teacher)),
        method=MethodOptions(arm=arm),
        training=TrainingOptions(
            epochs=options.epochs,
            batch_size=8,
            lr=2e-3,
            channels_last=True,  # faster on CPUs
            eval_every=4,
            log_every=50,
        ),
    )


def compare(options: argparse.Namespace) -> None:
    """Train both and print the table; what an earlier start has done already is not done again."""
    begun = time.perf_counter()

    # 1. Train both.
    first, second = options.output / "teacher", options.output / "student"
    trainings = [run_options("one-to-many", first, None, options), run_options("cross-head", second, first, options)]
    scores = []
    try:
        for training in trainings:
            say(f"\n{training.method.arm}: training into {training.output}")
            scores.append(run(replace(training, resume=goes_on(Path(training.output)))))
    except Interrupted as stop:
        raise Interrupted(stop.number, "stopped; the same command goes on from here") from None

    # 2. Compare them.
    teacher, student = scores
    if teacher is None or student is None:  # not the first of several processes
        return
    rows = [
        ("teacher (one-to-many), with NMS", teacher.nms, teacher.duplicates_nms),
        ("teacher (one-to-many), without NMS", teacher.plain, teacher.duplicates),
        ("student (one-to-one, distilled), without NMS", student.plain, student.duplicates),
    ]
    summary = {name: {"ap": s.ap, "ap50": s.ap50, "duplicates": d.rate} for name, s, d in rows}
    write_json(options.output / "table.json", summary)
    print("\n" + table(rows))
    print(printable(f"\n{time.perf_counter() - begun:.0f} s in all. Pictures: {options.output}/*/*.png"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: compare(options))


if __name__ == "__main__":
    raise SystemExit(main())
