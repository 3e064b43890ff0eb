"""Headers of tar files that lie: the walk ends at once, and never lists what is not there."""

import io
import re
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet.common.errors import UserError
from raydet.images.tars import Member, image_members


def header(name: bytes, size: int | bytes, kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size if isinstance(size, int) else size
    block[156:157], block[257:265], block[345 : 345 + len(prefix)] = kind, b"ustar\x0000", prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def record(kind: bytes, content: bytes) -> bytes:
    return header(b"record", len(content), kind) + content + bytes(-len(content) % 512)


def pax(**values: bytes) -> bytes:
    lines = b""
    for key, value in values.items():
        line = b" " + key.replace("_", ".").encode() + b"=" + value + b"\n"
        size = len(line) + 2
        lines += b"%d" % (size if len(str(size)) == 2 else size + 1) + line
    return record(b"x", lines)


FILE = header(b"a.jpg", 5) + b"hello".ljust(512, b"\0")
END = bytes(1024)


def outcome(data: bytes) -> list[Member] | str:
    try:
        return image_members(pa.BufferReader(data), "x.tar")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(b"a.jpg", b"\xff" * 12), "a member of -1 bytes"),
        (header(b"a.jpg", b"\xff" * 11 + b"\0"), "a member of -1 bytes"),
        (header(b"a.jpg", b"\x80" + b"\x7f" * 11), "a member of 154,135,671,558,081,661,678,616,447 bytes"),
        (header(b"a.jpg", 2**33 - 1), "a member of 8,589,934,591 bytes"),
        (header(b"a.jpg", b"-0000000001\0"), "an invalid number"),
        (header(b"a.jpg", b"99999999999\0"), "an invalid number"),
        (pax(size=b"-512") + FILE, "an invalid number"),
        (pax(size=b"9" * 30) + FILE, "an invalid number"),
        (pax(size=b"99999999999") + FILE, "a member of 99,999,999,999 bytes"),
        (record(b"x", b"999999 path=a\n") + FILE, "a pax record that cannot be read"),
        (record(b"x", b"0 path=a\n") + FILE, "a pax record that cannot be read"),
        (record(b"x", b"-5 path=a\n") + FILE, "an invalid number"),
        (record(b"x", b"path=a\n") + FILE, "a pax record that cannot be read"),
        (record(b"L", b"x" * (2**20 + 1)) + FILE, "a name record of 1,048,577 bytes"),
        (record(b"x", b"x" * (2**20 + 1)) + FILE, "a name record of 1,048,577 bytes"),
        (record(b"g", b"x" * (2**20 + 1)) + FILE, "a name record of 1,048,577 bytes"),
        (header(b"r", 2**30, b"L") + FILE, "a name record of"),
        (record(b"L", b"b.jpg") * 17 + FILE, "more than 16 records before one file"),
        (record(b"L", b"b.jpg"), "a name without a file"),
        (header(b"a.jpg", 5, b"S")[:482] + b"\1" + header(b"a.jpg", 5, b"S")[483:], "expected a header|first 512"),
    ],
)
@pytest.mark.timeout(20)
def test_headers_that_lie(content: bytes, words: str) -> None:
    result = outcome(content + END)
    assert isinstance(result, str) and re.search(words, result), result
    assert "\n" not in result and result.startswith("x.tar ")


def test_members_of_all_kinds() -> None:
    kinds = b"".join(header(b"no.jpg", 0, kind) for kind in (b"1", b"2", b"3", b"4", b"5", b"6"))
    other = header(b"no.jpg", 5, b"V") + b"hello".ljust(512, b"\0")
    data = FILE + kinds + other + FILE + pax(path=b"p.jpg", size=b"3") + FILE + record(b"L", b"l.jpg\0") + FILE
    data += pax(GNU_sparse_major=b"1") + FILE + header(b"u.jpg", 0, prefix=b"folder") + header(b"d.jpg/", 0, b"\0")
    members = outcome(data + END)
    assert isinstance(members, list)
    assert [(member.name, member.size) for member in members] == [
        ("a.jpg", 5),
        ("a.jpg", 5),  # a repeated name is another file
        ("p.jpg", 3),
        ("l.jpg", 5),
        ("folder/u.jpg", 0),
    ]
    assert all(data[member.offset : member.offset + member.size] == b"hello"[: member.size] for member in members)


@pytest.mark.timeout(60)
def test_a_large_record_is_not_read() -> None:
    """A name record may state any size: it is refused before it is read."""

    class Unreadable(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None and size <= 2**16
            return super().read(size)

    data = header(b"r", 2**29, b"x") + bytes(2**16)
    with pa.PythonFile(Unreadable(data), mode="r") as file, pytest.raises(UserError, match="a name record of"):
        image_members(file, "x.tar")


def _archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "ä" * 120 + ".png", "b.txt", "c.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"\xff" * 700))
    return stream.getvalue()


@settings(max_examples=300, deadline=None)
@given(
    damage=st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 255)), max_size=6),
    end=st.integers(0, 20_480),
    cuts=st.booleans(),
)
def test_damaged_archives_give_members_inside_the_file_or_a_reason(
    damage: list[tuple[int, int]], end: int, *, cuts: bool
) -> None:
    data = bytearray(_archive())
    for place, value in damage:
        data[place] = value
    data = data[:end] if cuts else data
    result = outcome(bytes(data))
    if isinstance(result, list):
        places = [member.offset for member in result]
        assert places == sorted(places)
        assert all(0 <= member.size <= len(data) - member.offset for member in result)
