"""Output of a command: lines, tables, progress and the result, on a terminal, in a log, or as JSON."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

from raydet.common.display.json_form import SCHEMA_VERSION, json_line, json_value
from raydet.common.display.progress import Progress, Snapshot
from raydet.common.display.rendering import end_line, plain_line, progress_object
from raydet.common.errors import printable
from raydet.common.redaction import without_secrets
from raydet.common.threads import running_beside

if TYPE_CHECKING:
    from raydet.common.display.terminal import Screen


def write_out(text: str, stream: TextIO | None = None) -> None:
    """Write text to stdout, or another stream, tolerating a reader such as `head` that closes the pipe early."""
    stream = stream or sys.stdout
    try:
        print(printable(text), end="", file=stream, flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which would raise a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


Style = Literal["terminal", "plain", "json"]

_TICK_S: dict[Style, float] = {"terminal": 0.2, "plain": 0.5, "json": 0.5}
_SECONDS_BETWEEN: dict[Style, tuple[float, float]] = {"terminal": (0, 0), "plain": (10, 60), "json": (1, 10)}
"""Least and most seconds between two outputs of a task; they grow with its duration, so that a log stays readable."""
_SHARE_OF_DURATION = 0.02
WORTH_A_LINE_S = 3.0
"""A task that took at least this long leaves a line."""


class CommandResult(Protocol):
    """The result of a command, a dataclass."""

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""


class Console:
    """Output of a command, in one of three styles.

    - `terminal`: lines, and a bar with the progress below them while something runs;
    - `plain`: lines, and from time to time one with the progress, for logs and pipes;
    - `json`: one JSON object a line: messages, progress, and the result or the error as the last one.

    Attributes:
        style: The style; by default `terminal` if stdout is one, `plain` otherwise.
        command: Name of the command, in JSON.
    """

    def __init__(
        self,
        style: Style | None = None,
        *,
        is_quiet: bool = False,
        command: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the output; with `is_quiet`, only the result or the error is printed."""
        self.style: Style = style or ("terminal" if _is_terminal(sys.stdout) else "plain")
        self.command = command
        self._is_quiet, self._clock = is_quiet, clock
        self._json_stream = sys.stdout  # kept, because `own_stdout` redirects that of libraries
        self._lock, self._is_showing = threading.Lock(), False

    @contextlib.contextmanager
    def own_stdout(self) -> Iterator[None]:
        """Context manager: in JSON, what libraries print on stdout while the block runs goes to stderr."""
        with contextlib.redirect_stdout(sys.stderr) if self.style == "json" else contextlib.nullcontext():
            yield

    @cached_property
    def _screen(self) -> "Screen":
        from raydet.common.display.terminal import Screen  # rich takes a moment to import

        return Screen()

    def line(self, text: str = "") -> None:
        """Print one line, with passwords and keys masked."""
        if self._is_quiet:
            return
        if self.style != "json":
            self._print(text)
        elif text.strip():
            self._write("message", text=text.strip())

    def title(self, text: str) -> None:
        """Print the title of the next step."""
        if self.style == "terminal" and not self._is_quiet:
            self._screen.print(printable(text), style="bold")
        else:
            self.line(text)

    def record(self, kind: str, values: Mapping[str, Any], lines: Sequence[str], *, heading: str = "") -> None:
        """Print an intermediate result, such as an epoch: its lines, or in JSON an object of this type."""
        if self._is_quiet:
            return
        if self.style == "json":
            self._write(kind, **values)
            return
        if heading:
            self.title(heading)
        for text in lines:
            self.line(text)

    def result(self, result: CommandResult, *, exit_code: int = 0) -> None:
        """Print the result of the command."""
        if self.style == "json":
            self._write("result", exit_code=exit_code, **json_value(result))
            return
        for text in result.lines():
            self._print(text)

    def failure(self, lines: Sequence[str], exit_code: int) -> None:
        """Print why the command failed: on stderr, or in JSON as the last object."""
        if self.style == "json":
            self._write("error", exit_code=exit_code, message=lines[-1].removeprefix("raydet: error: "))
            return
        for text in lines:
            print(text, file=sys.stderr)

    @contextlib.contextmanager
    def progress(
        self, task: str, *, total: int | None = None, unit: str = "images", completed: int = 0, leaves_line: bool = True
    ) -> Iterator[Progress]:
        """Context manager: show the progress of a task while the block runs; yield its counter.

        The counter may go on to other tasks. A block within another one shows nothing.

        Args:
            task: A short name for the user, such as `scoring`.
            total: Units of the task; None if unknown.
            unit: Plural noun of what is counted.
            completed: Units that an earlier run has done.
            leaves_line: True to print a line once a task has ended that took a few seconds.
        """
        if self._is_showing or self._is_quiet:
            yield Progress()
            return
        ended = partial(self._end, leaves_line=leaves_line)
        counter = Progress(task, total=total, unit=unit, completed=completed, ended=ended, clock=self._clock)
        self._is_showing = True
        try:
            with self._display() as show, _ticking(counter, show, _TICK_S[self.style]):
                yield counter
        finally:
            self._is_showing = False
        ended(counter.snapshot())

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[Snapshot], None]]:
        """Context manager: yield the function that shows a snapshot, if it is time for the next one."""
        if self.style == "terminal":
            from raydet.common.display.terminal import bar_on

            with bar_on(self._screen) as bar:
                yield bar.show
        elif self.style == "json":
            yield self._paced(lambda snapshot: self._write("progress", **progress_object(snapshot)))
        else:
            yield self._paced(lambda snapshot: self._print(plain_line(snapshot)))

    def _paced(self, write: Callable[[Snapshot], None]) -> Callable[[Snapshot], None]:
        """Return a function that writes a snapshot, unless the last one was written a moment ago."""
        least_s, most_s = _SECONDS_BETWEEN[self.style]
        written = started = self._clock()

        def show(snapshot: Snapshot) -> None:
            nonlocal written
            now = self._clock()
            if now - written >= min(most_s, max(least_s, (now - started) * _SHARE_OF_DURATION)):
                written = now
                write(snapshot)

        return show

    def _end(self, snapshot: Snapshot, *, leaves_line: bool) -> None:
        """Write the last state of a task."""
        if self.style == "json":
            self._write("progress", **progress_object(snapshot))
        elif leaves_line and snapshot.elapsed_s >= WORTH_A_LINE_S:
            self._print(end_line(snapshot))

    def _print(self, text: str) -> None:
        safe = printable(without_secrets(text))
        if self.style == "terminal":
            self._screen.print(safe)
        else:
            write_out(f"{safe}\n")

    def _write(self, kind: str, /, **values: Any) -> None:
        head = {"type": kind, "schema_version": SCHEMA_VERSION, "command": self.command}
        text = json_line(head | values)
        with self._lock:
            write_out(text, self._json_stream)


@contextlib.contextmanager
def _ticking(counter: Progress, show: Callable[[Snapshot], None], seconds: float) -> Iterator[None]:
    """Context manager: show snapshots of a counter in a thread while the block runs."""

    def run(stop: threading.Event) -> None:
        # The main thread reports a full disk or a closed terminal, if it has anything to print.
        with contextlib.suppress(OSError):
            while not stop.wait(seconds):
                show(counter.snapshot())

    show(counter.snapshot())
    with running_beside(run):
        yield


def _is_terminal(stream: TextIO) -> bool:
    """Return True for a terminal on which a line can be drawn again."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
