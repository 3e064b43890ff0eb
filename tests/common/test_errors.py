"""One-line messages."""

from raydet.common.errors import one_line


def test_a_message_becomes_one_line_of_limited_length() -> None:
    assert one_line("a  b\n\n\tc ") == "a b c"
    assert one_line(ValueError("x\ny")) == "x y"
    assert one_line(ValueError()) == "ValueError" and one_line("") == ""
    assert one_line("abcdef", limit=6) == "abcdef" and one_line("abcdefg", limit=6) == "abcde…"
