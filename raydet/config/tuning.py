"""`tune`, a search over the options of `train`, and `loop`, rounds of training on a detector's own detections."""

from typing import Any, Literal

from raydet.config.fields import PAIRS, config, option, require, require_not_negative, require_positive
from raydet.config.training import MOST_WEIGHT, require_metric

Search = Literal["optuna", "random"]
Scheduler = Literal["asha", "none"]
_LEAST_WEIGHT = 0.001


@config
class TuneConfig:
    """Search for the training options that give the best detector, by many short training runs in parallel."""

    out: str = option(
        "folder to write: OUT/best is the best model, OUT/trials the table of all trials", operational=True
    )
    train_config: str | dict[str, Any] = option(
        "training config to vary: a config file of train, or its options as a mapping; the mapping's key `config` may "
        "name a file that the other keys override"
    )
    space: dict[str, Any] | None = option(
        "search space: options of train, with dots for nested ones (schedule_options.num_cycles), each with "
        "{uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]} (high excluded) or {choice: [...]}; "
        "by default learning rates, weight decay and augmentation around those of the recipe",
        None,
    )
    train_data: str | list[str] | None = option(
        "images table to train on, or several; by default those of --train-config", None, value="TABLE[:WEIGHT] ..."
    )
    val_data: str | None = option("images table for validation; by default that of --train-config", None)
    num_trials: int = option("number of training runs; the first is --train-config unchanged", 20, operational=True)
    metric: str | None = option(
        "metric to optimise: one of COCO's twelve, AP:CLASS for one class, or loss (lower is better); by default the "
        "metric_for_best_model of --train-config",
        None,
    )

    search: Search = option("optuna learns from earlier trials (TPE); random does not", "optuna", group="Search")
    scheduler: Scheduler = option("asha stops trials that fall behind; none lets all finish", "asha", group="Search")
    points_to_evaluate: list[dict[str, Any]] = option(
        "sets of values to try before the search starts", group="Search", default_factory=list
    )
    grace_epochs: int | None = option(
        "epochs before a trial may be stopped; by default chosen so that asha compares each trial twice",
        None,
        group="Search",
    )
    reduction_factor: int = option("asha keeps one in this many trials at each comparison", 3, group="Search")
    seed: int = option("seed of the search; every trial has the seed of --train-config", 0, group="Search")

    max_concurrent: int | None = option(
        "trials that run at the same time; by default one per set of GPUs, or one per two CPUs and worker",
        None,
        group="Compute and cluster",
        operational=True,
    )
    time_limit_s: float | None = option(
        "seconds after which the search ends with the trials so far; the same command resumes it",
        None,
        group="Compute and cluster",
        operational=True,
    )
    retry_failed: bool = option(
        "repeat failed trials when the search resumes", False, group="Compute and cluster", operational=True
    )

    def __post_init__(self) -> None:
        require_positive(self, "num_trials", "grace_epochs", "max_concurrent", "time_limit_s")
        require_not_negative(self, "seed")
        require(self.reduction_factor >= 2, f"--reduction-factor must be at least 2, got {self.reduction_factor}")
        if self.metric is not None:
            require_metric("--metric", self.metric)
        require(
            self.space is None or len(self.space) > 0,
            "--space is empty: name the options to vary, such as `learning_rate: {loguniform: [1e-4, 1e-2]}`",
        )


@config
class LoopConfig:
    """Rounds of score → label → train → measure, in which a model is replaced only by one that is no worse."""

    checkpoint: str = option("first model: a model folder, as written by train, or a Hub name")
    unlabelled: str = option("images table to score, whose confident detections become labels")
    train_data: str | list[str] = option("labelled images table to train on, or several; TABLE:WEIGHT as of train")
    val_data: str = option("labelled images table for validation during training, which chooses the best epoch")
    truth: str = option("labelled images table that decides about models; best one that no training sees")
    labels: dict[str, Any] = option("options of prepare detections, such as threshold=0.6", value=PAIRS)
    out: str = option("folder to write: OUT/loop.json, OUT/metrics, and a folder per round", operational=True)

    rounds: int = option("maximum number of rounds; may be raised when a loop resumes", 3, operational=True)
    label_weight: float = option(
        "weight of the images with labels from detections; each is shown so often per epoch on average", 1.0
    )
    max_loss: float = option(
        "loss of AP, from 0 to 1, that the interval of the difference must exclude to promote a new model", 0.0
    )
    predict: dict[str, Any] | None = option("options of predict, such as batch_size=32", None, value=PAIRS)
    train: dict[str, Any] | None = option(
        "options of train, such as epochs=12; config=FILE names a file of that command, also in the other three",
        None,
        value=PAIRS,
    )
    evaluate: dict[str, Any] | None = option(
        "options of evaluate: slice_by, target_precision, bootstrap, seed, num_shards, ray_address", None, value=PAIRS
    )

    def __post_init__(self) -> None:
        require_positive(self, "rounds")
        require(
            _LEAST_WEIGHT <= self.label_weight <= MOST_WEIGHT,
            f"--label-weight must be from {_LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, got {self.label_weight}",
        )
        require(0 <= self.max_loss < 1, f"--max-loss must be at least 0 and below 1, got {self.max_loss}")
