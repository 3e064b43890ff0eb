"""What a person sees: lines and tables on the screen, and how far the work is. Imports no Ray."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from raydet.common.redaction import without_secrets


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table with the first column flush left and the others flush right."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths, strict=True)]
        lines.append("  ".join([first.ljust(first_width), *cells]).rstrip())
    return lines


class Console:
    """Prints plain lines; on a terminal a status line below them says how far the work is."""

    def __init__(self) -> None:
        # Lazily: what only lays out lines has no need of it.
        from rich.console import Console as RichConsole

        self._rich = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._is_terminal = self._rich.is_terminal

    def line(self, text: str = "") -> None:
        """Prints one line, without passwords and keys."""
        self._rich.print(without_secrets(text))

    def title(self, text: str) -> None:
        """Prints what comes next."""
        self._rich.print(text, style="bold" if self._is_terminal else None)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """Shows a status line for the time of a `with`; yields the function that changes it."""
        if not self._is_terminal:
            yield lambda _: None
            return
        with self._rich.status(text) as status:
            yield status.update
