"""A bar at the bottom of a terminal, above which everything else is printed."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from raydet.common.display.progress import Snapshot
from raydet.common.display.rendering import count_text, details, rate_text, time_text
from raydet.common.errors import printable

_FIELDS = ("count", "rate", "time")


class Screen(RichConsole):
    """The terminal. The cursor stays visible, so that a process that is killed leaves nothing to restore."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, soft_wrap=True)

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing; return False, as rich does where it cannot control the cursor."""
        return False


class Bar(Progress):
    """The bar of one task, and a line of details below it."""

    _details = ""

    def __init__(self, screen: Screen) -> None:
        columns = [TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))]
        columns += [
            TextColumn(f"{{task.fields[{name}]}}", markup=False, table_column=Column(no_wrap=True)) for name in _FIELDS
        ]
        super().__init__(
            columns[0],
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            *columns[1:],
            console=screen,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self.add_task("", total=None, count="", rate="", time="")

    def show(self, snapshot: Snapshot) -> None:
        """Draw a snapshot."""
        self._details = printable(" · ".join(details(snapshot)))
        self.update(
            self._task,
            description=printable(snapshot.task),
            total=snapshot.total,
            completed=snapshot.completed,
            count=count_text(snapshot),
            rate=rate_text(snapshot),
            time=time_text(snapshot),
        )
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar and the details, each in one line."""
        yield from super().get_renderables()
        if self._details:
            yield Text(f"  {self._details}", style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def bar_on(screen: Screen) -> Iterator[Bar]:
    """Context manager: show a bar while the block runs, and erase it afterwards.

    Output to `sys.stdout` and `sys.stderr` meanwhile, that of loggers included, appears above the bar.
    """
    before = (sys.stdout, sys.stderr)
    with (
        Bar(screen) as bar,
        _loggers_writing_to({id(old): new for old, new in zip(before, (sys.stdout, sys.stderr), strict=True)}),
    ):
        yield bar


@contextmanager
def _loggers_writing_to(streams: dict[int, Any]) -> Iterator[None]:
    """Context manager: loggers that hold one of the old streams, by its id, write to the new one."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    moved = []
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in streams:
            moved.append((handler, handler.setStream(streams[id(handler.stream)])))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
