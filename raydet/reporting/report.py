"""Metrics tables → one HTML file with metrics, confidence intervals and error analysis."""

from dataclasses import dataclass

from raydet.common.console import Console
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.config import ReportConfig
from raydet.config.fields import with_options
from raydet.reporting.answered import read_answered
from raydet.reporting.figures import charts
from raydet.reporting.galleries import build_galleries
from raydet.reporting.page import render
from raydet.reporting.run_tables import read_run
from raydet.tables import storage
from raydet.tables.new_output import new_file
from raydet.training.history import EpochRecord, read_history

_FILE = "report.html"


@dataclass(frozen=True)
class Report(Shown):
    """Result of `report`.

    Attributes:
        out: HTML file.
        run: Name of the run; None if the tables do not name it.
        num_bytes: Size of the file.
        problems: Parts that could not be shown, one line each.
    """

    out: str
    run: str | None
    num_bytes: int
    problems: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """The page, which `--open` opens."""
        return self.out

    def lines(self) -> list[str]:
        """Return a summary, for the terminal."""
        of_run = "" if self.run is None else f" of the run {self.run}"
        return [*self.problems, f"report{of_run} ({self.num_bytes / 1e6:.1f} MB): {self.out}"]


@with_options(ReportConfig)
def report(config: ReportConfig, *, console: Console | None = None) -> Report:
    """Write the report of one run as a single HTML file that needs no network.

    Tables other than `metrics` may be missing; the affected sections then say so. Images are read from the truth that
    the run names, if it still exists.

    Args:
        config: Location of the tables, and options of the page.
        console: Console for progress; by default a new one.

    Raises:
        UserError: The folder has no metrics or not this run, `train_run` is not a training run, or `crops` are not
            about its detections.
    """
    out = storage.absolute_uri(config.out or storage.join(config.metrics, _FILE))
    with (console or Console()).progress("reading the tables") as progress:
        run = read_run(config.metrics, config.run)
        answered = read_answered(run, config.crops) if config.crops else None
        history = [] if config.train_run is None else _history(config.train_run)
        with new_file(out, command="report", endings=(".html", ".htm")) as file:
            progress.begin("drawing")
            galleries = build_galleries(run, config.num_images, answered)
            progress.begin("writing the page")
            tables = () if answered is None else answered.tables
            data = render(run, charts(run, history), galleries, tables).encode()
            file.write(data)
    return Report(out=out, run=run.run, num_bytes=len(data), problems=galleries.problems)


def _history(train_run: str) -> list[EpochRecord]:
    history = read_history(storage.absolute_uri(train_run))
    if not history:
        raise UserError(f"{train_run} has no log/history.json; --train-run must be a folder that `raydet train` wrote")
    return history
