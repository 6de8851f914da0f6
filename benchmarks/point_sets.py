"""Time the assigner on points that were given by hand: grids, grids with holes, and scattered points.

python benchmarks/point_sets.py --output point_sets.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import library_cost
import torch

from crosskd_assign import DensePredictions, TaskAwareOneToOneAssigner


def irregular(predictions: DensePredictions, kind: str) -> DensePredictions:
    """Give predictions points of the same strides at random places, or leave a tenth of the grids' points out."""
    generator = torch.Generator().manual_seed(1)
    device, count = predictions.points.device, len(predictions.points)
    if kind == "scattered":
        points = torch.rand(count, 2, generator=generator) * torch.tensor([library_cost.WIDTH, library_cost.HEIGHT])
        return replace(predictions, points=points.to(device), levels=None)
    kept = (torch.rand(count, generator=generator) > 0.1).to(device)
    logits, boxes = predictions.logits[:, kept].contiguous(), predictions.boxes[:, kept].contiguous()
    return DensePredictions(logits, boxes, predictions.points[kept], predictions.strides[kept])


def _shifted(predictions: DensePredictions) -> Iterator[DensePredictions]:
    """The same at new points each time, each set some way off the one before."""
    while True:
        predictions = replace(predictions, points=predictions.points + 1 / 64, levels=None)
        yield predictions


def point_sets(device: torch.device, runs: int, images: int) -> Iterator[library_cost.Row]:
    """Time the matching on points that were given by hand: grids, grids with holes, and scattered points."""
    ours = TaskAwareOneToOneAssigner()
    for boxes, crowd in ((7, False), (20, False), (100, False), (300, True)):
        predictions, targets = library_cost.scene(images, boxes, device, crowd=crowd)
        name = f"{images} × {boxes} boxes{', crowded' if crowd else ''}"
        by_hand = replace(predictions, levels=None)
        sets = {"holes": irregular(predictions, "holes"), "scattered": irregular(predictions, "scattered")}
        new = _shifted(by_hand)
        arms: dict[str, Callable[[], object]] = {
            "with levels": partial(ours, predictions, targets),
            "by hand": partial(ours, by_hand, targets),
            "by hand, new points": lambda new=new, t=targets: ours(next(new), t),  # type: ignore[misc]
        }
        yield from library_cost.compare(f"grids, {name}", arms, runs, device)
        for kind, given in sets.items():
            new = _shifted(given)
            arms = {
                "ours": partial(ours, given, targets),
                "ours, new points": lambda new=new, t=targets: ours(next(new), t),  # type: ignore[misc]
                "all pairs + scipy (DeFCN)": partial(library_cost.dense_hungarian, given, targets),
            }
            yield from library_cost.compare(f"{kind}, {name}", arms, runs, device)


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="number of timed runs of each (9)")
    parser.add_argument("--images", type=int, default=4, help="batch size (4)")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (2)")
    parser.add_argument("--device", default="cpu", help="device to run on (cpu)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    # 2. Measure and print.
    rows = []
    for row in point_sets(torch.device(options.device), options.runs, options.images):
        print(f"{row['case']:38} {row['arm']:28} {row['ms']:9.2f} ms {row['ratio']:8.2f} ×", flush=True)
        rows.append(row)

    # 3. Write them.
    if options.output is not None:
        about = {"machine": platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.output.write_text(json.dumps({**about, "runs": options.runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
