"""Trace a detector to a graph: an ``onnx_ir.Model`` without data-dependent shapes."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import Probe
from ..errors import ExportError
from ..version import __version__
from .checking import roomy_size
from .tensor_detector import OUTPUT_NAMES, TensorDetector
from .translations import stable_translations

__all__ = ["describe_model", "trace_model"]

# Their shapes depend on what is in the picture, which many runtimes cannot take.
_DATA_DEPENDENT = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"})
# What small runtimes lack, besides.
_SELECTING = frozenset({"ArgMax", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "TopK"})


class _Halves(nn.Module):
    """A `TensorDetector` cut between preparation and network, for image sizes that stay open.

    The size of a prepared image is a long formula of the image's own, which torch would carry through every layer, for
    minutes. Instead the network gets an input with sizes of its own; the two are joined in the ONNX graph.
    """

    def __init__(self, view: TensorDetector) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: Tensor, canvas: Tensor) -> tuple[Tensor, ...]:
        batch = self.view.prepare(images)
        return batch.images, *self.view.detect(replace(batch, images=canvas))


def trace_model(
    view: TensorDetector, probe: Probe, size: tuple[int, int] | None, batch_size: int | None, opset: int
) -> Any:
    """Trace the graph, an ``onnx_ir.Model``."""
    # 1. Which sizes stay open.
    d = view.adapter.size_divisible
    cut = size is None and view.preprocessing == "inside"
    images = torch.zeros(batch_size or 2, 3, *(size or roomy_size(view, probe)))
    batch = {} if batch_size is not None else {0: torch.export.Dim("batch", min=1)}
    rows, columns = (d * torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    height, width = (torch.export.Dim(name, min=2) for name in ("height", "width"))
    open_size = {} if size is not None else {2: height, 3: width} if cut else {2: rows, 3: columns}
    shapes = {"images": batch | open_size}
    module: nn.Module = view
    arguments: tuple[Tensor, ...] = (images,)
    outputs = OUTPUT_NAMES[view.outputs]
    if cut:
        module, arguments, outputs = _Halves(view), (images, torch.zeros_like(images)), ("prepared", *outputs)
        shapes["canvas"] = batch | {2: rows, 3: columns}

    # 2. The graph.
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own, about itself
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=list(shapes),
                output_names=list(outputs),
                dynamo=True,
                verbose=False,
                custom_translation_table=stable_translations(),
            )
    except Exception as error:  # of torch.export, of the translation, of whatever an adapter does
        raise ExportError(
            expected="a detector that torch.onnx can trace",
            got=f"{error}",
            where=f"{type(view.adapter).__name__}, torch {torch.__version__}",
            fix="use plain torch operators in the adapter, and never turn a size or a value into a Python number there",
        ) from error
    model = program.model  # type: ignore[union-attr]  # None only without dynamo
    _validate_open(model, shapes, view)

    # 3. The two halves are joined.
    if cut:
        graph = model.graph
        graph.inputs[1].replace_all_uses_with(graph.outputs[0])
        del graph.inputs[1], graph.outputs[0]
        graph.sort()
    if view.outputs == "dense":
        _slice_for_gather(model)
    return model


def _slice_for_gather(model: Any) -> None:
    """Replace each Gather of one constant index, as of ``x[..., 0]``, by Slice and Squeeze, which all runtimes have."""
    ir: Any = importlib.import_module("onnx_ir")
    graph = model.graph

    def constant(name: str, number: int) -> Any:
        value = ir.Value(name=name, const_value=ir.tensor([number], dtype=ir.DataType.INT64, name=name))
        value.shape, value.dtype = ir.Shape([1]), ir.DataType.INT64
        graph.register_initializer(value)
        return value

    for node in list(graph):
        index = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "Gather" else None
        if index is None or tuple(index.shape) != ():
            continue
        # 1. The index as a range; the last element's range is open, for −1 + 1 is 0.
        old, start = node.outputs[0], int(index.numpy())
        end = start + 1 if start != -1 else 2**62
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        numbers = {"start": start, "end": end, "axis": axis}
        bounds = [constant(f"{old.name}_{name}", number) for name, number in numbers.items()]

        # 2. The nodes, in its place.
        part = ir.node("Slice", [node.inputs[0], *bounds])
        squeezed = ir.node("Squeeze", [part.outputs[0], bounds[2]])
        part.outputs[0].name = f"{old.name}_range"
        new = squeezed.outputs[0]
        new.name, new.shape, new.dtype = f"{old.name}_only", old.shape, old.dtype
        number = node.inputs[1]
        ir.convenience.replace_nodes_and_values(graph, node, [node], [part, squeezed], [old], [new])
        if not number.uses():
            graph.initializers.pop(number.name, None)


def _validate_open(model: Any, shapes: Mapping[str, Mapping[int, Any]], view: TensorDetector) -> None:
    """Raise `ExportError` if an adapter's code has fixed a size that should stay open."""
    for value in model.graph.inputs:
        for axis in shapes[value.name]:
            size = value.shape[axis]
            if isinstance(size, int):
                option = "batch_size=1" if axis == 0 else "a fixed image_size"
                raise ExportError(
                    expected=f"an open {('number of images', '', 'image height', 'image width')[axis]}",
                    got=f"one that tracing has fixed at {size}",
                    where=type(view.adapter).__name__,
                    fix=f"write x.shape[0] for len(x) in the adapter and loop over no images, or export with {option}",
                )


def describe_model(model: Any, view: TensorDetector, probe: Probe, entries: Mapping[str, str]) -> None:
    """Put metadata in, take traces of the machine out, and name open sizes.

    Raises:
        ExportError: A node's shape depends on what is in the picture.
    """
    # 1. No shape may depend on the picture, and nothing be selected where runtimes cannot.
    nodes = list(model.graph.all_nodes())
    types = {node.op_type for node in nodes}
    for unwanted, what in ((_DATA_DEPENDENT, "data-dependent shapes"), (_SELECTING, "top-k and gather")):
        wrong = sorted(types & unwanted)
        if wrong and (unwanted is _DATA_DEPENDENT or view.outputs == "dense"):
            raise ExportError(
                expected=f"a graph without {what}",
                got=", ".join(wrong),
                where=type(view.adapter).__name__,
                fix="leave suppression, masks, indexing and loops over values out of the adapter's features and head",
            )

    # 2. Names and metadata.
    for thing in (model.graph, *nodes, *(value for node in nodes for value in node.outputs)):
        thing.metadata_props.clear()  # file names and source lines
    for value in model.graph.outputs:
        if not isinstance(value.shape[1], int):
            value.shape[1] = "detections" if view.outputs == "detections" else "predictions"
    adapter = view.adapter
    model.producer_name, model.producer_version = "crosskd_assign", __version__
    model.metadata_props.update(
        {
            "adapter": type(adapter).__name__,
            "torch": torch.__version__,
            "strides": json.dumps(probe.strides),
            "preprocessing": view.preprocessing,
            "outputs": view.outputs,
            "one_to_many": json.dumps(view.one_to_many),
            "size_divisible": str(adapter.size_divisible),
            "image_mean": json.dumps(adapter.image_mean.flatten().tolist()),
            "image_std": json.dumps(adapter.image_std.flatten().tolist()),
            **entries,
        }
    )
