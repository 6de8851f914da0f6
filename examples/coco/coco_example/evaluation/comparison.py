"""A detector before and after NMS is taken out of it: scores, duplicates and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from coco_example.data.dataset import CocoDataset
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, Evaluation, table
from crosskd_assign.detectors.probing import evaluation_mode

__all__ = ["Times", "comparison_table", "median_times", "time_both"]

_IMAGES = 20


@dataclass(frozen=True)
class Times:
    """Median milliseconds of one image on one thread: the detector before with NMS, and the one after without."""

    before: float
    after: float


def time_both(before: Detector, after: Detector, dataset: CocoDataset, *, images: int = _IMAGES) -> Times:
    """Time both detectors on the first images, one at a time and in turn: resizing, network, selection and NMS."""
    pixels = [dataset[i][0].to(after.device) for i in range(min(images, len(dataset)))]

    def once(detector: Detector, image: Tensor, nms_threshold: float | None) -> None:
        detector.detect([image], nms_threshold=nms_threshold)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)

    with one_thread(), evaluation_mode(before.adapter), evaluation_mode(after.adapter):
        return Times(
            *median_times(
                [lambda image: once(before, image, NMS_THRESHOLD), lambda image: once(after, image, None)], pixels
            )
        )


def median_times(ways: Sequence[Callable[[Tensor], object]], images: Sequence[Tensor]) -> list[float]:
    """Take the median milliseconds of several ways, run in turn on every image, the first one twice."""
    seconds: list[list[float]] = [[] for _ in ways]
    for n, image in enumerate([images[0], *images]):
        for way, taken in zip(ways, seconds, strict=True):
            begun = time.perf_counter()
            way(image)
            if n > 0:  # the first pass prepares
                taken.append(time.perf_counter() - begun)
    return [1000 * statistics.median(taken) for taken in seconds]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread while the block runs, as devices with few cores would."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def comparison_table(before: Evaluation, after: Evaluation, times: Times) -> str:
    """Write the table of a conversion: `table` of both, without and with NMS, thresholds of the best F1 and time."""
    rows = [
        ("before, with NMS", before.nms, before.duplicates_nms),
        ("before, without NMS", before.plain, before.duplicates),
        ("after, without NMS", after.plain, after.duplicates),
        ("after, with NMS", after.nms, after.duplicates_nms),
    ]
    limits = (before.thresholds_nms, before.thresholds, after.thresholds, after.thresholds_nms)
    chosen = ["threshold", *(f"{limit.overall.score:.2f}".replace("nan", "–") for limit in limits)]
    spent = ["ms/image", f"{times.before:.1f}", "–", f"{times.after:.1f}", "–"]
    columns = zip(table(rows).split("\n"), chosen, spent, strict=True)
    return "\n".join(f"{line}  {limit:>9}  {cell:>8}" for line, limit, cell in columns)
