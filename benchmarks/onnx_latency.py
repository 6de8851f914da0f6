"""Time a whole detector in onnxruntime: our top-k against the same network with NMS, side by side in one run.

python benchmarks/onnx_latency.py --output onnx_latency.json      # needs pip install -e ".[export]"

Four files are made of each network. "top-k" is `export_onnx`. "NMS node" is the leanest usual way: one
NonMaxSuppression node behind the scores, threshold 0.05, IoU 0.6. "torchvision" is torchvision's own FCOS, written by
torch's TorchScript exporter: threshold 0.05, 1,000 candidates a level, IoU 0.6. "network alone" ends where boxes are
decoded: no way to detect can be faster.

What NMS costs depends on how much there is to suppress, so objects are planted: the network runs as it is, and a
constant is added to the output of its head, so that the points within 1.5 strides of an object's centre predict its
class and, each a little differently, its box. Candidates above the threshold and objects left are counted, not assumed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from library_cost import Row, compare
from onnx import TensorProto, helper
from torch import Tensor, nn
from torchvision.models.detection import FCOS, fcos_resnet50_fpn

from crosskd_assign import DensePredictions, EndToEndDetector
from crosskd_assign.export import TensorDetector, export_onnx

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "coco"))

from coco_example.models.detectors import build_detector
from coco_example.options import ModelOptions

CLASSES, STRIDE = 80, 8
THRESHOLD, IOU = 0.05, 0.6
NETWORKS = {"light": (320, 416), "ResNet-50": (512, 640)}  # height, width; 300 objects must fit in


def network(name: str, objects: int) -> FCOS:
    """Build FCOS with planted objects, on ResNet-50 or, with 64 channels and half the head, on MobileNetV3-Small."""
    torch.manual_seed(0)
    height, width = NETWORKS[name]
    if name == "light":
        light = ModelOptions(backbone="mobilenet_v3_small", size=width, channels=64, head_convs=2)
        model: Any = build_detector(light, CLASSES)
    else:
        model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES)
    model.transform.min_size, model.transform.max_size = (height,), width  # takes the picture as it is
    model.score_thresh, model.nms_thresh, model.detections_per_img = THRESHOLD, IOU, max(100, objects)
    model.head = Planted(model.head, objects, height, width)
    detector: FCOS = model.eval()
    return detector


class Planted(nn.Module):
    """A head that predicts planted objects, all on the finest level: each point near one predicts it."""

    def __init__(self, head: nn.Module, objects: int, height: int, width: int) -> None:
        super().__init__()
        self.logits: Tensor
        self.sides: Tensor
        self.head = head
        self.regression_head = head.regression_head
        # 1. Objects on a regular grid, so that none overlaps another.
        generator = torch.Generator().manual_seed(1)
        x, y = torch.arange(width // STRIDE) * STRIDE, torch.arange(height // STRIDE) * STRIDE
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2).float()  # (A₀, 2)
        columns = int(np.ceil(np.sqrt(objects * width / height)))
        rows = int(np.ceil(objects / columns))
        place = torch.arange(objects)
        cell = torch.tensor([width / columns, height / rows])
        center = (torch.stack([place % columns, place // columns], dim=1) + 0.5) * cell
        half = cell.min() * (0.3 + 0.15 * torch.rand(objects, 2, generator=generator))
        # 2. The points near one, and what they are to predict.
        distance, owner = (points[:, None] - center).abs().amax(dim=2).min(dim=1)
        hit = distance < 1.5 * STRIDE
        jitter = 1 + 0.04 * torch.randn(len(points), 4, generator=generator)
        box = torch.cat([center - half, center + half], dim=1)[owner]
        sides = torch.cat([points - box[:, :2], box[:, 2:] - points], dim=1) * jitter / STRIDE
        logits = torch.full((len(points), CLASSES), -4.0)  # below the threshold, whatever centerness says
        labels = torch.randint(CLASSES, (objects,), generator=generator)[owner]
        logits[hit, labels[hit]] = 6 + torch.randn(int(hit.sum()), generator=generator)
        self.register_buffer("logits", logits)
        self.register_buffer("sides", torch.where(hit[:, None], sides, 0))

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """Add what is planted to what the network outputs."""
        output: dict[str, Tensor] = self.head(features)
        rest = output["cls_logits"].shape[1] - self.logits.shape[0]
        logits = nn.functional.pad(self.logits, (0, 0, 0, rest), value=-4.0)
        sides = nn.functional.pad(self.sides, (0, 0, 0, rest))
        return {
            **output,
            "cls_logits": output["cls_logits"] + logits,
            "bbox_regression": output["bbox_regression"] + sides,
        }


class Raw(nn.Module):
    """The network's output, with boxes decoded, and nothing behind it."""

    def __init__(self, model: FCOS) -> None:
        super().__init__()
        self.view = TensorDetector(EndToEndDetector(model).eval())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict boxes ``(1, A, 4)`` and class logits ``(1, A, C)`` of one image."""
        predictions = self.predictions(images)
        return predictions.boxes, predictions.logits

    def predictions(self, images: Tensor) -> DensePredictions:
        """Predict on one image."""
        adapter, batch = self.view.adapter, self.view.prepare(images)
        return adapter.head(adapter.features(batch), batch.image_size)


class Dense(Raw):
    """All boxes ``(1, A, 4)`` and scores ``(1, C, A)`` of a detector, as a NonMaxSuppression node takes them."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict boxes and scores of one image."""
        predictions = self.predictions(images)
        quality = predictions.logits.new_zeros(()) if predictions.quality is None else predictions.quality
        scores = (predictions.logits.sigmoid() * quality.sigmoid()[..., None]).sqrt()
        return predictions.boxes, scores.transpose(1, 2)


