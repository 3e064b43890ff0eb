"""JSON and YAML of strangers: limits of size, depth and references."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from raydet.common.untrusted.documents import DocumentError, check_json_lines, parse_json, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_documents_are_parsed() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    assert parse_json('"\u00e9"') == "\u00e9"
    assert parse_yaml(b"a: &x {b: 1}\nc: *x\nd: [1, .5]\n") == {"a": {"b": 1}, "c": {"b": 1}, "d": [1, 0.5]}
    assert parse_yaml(b"") is None


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (parse_json, "[" * 9_000, "nested"),
        (parse_json, "[" + "[]," * 100_000 + "1]", "too many"),
        (parse_json, '{"a": 1, "a": 2}', "repeats"),
        (parse_json, "[Infinity]", "Infinity"),
        (parse_json, "{", "property name"),
        (parse_json, r'{"a": "\ud800"}', "surrogates"),
        (parse_json, "9" * 10_000, "digits"),
        (parse_yaml, BOMB, "values"),
        (parse_yaml, "a: &a [*a]", "around it"),
        (parse_yaml, "[" * 1000, "nested"),
        (parse_yaml, "{a: " * 100 + "1" + "}" * 100, "nested"),
        (parse_yaml, "!!python/object/apply:os.system [true]", "python"),
        (parse_yaml, "a: b: c", "mapping values"),
        (parse_yaml, "\0", "control characters"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value[:30],
)
def test_bombs_and_broken_documents_are_refused(parse: Callable[[bytes], Any], text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse(text.encode())
    assert "\n" not in str(caught.value)


def test_large_documents_are_refused() -> None:
    with pytest.raises(DocumentError, match="larger"):
        parse_json(b" " * 20_000, max_bytes=10_000)
    with pytest.raises(DocumentError, match="larger than 1,024 KiB"):
        parse_yaml(b" " * (2**20 + 1))


@pytest.mark.parametrize("text", [b"\n\n", b'{"a": [[1, 2]]}\n{"b": NaN}\n', b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}"])
def test_lines_of_objects_pass(text: bytes) -> None:
    check_json_lines(io.BytesIO(text))


@pytest.mark.parametrize("line", [b"null", b"[1]", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", b"{" * 50_000, b'{"a"'])
def test_lines_that_are_no_objects_or_too_deep_are_refused(line: bytes) -> None:
    with pytest.raises(DocumentError):
        check_json_lines(io.BytesIO(b'{"a": 1}\n' + line + b"\n"))
