"""Reading in chunks gives the same result as `json.loads`."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet.tables.json_stream import JsonError, elements, members

TEXTS = st.text(st.characters(codec="utf-8") | st.characters(categories=["Cs"]), max_size=6)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def read(data: bytes, **options: Any) -> dict[str, Any]:
    return read_all(io.BytesIO(data), **options)


def read_all(stream: io.BytesIO, **options: Any) -> dict[str, Any]:
    found = members(stream, **options)
    return {name: list(value) if isinstance(value, Iterator) else value for name, value in found}


@given(
    content=st.dictionaries(TEXTS, VALUES, max_size=5),
    chunk_bytes=st.integers(4, 40),
    indent=st.sampled_from([None, 0, 3]),
    encoding=st.sampled_from(ENCODINGS),
    is_ascii=st.booleans(),
)
def test_pieces_of_any_length_give_what_the_whole_gives(
    content: dict[str, Any], chunk_bytes: int, indent: int | None, encoding: str, is_ascii: bool
) -> None:
    data = json.dumps(content, indent=indent, ensure_ascii=is_ascii).encode(encoding, errors="surrogatepass")
    assert read(data, chunk_bytes=chunk_bytes) == json.loads(data)


@given(
    content=st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3),
    chunk_bytes=st.integers(4, 40),
    cut=st.floats(0, 1, exclude_max=True),
    added=st.sampled_from(["", "]", "}", ",", "x", ":", '"']),
)
def test_what_the_standard_library_refuses_is_refused(
    content: dict[str, Any], chunk_bytes: int, cut: float, added: str
) -> None:
    text = json.dumps(content)
    data = (text[: int(len(text) * cut)] + added).encode()
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(JsonError, match="not JSON"):
            read(data, chunk_bytes=chunk_bytes)
    else:
        assert isinstance(expected, dict)
        assert read(data, chunk_bytes=chunk_bytes) == expected


def test_elements_that_are_left_are_skipped() -> None:
    stream = io.BytesIO(b'{"first": [1, 2, [3]], "second": 4, "third": []}')
    assert [name for name, _ in members(stream)] == ["first", "second", "third"]


def test_constants_and_hooks_are_those_of_the_standard_library() -> None:
    content = b'{"a": [NaN, Infinity, {"b": 1}], "c": {"d": 2}}'
    found = read(content, object_hook=lambda item: sorted(item.items()))
    assert str(found) == "{'a': [nan, inf, [('b', 1)]], 'c': [('d', 2)]}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[1, 2]", "a list"),
        (b"3", "a int"),
        (b"", "not JSON: Expecting value, character 0"),
        (b'{"a": 1} {', "not JSON: extra data, character 9"),
        (b"{1: 2}", "not JSON: expecting '\"', character 1"),
        (b'{"a" 2}', "not JSON: expecting ':', character 5"),
        (b'{"a": [1 2]}', "not JSON: expecting ',' or ']', character 9"),
        (b'{"a": ["' + b"x" * 100 + b'\xff"]}', "not JSON: .*utf-8: invalid start byte, byte 108"),
        (b'{"a": ' + b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"a": ' + b"1" * 5000, "not JSON: .*digits.*, character 6"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [16, 2**20])
def test_mistakes_are_named_with_their_place(data: bytes, words: str, chunk_bytes: int) -> None:
    with pytest.raises(JsonError, match=words):
        read(data, chunk_bytes=chunk_bytes)


def test_a_broken_file_is_not_read_to_its_end() -> None:
    stream = io.BytesIO(b'{"a": [1, 2, {"b": tru}, ' + b"7, " * 100_000 + b"8]}")
    with pytest.raises(JsonError, match="Expecting value, character 19"):
        read_all(stream, chunk_bytes=64)
    assert stream.tell() < 200


def test_an_entry_that_would_fill_the_memory_is_refused() -> None:
    stream = io.BytesIO(b'{"a": [1, "' + b"x" * 100_000 + b'"]}')
    with pytest.raises(JsonError, match="1,000 characters, character 10"):
        read_all(stream, chunk_bytes=64, max_entry_chars=1000)
    assert stream.tell() < 5000


@given(content=st.lists(VALUES, max_size=5), chunk_bytes=st.integers(4, 40))
def test_a_list_is_read_element_by_element(content: list[Any], chunk_bytes: int) -> None:
    data = json.dumps(content).encode(errors="surrogatepass")
    assert list(elements(io.BytesIO(data), chunk_bytes=chunk_bytes)) == content
    for damaged in (data[:-1], data + b"]", b"{}", b""):
        with pytest.raises(JsonError):
            list(elements(io.BytesIO(damaged), chunk_bytes=chunk_bytes))
