"""Redaction of passwords, keys and tokens from everything that is printed, logged or written.

URIs are taken apart, not searched for known patterns: user and password go, whatever characters they contain, and so do
the query and the fragment, except for options of file systems.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from raydet.common.errors import UserError

_SECRET_NAME = re.compile(
    r"secret|passw|passphrase|credential|signature|connection_?string|"
    r"(api|access|private|account|storage|shared|encryption|signing)[_-]?key|"
    r"(^|[^a-z])(token|sig|sas|auth|pwd|pass|key)([^a-z]|$)",
    re.I,
)
_PLACE_NAME = re.compile(r"(file|path|dir|sock|socket|mode)$|^(OLD)?PWD$|^XDG_|^SSH_AUTH_SOCK$", re.I)
"""Environment variables whose value is the place of a secret, or something else, not the secret."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://")
_WORD = re.compile(r"[^\s\"'<>`]+")
_WEB = ("http", "https")
_TRAILING = re.compile(r"[.,;:)\]}]+$")
_STORE_OPTIONS = {
    *("allow_bucket_creation", "allow_bucket_deletion", "anonymous", "background_writes", "buffer_size"),
    *("connect_timeout", "default_bucket_location", "enable_tls", "endpoint_override", "project_id", "region"),
    *("replication", "request_timeout", "retry_limit_seconds", "scheme", "smart_defaults", "tls_ca_dir_path"),
    *("tls_ca_file_path", "tls_verify_certificates", "user"),
}
"""Options of pyarrow's file systems that a later step needs to open the URI, none of them secret."""
_QUERY_ITEM = re.compile(r"(?<=[?&;])([^=&#\s\"']+)=[^&#\s\"']*")
_ASSIGNMENT = re.compile(
    r"(?i)\b(pass(?:word|wd|phrase)|pwd|accountkey|sharedaccess(?:key|signature))(\s?=\s?)[^\s;&,\"']+"
)
_KNOWN_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|\b(AKIA|ASIA)[0-9A-Z]{16}\b")
_SIGNING = re.compile(r"(x-(amz|goog|oss|cos|bce)-.*|expires|policy|googleaccessid|s[eiprtv]|spr|sk[a-z]+)", re.I)
"""Items of a query that change whenever it is signed: S3, Google Cloud Storage, CloudFront, Azure."""
_DIGITS = 12
_SHORTEST_SECRET = 8
"""In characters; shorter environment values would match ordinary words."""
_HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """Return a copy of nested dicts, lists and strings with passwords, keys and tokens replaced by `***`.

    The function redacts values under keys such as `api_key`, values of environment variables with such names, and
    tokens of a known form. It removes user, password, query and fragment from URIs, so that they still work for anyone
    with credentials in the environment.
    """
    return _without_secrets(value, _secrets_of_environment())


def refuse_password(uri: str, *, what: str) -> None:
    """Refuse a URI that contains a password, a query or a fragment, where raydet would have to store the URI.

    Raises:
        UserError: The URI contains more than a place, or than options of a file system.
    """
    if "://" in uri and _public_uri(uri) != uri:
        raise UserError(
            f"{what} contains a password or a query, which raydet would have to store beside the data: "
            f"{without_secrets(uri)}; pass credentials in the environment instead (such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )


def name_of_url(url: str) -> str:
    """Return a name for the file behind a web URL, under which raydet stores it: the URL without password and query.

    URLs that differ in their queries get different names: `…/view.jpg?id=1` becomes `…/view~d9fc91d45c09.jpg`, with 12
    digits of a hash. Items that sign it or whose names suggest a secret do not count: no secret is hashed,
    and a URL that is signed again keeps its name.
    """
    place = _public_uri(url)
    query = url.partition("#")[0].partition("?")[2]
    items = [item for item in query.split("&") if item and not _is_signature(item.partition("=")[0])]
    if not items or "://" not in url:
        return place
    digest = hashlib.sha256("&".join(items).encode(errors="surrogatepass")).hexdigest()[:_DIGITS]
    folder, _, file = place.rpartition("/")
    if folder.endswith("/"):  # there is only a host
        return f"{place}/~{digest}"
    stem, dot, ending = file.rpartition(".") if "." in file else (file, "", "")
    return f"{folder}/{stem}~{digest}{dot}{ending}"


def _is_signature(name: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _SIGNING.fullmatch(name))


def _secrets_of_environment() -> list[str]:
    values = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            values |= {value, *(line for line in value.splitlines() if len(line) > 2 * _SHORTEST_SECRET)}
        if "://" in value:  # a database with its password
            for uri in value.split():
                password = _userinfo(uri.partition("://")[2]).partition(":")[2]
                values |= {password, unquote(password)}
    spelled = {form for value in values for form in (value, quote(value, safe=""), quote_plus(value))}
    return sorted((value for value in spelled if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def _without_secrets(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without_secrets(item, secrets) if _is_public(key, item) else _HIDDEN for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        value = _WORD.sub(lambda match: _public_word(match[0]), value)
    for secret in secrets:
        value = value.replace(secret, _HIDDEN)
    value = _ASSIGNMENT.sub(rf"\1\2{_HIDDEN}", _KNOWN_TOKEN.sub(_HIDDEN, value))
    return _QUERY_ITEM.sub(lambda match: f"{match[1]}={_HIDDEN}" if _SECRET_NAME.search(match[1]) else match[0], value)


def _is_public(key: Any, item: Any) -> bool:
    return item is None or isinstance(item, int | float) or not _SECRET_NAME.search(str(key))


def _public_word(word: str) -> str:
    """Redact the URIs in a word without spaces, one after another."""
    starts = [match.start() for match in _SCHEME.finditer(word)]
    if not starts:
        return word
    ends = [*starts[1:], len(word)]
    return word[: starts[0]] + "".join(_public_uri(word[start:end]) for start, end in zip(starts, ends, strict=True))


def _public_uri(uri: str) -> str:
    """Return a URI without user, password, query and fragment; the name of an Azure container or Hadoop user stays."""
    scheme, _, rest = uri.partition("://")
    info = _userinfo(rest)
    if ":" in info or (info and scheme.lower() in _WEB):
        rest = rest[len(info) + 1 :]
    # In an object store `#` is a character of a key like any other.
    place = re.split(r"[?#]" if scheme.lower() in _WEB else r"\?", rest, maxsplit=1)[0]
    extra = rest[len(place) :]
    if not extra:
        return f"{scheme}://{place}"
    items = extra[1:].partition("#")[0].split("&") if extra[0] == "?" and scheme.lower() not in _WEB else []
    tail = _TRAILING.search(extra)
    items = [item.rstrip(tail[0]) if tail and number == len(items) - 1 else item for number, item in enumerate(items)]
    kept = [item for item in items if item.partition("=")[0] in _STORE_OPTIONS and "@" not in item]
    return f"{scheme}://{place}{'?' if kept else ''}{'&'.join(kept)}{tail[0] if tail else ''}"


def _userinfo(rest: str) -> str:
    """Return user and password of a URI, without the `@` after them, given what follows `://`; "" without them.

    A password may contain any character, so it ends at the last `@`. Where this is ambiguous, as in a path with an `@`
    after a password, too much is taken.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return rest[: rest.rindex("@")] if ":" in authority else authority[: authority.rindex("@")]
    has_password = ":" in authority and not authority.rpartition(":")[2].isdigit()
    return rest[: rest.rindex("@")] if has_password and "@" in rest else ""
