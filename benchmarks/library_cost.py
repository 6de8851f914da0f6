"""Time the assigner, the losses, the post-processing and the step against what they replace, side by side in one run.

python benchmarks/library_cost.py --output benchmarks.json
python benchmarks/library_cost.py --only assigner        # pip install ultralytics adds a peer, if it is there
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler is talkative

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import box_iou

from crosskd_assign import (
    CrossHeadDistiller,
    DensePredictions,
    GridLevel,
    TaskAwareOneToOneAssigner,
    functional,
)
from crosskd_assign.assignment import Assigner
from crosskd_assign.postprocessing import top_detections
from crosskd_assign.structures import Batch, Target

HEIGHT, WIDTH, CLASSES = 800, 1344, 80
Row = dict[str, Any]


def compare(name: str, arms: Mapping[str, Callable[[], object]], runs: int, device: torch.device) -> list[Row]:
    """Time several ways of doing one thing in turn, A B A B …, after one warm-up each.

    Returns:
        A row for each with the median in milliseconds, and how many times faster the first is than it: the median of
        the ratios of neighbouring runs, which a drifting machine does not disturb.
    """
    # 1. Time them.
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(runs + 1):
        for arm, call in arms.items():
            _synchronize(device)
            time.sleep(0.05)  # threads that the one before left spinning would be charged to this one
            begun = time.perf_counter()
            call()
            _synchronize(device)
            if i > 0:
                seconds[arm].append(time.perf_counter() - begun)
    # 2. Compare each with the first.
    first = seconds[next(iter(arms))]
    rows = []
    for arm, values in seconds.items():
        ratio = statistics.median(v / f for v, f in zip(values, first, strict=True))
        rows.append({"case": name, "arm": arm, "ms": 1e3 * statistics.median(values), "ratio": ratio})
    return rows


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def pyramid() -> list[GridLevel]:
    """Build the five levels of a torchvision FCOS at 800 × 1344."""
    levels = []
    for stride in (8, 16, 32, 64, 128):
        height, width = -(-HEIGHT // stride), -(-WIDTH // stride)
        levels.append(GridLevel(height, width, stride, (WIDTH // width, HEIGHT // height), (0.0, 0.0)))
    return levels


def scene(
    images: int, boxes: int, device: torch.device, *, crowd: bool = False
) -> tuple[DensePredictions, list[Target]]:
    """Sample a half-trained detector's predictions and boxes of 12 to 600 px, or a crowd of 24 to 60 on a quarter."""
    # 1. Predictions.
    generator = torch.Generator().manual_seed(0)
    levels = pyramid()
    count = sum(map(len, levels))
    sides = torch.exp(0.5 * torch.randn(images, count, 4, generator=generator)) * 2  # in strides
    logits = 1.5 * torch.randn(images, count, CLASSES, generator=generator) - 4
    predictions = DensePredictions.from_sides(logits.to(device), sides.to(device), levels)
    # 2. Boxes.
    targets: list[Target] = []
    for _ in range(images):
        span = (3.2, 4.1) if crowd else (2.5, 6.4)
        size = torch.exp(torch.rand(boxes, 2, generator=generator) * (span[1] - span[0]) + span[0])
        area = torch.tensor([WIDTH, HEIGHT]) / (2 if crowd else 1)
        center = torch.rand(boxes, 2, generator=generator) * area
        corners = torch.cat([center - size / 2, center + size / 2], dim=1)
        labels = torch.randint(CLASSES, (boxes,), generator=generator)
        targets.append({"boxes": corners.to(device), "labels": labels.to(device)})
    return predictions, targets


def dense_hungarian(predictions: DensePredictions, targets: Sequence[Target]) -> None:
    """Match as DeFCN does: the metric of every point and box, then scipy on the whole matrix, image by image."""
    reach = 1.5 * predictions.strides[:, None]
    for logits, boxes, target in zip(predictions.logits, predictions.boxes, targets, strict=True):
        truth = target["boxes"]
        quality = logits.sigmoid()[:, target["labels"]] ** 0.2 * box_iou(boxes, truth) ** 0.8  # (A, G)
        offset = predictions.points[:, None] - (truth[:, :2] + truth[:, 2:]) / 2
        inside = (predictions.points[:, None] > truth[:, :2]) & (predictions.points[:, None] < truth[:, 2:])
        near = offset.abs().amax(dim=-1) < reach
        quality = torch.where(inside.all(dim=-1) & near, quality, -1.0)
        linear_sum_assignment(np.nan_to_num(quality.cpu().numpy()), maximize=True)


