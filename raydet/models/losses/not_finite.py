"""A loss of outputs that are not finite: NaN for every parameter, instead of an error of the matching.

The matching of boxes refuses such outputs with a ValueError. In training, a rank that stopped there would leave the
other ranks waiting for its gradient; NaN reaches them all, and all skip the step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_MOST = 1e15
"""Costs of larger values overflow in single precision."""


class NotFiniteError(ArithmeticError):
    """Boxes or scores of a model are not finite, so that they cannot be matched to labels."""


def loss_or_nan(loss: Callable[[Any], Any], outputs: Any) -> Any:
    """Compute a loss; if the outputs cannot be matched because they are not finite, all its values are NaN.

    Args:
        loss: Function of the outputs that returns tensors, within tuples, lists and dictionaries.
        outputs: Tensors, within tuples, lists and dictionaries.

    Raises:
        NotFiniteError: As described, and gradients are disabled.
    """
    try:
        return loss(outputs)
    except ValueError as error:
        if all(bool((value.abs() < _MOST).all()) for value in _tensors(outputs)):
            raise
        if not torch.is_grad_enabled():
            raise NotFiniteError("boxes or scores are not finite") from error
    # Every parameter gets a gradient, and every collective of the step takes place, as in any other step.
    return mapped(loss(mapped(outputs, _tamed)), lambda value: value * torch.nan)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every floating-point tensor within tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(mapped(each, change) for each in value)
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    return value


def _tamed(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(-1e4, 1e4)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
