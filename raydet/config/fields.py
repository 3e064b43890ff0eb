"""Declaration of options: help text, group, default, checks, and whether an option belongs to the identity."""

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    overload,
)

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets

Group = Literal[
    "Common options",
    "Input",
    "Model",
    "Optimisation",
    "Augmentation",
    "Validation",
    "Search",
    "Tiles and merging",
    "Detections",
    "Measurement",
    "Output",
    "Compute and cluster",
]
"""Headings of the help, in the order they are printed."""

PAIRS = "NAME=VALUE"
"""Value of an option that is a mapping, written as pairs on the command line."""
GROUPS: tuple[Group, ...] = get_args(Group)


_Config = TypeVar("_Config")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[_Config]) -> type[_Config]:
    """Make a frozen dataclass of options, which refuses numbers that nothing can compute with before its own checks."""
    own = vars(cls).get("__post_init__")

    def check(self: Any) -> None:
        for item in dataclasses.fields(self):
            _refuse_numbers(getattr(self, item.name), item.name)
        if own is not None:
            own(self)

    if own is not None or not hasattr(cls, "__post_init__"):
        cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def _refuse_numbers(value: Any, name: str) -> None:
    """Refuse NaN, infinities and integers beyond 64 bits, in nested values too."""
    if isinstance(value, float):
        require(math.isfinite(value), f"{flag(name)} must be a finite number, got {value}")
    elif isinstance(value, int):
        require(abs(value) < 2**63, f"{flag(name)} must be below 2⁶³, got {value}")
    elif isinstance(value, dict):
        for item in value.values():
            _refuse_numbers(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_numbers(item, name)


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    group: Group = "Common options",
    default_factory: Any = dataclasses.MISSING,
    operational: bool = False,
    is_later: bool = False,
    value: str = "",
) -> Any:
    """Declare one field of a config.

    Args:
        help: One or two clauses without a full stop; the default is printed after them.
        default: Without it and `default_factory`, the option is required.
        group: Heading under which the help lists the option; required options have their own.
        default_factory: As in `dataclasses.field`, for lists.
        operational: The option changes the time or the place of a run, never its result.
        is_later: The option was added later; at its default it does not belong to the identity, so that runs of
            versions without it can be resumed.
        value: Name of the value in the help; by default made from the type, or from the option's name.
    """
    metadata = {"help": help, "group": group, "operational": operational, "is_later": is_later, "value": value}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the spelling of an option in help and messages, such as `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first of these fields that is a number of 0 or less; None passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{flag(name)} must be above 0, got {value}")


def require_not_negative(config: Any, *names: str) -> None:
    """Raise UserError for the first of these fields that is below 0; None passes."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 0, f"{flag(name)} must not be negative, got {value}")


def is_union(hint: Any) -> bool:
    """Return True for a union of types, however it is written."""
    return isinstance(hint, types.UnionType) or get_origin(hint) is Union


def types_in(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the type itself."""
    members = get_args(hint) if is_union(hint) else (hint,)
    return tuple(member for member in members if member is not types.NoneType)


def field_names(config_class: type) -> list[str]:
    """Return the names of a config's options, in the order of their declaration."""
    return [item.name for item in fields_of(config_class)]


def fields_of(config_class: type) -> tuple[dataclasses.Field[Any], ...]:
    """Return the declarations of a config's options, in order."""
    return dataclasses.fields(config_class)


def is_required(item: "dataclasses.Field[Any]") -> bool:
    """Return True if an option has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def default_of(item: "dataclasses.Field[Any]") -> Any:
    """Return the default value of an option."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


_Options = ParamSpec("_Options")
_More = ParamSpec("_More")
_Given = TypeVar("_Given", contravariant=True)
_Result = TypeVar("_Result", covariant=True)


class TakesOptions(Protocol[_Given, _Options, _More, _Result]):
    """A command's function: takes a config, or the options of one as keyword arguments."""

    @overload
    def __call__(self, config: _Given, *args: _More.args, **kwargs: _More.kwargs) -> _Result: ...

    @overload
    def __call__(self, *args: _Options.args, **kwargs: _Options.kwargs) -> _Result: ...


def with_options(
    config_class: Callable[_Options, _Config],
) -> Callable[[Callable[Concatenate[_Config, _More], _Result]], TakesOptions[_Config, _Options, _More, _Result]]:
    """Let a function of a config also take the config's options as keyword arguments, beside its own arguments.

    The function then raises UserError for unknown and missing options.
    """

    def decorate(
        function: Callable[Concatenate[_Config, _More], _Result],
    ) -> TakesOptions[_Config, _Options, _More, _Result]:
        signature = inspect.signature(function)
        first, *own = signature.parameters.values()
        options = inspect.signature(config_class).parameters
        known = {*options, *(parameter.name for parameter in own)}
        required = [name for name, parameter in options.items() if parameter.default is parameter.empty]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if args or first.name in kwargs:
                return function(*args, **kwargs)
            name = function.__name__
            for unknown in kwargs.keys() - known:
                close = difflib.get_close_matches(unknown, known, n=1)
                raise UserError(f"{name}() has no option {unknown}{f'; did you mean {close[0]}?' if close else ''}")
            missing = [option for option in required if option not in kwargs]
            if missing:
                raise UserError(f"{name}() requires {', '.join(missing)}")
            given = {option: kwargs.pop(option) for option in options if option in kwargs}
            return function(config_class(**given), **kwargs)  # type: ignore[call-arg]

        optional = first.replace(default=None, annotation=first.annotation | None)
        shown = signature.replace(parameters=[optional, *own, *options.values()])
        call.__signature__ = shown  # type: ignore[attr-defined]
        return cast("TakesOptions[_Config, _Options, _More, _Result]", call)

    return decorate


def identity(config: Any) -> dict[str, Any]:
    """Return the fields that determine the result, without the operational ones."""
    return {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if not item.metadata["operational"]
        and not (item.metadata["is_later"] and getattr(config, item.name) == default_of(item))
    }


def config_hash(config: Any) -> str:
    """Return twelve hexadecimal digits that identify a config by its identity fields."""
    content = json.dumps([type(config).__name__, identity(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def to_yaml(config: Any, *, comments: Mapping[str, str] | None = None) -> str:
    """Format the resolved config as YAML: every field with its value, passwords and keys masked.

    Args:
        config: The config.
        comments: Comments by option, each at the end of the option's first line. Such a value must not be a text that
            YAML wraps.
    """
    # Imported late: most callers only build a config.
    import yaml

    lines = []
    for name, value in without_secrets(dataclasses.asdict(config)).items():
        first, *rest = yaml.safe_dump({name: value}, sort_keys=False).splitlines()
        note = f"  # {comments[name]}" if comments and name in comments else ""
        lines += [f"{first}{note}", *rest]
    return "\n".join(lines) + "\n"
