"""JSON and YAML from files that others wrote, parsed within limits of size, depth and references.

A short file can describe a structure that fills the memory: nested lists, or YAML aliases that refer to one another.
"""

import json
from typing import Any, BinaryIO

MAX_JSON_BYTES = 64 * 2**20
MAX_YAML_BYTES = 2**20
_MAX_DEPTH = 64
_MAX_NODES = 200_000
"""Nodes of a YAML document after the expansion of its aliases."""
_BYTES_PER_BRACKET = 8
"""Fewest bytes per list or object on average, beyond the first few thousand; Python stores each in 60 to 200 bytes."""
_FREE_BRACKETS = 10_000


class DocumentError(ValueError):
    """Unusable document; the message is a short reason."""


def parse_json(data: bytes | str, *, max_bytes: int = MAX_JSON_BYTES, allow_nan: bool = False) -> Any:
    """Parse JSON, with unique keys and, unless `allow_nan`, finite numbers.

    Raises:
        DocumentError: The text is not JSON, is too large or too deeply nested, repeats a key, or has NaN or Infinity.
    """
    if len(data) > max_bytes:
        raise DocumentError(f"it is larger than {max_bytes // 2**20} MiB")
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if raw.count(b"[") + raw.count(b"{") > max(_FREE_BRACKETS, len(raw) // _BYTES_PER_BRACKET):
        raise DocumentError("it has too many lists and objects for its size")
    try:
        content = json.loads(data, object_pairs_hook=_unique, parse_constant=float if allow_nan else _refuse_constant)
        if b"\\u" in raw:
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return content
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except DocumentError:
        raise
    except ValueError as error:
        raise DocumentError(str(error)) from None


def check_json_lines(file: BinaryIO) -> None:
    """Check that each line of a file is blank or a JSON object of moderate depth; some parsers crash on others.

    Raises:
        DocumentError: A line is something else, or too long.
    """
    import msgspec  # imported late: only this function needs it, not those who load a model

    number = 0
    while line := file.readline(MAX_JSON_BYTES):
        number += 1
        if not line.strip():
            continue
        try:
            content = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError):
            content = parse_json(line, allow_nan=True)
        is_deep = line.count(b"[") + line.count(b"{") > _MAX_DEPTH and _is_deep(content)
        if not isinstance(content, dict) or is_deep:
            raise DocumentError(f"line {number:,} is not a JSON object of at most {_MAX_DEPTH} levels")


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in content if names.count(name) > 1)
        raise DocumentError(f"it repeats the key {repeated[:80]!r}")
    return content


def _refuse_constant(name: str) -> Any:
    raise DocumentError(f"it contains {name}, which is not a number")


def parse_yaml(data: bytes | str) -> Any:
    """Parse a YAML document of plain values.

    Raises:
        DocumentError: The text is not YAML, is too large or too deeply nested, or grows too much by its aliases.
    """
    import yaml  # imported late: most callers need JSON only

    if len(data) > MAX_YAML_BYTES:
        raise DocumentError(f"it is larger than {MAX_YAML_BYTES // 1024:,} KiB")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_growth(yaml, data, loader)
        return loader(data).get_single_data()
    except DocumentError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(" ".join(str(error).split())) from None


def _check_growth(yaml: Any, data: bytes | str, loader: Any) -> None:
    """Refuse deep nesting, and aliases whose expansion is large or contains itself, before anything is built."""
    sizes: dict[str, int] = {}  # by anchor, once its node is complete
    open_nodes: list[tuple[str | None, int]] = []  # anchor and number of nodes before it
    num_nodes = 0
    for event in yaml.parse(data, Loader=loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise DocumentError(f"the alias *{anchor} refers to an unknown anchor, or to the node around it")
            num_nodes += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            if anchor:
                sizes[anchor] = 1
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            open_nodes.append((anchor, num_nodes))
            num_nodes += 1
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            name, before = open_nodes.pop()
            if name:
                sizes[name] = num_nodes - before
        if len(open_nodes) > _MAX_DEPTH:
            raise DocumentError(f"it is nested more than {_MAX_DEPTH} levels deep")
        if num_nodes > _MAX_NODES:
            raise DocumentError(f"it has more than {_MAX_NODES:,} values")
