"""Bodies of answers from web servers → bytes, with every length checked."""

import http.client
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_PART_BYTES = 2**20
_MAX_LINE_BYTES = 4096
_MAX_TRAILERS = 100
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,12}")


class PackingError(Exception):
    """The server packs the file in a way that it was not asked for."""


def body_of(response: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    """Yield the body of an answer in parts, each of at most a megabyte and a little, unpacked if it is packed.

    Args:
        response: The answer, of which only the headers are read.
        max_bytes: A packed part is unpacked to little more than this; the caller counts all parts.

    Raises:
        PackingError: `Content-Encoding` is neither gzip nor deflate.
        http.client.IncompleteRead: The body ends early.
        http.client.HTTPException: The body is not valid HTTP.
        zlib.error: The body cannot be unpacked.
        OSError: The connection failed.
    """
    body = _chunks(response) if response.chunked else _plain(response)
    encoding = (response.getheader("Content-Encoding") or "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise PackingError
    return _unpacked(body, min(max_bytes + 1, _PART_BYTES))


def _plain(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Read a body up to its stated length, or to the end of the connection."""
    stream: BinaryIO = response.fp
    left = response.length
    while left != 0:
        part = stream.read1(_PART_BYTES if left is None else min(left, _PART_BYTES))  # type: ignore[attr-defined]
        if not part:
            if left:
                raise http.client.IncompleteRead(b"")
            break
        left = None if left is None else left - len(part)
        yield part
    response.close()


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Read a chunked body; `http.client` would accept a negative size and endless trailers."""
    stream: BinaryIO = response.fp
    while size := _chunk_size(stream):
        while size:
            part = stream.read1(min(size, _PART_BYTES))  # type: ignore[attr-defined]
            if not part:
                raise http.client.IncompleteRead(b"")
            size -= len(part)
            yield part
        if stream.readline(3).strip():
            raise http.client.HTTPException
    for _ in range(_MAX_TRAILERS):
        if _line(stream) in (b"\r\n", b"\n"):
            response.close()
            return
    raise http.client.HTTPException


def _chunk_size(stream: BinaryIO) -> int:
    digits = _line(stream).partition(b";")[0].strip()
    if not _CHUNK_SIZE.fullmatch(digits):
        raise http.client.HTTPException
    return int(digits, 16)


def _line(stream: BinaryIO) -> bytes:
    line = stream.readline(_MAX_LINE_BYTES)
    if not line.endswith(b"\n"):
        raise http.client.IncompleteRead(b"") if len(line) < _MAX_LINE_BYTES else http.client.HTTPException
    return line


def _unpacked(body: Iterable[bytes], part_bytes: int) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # recognises both formats
    for part in body:
        left = part
        while left and not unpacker.eof:
            yield unpacker.decompress(left, part_bytes)
            left = unpacker.unconsumed_tail
    while not unpacker.eof and (rest := unpacker.decompress(b"", part_bytes)):
        yield rest
    if not unpacker.eof:
        raise http.client.IncompleteRead(b"")
