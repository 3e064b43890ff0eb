"""Parameters that a loss may leave out, which need a gradient all the same."""

from typing import Any

from torch import Tensor, nn

from raydet.models.detector import Detector

_DENOISING_TOKEN = "denoising_class_embed"


def zero_over_left_out_parameters(detector: Detector, loss: Tensor) -> Tensor:
    """Return a zero that depends on every trainable parameter that the loss may leave out.

    DistributedDataParallel waits for every gradient on every rank, but a rank without boxes never uses some
    parameters, such as the class embedding of the denoising queries. A single rank needs the zero too, because an
    optimizer treats a gradient of zero differently from none.

    Args:
        detector: The detector in training. The first call stores the parameters in it.
        loss: Loss of a micro-batch, with its graph.
    """
    if detector.left_out is None:
        detector.left_out = _left_out(detector, loss)
    parameters = [parameter for parameter in detector.left_out if parameter.requires_grad]
    return sum((parameter.sum() for parameter in parameters), loss.new_zeros(())) * 0.0


def _left_out(detector: Detector, loss: Tensor) -> tuple[nn.Parameter, ...]:
    """Return the parameters that no loss reaches, and those that only some losses reach."""
    model = detector.model
    if _skips_layers(model.config):
        return tuple(model.parameters())
    reached = _reached(loss)
    return tuple(
        parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in reached or (detector.family.denoises and _DENOISING_TOKEN in name)
    )


def _reached(loss: Tensor) -> set[int]:
    """Return the ids of the tensors to which `backward` would send a gradient."""
    reached: set[int] = set()
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node that accumulates the gradient of a parameter
            reached.add(id(node.variable))
        nodes.extend(following for following, _ in node.next_functions)
    return reached


def _skips_layers(config: Any) -> bool:
    """Return True if training skips layers at random, as DETR can."""
    return any(getattr(config, f"{part}_layerdrop", 0.0) > 0.0 for part in ("encoder", "decoder"))
