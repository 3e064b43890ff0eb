"""The history of a training run: one record per epoch, in OUT/log/history.json.

It determines the best epoch and the end of a run. This module imports neither torch nor Ray.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raydet.common.console import counted, shown
from raydet.common.errors import UserError
from raydet.common.notebook.showing import table_html
from raydet.config import COCO_METRICS
from raydet.models.checkpoints import HISTORY_FILE, STEPS_FILE
from raydet.tables import storage
from raydet.training.recovery.overrides import Override, overrides_from_json, overrides_to_json
from raydet.training.recovery.skipping import SkippedStep


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """Results of one validation. None marks an undefined value, such as the AP of a class without ground truth.

    Attributes:
        numbers: COCO's twelve metrics by name.
        ap_by_class: AP by class name.
        num_unreadable: Images that could not be read; all their boxes count as missed.
        loss: Loss of the final boxes over all images; None if it was not measured or is not finite.
        seconds: Wall-clock time of the validation on rank 0; None if an old file lacks it.
    """

    numbers: Mapping[str, float | None] = field(default_factory=dict)
    ap_by_class: Mapping[str, float | None] = field(default_factory=dict)
    num_unreadable: int = 0
    loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of a training run.

    Attributes:
        epoch: Number of the epoch, from 1.
        ended: Local time at which the last step ended, ISO 8601.
        loss: Mean loss per step.
        losses: Mean of each loss term per step; their sum is `loss`.
        gradient_norm: Mean gradient norm before clipping.
        learning_rate: Learning rate of the first parameter group after the last step.
        images_per_s: Training images of all workers per second of `seconds`.
        seconds: Wall-clock time of the training steps.
        step_s: Mean seconds per step, split into `data`, `compute` and `communication`.
        start_s: Seconds until the first images arrived, if workers and stream had just started.
        num_skipped_steps: Steps that changed nothing, because their gradient was not finite; the losses and the
            gradient norm leave them out, and are NaN if no step remains.
        skipped: The latest of them.
        overrides: Settings that changed in this epoch.
        num_unreadable: Training images that could not be read.
        peak_memory_mb: Peak memory of rank 0's process, in MiB.
        peak_device_memory_mb: Peak memory on rank 0's GPU, in MiB; None without a GPU.
        num_trained_parameters: Trainable parameters of the model; None if an old file lacks it.
        validation: Results of the validation after the epoch; None if there was none.
    """

    epoch: int
    loss: float
    ended: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    images_per_s: float = 0.0
    seconds: float = 0.0
    step_s: Mapping[str, float] = field(default_factory=dict)
    start_s: float = 0.0
    num_skipped_steps: int = 0
    skipped: tuple[SkippedStep, ...] = ()
    overrides: tuple[Override, ...] = ()
    num_unreadable: int = 0
    peak_memory_mb: float | None = None
    peak_device_memory_mb: float | None = None
    num_trained_parameters: int | None = None
    validation: ValidationRecord | None = None

    @property
    def total_s(self) -> float:
        """Seconds of the epoch, including start-up and validation."""
        validation_s = None if self.validation is None else self.validation.seconds
        return self.start_s + self.seconds + (validation_s or 0.0)

    def value(self, metric: str) -> float | None:
        """Return a metric of the epoch; None if it is undefined or was not measured.

        Args:
            metric: One of COCO's twelve metrics, `AP:CLASS` for the AP of one class, or `loss` for the loss of the
                validation.
        """
        if self.validation is None:
            return None
        if metric == "loss":
            return self.validation.loss
        if metric.startswith("AP:"):
            return self.validation.ap_by_class.get(metric.removeprefix("AP:"))
        return self.validation.numbers.get(metric)

    def score(self, metric: str) -> float | None:
        """Return `value`, negated for `loss`, so that higher is better."""
        value = self.value(metric)
        return -value if metric == "loss" and value is not None else value

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; values that were not measured have no key."""
        content: dict[str, Any] = {
            "epoch": self.epoch,
            "ended": self.ended,
            "loss": self.loss,
            "losses": dict(self.losses),
            "gradient_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "images_per_s": self.images_per_s,
            "seconds": self.seconds,
            "step_s": dict(self.step_s),
            "start_s": self.start_s,
            "skipped_steps": self.num_skipped_steps,
            "unreadable": self.num_unreadable,
        }
        if self.skipped:
            content["skipped"] = [step.to_json() for step in self.skipped]
        if self.overrides:
            content["overrides"] = overrides_to_json(self.overrides)
        for name in ("peak_memory_mb", "peak_device_memory_mb"):
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        if self.num_trained_parameters is not None:
            content["trained_parameters"] = self.num_trained_parameters
        if self.validation is not None:
            content |= {
                **self.validation.numbers,
                "AP_by_class": dict(self.validation.ap_by_class),
                "validation_unreadable": self.validation.num_unreadable,
                "validation_s": self.validation.seconds,
            }
            if self.validation.loss is not None:
                content["validation_loss"] = self.validation.loss
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "EpochRecord":
        """Read the result of `to_json`; only `epoch` and `loss` are required.

        Raises:
            ValueError: The content is not an epoch record.
        """
        if not isinstance(content, Mapping) or not all(_is_number(content.get(name)) for name in ("epoch", "loss")):
            raise ValueError("an epoch record must have the numbers `epoch` and `loss`")
        names = ("ended", "losses", "gradient_norm", "learning_rate", "images_per_s", "seconds", "step_s", "start_s")
        more = (*names, "peak_memory_mb", "peak_device_memory_mb")
        validation = None
        numbers = {name: _number(content, name) for name in COCO_METRICS if name in content}
        by_class = content.get("AP_by_class") or {}
        if numbers or by_class:
            validation = ValidationRecord(
                numbers=numbers,
                ap_by_class={str(name): _number(by_class, name) for name in by_class},
                num_unreadable=int(content.get("validation_unreadable") or 0),
                loss=_number(content, "validation_loss"),
                seconds=_number(content, "validation_s"),
            )
        return cls(
            epoch=int(content["epoch"]),
            loss=float(content["loss"]),
            num_skipped_steps=int(content.get("skipped_steps") or 0),
            skipped=tuple(SkippedStep.from_json(step) for step in content.get("skipped") or ()),
            overrides=overrides_from_json(content.get("overrides") or ()),
            num_unreadable=int(content.get("unreadable") or 0),
            num_trained_parameters=content.get("trained_parameters"),
            validation=validation,
            **{name: content[name] for name in more if content.get(name) is not None},
        )


class History(list[EpochRecord]):
    """The records of all finished epochs, also as a table and as curves; a notebook shows the table."""

    def to_arrow(self) -> pa.Table:
        """Return a row for each epoch; what is undefined or was not measured is null.

        Columns: `epoch`, `loss`, `loss:TERM` of each loss term, `learning_rate`, `gradient_norm`, `images_per_s`,
        `seconds`, and of the validation COCO's metrics, `AP:CLASS` of each class, `validation_loss`. Only `epoch` is an
        int64, all others are float64.
        """
        rows = [_row(record) for record in self]
        names = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch"]
        fields = [(name, pa.int64() if name == "epoch" else pa.float64()) for name in names]
        return pa.Table.from_pylist(rows, schema=pa.schema(fields))

    def to_pandas(self) -> Any:
        """Return `to_arrow` as a pandas data frame."""
        return self.to_arrow().to_pandas()

    def plot(self) -> Any:
        """Return a Plotly figure of the losses and the AP by epoch; a notebook shows it."""
        import plotly.graph_objects as go

        table = self.to_arrow()
        figure = go.Figure()
        for name, axis in (("loss", "y"), ("validation_loss", "y"), ("AP", "y2"), ("AP50", "y2"), ("AP75", "y2")):
            if name in table.column_names:
                measured = table.select(["epoch", name]).drop_null()
                epochs, values = (measured[column].to_pylist() for column in ("epoch", name))
                label = name.replace("_", " ")
                figure.add_trace(go.Scatter(x=epochs, y=values, name=label, yaxis=axis, mode="lines+markers"))
        figure.update_layout(
            xaxis={"title": {"text": "epoch"}},
            yaxis={"title": {"text": "loss"}, "rangemode": "tozero"},
            yaxis2={"title": {"text": "AP"}, "range": [0, 1], "overlaying": "y", "side": "right"},
            legend={"orientation": "h"},
        )
        return figure

    def _repr_html_(self) -> str:
        table = self.to_arrow()
        columns = ("epoch", "loss", "validation_loss", "AP", "AP50", "AP75", "learning_rate", "images_per_s")
        names = [name for name in columns if name in table.column_names]
        rows = [tuple(shown(row[name], ".4g") for name in names) for row in table.select(names).to_pylist()]
        return table_html([tuple(names), *rows], counted(len(rows), "epoch"))


def _row(record: EpochRecord) -> dict[str, float | None]:
    """Return the columns of `History.to_arrow` for one epoch."""
    row: dict[str, float | None] = {"epoch": record.epoch, "loss": record.loss}
    row |= {f"loss:{name}": value for name, value in record.losses.items()}
    names = ("learning_rate", "gradient_norm", "images_per_s", "seconds")
    row |= {name: getattr(record, name) for name in names}
    if record.validation is not None:
        row |= record.validation.numbers
        row |= {f"AP:{name}": value for name, value in record.validation.ap_by_class.items()}
        row["validation_loss"] = record.validation.loss
    return {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(content: Mapping[str, Any], name: str) -> float | None:
    value = content.get(name)
    if value is not None and not _is_number(value):
        raise ValueError(f"{name} is not a number: {value!r}")
    return value


def read_history(out: str) -> History:
    """Read the history of a run folder; it is empty if no epoch has finished.

    Raises:
        UserError: The file does not hold a history.
    """
    uri = storage.join(out, HISTORY_FILE)
    if not storage.exists(uri):
        return History()
    try:
        contents = storage.read_json(uri, allow_nan=True)
        if not isinstance(contents, list):
            raise ValueError("it must be a list")
        return History(EpochRecord.from_json(content) for content in contents)
    except ValueError as error:
        raise UserError(f"{uri} is damaged: it does not hold the history of a training run: {error}") from None


def write_history(out: str, history: Sequence[EpochRecord]) -> None:
    """Write the history of a run folder atomically."""
    content = json.dumps([record.to_json() for record in history], indent=1)
    storage.write_bytes(storage.join(out, HISTORY_FILE), content.encode())


def write_stopped_epoch(out: str, record: EpochRecord) -> None:
    """Write the record of an epoch that was stopped, for `plan`."""
    storage.write_bytes(storage.join(out, STEPS_FILE), json.dumps(record.to_json()).encode())


def best_epoch(history: Sequence[EpochRecord], metric: str) -> EpochRecord | None:
    """Return the epoch with the best metric, the newest of equal ones; the newest epoch if none was measured."""
    if not history:
        return None
    scored = [(score, number) for number, record in enumerate(history) if (score := record.score(metric)) is not None]
    return history[max(scored)[1]] if scored else history[-1]


def is_best_so_far(history: Sequence[EpochRecord], metric: str) -> bool:
    """Return True if the newest epoch is the best."""
    return bool(history) and best_epoch(history, metric) is history[-1]


def is_out_of_patience(history: Sequence[EpochRecord], metric: str, patience: int | None) -> bool:
    """Return True if none of the last `patience` measured epochs is better than all earlier ones; never for 0."""
    if not patience:
        return False
    scores = [score for record in history if (score := record.score(metric)) is not None]
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def is_over(history: Sequence[EpochRecord], *, epochs: int, metric: str, patience: int | None) -> bool:
    """Return True if a run has completed all epochs or is out of patience."""
    return len(history) >= epochs or is_out_of_patience(history, metric, patience)
