"""The whole path in a few minutes on two CPU cores: draw scenes, train a teacher, distil a student, compare.

python examples/coco/demo.py --output runs/demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evaluate import table
from options import Options
from processes import Interrupted
from runs import write_json
from train import run
from training import DeadLossError, NonFiniteLossError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for both runs (runs/demo)")
    parser.add_argument("--data-path", type=Path, default=Path("data/demo"), help="folder for the scenes (data/demo)")
    parser.add_argument("--epochs", type=int, default=8, help="of each of the two trainings (8)")
    parser.add_argument("--seed", type=int, default=0, help="of both (0)")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    folders = {"one-to-many": options.output / "teacher", "cross-head": options.output / "student"}
    scores = {}
    try:
        for arm, folder in folders.items():
            print(f"\n{arm}: training into {folder}", file=sys.stderr)
            scores[arm] = run(
                Options(
                    output=str(folder),
                    arm=arm,
                    data="demo",
                    data_path=str(options.data_path),
                    teacher="" if arm == "one-to-many" else str(folders["one-to-many"]),
                    epochs=options.epochs,
                    seed=options.seed,
                    batch_size=8,
                    lr=2e-3,
                    cache=True,
                    channels_last=True,  # faster on CPUs
                    eval_every=4,
                    log_every=50,
                )
            )
    except (ValueError, NonFiniteLossError, DeadLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped; to begin again, remove {options.output}", file=sys.stderr)
        return 128 + stop.number
    teacher, student = scores["one-to-many"], scores["cross-head"]
    if teacher is None or student is None:  # not the first of several processes
        return 0
    rows = [
        ("teacher (one-to-many), with NMS", teacher.nms, teacher.duplicates_nms),
        ("teacher (one-to-many), without NMS", teacher.plain, teacher.duplicates),
        ("student (one-to-one, distilled), without NMS", student.plain, student.duplicates),
    ]
    summary = {name: {"ap": s.ap, "ap50": s.ap50, "duplicates": d.rate} for name, s, d in rows}
    write_json(options.output / "table.json", summary)
    print("\n" + table(rows))
    print(f"\n{time.perf_counter() - begun:.0f} s in all. Pictures: {options.output}/*/*.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
