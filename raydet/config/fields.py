"""What the options of every command are declared with: help, default, checks, and what belongs to the identity."""

import dataclasses
import hashlib
import json
from dataclasses import field
from typing import Any

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    operational: bool = False,
) -> Any:
    """A field of a config: its help text, its default if it has one, and whether it is operational."""
    metadata = {"help": help, "operational": operational}
    if default_factory is not dataclasses.MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raises UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raises UserError for the first of these fields that is a number of 0 or less."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} must be above 0, got {value}")


def field_names(config_class: type) -> list[str]:
    """The options of a config, in the order they are declared."""
    return [item.name for item in fields_of(config_class)]


def fields_of(config_class: type) -> tuple[dataclasses.Field[Any], ...]:
    """The declarations of a config's options, in order."""
    return dataclasses.fields(config_class)


def is_required(item: "dataclasses.Field[Any]") -> bool:
    """Whether an option has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def default_of(item: "dataclasses.Field[Any]") -> Any:
    """What an option is when it is not given."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def identity(config: Any) -> dict[str, Any]:
    """The fields that decide what comes out, without the operational ones."""
    return {
        item.name: getattr(config, item.name) for item in dataclasses.fields(config) if not item.metadata["operational"]
    }


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that stand for a config's identity."""
    content = json.dumps([type(config).__name__, identity(config)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def to_yaml(config: Any) -> str:
    """The whole resolved config, every field with its value, without passwords and keys."""
    # Not needed by those who only build a config.
    import yaml

    return yaml.safe_dump(without_secrets(dataclasses.asdict(config)), sort_keys=False)
