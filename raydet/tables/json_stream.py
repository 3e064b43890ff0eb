"""A JSON object of any size → its members one by one, arrays element by element: files of labels outgrow the memory.

The parsing itself is that of the standard library, as for a whole file (`NaN` and lone surrogates included); what is
added here is that only a piece of the text is in memory at a time.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

CHUNK_BYTES = 4 * 2**20
MAX_ENTRY_CHARS = 64 * 2**20
"""Of one element, or of one member that is no array: so much is in memory at once."""

_ENCODING_BYTES = 4
_LONGEST_TAIL = 2
"""Of a number that is cut off, behind what is taken for a whole one: `1e+`."""
_LONGEST_CUT = 16
"""What is wrong so near to the end of the text may only be cut off: a literal such as `-Infinity`, or an escape."""
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonError(Exception):
    """A file is not JSON, or not an object; the message continues the file's name."""


class Stream(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, none at the end."""


class Elements:
    """The elements of an array, to be gone through once, before the next member is asked for."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self._iterator


def members(stream: Stream, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Reads the members of the object that a file holds.

    Args:
        stream: The file: UTF-8, UTF-16 or UTF-32.
        object_hook: What is done to each object in it, as in `json.loads`.

    Yields:
        The name of each member, and its value; that of an array is `Elements`. What is left of these is skipped.

    Raises:
        JsonError: The file is not JSON, or not an object; also while elements are gone through.
    """
    text = _Text(stream, json.JSONDecoder(object_hook=object_hook))
    if text.peek() == "[":
        raise JsonError("holds a list")
    if text.peek() != "{":
        raise JsonError(f"holds a {type(text.value()).__name__}")
    for _ in text.entries("{", "}"):
        text.expect('"')
        name = text.value()
        text.take(":")
        if text.peek() == "[":
            elements = (text.value() for _ in text.entries("[", "]"))
            yield name, Elements(elements)
            for _ in elements:
                pass
        else:
            yield name, text.value()
    text.finish()


class _Text:
    """The text from where reading stands up to the end of what has been fetched."""

    def __init__(self, stream: Stream, decoder: json.JSONDecoder) -> None:
        self._stream, self._decode = stream, decoder.raw_decode
        head = b""
        while len(head) < _ENCODING_BYTES and (data := stream.read(CHUNK_BYTES)):
            head += data
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(head))(errors="surrogatepass")
        self._at, self._num_before, self._num_bytes, self._is_whole = 0, 0, 0, False
        self._text = self._characters(head)

    def peek(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fetch():
                return ""

    def expect(self, *wanted: str) -> str:
        """The next character that is not blank, which must be one of these."""
        found = self.peek()
        if found not in wanted:
            what = " or ".join(f"'{character}'" for character in wanted)
            raise _not_json(f"expecting {what}, {self._place(self._at)}")
        return found

    def take(self, *wanted: str) -> str:
        """Passes one of these characters and says which it was."""
        found = self.expect(*wanted)
        self._at += 1
        return found

    def entries(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each entry of an object or array."""
        self.take(opening)
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            yield
            if self.take(",", closing) == closing:
                return

    def value(self) -> Any:
        """The next value, whole."""
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
        """Refuses further text."""
        if self.peek():
            raise _not_json(f"extra data, {self._place(self._at)}")

    def _place(self, at: int) -> str:
        return f"character {self._num_before + at:,}"

    def _fetch(self) -> bool:
        """Fetches at least as much again, so that a long value is not begun anew for each piece; False at the end."""
        if self._is_whole:
            return False
        rest = self._text[self._at :]
        if len(rest) > MAX_ENTRY_CHARS:
            raise _not_json(f"an entry of more than {MAX_ENTRY_CHARS:,} characters, {self._place(self._at)}")
        data = self._stream.read(max(CHUNK_BYTES, len(rest)))
        self._is_whole = not data
        self._num_before, self._at = self._num_before + self._at, 0
        self._text = rest + self._characters(data)
        return True

    def _characters(self, data: bytes) -> str:
        undecoded, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(data, final=self._is_whole)
        except UnicodeDecodeError as error:
            place = self._num_bytes - len(undecoded) + error.start
            raise _not_json(f"no text in {error.encoding}: {error.reason}, byte {place:,}") from None
        self._num_bytes += len(data)
        return text


def _not_json(reason: str) -> JsonError:
    return JsonError(f"is not JSON: {reason}")
