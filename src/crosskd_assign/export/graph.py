"""Find the parts of an ONNX graph by walking through it: the network, the head's last layers, and what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ExportError

__all__ = ["GraphParts", "graph_parts"]

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class GraphParts:
    """Names of the nodes of a detector's graph.

    Attributes:
        network: The layers that make features, and all between them: what lower precision pays for.
        outputs: The last layers, which classes, boxes, quality and selection come from.
        followers: All that computes with these: decoding, products of scores, a selection branch, top-k.
    """

    network: tuple[str, ...]
    outputs: tuple[str, ...]
    followers: tuple[str, ...]


def graph_parts(model: Any) -> GraphParts:
    """Find the parts of an ``onnx.ModelProto``, whose nodes get a name where they have none.

    What comes before the first layer (resizing, normalising) belongs to none of them.

    Raises:
        ExportError: No layer leads to the outputs, or none comes before the last ones.
    """
    # 1. Nodes by name and by what they make.
    nodes = list(model.graph.node)
    for i, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{i}"
    makers = {value: node for node in nodes for value in node.output}
    constants = {value.name for value in model.graph.initializer}
    constants |= {value for node in nodes if node.op_type == "Constant" for value in node.output}

    # 2. Back from the outputs to the last layers. A shape is a number, not a value: nothing is computed along it.
    last: set[str] = set()
    values, seen = [value.name for value in model.graph.output], set[str]()
    while values:
        maker = makers.get(values.pop())
        if maker is None or maker.name in seen or maker.op_type == "Shape":
            continue
        seen.add(maker.name)
        if _is_layer(maker, constants) and not _reads_softmax(maker, makers):
            last.add(maker.name)
        else:
            values += maker.input

    # 3. Forward from these to what follows, and from the other layers to the rest of the network.
    order = [node.name for node in nodes]
    followers = _downstream(nodes, last) - last
    layers = {node.name for node in nodes if _is_layer(node, constants)} - last - followers
    network = _downstream(nodes, layers) - last - followers
    if not last or not layers:
        raise ExportError(
            expected="a network of convolutions, and the last ones behind it",
            got=f"{len(layers)} layers and {len(last)} last ones",
            where="the graph",
            fix="leave it in float32",
        )
    parts = (tuple(name for name in order if name in part) for part in (network, last, followers))
    return GraphParts(*parts)


def _is_layer(node: Any, constants: set[str]) -> bool:
    return node.op_type in _LAYERS and (node.op_type != "MatMul" or not constants.isdisjoint(node.input))


def _reads_softmax(node: Any, makers: dict[str, Any]) -> bool:
    """Whether a layer is the mean of a distribution, over a box's distances, and so part of the decoding."""
    maker = makers.get(node.input[0])
    while maker is not None and maker.op_type in ("Transpose", "Reshape", "Cast", "Identity"):
        maker = makers.get(maker.input[0])
    return maker is not None and maker.op_type == "Softmax"


def _downstream(nodes: list[Any], start: set[str]) -> set[str]:
    """Names of nodes that read, near or far, what those of ``start`` make, and of these; nodes are in order."""
    reached, values = set(start), set[str]()
    for node in nodes:
        # Values alone: what reads a map's shape does not read the map.
        if node.op_type != "Shape" and not values.isdisjoint(node.input):
            reached.add(node.name)
        if node.name in reached:
            values.update(node.output)
    return reached
