"""Incremental JSON reader: the members of an object one by one, arrays element by element.

The standard library parses each value (including `NaN` and lone surrogates). This module keeps only a chunk of the text
in memory, since label files may be larger than memory.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

CHUNK_BYTES = 4 * 2**20
MAX_ENTRY_CHARS = 16 * 2**20
"""Maximum length of one array element, or of one non-array member, held in memory."""

_ENCODING_BYTES = 4
_LONGEST_TAIL = 2
"""Characters by which a truncated number such as `1e+` may extend beyond the number parsed so far (`1`)."""
_LONGEST_CUT = 16
"""An error this close to the end of the text may be a truncated literal such as `-Infinity`, or a truncated escape."""
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonError(Exception):
    """Invalid JSON, or JSON of another kind; the message continues a sentence that starts with the file name."""


class ByteStream(Protocol):
    """A readable binary file."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; none at the end."""


def members(
    stream: ByteStream,
    *,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    max_entry_chars: int = MAX_ENTRY_CHARS,
) -> Iterator[tuple[str, Any]]:
    """Read the members of the JSON object in a file.

    Args:
        stream: The file, in UTF-8, UTF-16 or UTF-32.
        object_hook: Function applied to each nested object, as in `json.loads`.
        chunk_bytes: Bytes that are read at a time.
        max_entry_chars: Maximum size in memory of one array element, or of one member that is not an array.

    Yields:
        Name and value of each member; an array is an iterator over its elements, of which unconsumed ones are skipped.

    Raises:
        JsonError: The file is not JSON or not an object; also raised while elements are consumed.
    """
    text = _Text(stream, json.JSONDecoder(object_hook=object_hook), chunk_bytes, max_entry_chars)
    if text.peek() == "[":
        raise JsonError("contains a list")
    if text.peek() != "{":
        raise JsonError(f"contains a {type(text.value()).__name__}")
    for _ in text.entries("{", "}"):
        text.expect('"')
        name = text.value()
        text.take(":")
        if text.peek() == "[":
            elements = (text.value() for _ in text.entries("[", "]"))
            yield name, elements
            for _ in elements:
                pass
        else:
            yield name, text.value()
    text.finish()


def elements(
    stream: ByteStream, *, chunk_bytes: int = CHUNK_BYTES, max_entry_chars: int = MAX_ENTRY_CHARS
) -> Iterator[Any]:
    """Read the elements of the JSON array in a file, one at a time; parameters and errors are those of `members`."""
    text = _Text(stream, json.JSONDecoder(), chunk_bytes, max_entry_chars)
    if text.peek() != "[":
        raise JsonError("contains no list")
    for _ in text.entries("[", "]"):
        yield text.value()
    text.finish()


class _Text:
    """Buffered text from the read position to the end of the fetched data."""

    def __init__(self, stream: ByteStream, decoder: json.JSONDecoder, chunk_bytes: int, max_entry_chars: int) -> None:
        self._stream, self._decode = stream, decoder.raw_decode
        self._chunk_bytes, self._max_entry_chars = chunk_bytes, max_entry_chars
        head = b""
        while len(head) < _ENCODING_BYTES and (data := stream.read(chunk_bytes)):
            head += data
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(head))(errors="surrogatepass")
        self._at, self._num_before, self._num_bytes, self._is_at_end = 0, 0, 0, False
        self._text = self._characters(head)

    def peek(self) -> str:
        """Return the next non-blank character; an empty string at the end."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fetch():
                return ""

    def expect(self, *wanted: str) -> str:
        """Return the next non-blank character, which must be one of `wanted`."""
        found = self.peek()
        if found not in wanted:
            what = " or ".join(f"'{character}'" for character in wanted)
            raise _not_json(f"expecting {what}, {self._place(self._at)}")
        return found

    def take(self, *wanted: str) -> str:
        """Consume the next non-blank character, which must be one of `wanted`, and return it."""
        found = self.expect(*wanted)
        self._at += 1
        return found

    def entries(self, opening: str, closing: str) -> Iterator[None]:
        """Iterate over an object or array, pausing before each entry."""
        self.take(opening)
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            yield
            if self.take(",", closing) == closing:
                return

    def value(self) -> Any:
        """Return the next complete value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _LONGEST_CUT
                if is_cut and self._fetch():
                    continue
                raise _not_json(f"{error.msg}, {self._place(error.pos)}") from None
            except (ValueError, RecursionError) as error:  # such as a number of thousands of digits
                raise _not_json(f"{error}, {self._place(self._at)}") from None
            if len(self._text) - end <= _LONGEST_TAIL and self._fetch():
                continue
            self._at = end
            return value

    def finish(self) -> None:
        """Check that no text is left."""
        if self.peek():
            raise _not_json(f"extra data, {self._place(self._at)}")

    def _place(self, at: int) -> str:
        return f"character {self._num_before + at:,}"

    def _fetch(self) -> bool:
        """Fetch at least as much text as is buffered, so that parsing restarts rarely; return False at the end."""
        if self._is_at_end:
            return False
        rest = self._text[self._at :]
        if len(rest) > self._max_entry_chars:
            raise _not_json(f"an entry of more than {self._max_entry_chars:,} characters, {self._place(self._at)}")
        data = self._stream.read(max(self._chunk_bytes, len(rest)))
        self._is_at_end = not data
        self._num_before, self._at = self._num_before + self._at, 0
        self._text = rest + self._characters(data)
        return True

    def _characters(self, data: bytes) -> str:
        undecoded, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(data, final=self._is_at_end)
        except UnicodeDecodeError as error:
            place = self._num_bytes - len(undecoded) + error.start
            raise _not_json(f"invalid {error.encoding}: {error.reason}, byte {place:,}") from None
        self._num_bytes += len(data)
        return text


def _not_json(reason: str) -> JsonError:
    return JsonError(f"is not JSON: {reason}")