def task_aligned_peer(predictions: DensePredictions, targets: Sequence[Target]) -> Callable[[], object] | None:
    """Build Ultralytics' TaskAlignedAssigner with topk=1, if the package is installed."""
    if importlib.util.find_spec("ultralytics") is None:
        return None
    from ultralytics.utils.tal import TaskAlignedAssigner  # noqa: PLC0415  # AGPL-3.0, never a dependency

    most = max(len(target["boxes"]) for target in targets)
    boxes = torch.stack([target["boxes"] for target in targets])
    labels = torch.stack([target["labels"] for target in targets])[..., None]
    mask = torch.ones(len(targets), most, 1, device=boxes.device)
    peer = TaskAlignedAssigner(topk=1, num_classes=CLASSES, alpha=0.5, beta=6.0)
    scores = predictions.logits.sigmoid()
    return lambda: peer(scores, predictions.boxes, predictions.points, labels, boxes, mask)


def assigner(device: torch.device, runs: int, images: int) -> list[Row]:
    """Time the matching of a batch: arithmetic candidates and lazy solving against everything on everything."""
    rows = []
    for boxes, crowd in ((7, False), (20, False), (100, False), (300, True)):
        # 1. Time.
        predictions, targets = scene(images, boxes, device, crowd=crowd)
        ours, greedy = TaskAwareOneToOneAssigner(), TaskAwareOneToOneAssigner(solver="greedy")
        arms: dict[str, Callable[[], object]] = {
            "ours, exact": partial(ours, predictions, targets),
            "ours, greedy": partial(greedy, predictions, targets),
            "all pairs + scipy (DeFCN)": partial(dense_hungarian, predictions, targets),
        }
        peer = task_aligned_peer(predictions, targets)
        if peer is not None:
            arms["TaskAlignedAssigner(topk=1)"] = peer
        case = compare(f"assign {images} × {boxes} boxes{', crowded' if crowd else ''}", arms, runs, device)
        # 2. Memory, and what the greedy solver loses.
        for row, call in zip(case, arms.values(), strict=True):
            row["peak_mb"] = _peak_memory(call, device) / 2**20
        best, reached = (float(a(predictions, targets).metric.double().sum()) for a in (ours, greedy))
        case[1]["optimality_gap"] = (best - reached) / best
        rows += case
    return rows


def composed_quality_focal(z: Tensor, teacher: Tensor) -> Tensor:
    """Compute the class term of distillation as it is usually written."""
    q = teacher.sigmoid()
    return ((z.sigmoid() - q).abs() * F.binary_cross_entropy_with_logits(z, q, reduction="none")).sum()


def losses(device: torch.device, runs: int, images: int) -> list[Row]:
    """Time forward and backward of the dense classification term, and measure its peak memory beyond the inputs."""
    shape = (images, sum(map(len, pyramid())), CLASSES)
    z = (2 * torch.randn(shape, device=device) - 5).requires_grad_()
    teacher = 2 * torch.randn(shape, device=device) - 5

    def ours() -> None:
        z.grad = None
        functional.cross_head_classification_loss(z, teacher, normalizer=1.0).backward()  # type: ignore[no-untyped-call]

    def composed() -> None:
        z.grad = None
        composed_quality_focal(z, teacher).backward()  # type: ignore[no-untyped-call]

    arms = {"ours": ours, "composed": composed}
    rows = compare(f"class distillation {images} × {shape[1]} × {CLASSES}", arms, runs, device)
    for row, call in zip(rows, arms.values(), strict=True):
        row["peak_mb"] = _peak_memory(call, device) / 2**20
    return rows


def _peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of bytes that ``call`` allocates; on a CPU a bound, the sum of torch's and NumPy's peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    tracemalloc.start()  # NumPy's share
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events() if profile.profiler else ():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak + host


