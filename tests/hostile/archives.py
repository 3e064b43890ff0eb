"""Hostile tar files, as bytes."""

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

from tests.hostile.pictures import saved

Make = Callable[[bytes], bytes]
_BLOCK = 512


def header(name: str, size: int | bytes, kind: bytes = b"0", *, link: str = "", prefix: str = "") -> bytes:
    """Return the header of a member with a valid checksum; a size in bytes is written as it is."""
    stated = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(_BLOCK)
    fields = (
        (0, name.encode("utf-8", "surrogateescape")[:100]),
        (100, b"0000644\0" + b"0000000\0" * 2),
        (124, stated[:12]),
        (136, b"00000000000\0"),
        (156, kind),
        (157, link.encode()[:100]),
        (257, b"ustar\00000"),
        (345, prefix.encode()[:155]),
    )
    for place, value in fields:
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0", size: int | bytes | None = None, **more: str) -> bytes:
    """Return a member with its padded content."""
    return header(name, len(data) if size is None else size, kind, **more) + data + bytes(-len(data) % _BLOCK)


def pax(**values: str) -> bytes:
    """Return an extended header."""
    return member("pax", b"".join(_record(name, value) for name, value in values.items()), b"x")


def _record(name: str, value: str) -> bytes:
    body = f" {name.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def binary(size: int) -> bytes:
    """Return a size in base 256."""
    return (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")


def _sparse(blocks: list[tuple[int, int]], size: int, stored: bytes) -> bytes:
    block = bytearray(header("sparse.png", len(stored), b"S"))
    for number, (offset, length) in enumerate(blocks[:4]):
        block[386 + 24 * number : 386 + 24 * number + 24] = b"%011o\0%011o\0" % (offset, length)
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + stored + bytes(-len(stored) % _BLOCK)


END = bytes(2 * _BLOCK)

ARCHIVES: dict[str, Make] = {
    "negative size": lambda _: member("b.png", b"", size=binary(-512)),
    "size of minus one block": lambda _: member("b.png", b"", size=binary(-1024)),
    "octal minus": lambda _: member("b.png", b"", size=b"-0000001000\0"),
    "size of 2^62": lambda _: member("b.png", b"", size=binary(2**62)),
    "size of 2^80": lambda _: member("b.png", b"", size=binary(2**80)),
    "size of 8 GB in octal": lambda _: member("b.png", b"x", size=b"77777777777\0"),
    "size that is no number": lambda _: member("b.png", b"x", size=b"hello world\0"),
    "size behind the end": lambda good: member("b.png", good, size=len(good) + 100_000),
    "pax size of minus one": lambda _: pax(size="-1024") + member("b.png", b""),
    "pax size of 10^30": lambda _: pax(size="9" * 30) + member("b.png", b""),
    "pax size of 5,000 digits": lambda _: pax(size="9" * 5_000) + member("b.png", b""),
    "pax size that is no number": lambda _: pax(size="x") + member("b.png", b""),
    "pax size of zero": lambda good: pax(size="0") + member("b.png", good),
    "pax size of a header": lambda _: pax(size="-512") + member("pax", b"", b"x"),
    "pax length of zero": lambda _: member("pax", b"0 path=x\n" * 3, b"x") + member("b.png", b""),
    "pax length of 10^9": lambda _: member("pax", b"1000000000 path=x\n", b"x") + member("b.png", b""),
    "pax length negative": lambda _: member("pax", b"-9 path=x\n", b"x") + member("b.png", b""),
    "pax of 5,000-digit length": lambda _: member("pax", b"9" * 5_000 + b" path=x\n", b"x") + member("b.png", b""),
    "pax of 100 MB": lambda good: pax(path="n" * 100_000_000) + member("b.png", good),
    "pax of 300,000 records": lambda good: pax(**{f"k{n}": "v" for n in range(300_000)}) + member("b.png", good),
    "pax that states 3 GB": lambda _: header("pax", 3 * 2**30, b"x"),
    "pax path outside": lambda good: pax(path="../../outside/b.png") + member("b.png", good),
    "pax path with NUL": lambda good: pax(path="a\0b.png") + member("b.png", good),
    "pax path that is not text": lambda good: pax(path="\udcff\udcfe.png") + member("b.png", good),
    "pax path with escape sequences": lambda good: pax(path="\x1b[31m.png") + member("b.png", good),
    "pax charset that is unknown": lambda good: pax(hdrcharset="x", path="b.png") + member("b.png", good),
    "10,000 pax headers before a member": lambda good: pax(a="1") * 10_000 + member("b.png", good),
    "pax header at the end": lambda _: pax(path="b.png"),
    "global pax of 50 MB": lambda good: (
        member("pax", _record("comment", "c" * 50_000_000), b"g") + member("b.png", good)
    ),
    "global pax size": lambda good: member("pax", _record("size", "-1"), b"g") + member("b.png", good),
    "sparse map in pax": lambda _: (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="b.png", GNU__sparse__realsize="9" * 12)
        + member("b.png", b"99999999\n" + b"0\n1\n" * 100)
    ),
    "sparse map in pax that is no number": lambda _: pax(GNU__sparse__map="a,b,c") + member("b.png", b""),
    "sparse map in pax with 10^6 entries": lambda _: (
        pax(GNU__sparse__map=",".join(["1"] * 1_000_000)) + member("b.png", b"")
    ),
    "sparse of 8 GB": lambda _: _sparse([(0, 0)], 2**33 - 1, b""),
    "sparse with blocks that overlap": lambda good: _sparse([(0, 512), (0, 512)], 512, good),
    "long name of 100 MB": lambda good: member("././@LongLink", b"n" * 100_000_000, b"L") + member("b.png", good),
    "long name that states 3 GB": lambda _: header("././@LongLink", 3 * 2**30, b"L"),
    "long name with NUL": lambda good: member("././@LongLink", b"a\0b.png", b"L") + member("b.png", good),
    "long name that is empty": lambda good: member("././@LongLink", b"", b"L") + member("b.png", good),
    "long name negative": lambda _: header("././@LongLink", binary(-512), b"L"),
    "5,000 long names before a member": lambda good: (
        member("././@LongLink", b"n.png", b"L") * 5_000 + member("b.png", good)
    ),
    "long link of 10 MB": lambda good: member("././@LongLink", b"n" * 10_000_000, b"K") + member("b.png", good, b"2"),
    "name outside": lambda good: member("../../outside/b.png", good),
    "absolute name": lambda good: member("/etc/b.png", good),
    "prefix outside": lambda good: member("b.png", good, prefix="../.."),
    "name with backslashes": lambda good: member("..\\..\\b.png", good),
    "name that is not text": lambda good: member("\udcff.png", good),
    "name with escape sequences": lambda good: member("\x1b[31m.png", good),
    "name with a newline": lambda good: member("a\nb.png", good),
    "name with bidi": lambda good: member("a\u202eb.png", good),
    "empty name": lambda good: member("", good),
    "the same name twice": lambda good: member("b.png", good) * 2,
    "10,000 copies of a name": lambda good: member("b.png", b"") * 10_000,
    "100,000 empty images": lambda good: b"".join(header(f"{n}.png", 0) for n in range(20_000)),
    "link": lambda _: member("b.png", b"", b"2", link="/etc/hostname"),
    "hard link": lambda _: member("b.png", b"", b"1", link="../../outside/secret.png"),
    "hard link with a size": lambda _: member("b.png", b"", b"1", size=5_000, link="a.png"),
    "device": lambda _: member("b.png", b"", b"3"),
    "FIFO": lambda _: member("b.png", b"", b"6"),
    "folder called like an image": lambda _: member("b.png/", b"", b"5"),
    "folder with a size": lambda _: member("d/", b"", b"5", size=binary(2**40)),
    "unknown type": lambda good: member("b.png", good, b"?"),
    "Solaris extended header": lambda good: member("x", _record("path", "c.png"), b"X") + member("b.png", good),
    "volume header": lambda good: member("label", b"", b"V") + member("b.png", good),
    "wrong checksum": lambda good: header("b.png", len(good)).replace(b"ustar", b"wrong") + good,
    "no end": lambda good: member("b.png", good)[:-1],
    "half of a header": lambda _: header("b.png", 0)[:200],
    "half of an image": lambda good: member("b.png", good, size=len(good) * 3)[: len(good)],
    "50 MB of zeros at the end": lambda good: member("b.png", good) + bytes(50_000_000),
    "members behind the end": lambda good: member("b.png", good) + END + member("c.png", good),
    "a tar in a tar": lambda good: member("b.png", member("c.png", good) + END),
    "an image that is a bomb": lambda _: member("b.png", saved("PNG")[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1)),
}
"""Bytes that follow a good image in a tar, by name."""

WHOLE_ARCHIVES: dict[str, Make] = {
    "gzip called tar": lambda good: gzip.compress(member("a.png", good) + END),
    "bzip2 called tar": lambda good: bz2.compress(member("a.png", good) + END),
    "xz called tar": lambda good: lzma.compress(member("a.png", good) + END),
    "zip called tar": lambda _: b"PK\x05\x06" + bytes(18),
    "empty": lambda _: b"",
    "only an end": lambda _: END,
    "text": lambda _: b"this is not a tar file\n" * 100,
    "an image": lambda good: good,
    "zeros": lambda _: bytes(10_000_000),
    "old format": lambda good: member("a.png", good).replace(b"ustar\x0000", bytes(8)) + END,
}
"""Whole files in place of a tar."""


def archive(name: str) -> bytes:
    """Return a tar file with a good image and something hostile."""
    good = saved("PNG")
    if name in WHOLE_ARCHIVES:
        return WHOLE_ARCHIVES[name](good)
    return member("a.png", good) + ARCHIVES[name](good) + END
