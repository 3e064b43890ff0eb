"""Results and tables for people at a Python prompt or in a notebook: text, and HTML in which everything is escaped."""

import html
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raydet.common.console import aligned, counted, shown
from raydet.common.errors import printable
from raydet.common.redaction import without_secrets

_LONGEST_CELL = 60


class Shown(ABC):
    """Base class of a command's result: `show` prints it, and a notebook displays it."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Return a summary for the terminal."""

    def show(self) -> None:
        """Print the summary."""
        for line in self.lines():
            print(printable(without_secrets(line)))

    def _repr_html_(self) -> str:
        return f"<pre>{_escaped(chr(10).join(self.lines()))}</pre>"


def table_text(rows: Sequence[tuple[str, ...]], note: str) -> str:
    """Format rows of cells, of which the first is the header, and a note below them, as plain text."""
    return "\n".join([*(printable(line.rstrip()) for line in aligned(rows)), printable(without_secrets(note))])


def table_html(rows: Sequence[tuple[str, ...]], note: str) -> str:
    """Format rows of cells, of which the first is the header, and a note below them, as HTML."""
    head, *body = rows
    lines = [f"<tr>{_cells('th', head)}</tr>", *(f"<tr>{_cells('td', row)}</tr>" for row in body)]
    return f"<table>{''.join(lines)}</table><p>{_escaped(note)}</p>"


def row_cells(row: Mapping[str, Any], class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the values of a table's row as short texts; boxes are counted by the names of their classes."""
    return tuple(_short(_cell(value, class_names)) for value in row.values())


def _cell(value: Any, class_names: Sequence[str]) -> str:
    if value is None or isinstance(value, float):
        return shown(value, ".4g")
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict) and "path" in value:
        return value["path"] or _cell(value.get("bytes"), ())
    if isinstance(value, dict) and isinstance(value.get("category"), list):
        counts = Counter(class_names[category] for category in value["category"])
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or shown(None)
    if isinstance(value, dict) and isinstance(value.get("bbox"), list):
        return counted(len(value["bbox"]), "box", "boxes")
    return str(value)


def _short(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= _LONGEST_CELL else f"{line[: _LONGEST_CELL - 1]}…"


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells)


def _escaped(text: str) -> str:
    return html.escape(printable(without_secrets(text)))
