"""The parts of a detector that a level of INT8 leaves in float, as nodes of its OpenVINO graph.

Points that boxes are relative to, and what attention weighs them with, stay in float at every level.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoModelForObjectDetection

from raydet.models.class_heads import class_tensor_names
from raydet.models.detector import Detector, quiet

Level = Literal["all layers", "float heads", "float decoder", "backbone only"]
LEVELS: tuple[Level, ...] = ("all layers", "float heads", "float decoder", "backbone only")
"""From the most layers in INT8 to the fewest; each leaves what the one before leaves, and more."""

LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
"""Types of the nodes that compute in INT8; the others only pass INT8 on."""
_ATTENTION = ("Softmax", "ScaledDotProductAttention", "GridSample")
_DATA = ("Constant", "Parameter", "Result")
MOVING = (
    "Broadcast", "Concat", "Gather", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Tile",
    "Transpose", "Unsqueeze", "VariadicSplit"
)  # fmt: skip
"""Types of nodes whose outputs are values of their first input, in INT8 or not."""
_SAMPLING = ("sampling_offsets", "attention_weights")
"""Layers of deformable attention that say where to look, and how much each place counts."""
_MODULE = re.compile(r"__module\.model\.(.+?)/")


@dataclass(frozen=True)
class NamedNode:
    """Node of a graph.

    Attributes:
        name: Its friendly name.
        kind: Its type.
        module: Name of the module in the detector's model that it belongs to; empty for the whole model.
    """

    name: str
    kind: str
    module: str


def nodes_of(graph: Any) -> Iterator[NamedNode]:
    """Yield the nodes that compute something."""
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in _DATA:
            yield NamedNode(node.get_friendly_name(), kind, _module_of(node))


def _module_of(node: Any) -> str:
    """Return the module of a node; a layer that was merged with the next one has lost its name and takes that one's."""
    while node is not None:
        found = _MODULE.match(node.get_friendly_name())
        if found:
            return found[1]
        consumers = [port.get_node() for port in node.output(0).get_target_inputs()]
        node = next(iter(consumers), None)
    return ""


class FloatParts:
    """The parts of a detector that stay in float, by level."""

    def __init__(self, detector: Detector) -> None:
        """Find the heads of a detector, whose model may be without weights."""
        self._family = detector.family
        with quiet():
            names = class_tensor_names(detector.model.config, AutoModelForObjectDetection.from_config)
        self._class_heads = {name.rpartition(".")[0] for name in names}

    def nodes_in(self, graph: Any, level: Level) -> list[str]:
        """Return the names of the nodes in a graph that a level leaves in float."""
        return [node.name for node in nodes_of(graph) if self._is_float(node, level)]

    def _is_float(self, node: NamedNode, level: Level) -> bool:
        module, in_backbone = f"{node.module}.", self._in_backbone(node.module)
        if node.kind not in LAYERS:
            # Outside the backbone, arithmetic is that of boxes, positions and attention.
            return node.kind in _ATTENTION or not (in_backbone or node.kind in MOVING)
        parts = node.module.split(".")
        is_head = node.module in self._class_heads or any(part in self._family.precise_layers for part in parts)
        in_decoder = self._family.decoder is not None and module.startswith(f"{self._family.decoder}.")
        stays = {
            "all layers": any(part in _SAMPLING for part in parts),
            "float heads": is_head,
            "float decoder": in_decoder,
            "backbone only": not in_backbone,
        }
        return any(stays[own] for own in LEVELS[: LEVELS.index(level) + 1])

    def _in_backbone(self, module: str) -> bool:
        return f"{module}.".startswith(self._family.backbone_prefixes)