def write_top_k(model: FCOS, objects: int, image: Tensor, path: Path) -> None:
    """Write our export: the network and top-k."""
    height, width = image.shape[1:]
    detector = EndToEndDetector(model, top_k=max(100, objects))
    export_onnx(detector, path, image_size=(height, width), batch_size=1, images=[image])


def write_network(model: FCOS, objects: int, image: Tensor, path: Path) -> None:
    """Write the network alone, which no way to detect can leave out."""
    del objects
    write(Raw(model), image, path)


def write(module: nn.Module, image: Tensor, path: Path) -> None:
    """Write a module as it is."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (image[None],),
            input_names=["images"],
            output_names=["all_boxes", "all_scores"],
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    program.save(str(path))  # type: ignore[union-attr]  # None only without dynamo


def write_nms_node(model: FCOS, objects: int, image: Tensor, path: Path) -> None:
    """Write the network, a NonMaxSuppression node, and the best of what it leaves."""
    # 1. The network.
    write(Dense(model), image, path)
    file = onnx.load(str(path))
    graph, most = file.graph, max(100, objects)

    # 2. Behind it NMS, and the best of what it leaves.
    def constant(name: str, value: Any, dtype: Any) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, dtype), name))

    constant("most", most, np.int64)
    constant("most1", [most], np.int64)
    constant("iou", IOU, np.float32)
    constant("threshold", THRESHOLD, np.float32)
    constant("which_box", [0, 2], np.int64)
    constant("which_class", [1], np.int64)
    graph.node.extend(
        [
            helper.make_node("NonMaxSuppression", ["all_boxes", "all_scores", "most", "iou", "threshold"], ["kept"]),
            helper.make_node("GatherND", ["all_scores", "kept"], ["kept_scores"]),
            helper.make_node("Shape", ["kept_scores"], ["count"]),
            helper.make_node("Min", ["count", "most1"], ["k"]),
            helper.make_node("TopK", ["kept_scores", "k"], ["scores", "order"]),
            helper.make_node("Gather", ["kept", "order"], ["best"]),
            helper.make_node("Gather", ["best", "which_box"], ["place"], axis=1),
            helper.make_node("GatherND", ["all_boxes", "place"], ["boxes"]),
            helper.make_node("Gather", ["best", "which_class"], ["labels"], axis=1),
        ]
    )
    # 3. These are the outputs now.
    del graph.output[:]
    for name, kind in (("boxes", TensorProto.FLOAT), ("scores", TensorProto.FLOAT), ("labels", TensorProto.INT64)):
        graph.output.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(file, str(path))


def write_torchvision(model: FCOS, objects: int, image: Tensor, path: Path) -> None:
    """Write all of torchvision's model."""
    del objects
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            ([image],),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["boxes", "scores", "labels"],
        )


ARMS: dict[str, Callable[[FCOS, int, Tensor, Path], None]] = {
    "top-k (ours)": write_top_k,
    "NMS node": write_nms_node,
    "torchvision": write_torchvision,
    "network alone": write_network,
}


def measure(name: str, objects: int, runs: int, threads: int, folder: Path) -> list[Row]:
    """Time the files of a network on an image with so many objects."""
    # 1. The network, and how many candidates it leaves to NMS.
    height, width = NETWORKS[name]
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    model = network(name, objects)
    with torch.no_grad():
        candidates = int((Dense(model)(image[None])[1] > THRESHOLD).sum())
    # 2. Write the files, and count what each detects.
    arms: dict[str, Callable[[], object]] = {}
    found: dict[str, int] = {}
    for arm, write_arm in ARMS.items():
        path = folder / f"{arm}.onnx"
        write_arm(model, objects, image, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        single = len(session.get_inputs()[0].shape) == 3  # torchvision's takes no batch
        pixels = image.numpy() if single else image.numpy()[None]
        arms[arm] = partial(session.run, None, {"images": pixels})
        outputs = dict(zip((x.name for x in session.get_outputs()), session.run(None, {"images": pixels}), strict=True))
        if "scores" in outputs:
            found[arm] = int((outputs["scores"] > THRESHOLD).sum())
    # 3. Time them.
    rows = compare(f"{name}, {objects} objects", arms, runs, torch.device("cpu"))
    size = {"height": height, "width": width, "objects": objects, "candidates": candidates}
    return [row | size | {"detections": found.get(row["arm"])} for row in rows]


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS, help="time one of the networks")
    parser.add_argument(
        "--objects", type=int, nargs="+", default=[5, 300], help="numbers of objects in the image (5 300)"
    )
    parser.add_argument("--runs", type=int, default=25, help="number of timed runs of each (25)")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of onnxruntime (2)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the figures to")
    options = parser.parse_args()
    # 2. Measure, and print a row as soon as it is there.
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            for objects in options.objects if options.only in (None, name) else ():
                for row in measure(name, objects, options.runs, options.threads, Path(folder)):
                    line = f"{row['case']:32} {row['arm']:14} {row['ms']:9.2f} ms {row['ratio']:7.3f} ×"
                    seen = "" if row["detections"] is None else f"{row['detections']:4} detections"
                    print(f"{line}  {row['candidates']:5} candidates {seen}", flush=True)
                    rows.append(row)
    # 3. Write them.
    if options.output is not None:
        about = {
            "machine": f"{platform.machine()}, CPU",
            "threads": options.threads,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "runs": options.runs,
        }
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
