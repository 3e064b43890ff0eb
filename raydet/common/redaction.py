"""Passwords, keys and tokens, and how they stay out of what is printed, logged and written."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raydet.common.errors import UserError

_SECRET_NAME = re.compile(
    r"secret|passw|credential|signature|(api|access|private|account)[_-]?key|(^|[^a-z])(token|sig)([^a-z]|$)", re.I
)
_PLACE_NAME = re.compile(r"(file|path|dir)$", re.I)
"""Variables named so hold where a secret is, and not the secret."""
_USER_IN_URL = re.compile(
    r"(?<=://)[^/@\s?#\"']*:[^/@\s?#\"']*@|(?<=http://)[^/@\s?#\"']+@|(?<=https://)[^/@\s?#\"']+@"
)
"""User and password; a name alone is, but on the web, the container of Azure's or the user of Hadoop's storage."""
_QUERY_ITEM = re.compile(r"(?<=[?&;])([^=&#\s\"']+)=[^&#\s\"']*")
_KNOWN_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|\b(AKIA|ASIA)[0-9A-Z]{16}\b")
_SHORTEST_SECRET = 8
"""Characters; shorter values of the environment would be found within ordinary words."""
_HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """A copy of nested dicts, lists and texts in which passwords, keys and tokens are replaced by `***`.

    Those are: what stands under a name such as `api_key`; secret arguments of a URL; the values of environment
    variables with such a name; tokens of a known form. User and password in a URL are left out of it, so that what
    remains still names the place, to whoever has the keys in the environment.
    """
    return _without_secrets(value, _secrets_of_environment())


def refuse_password(uri: str, *, what: str) -> None:
    """Refuses a URI with a password in it, where it would have to be written down to be used later.

    Args:
        uri: A path or URI.
        what: What it is, for the message.

    Raises:
        UserError: It has one.
    """
    if _USER_IN_URL.search(uri):
        raise UserError(
            f"{what} has a password in it, which would be written beside the data: {without_secrets(uri)}; leave it "
            "out and give the keys in the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
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
