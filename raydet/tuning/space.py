"""The space of a search: the training options that vary, and their distributions."""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raydet.common.errors import UserError
from raydet.config import TrainConfig, field_names
from raydet.config.options import build

Kind = Literal["uniform", "loguniform", "randint", "choice"]
Parameters = dict[str, Any]
"""Values by the name of a `train` option; a dot separates an option from a nested one."""

_KINDS = typing.get_args(Kind)
_NOT_TO_VARY = {
    "out": "each trial has its own run folder",
    "val_data": "trials are compared on the same images",
    "validate_fraction": "trials are compared on the same images",
    "metric_for_best_model": "trials are compared by the same metric",
    "num_workers": "it changes the training time, not the result",
    "use_gpu": "it changes the training time, not the result",
    "cpus_per_worker": "it changes the training time, not the result",
    "threads_per_worker": "it changes the training time, not the result",
}


@dataclass(frozen=True)
class Dimension:
    """An option of `train` that varies.

    Attributes:
        name: Name of the option, with a dot before a nested one.
        kind: Distribution of its values.
        values: The choices, or the lowest and the highest value; the highest is included except for `uniform`.
    """

    name: str
    kind: Kind
    values: tuple[Any, ...]

    def sample(self, random: np.random.Generator) -> Any:
        """Draw a value, uniformly on the scale of the kind."""
        if self.kind == "choice":
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(low, high + 1))
        if self.kind == "loguniform":
            return float(np.clip(math.exp(random.uniform(math.log(low), math.log(high))), low, high))
        return float(random.uniform(low, high))

    def contains(self, value: Any) -> bool:
        """Return True if the search could draw this value."""
        if self.kind == "choice":
            return _as_json(value) in map(_as_json, self.values)
        is_number = isinstance(value, int) or (isinstance(value, float) and self.kind != "randint")
        return is_number and not isinstance(value, bool) and bool(self.values[0] <= value <= self.values[1])

    def probes(self) -> tuple[Any, ...]:
        """Return representative values, all of which must be valid for training."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        # One in between too: an option that accepts only integers may have two of them as its bounds.
        between = () if self.kind == "randint" else (low + (high - low) * 0.317,)
        return (low, *between, high)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def parse_space(space: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """Parse the space of a config.

    Raises:
        UserError: An option is unknown or cannot vary, a distribution is unknown, or its bounds are invalid.
    """
    return tuple(_dimension(name, spec) for name, spec in space.items())


def _dimension(name: str, spec: Any) -> Dimension:
    check_name(name)
    where = f"--space: {name}"
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise UserError(f"{where} must be one of {', '.join(f'{{{kind}: [...]}}' for kind in _KINDS)}; got {spec}")
    ((kind, values),) = spec.items()
    if kind not in _KINDS:
        raise UserError(f"{where}: unknown distribution `{kind}`; must be one of {', '.join(_KINDS)}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"{where}: {kind} requires a list in square brackets, got {values}")
    if kind == "choice":
        if len(set(map(_as_json, values))) < max(len(values), 2):
            raise UserError(f"{where}: choice requires two or more different values, got {list(values)}")
        return Dimension(name, kind, tuple(values))
    numbers = [_number(value, where) for value in values]
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"{where}: {kind} requires [low, high] with low < high, got {list(values)}")
    low, high = numbers
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}: loguniform requires values above 0, got {list(values)}")
    if kind != "randint":
        return Dimension(name, kind, (low, high))
    if low != int(low) or high != int(high):
        raise UserError(f"{where}: randint requires integers, got {list(values)}")
    return Dimension(name, kind, (int(low), int(high) - 1))


def check_name(name: str) -> None:
    """Check that a train option exists and can vary.

    Raises:
        UserError: The option does not exist, or its value must be the same for all trials.
    """
    top, dot, _ = name.partition(".")
    names = field_names(TrainConfig)
    if top not in names:
        close = difflib.get_close_matches(top, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "raydet train --help lists all options"
        raise UserError(f"--space: train has no option {top}; {hint}")
    if top in _NOT_TO_VARY:
        raise UserError(f"--space: {top} cannot vary: {_NOT_TO_VARY[top]}; set it in --train-config")
    hint = typing.get_type_hints(TrainConfig)[top]
    if dot and not any(typing.get_origin(part) is dict for part in (hint, *typing.get_args(hint))):
        raise UserError(f"--space: {name}: {top} has no nested options")


def _number(value: Any, where: str) -> float:
    """Parse a finite number; YAML reads 1e-4, without a decimal point, as text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value} is not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {value} is not a finite number")
    return number


def with_parameters(base: TrainConfig, parameters: Parameters) -> TrainConfig:
    """Return the training config with some options changed.

    Raises:
        UserError: The options are invalid.
    """
    values = dataclasses.asdict(base)
    for name, value in parameters.items():
        *path, last = name.split(".")
        place = values
        for part in path:
            place[part] = dict(place.get(part) or {})
            place = place[part]
        place[last] = value
    return build(TrainConfig, values, program="raydet tune")


def value_in(config: TrainConfig, name: str) -> Any:
    """Return the value of an option in a config; None for a nested option that is not set."""
    value: Any = dataclasses.asdict(config)
    for part in name.split("."):
        value = (value or {}).get(part)
    return value


def with_value(base: TrainConfig, dimension: Dimension, value: Any) -> TrainConfig:
    """Return the training config with one value of a dimension; a UserError names dimension and value."""
    with naming_value(dimension, value):
        return with_parameters(base, {dimension.name: value})


@contextmanager
def naming_value(dimension: Dimension, value: Any) -> Iterator[None]:
    """Context manager: a UserError raised while the block runs names dimension and value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--space: {dimension.name}: the value {value} is invalid: {error}") from None


def typed(base: TrainConfig, dimension: Dimension) -> Dimension:
    """Convert a dimension's choices to the option's type: YAML reads 1e-3 as text, train as a number.

    Raises:
        UserError: A choice is invalid for training.
    """
    if dimension.kind != "choice":
        return dimension
    values = tuple(value_in(with_value(base, dimension, value), dimension.name) for value in dimension.values)
    return Dimension(dimension.name, dimension.kind, values)
