"""`tune`: a search over the options of training."""

from dataclasses import dataclass
from typing import Any, Literal

from raydet.config.fields import option, require, require_positive
from raydet.config.training import COCO_METRICS

Search = Literal["optuna", "random"]
Scheduler = Literal["asha", "none"]


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Search for the options of training that give the best detector: many short trainings, side by side."""

    out: str = option("folder: OUT/best is the best model, OUT/trials the table of all trials", operational=True)
    train: str | dict[str, Any] = option(
        "the training that is varied: a config file of train, or its options as a mapping, where `config` may name a "
        "file that the others override"
    )
    train_data: str | None = option("images table to learn from; the one that `train` names by default", None)
    val_data: str | None = option("images table to validate on; the one that `train` names by default", None)
    space: dict[str, Any] = option(
        "what to vary: options of train, with dots for those within one (schedule_options.num_cycles), each with one "
        "of {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]} (without high), {choice: [...]}"
    )
    points: list[dict[str, Any]] = option(
        "values to try before the search begins; `train` as it stands is always the first trial", default_factory=list
    )

    num_trials: int = option("trainings in all, the first of them with `train` as it stands", 20, operational=True)
    metric: str | None = option(
        "what to search for: one of COCO's twelve, AP:CLASS for one class, or loss, of which less is better; the "
        "metric_for_best_model of `train` by default",
        None,
    )
    search: Search = option("optuna learns from the trials so far (TPE), random does not", "optuna")
    scheduler: Scheduler = option("asha stops a trial early that is behind the others; none lets all finish", "asha")
    grace_epochs: int | None = option(
        "epochs before a trial may be stopped; by default those after which asha looks twice at a trial", None
    )
    reduction_factor: int = option("asha lets one in so many trials go on, at each look", 3)
    max_concurrent: int | None = option(
        "trials at once; by default one for each set of GPUs, or for each two CPUs a worker", None, operational=True
    )
    time_limit_s: float | None = option(
        "seconds after which the search ends with what it has; the same command goes on from there",
        None,
        operational=True,
    )
    retry_failed: bool = option("do failed trials again when the search goes on", False, operational=True)
    seed: int = option("of the search; all trials have the seed of `train`", 0)

    def __post_init__(self) -> None:
        require_positive(self, "num_trials", "grace_epochs", "max_concurrent", "time_limit_s")
        require(self.reduction_factor >= 2, f"reduction_factor must be at least 2, got {self.reduction_factor}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        metric = self.metric
        require(
            metric is None or metric in (*COCO_METRICS, "loss") or metric.startswith("AP:"),
            f"metric must be one of {', '.join(COCO_METRICS)}, AP:CLASS or loss, got {metric}",
        )
        require(
            len(self.space) > 0,
            "space is empty: name what to vary, such as `learning_rate: {loguniform: [1e-4, 1e-2]}`",
        )
