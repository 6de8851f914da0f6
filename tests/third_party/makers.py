"""One adapter of each foreign detector that is at hand, small enough for a test; making another skips the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from crosskd_assign import DetectorAdapter

torch.set_num_threads(1)  # maps of a few points are slower on more, and much slower where cores are shared

CLASSES = 3
SIZE = 96  # pixels


def _effdet() -> DetectorAdapter:
    pytest.importorskip("effdet")
    from effdet_detector import build

    return build(CLASSES)


def _yolo(name: str, branch: str = "one-to-many") -> Callable[[], DetectorAdapter]:
    def build_one() -> DetectorAdapter:
        pytest.importorskip("ultralytics")
        from ultralytics_detector import build

        return build(CLASSES, name=name, branch=branch)  # type: ignore[arg-type]

    return build_one


def _ssdlite() -> DetectorAdapter:
    from ssdlite_detector import build

    return build(CLASSES, size=SIZE)


def _trained(function: str) -> Callable[[], DetectorAdapter]:
    def load() -> DetectorAdapter:
        if not Path(os.environ.get("COCO_DETECTORS", ""), "coco_detectors.py").is_file():
            pytest.skip("COCO_DETECTORS does not name the folder of coco_detectors.py")
        import nanodet_yolox

        adapter: DetectorAdapter = getattr(nanodet_yolox, function)(0)[0]
        return adapter

    return load


MAKERS: dict[str, Callable[[], DetectorAdapter]] = {
    "effdet": _effdet,
    "yolov8n": _yolo("yolov8n"),
    "yolo11n": _yolo("yolo11n"),
    "yolo26n": _yolo("yolo26n"),
    "yolo26n-one-to-one": _yolo("yolo26n", "one-to-one"),
    "ssdlite": _ssdlite,
    "nanodet": _trained("nanodet_m"),
    "yolox": _trained("yolox_nano"),
}


def make_detector(name: str) -> DetectorAdapter:
    """A detector with reproducible weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return awake(MAKERS[name]())


def awake(adapter: DetectorAdapter) -> DetectorAdapter:
    """Measures the batch-norms of a fresh network once: with those it is built with, all points predict the same."""
    norms = [module for module in adapter.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(int(norm.num_batches_tracked) for norm in norms if norm.num_batches_tracked is not None):
        return adapter
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    batch, _ = adapter.train().preprocess(torch.rand(4, 3, SIZE, SIZE))
    with torch.no_grad():
        adapter.head(adapter.features(batch), batch.image_size)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return adapter
