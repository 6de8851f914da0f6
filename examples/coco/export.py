"""Write the detector of a finished run as a file for a runtime: pixels in, boxes out, no NMS.

python examples/coco/export.py runs/demo/student --output student.onnx
python examples/coco/export.py runs/demo/student --int8 data/demo/train --output student.int8.onnx
python examples/coco/export.py runs/demo/student --runtime openvino --output student.xml
python examples/coco/predict.py --model student.onnx --output runs/demo/pictures data/demo/val
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from coco_example.commands import CommandParser, run_command
from coco_example.data.calibration import find_pictures, prepared_pictures, validation_folder
from coco_example.errors import MissingPackageError, RunError, of_options
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.models.class_filter import labels_of
from coco_example.models.detectors import selection_of
from coco_example.models.saved_model import load_model

from crosskd_assign import EndToEndDetector, adapt
from crosskd_assign.errors import ExportError, OptionError
from crosskd_assign.export import ExportReport, convert_openvino, export_onnx, halve_onnx, quantize_onnx
from crosskd_assign.export.precision import Calibration
from crosskd_assign.export.tensor_detector import Outputs, Preprocessing

__all__ = ["export", "main"]

OPTIONS = {  # of arguments that errors of the library name
    "box_tolerance": "--box-tolerance",
    "image_size": "--size",
    "outputs": "--outputs",
    "preprocessing": "--preprocessing",
    "score_tolerance": "--score-tolerance",
}


def export(
    run: Path,
    path: Path,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: Preprocessing = "inside",
    outputs: Outputs = "detections",
    top_k: int | None = None,
    opset: int = 18,
    classes: Sequence[str] | None = None,
    one_class_per_point: bool | None = None,
    score_tolerance: float | None = None,
    box_tolerance: float = 1e-3,
) -> ExportReport:
    """Export the detector of a run, with the names of its classes and the size it was trained at, in pixels.

    Args:
        run: The run's folder.
        path: The file to write.
        image_size: Height and width of all images, or None for any.
        preprocessing: Whether the file resizes images itself.
        outputs: The best detections, or all predictions.
        top_k: Detections of an image; None: the run's.
        opset: ONNX operator set.
        classes: Names or ids of the classes to detect; None: all.
        one_class_per_point: Whether each point reports its best class only; None: as the run.
        score_tolerance: Largest difference of a score that the check puts down to rounding; None: as `export_onnx`.
        box_tolerance: Largest difference of a box's side that it does, in pixels.

    Raises:
        ExportError: `export_onnx` raises it.
        RunError: There is no finished run, its detector lacks a class, or it needs NMS and is to detect without.
    """
    model, spec = load_model(run)
    if spec.one_to_many and outputs == "detections":
        raise RunError(
            expected="a detector that needs no NMS",
            got="a one-to-many run",
            where=f"{run}",
            fix="convert it with train.py --convert, or write --outputs dense and run NMS on the host",
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
        outputs=outputs,
        one_to_many=spec.one_to_many,
        class_names=spec.label_to_name,
        metadata={
            **({"detector": spec.detector} if spec.detector else form),
            "short_side": str(spec.model.size if transform is None else transform.min_size[-1]),
            "long_side": str(spec.model.size if transform is None else transform.max_size),
            "category_ids": json.dumps(spec.label_to_category, ensure_ascii=False),
            "top_k": str(detector.top_k),
            **({"one_class_per_point": "true"} if detector.one_class_per_point else {}),
            **({} if spec.thresholds is None else spec.thresholds.as_metadata()),
        },
        opset=opset,
        score_tolerance=score_tolerance,
        box_tolerance=box_tolerance,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--output", type=Path, default=None, help="file to write (model.onnx, or the like, in the run's folder)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="only images of this size, pixels")
    size.add_argument("--dynamic-size", action="store_true", help="images of any size (the default)")
    parser.add_argument(
        "--preprocessing",
        choices=("inside", "outside"),
        default="inside",
        help="inside: images as they come; outside: already resized and padded (inside)",
    )
    parser.add_argument(
        "--outputs",
        choices=get_args(Outputs),
        default="detections",
        help="detections: the best; dense: all boxes and scores, without top-k, for runtimes that lack it (detections)",
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
    parser.add_argument(
        "--score-tolerance",
        type=float,
        default=None,
        help="largest difference of a score between file and detector that is rounding (1e-5; with a selection branch "
        "1e-3)",
    )
    parser.add_argument(
        "--box-tolerance",
        type=float,
        default=1e-3,
        help="largest difference of a box's side that is, in pixels (1e-3)",
    )
    parser.add_argument("--opset", type=int, default=18, help="ONNX operator set (18)")
    parser.add_argument(
        "--runtime",
        choices=("onnx", "openvino"),
        default="onnx",
        help="openvino: .xml and .bin, run there first (onnx)",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--int8", type=Path, metavar="FOLDER", help="quantise, calibrated on pictures in this folder, in any tree"
    )
    precision.add_argument("--half", action="store_true", help="half precision, checked on pictures")
    parser.add_argument("--int8-images", type=int, default=100, help="pictures to calibrate on at most (100)")
    parser.add_argument(
        "--calibration", choices=get_args(Calibration), default="minmax", help="how INT8 ranges are chosen (minmax)"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER", help="pictures for the check of --half and openvino (the run's own)"
    )
    return parser.parse_args(arguments)


def destination(options: argparse.Namespace) -> Path:
    """Choose the file to write, and refuse what cannot work before any work.

    Raises:
        RunError: The file's name or a number does not go with the other options.
        MissingPackageError: The runtime is not installed.
    """
    suffix = ".xml" if options.runtime == "openvino" else ".onnx"
    kind = ".int8" if options.int8 else ".half" if options.half else ""
    path: Path = options.output or options.run / f"model{kind}{suffix}"
    if path.suffix != suffix:
        raise RunError(
            expected=f"a file that ends in {suffix}",
            got=path.name,
            where="--output",
            fix=f"name it {path.stem}{suffix}",
        )
    if options.classes is not None and options.outputs == "dense":
        raise RunError(
            expected="--classes with --outputs detections",
            got="it with dense outputs, of which the host selects",
            where="--classes",
            fix="leave it out, and select the classes on the host",
        )
    if options.int8_images < 1:
        raise RunError(
            expected="at least 1 picture", got=f"{options.int8_images}", where="--int8-images", fix="take some tens"
        )
    if options.runtime == "openvino" and find_spec("openvino") is None:
        raise MissingPackageError(
            expected="openvino", got="no such package", where="--runtime", fix='pip install "crosskd_assign[openvino]"'
        )
    return path


def run(options: argparse.Namespace) -> None:
    """Export a detector and print what was written."""
    # 1. What can be refused is refused now. Pictures are for what has to be measured.
    path = destination(options)
    pictures: list[Path] = []
    if options.int8 or options.half or options.runtime == "openvino":
        pictures = find_pictures(options.int8 or options.check or validation_folder(options.run), options.int8_images)

    # 2. The float32 file, which is a step on the way if there are pictures.
    onnx = path.with_name(f".{path.name}.float.onnx") if pictures else path
    steps: dict[str, Any] = {}
    try:
        report = export(
            options.run,
            onnx,
            image_size=None if options.size is None else tuple(options.size),
            preprocessing=options.preprocessing,
            outputs=options.outputs,
            top_k=options.top_k,
            opset=options.opset,
            classes=options.classes,
            one_class_per_point=options.one_class_per_point,
            score_tolerance=options.score_tolerance,
            box_tolerance=options.box_tolerance,
        )
        if pictures:
            steps = finish(options, onnx, path, pictures)
    except (ExportError, OptionError) as error:
        raise of_options(error, OPTIONS) from error
    finally:
        if pictures:
            onnx.unlink(missing_ok=True)

    # 3. What it is.
    written = [path, path.with_suffix(".bin")] if options.runtime == "openvino" else [path]
    summary = {
        "file": str(path),
        "megabytes": round(sum(file.stat().st_size for file in written) / 2**20, 1),
        "input": report.input_shape,
        "outputs": report.outputs,
        "detections": report.detections,
        "checked": report.batches,
        "score_difference": report.score_difference,
        "box_difference_px": report.box_difference,
        **steps,
    }
    print(json.dumps(summary))


def finish(options: argparse.Namespace, onnx: Path, path: Path, pictures: Sequence[Path]) -> dict[str, Any]:
    """Bring a float32 file to the precision and the runtime that are asked for; return how far each step is off."""
    # 1. Pictures as the file takes them.
    images = prepared_pictures(pictures, OnnxDetector(onnx).prepare)
    steps: dict[str, Any] = {"pictures": len(images)}
    lower = path if options.runtime == "onnx" else onnx

    # 2. The precision.
    if options.int8:
        report = quantize_onnx(onnx, lower, images, method=options.calibration)
        steps["int8"] = {"layers": report.layers, "kept_in_float": report.kept, **asdict(report.agreement)}
    elif options.half:
        report = halve_onnx(onnx, lower, images)
        steps["half"] = {"layers": report.layers, "kept_in_float": report.kept, **asdict(report.agreement)}

    # 3. The runtime.
    if options.runtime == "openvino":
        steps["openvino"] = asdict(convert_openvino(onnx, path, images).agreement)
    return steps


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
