"""Results and other values → plain values for JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from raydet.common.redaction import without_secrets

SCHEMA_VERSION = 1
"""Version of the objects of `--json`; it grows when a field is removed or changes its meaning."""


def json_fields(result_class: type) -> tuple[str, ...]:
    """Return the names of a result's fields in JSON, in order.

    These are the fields of the dataclass, without those that its repr leaves out, such as large arrays, and the
    properties that it lists in `json_properties`.
    """
    fields = tuple(item.name for item in dataclasses.fields(result_class) if item.repr)
    return (*fields, *getattr(result_class, "json_properties", ()))


def json_value(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity as null, tuples and arrays as lists, paths as strings.

    An object that has a method `to_json` is represented by its result, any other dataclass by its `json_fields`.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(getattr(value, "to_json", None)):
        return json_value(value.to_json())
    if dataclasses.is_dataclass(value):
        return {name: json_value(getattr(value, name)) for name in json_fields(type(value))}
    if isinstance(value, Mapping):
        return {str(name): json_value(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        return json_value(value.tolist())
    if isinstance(value, (Sequence, set, frozenset)):
        return [json_value(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def json_line(values: Mapping[str, Any]) -> str:
    """Format an object as one line of ASCII, without secrets."""
    return json.dumps(without_secrets(json_value(values)), allow_nan=False) + "\n"
