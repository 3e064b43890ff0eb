"""Redaction of passwords, keys and tokens from everything that is printed, logged or written."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raydet.common.errors import UserError

_SECRET_NAME = re.compile(
    r"secret|passw|credential|signature|(api|access|private|account)[_-]?key|(^|[^a-z])(token|sig)([^a-z]|$)", re.I
)
_PLACE_NAME = re.compile(r"(file|path|dir)$", re.I)
"""Environment variables with these suffixes hold the location of a secret, not the secret."""
_USER_IN_URL = re.compile(
    r"(?<=://)[^/@\s?#\"']*:[^/@\s?#\"']*@|(?<=http://)[^/@\s?#\"']+@|(?<=https://)[^/@\s?#\"']+@"
)
"""User and password. A user name alone counts only on the web: elsewhere it names an Azure container or Hadoop user."""
_QUERY_ITEM = re.compile(r"(?<=[?&;])([^=&#\s\"']+)=[^&#\s\"']*")
_KNOWN_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|\b(AKIA|ASIA)[0-9A-Z]{16}\b")
_SHORTEST_SECRET = 8
"""In characters; shorter environment values would match ordinary words."""
_HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """Return a copy of nested dicts, lists and strings with passwords, keys and tokens replaced by `***`.

    The function redacts values under keys such as `api_key`, secret query parameters of URLs, values of environment
    variables with such names, and tokens of a known form. It removes user and password from URLs, so that they still
    work for anyone with credentials in the environment.
    """
    return _without_secrets(value, _secrets_of_environment())


def refuse_password(uri: str, *, what: str) -> None:
    """Refuse a URI that contains a password, where raydet would have to store the URI.

    Args:
        uri: A path or URI.
        what: Description of the URI for the message.

    Raises:
        UserError: The URI contains a password.
    """
    if _USER_IN_URL.search(uri):
        raise UserError(
            f"{what} contains a password, which raydet would have to store beside the data: {without_secrets(uri)}; "
            "pass credentials in the environment instead (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def _secrets_of_environment() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name) and not _PLACE_NAME.search(name)
    }
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
    value = _KNOWN_TOKEN.sub(_HIDDEN, _USER_IN_URL.sub("", value))
    return _QUERY_ITEM.sub(lambda match: f"{match[1]}={_HIDDEN}" if _SECRET_NAME.search(match[1]) else match[0], value)
