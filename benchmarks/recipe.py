"""Measure what the COCO recipe costs: training steps of FCOS-R50 at 800 × 1333, and the hours they add up to.

python benchmarks/recipe.py --images 2            # on a GPU, as one of eight processes
python benchmarks/recipe.py --images 1 --runs 2   # on a CPU, for the ratios
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "coco"))

from coco_example.models.detectors import build_detector
from coco_example.models.methods import build_method
from coco_example.options import Arm, MethodOptions, ModelOptions

from crosskd_assign.structures import Target

ARMS: tuple[Arm, ...] = ("one-to-many", "one-to-one", "cross-head")
TRAINING_IMAGES = 117_266  # images of COCO train2017 with boxes
EPOCHS = {"1x": 12, "3x": 36}
HEIGHT, WIDTH = 800, 1333


def measure(name: Arm, images: int, runs: int, device: torch.device, *, autocast: bool) -> dict[str, Any]:
    """Measure median seconds of a step with its optimiser, and peak MiB: of the GPU, or of this process so far."""
    # 1. A method, its optimiser, and a batch.
    torch.manual_seed(0)
    model = ModelOptions(backbone="resnet50", size=WIDTH, short_side=HEIGHT)
    student, teacher = (build_detector(model, 91) for _ in range(2))
    method = build_method(MethodOptions(arm=name), student, teacher if name == "cross-head" else None)
    method.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    pixels = [torch.rand(3, HEIGHT, WIDTH, device=device) for _ in range(images)]
    corner = torch.rand(7, 2) * torch.tensor([WIDTH - 200.0, HEIGHT - 200.0])
    box = torch.cat([corner, corner + 20 + 170 * torch.rand(7, 2)], dim=1).to(device)
    targets: list[Target] = [{"boxes": box, "labels": torch.arange(1, 8, device=device)} for _ in pixels]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # 2. Steps; the first is not counted.
    seconds = []
    for i in range(runs + 1):
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses = method(pixels, targets)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _resident()
    return {"arm": name, "seconds": statistics.median(seconds), "peak_mb": peak}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="images a step on one process (2)")
    parser.add_argument("--processes", type=int, default=8, help="number of processes of the recipe (8)")
    parser.add_argument("--runs", type=int, default=10, help="number of timed steps of each arm (10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="autocast precision")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the figures to")
    options = parser.parse_args()
    device = torch.device(options.device)
    steps = TRAINING_IMAGES / (options.images * options.processes)
    # 2. Measure the arms.
    rows = []
    for name in ARMS:  # in order of memory, because a process never gives back its peak
        row = measure(name, options.images, options.runs, device, autocast=options.precision == "bfloat16")
        row |= {f"hours_{kind}": row["seconds"] * steps * epochs / 3600 for kind, epochs in EPOCHS.items()}
        rows.append(row)
        hours = ", ".join(f"{kind} {row[f'hours_{kind}']:.1f} h" for kind in EPOCHS)
        ratio = row["seconds"] / rows[0]["seconds"]
        print(
            f"{name:12} {row['seconds']:8.3f} s a step {ratio:5.2f} × {row['peak_mb']:8.0f} MiB   {hours}", flush=True
        )
    # 3. Write them.
    if options.output is not None:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        about = {"machine": machine, "torch": torch.__version__, "images": options.images, "rows": rows}
        options.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
