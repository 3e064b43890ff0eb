"""Passwords, keys and tokens, and how they stay out of what is logged."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET_NAME = re.compile(
    r"secret|passw|credential|signature|(api|access|private|account)[_-]?key|(^|[^a-z])(token|sig)([^a-z]|$)", re.I
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s?#]+@")
_QUERY_ITEM = re.compile(r"(?<=[?&;])([^=&#\s]+)=[^&#\s]*")
_KNOWN_TOKEN = re.compile(r"\b(hf_\w{16,}|AKIA[0-9A-Z]{16})\b")
_HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """A copy of nested dicts, lists and texts in which passwords, keys and tokens are replaced by `***`.

    Those are: what stands under a name such as `api_key`; user and password in a URL, and secret arguments of it;
    the values of environment variables with such a name; tokens of a known form.
    """
    return _without_secrets(value, _secrets_of_environment())


def _secrets_of_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def _without_secrets(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _HIDDEN if item is not None and _SECRET_NAME.search(str(key)) else _without_secrets(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, _HIDDEN)
    value = _KNOWN_TOKEN.sub(_HIDDEN, _USER_IN_URL.sub(f"{_HIDDEN}@", value))
    return _QUERY_ITEM.sub(lambda match: f"{match[1]}={_HIDDEN}" if _SECRET_NAME.search(match[1]) else match[0], value)
