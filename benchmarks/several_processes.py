"""Time training on one, two and four processes of this machine, each step of the same images, and measure their memory.

python benchmarks/coco_size.py --data-path runs/coco_part --part 0.01 --pictures coco_open/train --only nothing
python benchmarks/several_processes.py --data-path runs/coco_part
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _logged(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


def _ranks(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def _mib(pid: int, file: str, key: str) -> float:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure(data: Path, processes: int, *, images: int, steps: int, size: int) -> dict[str, Any]:
    """Train some steps; return steps a second after the first five, and the memory of every process."""
    with tempfile.TemporaryDirectory() as temporary:
        # 1. Start.
        folder = Path(temporary) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(ROOT / "examples/coco/train.py"), "--data-path", str(data), "--output", str(folder)]
        command += ["--arm", "one-to-one", "--sync-batch-norm", "--log-every", "1", "--workers", "0"]
        command += ["--batch-size", str(images // processes), "--size", str(size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

        # 2. Wait for the steps, and stop.
        while len(_logged(folder)) < steps and launcher.poll() is None:
            time.sleep(0.2)
        if launcher.poll() is not None:
            raise SystemExit(f"error: training ended early: {launcher.communicate()[1][-500:]}")
        ranks = _ranks(launcher.pid)
        peak = [_mib(pid, "status", "VmHWM:") for pid in ranks]
        shared = [_mib(pid, "smaps_rollup", "Pss:") for pid in ranks]
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate()

        # 3. Count.
        first, last = (_logged(folder)[n]["seconds"] for n in (4, steps - 1))
    return {
        "processes": processes,
        "steps_per_second": (steps - 5) / (last - first),
        "peak_mib": peak,
        "proportional_mib": shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="data set to train on")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes (1 2 4)")
    parser.add_argument("--images", type=int, default=8, help="images of a step over all processes (8)")
    parser.add_argument("--steps", type=int, default=25, help="steps of each run; the first five do not count (25)")
    parser.add_argument("--size", type=int, default=320, help="longer side of the images in pixels (320)")
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()

    rows = []
    for count in options.processes:
        row = measure(options.data_path, count, images=options.images, steps=options.steps, size=options.size)
        rows.append(row)
        memory = ", ".join(
            f"{p:,.0f} ({s:,.0f})" for p, s in zip(row["peak_mib"], row["proportional_mib"], strict=True)
        )
        print(f"{count} processes: {row['steps_per_second']:.2f} steps a second; MiB of each: {memory}", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
