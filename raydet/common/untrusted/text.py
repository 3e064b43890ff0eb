"""Text files that other programs wrote: bytes → text, in the encodings that editors and spreadsheets use."""

import io
import json
from typing import Any


class TextError(Exception):
    """Bytes that are not text; the message is a short reason."""


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text file, UTF-8, UTF-16 or UTF-32, by its first four bytes: mark or NUL bytes."""
    # Python's detection for JSON is right for any text that begins with two ASCII characters.
    return json.detect_encoding(head[:4])


def text_stream(file: Any, *, newline: str | None = None) -> io.TextIOWrapper:
    """Return a text stream over an open binary file, which it closes, in the encoding that `encoding_of` finds."""
    buffered = io.BufferedReader(file)
    return io.TextIOWrapper(buffered, encoding=encoding_of(buffered.peek(4)), newline=newline)


def decode_text(data: bytes) -> str:
    """Decode a text file in UTF-8, UTF-16 or UTF-32, without the byte order mark.

    Raises:
        TextError: The bytes are not text in one of these encodings.
    """
    try:
        text = data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise TextError(
            f"not text in UTF-8 or UTF-16: byte {error.start:,} is invalid in {error.encoding.upper()}"
        ) from None
    if "\0" in text:
        raise TextError("not text: it contains NUL characters")
    return text
