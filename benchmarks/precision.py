"""Measure what INT8 and half precision cost a detector: AP, duplicates, size and latency of exported files.

python benchmarks/precision.py runs/one-to-many runs/student --data-path data/bccd --output precision.json \
    --picture precision.png

Each run becomes three files: float32, INT8 calibrated on training pictures, and half precision. A one-to-many run is
exported with dense outputs and scored with NMS, any other with its detections and without. AP is that of onnxruntime's
detections on the validation images. Latency is one picture's, preprocessing and NMS included: processor time on one
thread, which other work on the machine hardly disturbs, all files in turn; in brackets, how many times as long as
float32's. Half precision has none, because onnxruntime computes it in float32 on most processors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "coco"))

import export as exporting
from coco_example.data.calibration import find_pictures, prepared_pictures
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.evaluation.evaluation import detect, score
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.models.saved_model import load_model

from crosskd_assign.export import halve_onnx, quantize_onnx

Row = dict[str, Any]
HEAD = "| network | file | AP | AP50 | duplicates | MB | latency | found again |\n|---|---|---|---|---|---|---|---|"

MEASURED = (("ap", 100, "AP"), ("megabytes", 1, "MB"), ("ms", 1, "ms an image, one thread"))


def write_files(run: Path, folder: Path, pictures: list[Path], methods: list[str]) -> tuple[dict[str, Path], Row]:
    """Write a run's files; return them, and how far each is from the first."""
    outputs: Any = "dense" if load_model(run)[1].one_to_many else "detections"
    files = {"float32": folder / "float32.onnx"}
    exporting.export(run, files["float32"], outputs=outputs)
    images = prepared_pictures(pictures, OnnxDetector(files["float32"]).prepare)
    found = {"float32": 1.0}
    for method in methods:
        name = f"INT8, {method}"
        files[name] = folder / f"{method}.onnx"
        kind: Any = method
        found[name] = quantize_onnx(files["float32"], files[name], images, method=kind).agreement.matched
    files["float16"] = folder / "float16.onnx"
    found["float16"] = halve_onnx(files["float32"], files["float16"], images).agreement.matched
    return files, found


def measure(run: Path, data: Path, limit: int, methods: list[str], runs: int, folder: Path) -> list[Row]:
    """Measure a run's files."""
    # 1. Files, calibrated on training pictures, and images to score on.
    train, _ = locate_split(data, "train")
    files, found = write_files(run, folder, find_pictures(train, limit), methods)
    detectors = {name: OnnxDetector(path, threads=1) for name, path in files.items()}

    # 2. Scores.
    rows: list[Row] = []
    for name, detector in detectors.items():
        index = read_coco(*locate_split(data, "val"), detector.classes)
        result = score(detect(detector, CocoDataset(index)), index, top_k=detector.top_k)
        many = detector.one_to_many
        scores, duplicates = (result.nms, result.duplicates_nms) if many else (result.plain, result.duplicates)
        rows.append(
            {
                "network": f"{run.name}, {'with' if many else 'without'} NMS",
                "file": name,
                "ap": scores.ap,
                "ap50": scores.ap50,
                "duplicates": duplicates.rate,
                "megabytes": files[name].stat().st_size / 2**20,
                "matched": found[name],
            }
        )

    # 3. Latency, of all files in turn.
    image, _ = CocoDataset(index)[0]
    arms: dict[str, Callable[[], object]] = {n: partial(d, [image]) for n, d in detectors.items() if n != "float16"}
    times = processor_times(arms, runs)
    return [row | times.get(row["file"], {"ms": None, "ratio": None}) for row in rows]


def processor_times(arms: Mapping[str, Callable[[], object]], runs: int) -> dict[str, Row]:
    """Measure processor time of calls on one thread, in turn: medians in milliseconds, and ratios to the first."""
    torch.set_num_threads(1)  # as onnxruntime has
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(runs + 1):
        for arm, call in arms.items():
            begun = time.process_time()
            call()
            if i > 0:  # the first warms up
                seconds[arm].append(time.process_time() - begun)
    first = next(iter(seconds.values()))
    return {
        arm: {
            "ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(v / f for v, f in zip(values, first, strict=True)),
        }
        for arm, values in seconds.items()
    }


def line(row: Row) -> str:
    """Write a row of the table."""
    latency = "–" if row["ms"] is None else f"{row['ms']:.1f} ms ({row['ratio']:.2f})"
    cells = [row["network"], row["file"], f"{100 * row['ap']:.1f}", f"{100 * row['ap50']:.1f}"]
    cells += [f"{row['duplicates']:.3f}", f"{row['megabytes']:.2f}", latency, f"{100 * row['matched']:.1f} %"]
    return f"| {' | '.join(cells)} |"


def draw(rows: list[Row], path: Path) -> None:
    """Draw AP, size and latency of every file, a group of bars a network."""
    plt.style.use("tableau-colorblind10")
    networks, files = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "file"))
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axes, (key, factor, label) in zip(panels, MEASURED, strict=True):
        for i, file in enumerate(files):
            own = [row for row in rows if row["file"] == file and row[key] is not None]
            places = [networks.index(row["network"]) + (i - (len(files) - 1) / 2) * 0.8 / len(files) for row in own]
            heights = [factor * row[key] for row in own]
            bars = axes.bar(places, heights, 0.75 / len(files), color=f"C{i}", label=file)
            axes.bar_label(bars, fmt="%.1f", fontsize="x-small")
        axes.set_xticks(range(len(networks)), [network.replace(", ", "\n") for network in networks], fontsize="small")
        axes.set_title(label)
        axes.margins(y=0.15)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(files), fontsize="small"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folders of finished runs on one data set")
    parser.add_argument("--data-path", type=Path, required=True, help="data set, as for train.py")
    parser.add_argument("--images", type=int, default=100, help="pictures to calibrate on (100)")
    parser.add_argument(
        "--methods", nargs="+", default=["minmax"], help="calibration methods to compare: minmax percentile entropy"
    )
    parser.add_argument("--runs", type=int, default=25, help="number of timed runs of each file (25)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the figures to")
    parser.add_argument("--picture", type=Path, default=None, help="picture to draw of them")
    options = parser.parse_args()

    # 2. Measure, and print a row as soon as it is there.
    rows: list[Row] = []
    print(HEAD)
    for run in options.run:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(run, options.data_path, options.images, options.methods, options.runs, Path(folder))
        print("\n".join(map(line, found)), flush=True)
        rows += found
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