def postprocessing(device: torch.device, runs: int, images: int) -> list[Row]:
    """Time top-k without NMS against torchvision's own post-processing of the same outputs."""
    # 1. The outputs of a head, as torchvision has them.
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES).to(device).eval()
    predictions, _ = scene(images, 1, device)
    sizes = [len(level) for level in pyramid()]
    distances = torch.rand(images, sum(sizes), 4, device=device) * 4
    centerness = torch.randn(images, sum(sizes), 1, device=device)
    outputs = {
        "cls_logits": list(torch.split(predictions.logits, sizes, 1)),
        "bbox_regression": list(torch.split(distances, sizes, 1)),
        "bbox_ctrness": list(torch.split(centerness, sizes, 1)),
    }
    half = predictions.strides[:, None] / 2
    anchors = torch.cat([predictions.points - half, predictions.points + half], dim=1)
    split = [list(torch.split(anchors, sizes))] * images
    # 2. Time both.
    arms: dict[str, Callable[[], object]] = {
        "ours, top-k": lambda: top_detections(predictions, 100),
        "torchvision, NMS": lambda: model.postprocess_detections(outputs, split, [(HEIGHT, WIDTH)] * images),
    }
    with torch.no_grad():
        return compare(f"post-process {images} images", arms, runs, device)


def step(device: torch.device, runs: int, images: int, size: int) -> list[Row]:
    """Time a whole distillation step against the sum of the parts that no implementation can leave out."""
    # 1. A student, its teacher, and a batch.
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "min_size": size, "max_size": 2 * size}
    student, teacher = fcos_resnet50_fpn(**options).to(device), fcos_resnet50_fpn(**options).to(device)
    distiller = CrossHeadDistiller(student, teacher).to(memory_format=torch.channels_last)
    pixels = [torch.rand(3, size, size, device=device) for _ in range(images)]
    corner = torch.rand(7, 2, device=device) * 0.7 * size
    box = torch.cat([corner, corner + 0.25 * size], dim=1)
    targets: list[Target] = [{"boxes": box, "labels": torch.arange(7, device=device)} for _ in pixels]
    batch, _ = distiller.detector.adapter.preprocess(pixels, targets)

    # 2. The step, with any assigner, and its parts.
    def whole(assigner: Assigner) -> None:
        distiller.detector.assigner = assigner
        distiller.zero_grad(set_to_none=True)
        torch.stack(list(distiller(pixels, targets).values())).sum().backward()  # type: ignore[no-untyped-call]

    exact = TaskAwareOneToOneAssigner()
    arms = {"parts": partial(_parts, distiller, batch), "whole step": partial(whole, exact)}
    if device.type == "cuda":  # what the matching takes of it
        with torch.no_grad():
            made = exact(distiller.detector.run(pixels, targets).predictions, targets)
        arms["waited for at once"] = partial(whole, partial(exact))  # which hides that it can be begun
        arms["matched before"] = partial(whole, lambda *_: made)

    # 3. Time them.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return compare(f"step, {images} × {size} px, R50", arms, runs, device)


def _parts(distiller: CrossHeadDistiller, batch: Batch) -> None:
    """Run the networks of a step forward and backward, and nothing else."""
    adapter, teacher = distiller.detector.adapter, distiller.teacher
    distiller.zero_grad(set_to_none=True)
    features = adapter.features(batch)
    own = adapter.head(features, batch.image_size)
    with torch.no_grad():
        teacher.head(teacher.features(batch), batch.image_size)
    cross = teacher.head(features, batch.image_size)
    total = own.logits.sum() + own.boxes.sum() + cross.logits.sum() + cross.boxes.sum()
    total.backward()  # type: ignore[no-untyped-call]


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("assigner", "losses", "postprocessing", "step"), help="run one of the parts")
    parser.add_argument("--runs", type=int, default=9, help="number of timed runs of each (9)")
    parser.add_argument("--images", type=int, default=16, help="batch size of the assigner (16)")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    small = device.type == "cpu"
    parts: dict[str, Callable[[], list[Row]]] = {
        "assigner": lambda: assigner(device, options.runs, options.images),
        "losses": lambda: losses(device, options.runs, 4 if small else 16),
        "postprocessing": lambda: postprocessing(device, options.runs, 8),
        "step": lambda: step(device, options.runs, 2 if small else 16, 256 if small else 800),
    }
    # 2. Measure, and print a row as soon as it is there.
    rows: list[Row] = []
    for name, part in parts.items():
        if options.only in (None, name):
            for row in part():
                line = f"{row['case']:38} {row['arm']:28} {row['ms']:9.2f} ms {row['ratio']:8.2f} ×"
                line += f" {row['peak_mb']:8.1f} MiB" if "peak_mb" in row else ""
                line += f"   Σ metric {-100 * row['optimality_gap']:.4f} %" if "optimality_gap" in row else ""
                print(line, flush=True)
                rows.append(row)
    # 3. Write them.
    if options.output is not None:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, CPU"
        about = {"machine": machine, "threads": options.threads, "torch": torch.__version__, "runs": options.runs}
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
