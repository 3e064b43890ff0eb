"""Results of a search: the table of trials, the best model with its config, and an HTML page."""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from raydet.common.notebook.showing import Shown
from raydet.config import COCO_METRICS, TrainConfig, config_hash, to_yaml
from raydet.reporting.tuning_page import Axis, TrialRow, render_tuning
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.schema import build_schema
from raydet.tables.table import TableWriter
from raydet.tuning.following import in_short
from raydet.tuning.plan import Search, TuningPlan
from raydet.tuning.records import TRIALS_FOLDER, Trial, natural, with_history
from raydet.tuning.search import importances
from raydet.tuning.space import Dimension, with_parameters

BEST_FOLDER = "best"
PAGE = "tune.html"
_ARROW_TYPES = {"uniform": pa.float64(), "loguniform": pa.float64(), "randint": pa.int64(), "choice": pa.string()}


@dataclass(frozen=True, kw_only=True)
class TuneResult(Shown):
    """Result of a search.

    Attributes:
        out: Output folder or URI.
        metric: Name of the optimised metric.
        trials: All trials, with their histories.
        best: The best trial.
        value: Metric of the best trial in its best epoch.
        default_value: Metric of the unchanged config; None if that trial failed.
        parameters: Value of each varied option in the best trial.
        importance: Share of each option in separating the best trials from the others; None if it cannot be computed.
        checkpoint: The best model, a Hugging Face model folder.
        is_over: False if the time limit ended the search early.
        already_done: True if the search was finished before this call.
    """

    out: str
    metric: str
    trials: tuple[Trial, ...]
    best: Trial
    value: float
    default_value: float | None
    parameters: dict[str, Any]
    importance: dict[str, float] | None
    checkpoint: str
    is_over: bool = True
    already_done: bool = False

    json_properties: ClassVar = ("config_file", "page")

    @property
    def page(self) -> str:
        """Page about the trials, which `--open` opens."""
        return storage.join(self.out, PAGE)

    @property
    def config_file(self) -> str:
        """Training config of the best trial, for a longer run."""
        return storage.join(self.out, BEST_FOLDER, "config.yaml")

    def lines(self) -> list[str]:
        """Return a summary of the search for the terminal."""
        first = ["nothing to do: this search is finished; raise --num-trials to continue it"]
        late = ["the time limit ended the search early; run the same command with a higher --time-limit-s to resume"]
        default = "" if self.default_value is None else f"; unchanged config: {self.default_value:.3f}"
        counts = {state: sum(trial.state == state for trial in self.trials) for state in ("stopped", "failed")}
        others = "".join(f", {number} {state}" for state, number in counts.items() if number)
        lines = [
            *(first if self.already_done else []),
            *([] if self.is_over else late),
            f"best: {self.metric} {self.value:.3f}, {self.best.name} of {len(self.trials)} trials{others}{default}",
            "  " + ", ".join(f"{name} {in_short(value)}" for name, value in self.parameters.items()),
        ]
        if self.importance is not None:
            shares = sorted(self.importance.items(), key=lambda item: -item[1])
            lines.append("importance of each option: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
        return [
            *lines,
            f"checkpoint: {self.checkpoint}",
            f"to train it longer: raydet train --config {self.config_file} --epochs N",
            f"trials: {storage.join(self.out, TRIALS_FOLDER)}; page: {self.page}",
        ]


def write_results(search: Search, *, is_over: bool, already_done: bool) -> TuneResult | None:
    """Write the table, the page and the best model; return None if no trial was measured."""
    plan = search.plan
    for number, trial in search.trials.items():
        # An interrupted trial may have finished epochs that were not reported.
        search.trials[number] = with_history(trial, plan.out)
    trials = tuple(search.trials[number] for number in sorted(search.trials))
    best = search.best()
    scored = [(plan.values(t.parameters), score) for t in trials if (score := t.score(plan.metric)) is not None]
    importance = importances(plan.dimensions, scored)
    _write_table(plan, trials, best[0] if best else None, importance)
    page = _page(plan, trials, best[0] if best else None, importance, is_over=is_over)
    storage.write_bytes(storage.join(plan.out, PAGE), page.encode())
    if best is None:
        return None
    default = trials[0].score(plan.metric)
    return TuneResult(
        out=plan.out,
        metric=plan.metric,
        trials=trials,
        best=best[0],
        value=natural(best[1], plan.metric),
        default_value=None if default is None else natural(default, plan.metric),
        parameters=plan.values(best[0].parameters),
        importance=importance,
        checkpoint=_write_best(plan, best[0]),
        is_over=is_over,
        already_done=already_done,
    )


def _write_best(plan: TuningPlan, trial: Trial) -> str:
    """Copy the best trial's checkpoint and write its config, whose output folder is OUT/final."""
    target = storage.join(plan.out, BEST_FOLDER)
    config = dataclasses.replace(with_parameters(plan.base, trial.parameters), out=storage.join(plan.out, "final"))
    with tempfile.TemporaryDirectory(prefix="raydet-best-") as folder:
        storage.fetch_folder(storage.join(trial.folder(plan.out), "checkpoint"), folder)
        Path(folder, "config.yaml").write_text(to_yaml(config), "utf-8")
        storage.publish_folder(folder, target)
    return target


def _write_table(
    plan: TuningPlan, trials: Sequence[Trial], best: Trial | None, importance: dict[str, float] | None
) -> None:
    uri = storage.join(plan.out, TRIALS_FOLDER)
    extra = [pa.field(f"param_{dimension.name}", _ARROW_TYPES[dimension.kind]) for dimension in plan.dimensions]
    # An existing table is from an earlier run of the search; it must not look valid until the new one is complete.
    storage.delete_file(storage.join(uri, MANIFEST_NAME))
    with TableWriter(uri, build_schema("trials", extra_fields=extra), config_hash=config_hash(plan.config)) as writer:
        writer.extra = {
            "metric": plan.metric,
            "best": None if best is None else best.name,
            "importance": importance,
        }
        writer.write_rows([_table_row(plan, trial) for trial in trials])


def _table_row(plan: TuningPlan, trial: Trial) -> dict[str, Any]:
    best = trial.best(plan.metric)
    score = trial.score(plan.metric)
    checkpoint = storage.join(trial.folder(plan.out), "checkpoint")
    values = plan.values(trial.parameters)
    return {
        "trial": trial.name,
        "state": trial.state,
        "source": trial.source,
        "parameters": json.dumps(values),
        "metric": plan.metric,
        "value": None if score is None else natural(score, plan.metric),
        "best_epoch": None if best is None else best.epoch,
        "num_epochs": len(trial.history),
        "seconds": seconds_of(trial),
        **{name: None if best is None else best.value(name) for name in COCO_METRICS},
        "loss": None if best is None else best.loss,
        "checkpoint": None if best is None else checkpoint,
        "error": trial.error,
        **{f"param_{each.name}": _cell(each, values[each.name]) for each in plan.dimensions},
    }


def _cell(dimension: Dimension, value: Any) -> Any:
    """Convert a value to its column's type; None if a default does not fit it."""
    if value is None:
        return None
    if dimension.kind == "choice":
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if dimension.kind != "randint" else int(value) if value == int(value) else None


def seconds_of(trial: Trial) -> float:
    """Return the seconds of a trial's epochs: start-up, training and validation."""
    return sum(record.total_s for record in trial.history)


def _page(
    plan: TuningPlan, trials: Sequence[Trial], best: Trial | None, importance: dict[str, float] | None, *, is_over: bool
) -> str:
    config = plan.config
    remarks = [] if is_over else ["The time limit ended the search before all trials were done."]
    if any(trial.state == "stopped" for trial in trials):
        remarks.append("A stopped trial counts with its best epoch before the stop.")
    facts = [
        ("Search", f"{config.search}, seed {config.seed}"),
        ("Scheduler", config.scheduler),
        ("Metric", plan.metric),
        ("Folder", plan.out),
        ("Space", json.dumps(config.space)),
        ("Training", ", ".join(f"{name}: {value}" for name, value in _changed(plan.base).items())),
    ]
    return render_tuning(
        metric=plan.metric,
        is_less_better=plan.metric == "loss",
        axes=[_axis(dimension) for dimension in plan.dimensions],
        trials=[_page_row(plan, trial) for trial in trials],
        best=None if best is None else best.name,
        importance=importance,
        facts=facts,
        notes=remarks,
    )


def _changed(base: TrainConfig) -> dict[str, Any]:
    """Return the training options that differ from their defaults."""
    return {
        item.name: getattr(base, item.name)
        for item in dataclasses.fields(base)
        if item.name != "out" and getattr(base, item.name) != item.default and getattr(base, item.name) != []
    }


def _axis(dimension: Dimension) -> Axis:
    choices = tuple(map(_text, dimension.values)) if dimension.kind == "choice" else None
    return Axis(name=dimension.name, is_log=dimension.kind == "loguniform", choices=choices)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _page_row(plan: TuningPlan, trial: Trial) -> TrialRow:
    row, values = _table_row(plan, trial), plan.values(trial.parameters)
    same = ("state", "source", "value", "best_epoch", "num_epochs", "seconds", "error")
    return TrialRow(
        name=trial.name,
        values=tuple(
            _text(values[each.name]) if each.kind == "choice" else row[f"param_{each.name}"] for each in plan.dimensions
        ),
        **{name: row[name] for name in same},
    )
