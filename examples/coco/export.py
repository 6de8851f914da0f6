"""Write the detector of a finished run as one ONNX file: pixels in, boxes out, no NMS.

python examples/coco/export.py runs/demo/student --output student.onnx
python examples/coco/predict.py --model student.onnx --output runs/demo/pictures data/demo/val
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coco_example.commands import CommandParser, run_command
from coco_example.errors import RunError
from coco_example.models.class_filter import labels_of
from coco_example.models.detectors import selection_of
from coco_example.models.saved_model import load_model

from crosskd_assign import EndToEndDetector, adapt
from crosskd_assign.export import ExportReport, export_onnx
from crosskd_assign.export.tensor_detector import Preprocessing

__all__ = ["export", "main"]


def export(
    run: Path,
    path: Path,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing = "inside",
    top_k: int | None = None,
    opset: int = 18,
    classes: Sequence[str] | None = None,
    one_class_per_point: bool | None = None,
) -> ExportReport:
    """Export the detector of a run, with the names of its classes and the size it was trained at, in pixels.

    Args:
        run: The run's folder.
        path: The file to write.
        image_size: Height and width of all images, or None for any.
        preprocessing: Whether the file resizes images itself.
        top_k: Detections of an image; None: the run's.
        opset: ONNX operator set.
        classes: Names or ids of the classes to detect; None: all.
        one_class_per_point: Whether each point reports its best class only; None: as the run.

    Raises:
        RunError: There is no finished run, its detector needs NMS, or it lacks a class.
    """
    model, spec = load_model(run)
    if spec.one_to_many:
        raise RunError(
            expected="a detector that needs no NMS",
            got="a one-to-many run",
            where=f"{run}",
            fix="export one trained with --arm one-to-one or cross-head",
        )
    detector = EndToEndDetector(
        model,
        selection=selection_of(model),
        top_k=spec.model.top_k if top_k is None else top_k,
        one_class_per_point=spec.model.one_class_per_point if one_class_per_point is None else one_class_per_point,
        classes=labels_of(classes, spec.label_to_name, spec.label_to_category),
    )
    transform: Any = getattr(adapt(model).model, "transform", None)  # torchvision's
    if transform is None and preprocessing == "outside":
        raise RunError(
            expected="images that the file resizes itself, for a detector of a Python file",
            got="--preprocessing outside",
            where=f"{run}",
            fix="leave it out, or export the detector with crosskd_assign.export.export_onnx",
        )
    form = {"architecture": spec.model.architecture, "backbone": spec.model.backbone}
    return export_onnx(
        detector,
        path,
        image_size=image_size,
        preprocessing=preprocessing,
        class_names=spec.label_to_name,
        metadata={
            **({"detector": spec.detector} if spec.detector else form),
            "short_side": str(spec.model.size if transform is None else transform.min_size[-1]),
            "long_side": str(spec.model.size if transform is None else transform.max_size),
            "category_ids": json.dumps(spec.label_to_category, ensure_ascii=False),
            **({} if spec.thresholds is None else spec.thresholds.as_metadata()),
        },
        opset=opset,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--output", type=Path, default=None, help="file to write (model.onnx in the run's folder)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="only images of this size, pixels")
    size.add_argument("--dynamic-size", action="store_true", help="images of any size (the default)")
    parser.add_argument(
        "--preprocessing",
        choices=("inside", "outside"),
        default="inside",
        help="inside: images as they come; outside: already resized and padded (inside)",
    )
    parser.add_argument("--top-k", type=int, default=None, help="detections of an image (the run's)")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=None,
        metavar="NAME",
        help="classes to detect, by name or id, before top-k (all)",
    )
    parser.add_argument(
        "--one-class-per-point",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let each point report its best class only (as the run)",
    )
    parser.add_argument("--opset", type=int, default=18, help="ONNX operator set (18)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Export a detector and print what was written."""
    path = options.output or options.run / "model.onnx"
    report = export(
        options.run,
        path,
        image_size=None if options.size is None else tuple(options.size),
        preprocessing=options.preprocessing,
        top_k=options.top_k,
        opset=options.opset,
        classes=options.classes,
        one_class_per_point=options.one_class_per_point,
    )
    summary = {
        "file": str(path),
        "megabytes": round(path.stat().st_size / 2**20, 1),
        "input": report.input_shape,
        "detections": report.detections,
        "checked": report.batches,
        "score_difference": report.score_difference,
        "box_difference_px": report.box_difference,
    }
    print(json.dumps(summary))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
