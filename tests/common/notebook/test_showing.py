"""Results and rows of tables as text and as HTML."""

from dataclasses import dataclass

import pytest

from raydet.common.notebook.showing import Shown, row_cells, table_html, table_text

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J"


@dataclass(frozen=True)
class Hostile(Shown):
    text: str

    def lines(self) -> list[str]:
        return ["first", self.text]


def test_a_result_is_printed_and_its_html_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    result = Hostile(f"{HOSTILE} s3://key:secret-password@bucket/x")
    result.show()
    printed = capsys.readouterr().out
    assert printed.startswith("first\n<img") and "\x1b" not in printed and "secret-password" not in printed
    page = result._repr_html_()
    assert page.startswith("<pre>first\n&lt;img") and "\x1b" not in page and "secret-password" not in page


def test_a_table_is_escaped_and_aligned() -> None:
    rows = [("name", HOSTILE), ("a", "1")]
    page = table_html(rows, f"note {HOSTILE}")
    assert "<img" not in page and page.count("&lt;img") == 2 and page.count("<td>") == 2 and "\x1b" not in page
    assert "\x1b" not in table_text(rows, HOSTILE)
    first, second, note = table_text([("name", "n"), ("a", "1,000")], "two rows").splitlines()
    assert len(first) == len(second) and note == "two rows"


def test_cells_are_short() -> None:
    row = {
        "image": {"bytes": b"12345", "path": None},
        "other": {"bytes": None, "path": "a/b.jpg"},
        "objects": {"category": [1, 0, 1], "bbox": [[0.0] * 4] * 3},
        "nothing": {"category": [], "bbox": []},
        "camera": None,
        "score": 0.123456,
        "text": f"{'long ' * 100}\n",
    }
    *cells, text = row_cells(row, ["cat", "dog\n"])
    assert cells == ["5 bytes", "a/b.jpg", "2 dog , 1 cat", "–", "–", "0.1235"]
    assert len(text) == 60 and text.endswith("…")
