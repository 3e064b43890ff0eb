"""The space of a search: which options of training vary, and over what."""

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
"""Values by the name of an option of train, with dots for an option within one."""

_KINDS = typing.get_args(Kind)
_NOT_TO_VARY = {
    "out": "each trial has a run folder of its own",
    "val_data": "trials are compared on the same images",
    "validate_fraction": "trials are compared on the same images",
    "metric_for_best_model": "trials are compared by the same number",
    "num_workers": "it changes how long training takes, not what comes out",
    "use_gpu": "it changes how long training takes, not what comes out",
    "cpus_per_worker": "it changes how long training takes, not what comes out",
    "threads_per_worker": "it changes how long training takes, not what comes out",
}


@dataclass(frozen=True)
class Dimension:
    """An option of train that varies.

    Attributes:
        name: Of the option, with dots for one within it.
        kind: How it varies.
        values: The choices, or the lowest and the highest value, the latter included except for `uniform`.
    """

    name: str
    kind: Kind
    values: tuple[Any, ...]

    def sample(self, random: np.random.Generator) -> Any:
        """Draws a value, with the same chance for all, on the scale of the kind."""
        if self.kind == "choice":
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(low, high + 1))
        if self.kind == "loguniform":
            return float(np.clip(math.exp(random.uniform(math.log(low), math.log(high))), low, high))
        return float(random.uniform(low, high))

    def contains(self, value: Any) -> bool:
        """Whether the search could draw this value."""
        if self.kind == "choice":
            return _as_json(value) in map(_as_json, self.values)
        is_number = isinstance(value, int) or (isinstance(value, float) and self.kind != "randint")
        return is_number and not isinstance(value, bool) and bool(self.values[0] <= value <= self.values[1])

    def probes(self) -> tuple[Any, ...]:
        """Values that must all be good for training, if the others are to be."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        # One in between, too: an option that takes whole numbers alone may have two of them as its ends.
        between = () if self.kind == "randint" else (low + (high - low) * 0.317,)
        return (low, *between, high)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def parse_space(space: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """Reads the space of a config.

    Raises:
        UserError: An option that there is not, or that cannot vary; an unknown distribution; bounds that cannot be.
    """
    return tuple(_dimension(name, spec) for name, spec in space.items())


def _dimension(name: str, spec: Any) -> Dimension:
    check_name(name)
    where = f"--space: {name}"
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise UserError(f"{where} must be one of {', '.join(f'{{{kind}: [...]}}' for kind in _KINDS)}; got {spec}")
    ((kind, values),) = spec.items()
    if kind not in _KINDS:
        raise UserError(f"{where}: unknown distribution `{kind}`; there are {', '.join(_KINDS)}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"{where}: {kind} takes a list in square brackets, got {values}")
    if kind == "choice":
        if len(set(map(_as_json, values))) < max(len(values), 2):
            raise UserError(f"{where}: choice takes two or more different values, got {list(values)}")
        return Dimension(name, kind, tuple(values))
    numbers = [_number(value, where) for value in values]
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UserError(f"{where}: {kind} takes the lowest value and then the highest, got {list(values)}")
    low, high = numbers
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}: loguniform takes values above 0, got {list(values)}")
    if kind != "randint":
        return Dimension(name, kind, (low, high))
    if low != int(low) or high != int(high):
        raise UserError(f"{where}: randint takes whole numbers, got {list(values)}")
    return Dimension(name, kind, (int(low), int(high) - 1))


def check_name(name: str) -> None:
    """Makes sure that an option of train can vary.

    Raises:
        UserError: There is no such option, or its value must be the same for all trials.
    """
    top, dot, _ = name.partition(".")
    names = field_names(TrainConfig)
    if top not in names:
        close = difflib.get_close_matches(top, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "see raydet train --help for those there are"
        raise UserError(f"--space: train has no option {top}; {hint}")
    if top in _NOT_TO_VARY:
        raise UserError(f"--space: {top} cannot vary: {_NOT_TO_VARY[top]}; set it in --train-config")
    if dot and not any(typing.get_origin(part) is dict for part in _parts(typing.get_type_hints(TrainConfig)[top])):
        raise UserError(f"--space: {name}: there are no options within {top}")


def _parts(hint: Any) -> tuple[Any, ...]:
    return (hint, *typing.get_args(hint))


def _number(value: Any, where: str) -> float:
    """YAML takes 1e-4, without a point, for text."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value} is no number") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {value} is no number that can be drawn")
    return number


def with_parameters(base: TrainConfig, parameters: Parameters) -> TrainConfig:
    """The training with some of its options changed.

    Raises:
        UserError: It cannot be trained with these.
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
    """What an option is in a config; None where an option within one is not set."""
    value: Any = dataclasses.asdict(config)
    for part in name.split("."):
        value = (value or {}).get(part)
    return value


def with_value(base: TrainConfig, dimension: Dimension, value: Any) -> TrainConfig:
    """The training with one value of a dimension; the message of its UserError says which."""
    with naming(dimension, value):
        return with_parameters(base, {dimension.name: value})


@contextmanager
def naming(dimension: Dimension, value: Any) -> Iterator[None]:
    """Has a UserError inside a `with` say of which value it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--space: {dimension.name}: {value} cannot be trained with: {error}") from None


def typed(base: TrainConfig, dimension: Dimension) -> Dimension:
    """The dimension with its choices as train takes them: 1e-3, which YAML takes for text, is a number there.

    Raises:
        UserError: One of them cannot be trained with.
    """
    if dimension.kind != "choice":
        return dimension
    values = tuple(value_in(with_value(base, dimension, value), dimension.name) for value in dimension.values)
    return Dimension(dimension.name, dimension.kind, values)
