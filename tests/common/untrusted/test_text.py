"""Text is decoded as editors and spreadsheets save it, and anything else is refused with a reason."""

import pytest

from raydet.common.untrusted.text import TextError, decode_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_is_decoded_without_its_mark(encoding: str) -> None:
    text = "ab é 画\n"
    assert decode_text(text.encode(encoding)) == text


def test_nothing_is_empty_text() -> None:
    assert decode_text(b"") == "" and decode_text("\ufeff".encode()) == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"ab\xff", "not text in UTF-8 or UTF-16: byte 2 is invalid in UTF-8"),
        (b"\xff\xfea\0b", "not text in UTF-8 or UTF-16: byte 4 is invalid in UTF-16-LE"),
        (b"abcdef\0", "not text: it contains NUL characters"),
    ],
)
def test_other_bytes_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(TextError) as caught:
        decode_text(data)
    assert str(caught.value) == reason
