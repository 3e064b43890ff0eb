"""A rewrite of deformable attention in an OpenVINO graph that makes it faster and computes the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """The weighted sum at the end of deformable attention.

    Attributes:
        total: Node that sums over the points of all levels, [B · heads, channels, queries].
        samples: Nodes that sample a level each, [B · heads, channels, queries, points].
        weights: Output with the weights, [B · heads, 1, queries, points of all levels].
    """

    total: Any
    samples: tuple[Any, ...]
    weights: Any


def put_queries_last(graph: Any) -> None:
    """Swap queries and points in the samples of all deformable attention of an `openvino.Model`.

    There are hundreds of queries and few points. OpenVINO joins the levels along the last axis with its reference code,
    and sums over few neighbours slowly; both are vectorised if the queries are last. The order of each sum is the same.
    """
    from openvino import opset15 as opset

    def swapped(output: Any, axes: tuple[int, ...], name: str) -> Any:
        return _named(opset.transpose(output, list(axes)), name)

    for sampling in list(samplings_of(graph)):
        own = sampling.total.get_friendly_name()
        parts = []
        for level, sample in enumerate(sampling.samples):
            grid = swapped(sample.input_value(1), (0, 2, 1, 3), f"{own}/grid_{level}")
            part = opset.grid_sample(sample.input_value(0), grid, sample.get_attributes())
            parts.append(_named(part, f"{sample.get_friendly_name()}/queries_last"))
        joined = _named(opset.concat(parts, 2), f"{own}/levels") if len(parts) > 1 else parts[0]
        weights = swapped(sampling.weights, (0, 1, 3, 2), f"{own}/weights")
        weighted = _named(opset.multiply(joined, weights), f"{own}/weighted")
        total = _named(opset.reduce_sum(weighted, 2), f"{own}/queries_last")
        for target in sampling.total.output(0).get_target_inputs():
            target.replace_source_output(total.output(0))
    graph.validate_nodes_and_infer_types()


def samplings_of(graph: Any) -> Iterator[Sampling]:
    """Yield the sums over points of a graph that have the queries before the points."""
    for total in graph.get_ordered_ops():
        if total.get_type_name() != "ReduceSum" or total.get_attributes()["keep_dims"]:
            continue
        axes, product = total.input_value(1).get_node(), total.input_value(0).get_node()
        if axes.get_type_name() != "Constant" or axes.get_vector().tolist() not in ([-1], [3]):
            continue
        if product.get_type_name() != "Multiply":
            continue
        samples = _samples(product.input_value(0).get_node())
        if samples:
            yield Sampling(total, samples, product.input_value(1))


def _samples(joined: Any) -> tuple[Any, ...]:
    """Return the samples that a node joins along their points; empty for any other node."""
    parts, axes = [joined], (-1, 3)
    if joined.get_type_name() == "Reshape":  # of levels and points, stacked, into one axis
        joined, axes = joined.input_value(0).get_node(), (-2, 3)
    if joined.get_type_name() == "Concat":
        if joined.get_attributes()["axis"] not in axes:
            return ()
        parts = [value.get_node() for value in joined.input_values()]
    parts = [part.input_value(0).get_node() if part.get_type_name() == "Unsqueeze" else part for part in parts]
    return tuple(parts) if all(part.get_type_name() == "GridSample" for part in parts) else ()


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node
