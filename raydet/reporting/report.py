"""Metrics tables → one HTML file that says how good a run is, how sure that is, and what goes wrong."""

from dataclasses import dataclass

from raydet.common.errors import UserError
from raydet.config import ReportConfig
from raydet.reporting.figures import charts
from raydet.reporting.galleries import build_galleries
from raydet.reporting.page import render
from raydet.reporting.run_tables import read_run
from raydet.tables import storage
from raydet.tables.new_output import new_file
from raydet.training.history import EpochRecord, read_history

__all__ = ["Report", "report"]

_FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """What `report` wrote.

    Attributes:
        out: The HTML file.
        run: The run it is about; None where the tables give it no name.
        num_bytes: Of the file.
        problems: What could not be shown, one line each.
    """

    out: str
    run: str | None
    num_bytes: int
    problems: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was written, for the terminal."""
        of_run = "" if self.run is None else f" of the run {self.run}"
        return [*self.problems, f"report{of_run} ({self.num_bytes / 1e6:.1f} MB): {self.out}"]


def report(config: ReportConfig) -> Report:
    """Writes the report of one run as a single HTML file that needs no network.

    Tables besides `metrics` may be missing; their sections then say so. Pictures are read from the truth that the
    run names, as far as it is still there.

    Args:
        config: Where the tables are, and what to show.

    Raises:
        UserError: The folder holds no metrics, or not this run, or `train_run` is no training run.
    """
    out = storage.absolute_uri(config.out or storage.join(config.metrics, _FILE))
    run = read_run(config.metrics, config.run)
    history = [] if config.train_run is None else _history(config.train_run)
    with new_file(out, command="report", endings=(".html", ".htm")) as file:
        galleries = build_galleries(run, config.num_images)
        data = render(run, charts(run, history), galleries).encode()
        file.write(data)
    return Report(out=out, run=run.run, num_bytes=len(data), problems=galleries.problems)


def _history(train_run: str) -> list[EpochRecord]:
    history = read_history(storage.absolute_uri(train_run))
    if not history:
        raise UserError(f"{train_run} has no log/history.json; --train-run must be a folder that `raydet train` wrote")
    return history
