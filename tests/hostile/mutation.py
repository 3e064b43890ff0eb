"""Strategies of hypothesis: damaged bytes, JSON documents with foreign values, tar files of lying headers."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.hostile import archives, tiffs

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)


def damaged(good: bytes, most_edits: int = 8) -> st.SearchStrategy[bytes]:
    """Return bytes that differ from good ones in a few places: changed, left out, repeated, cut off, appended."""
    place = st.integers(0, max(len(good) - 1, 0))
    byte = st.sampled_from(_EDGES) | st.integers(0, 255)
    edit = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("set"), place, byte.map(lambda value: bytes([value]))),
        st.tuples(st.just("remove"), place, st.integers(1, 64)),
        st.tuples(st.just("repeat"), place, st.integers(1, 64)),
        st.tuples(st.just("cut"), place, st.none()),
        st.tuples(st.just("insert"), place, st.binary(max_size=32)),
    )
    return st.lists(edit, min_size=1, max_size=most_edits).map(lambda edits: _edited(good, edits))


def _edited(good: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    data = bytearray(good)
    for kind, place, value in edits:
        if kind == "set":
            data[place : place + len(value)] = value
        elif kind == "remove":
            del data[place : place + value]
        elif kind == "repeat":
            data[place:place] = data[place : place + value] * 3
        elif kind == "cut":
            del data[place:]
        else:
            data[place:place] = value
    return bytes(data)


def with_foreign_fields(good: bytes) -> st.SearchStrategy[bytes]:
    """Return a TIFF in whose first directory some fields have other values."""
    fields = [
        st.tuples(st.just(getattr(entry, name)), st.sampled_from(values) | st.integers(0, 2**32))
        for entry in tiffs.entries_of(good)
        for name, values in tiffs.WRONG.items()
    ]
    return st.lists(st.one_of(fields), min_size=1, max_size=4).map(lambda changes: tiffs.with_fields(good, changes))


NUMBERS = st.one_of(
    st.integers(-3, 50),
    st.sampled_from([2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**40]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["a.png", "../a.png", "/etc/hostname", "\x1b[31m", "\u202e", "\ud800", "a\0b", "1", "n" * 300]),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def with_foreign_values(good: Any, addresses: list[tuple[Any, ...]]) -> st.SearchStrategy[str]:
    """Return JSON texts of a document in which some values are foreign, or missing."""
    change = st.tuples(st.sampled_from(addresses), st.one_of(st.just(_REMOVED), VALUES))
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: json.dumps(_changed(good, changes)))


_REMOVED = object()


def _changed(good: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
    content = copy.deepcopy(good)
    for address, value in changes:
        parent = content
        try:
            for key in address[:-1]:
                parent = parent[key]
            if value is _REMOVED:
                del parent[address[-1]]
            else:
                parent[address[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has removed the place
    return content


_SIZES = st.one_of(
    st.integers(0, 2_000),
    st.sampled_from([-1, -512, -1024, 2**33, 2**62, 2**63, 2**80]).map(archives.binary),
    st.binary(min_size=12, max_size=12),
    st.sampled_from([b"00000001000\0", b"-0000001000\0", b"77777777777\0", b"           \0", bytes(12)]),
)
_KINDS = st.sampled_from([bytes([kind]) for kind in b"01234567LKxgXSVDNA\0?"])
_NAMES = st.sampled_from(["a.png", "b.jpg", "../a.png", "/a.png", "d/", "", "n" * 99 + ".png", "././@LongLink"])
_RECORDS = st.dictionaries(
    st.sampled_from(
        ["size", "path", "linkpath", "hdrcharset", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.realsize", "mtime"]
    ),
    st.sampled_from(["-1", "0", "1", "512", "9" * 30, "x", "", "a.png", "../a.png", "BINARY", "0,1,2", "1.0", "nan"]),
    max_size=4,
)


def _member(name: str, size: int | bytes, kind: bytes, data: bytes) -> bytes:
    if isinstance(size, bytes) and len(size) != 12:
        size = size.ljust(12, b"\0")[:12]
    return archives.member(name, data, kind, size)


TARS: st.SearchStrategy[bytes] = st.builds(
    lambda members, end, cut: (b"".join(members) + end)[: cut or None],
    st.lists(
        st.one_of(
            st.builds(_member, _NAMES, _SIZES, _KINDS, st.binary(max_size=600)),
            _RECORDS.map(lambda records: archives.pax(**records)),
            st.binary(min_size=512, max_size=512),
        ),
        max_size=6,
    ),
    st.sampled_from([archives.END, b"", bytes(512), bytes(10_240)]),
    st.one_of(st.just(0), st.integers(1, 4_000)),
)
"""Tar files whose headers have valid checksums, and often lie."""


def addresses_of(content: Any) -> list[tuple[Any, ...]]:
    """Return the addresses of all values in a JSON document."""
    found: list[tuple[Any, ...]] = []

    def walk(value: Any, before: tuple[Any, ...]) -> None:
        if before:
            found.append(before)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, (*before, key))

    walk(content, ())
    return found


def damaged_text(good: str, most_edits: int = 6) -> st.SearchStrategy[bytes]:
    """Return a text that differs in a few places, by bytes or by pieces that mean something."""
    pieces = st.sampled_from(
        [b"-", b"1e999", b"nan", b"inf", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"9" * 400, b"\r", b"\n\n", b"\t", b"<a>"]
    )
    insert: Callable[[list[tuple[int, bytes]]], bytes] = lambda edits: _inserted(good.encode(), edits)  # noqa: E731
    place = st.integers(0, len(good))
    return damaged(good.encode(), most_edits) | st.lists(st.tuples(place, pieces), max_size=4).map(insert)


def _inserted(good: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for place, piece in edits:
        good = good[:place] + piece + good[place:]
    return good
