"""Lines, tables and progress on the terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from raydet.common.errors import printable
from raydet.common.redaction import without_secrets


def write_out(text: str) -> None:
    """Write text to stdout, tolerating a reader such as `head` that closes the pipe early."""
    try:
        print(printable(text), end="", flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which would raise a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(value: float | None, spec: str = ".3f") -> str:
    """Format a number for display; "–" stands for None."""
    return "–" if value is None else format(value, spec)


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun, such as "1 image" or "2,000 images"; the plural adds an s unless given."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


MOST_NAMED = 10
"""For no more rejected or unreadable images than this, a command names each."""


def listed(items: Sequence[object], most: int) -> str:
    """List items, such as "a, b and 3 more": at most `most` of them."""
    text = ", ".join(map(str, items[:most]))
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align a table's cells: the first column left, the others right."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths, strict=True)]
        lines.append("  ".join([first.ljust(first_width), *cells]).rstrip())
    return lines


class Console:
    """Console output: plain lines, and on a terminal a status line with the progress below them."""

    def __init__(self) -> None:
        # Imported late: `aligned` and `shown` do not need it.
        from rich.console import Console as RichConsole

        self._rich = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._is_terminal = self._rich.is_terminal

    def line(self, text: str = "") -> None:
        """Print one line, with passwords and keys masked."""
        self._rich.print(printable(without_secrets(text)))

    def title(self, text: str) -> None:
        """Print the title of the next step."""
        self._rich.print(printable(text), style="bold" if self._is_terminal else None)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show a status line while the block runs; yield the function that updates it."""
        if not self._is_terminal:
            yield lambda _: None
            return
        with self._rich.status(printable(text)) as status:
            yield lambda shown: status.update(printable(shown))
