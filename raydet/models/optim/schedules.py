"""Learning-rate schedules: their options, checked without torch, and the schedules themselves."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raydet.common.errors import UserError
from raydet.config import ResolvedTrainConfig

# torch is imported where it is used, so that the driver can check a schedule without it.
if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LambdaLR

_MIN_RATE = {"min_lr", "min_lr_rate"}
_OPTIONS: dict[str, set[str]] = {
    "linear": set(),
    "cosine": {"num_cycles"},
    "cosine_with_restarts": {"num_cycles"},
    "polynomial": {"lr_end", "power"},
    "constant": set(),
    "constant_with_warmup": set(),
    "inverse_sqrt": {"timescale"},
    "reduce_lr_on_plateau": {"factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "mode"},
    "cosine_with_min_lr": {"num_cycles", *_MIN_RATE},
    "cosine_warmup_with_min_lr": {"num_cycles", "warmup_lr_rate", *_MIN_RATE},
    "warmup_stable_decay": {
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"
    },
    "one_cycle": {"pct_start", "div_factor", "final_div_factor", "anneal_strategy"},
}  # fmt: skip
"""Options of each schedule, named as in transformers and torch."""
_CHOICES = {
    "threshold_mode": ("rel", "abs"),
    "mode": ("min", "max"),
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "anneal_strategy": ("cos", "linear"),
}
_POSITIVE = {"pct_start", "factor", "div_factor", "final_div_factor", "timescale"}
_BELOW_ONE = {"pct_start", "factor", "min_lr_rate", "min_lr_ratio", "warmup_lr_rate"}
_RATES = {"min_lr", "lr_end"}
NO_WARMUP = {
    "constant": "constant has no warm-up; use constant_with_warmup",
    "one_cycle": "one_cycle has its own warm-up, set by --schedule-options {pct_start: 0.3}; omit --warmup-steps",
}
"""Schedules that have no linear warm-up, and the advice to who asks for one."""


def check_schedule(config: ResolvedTrainConfig) -> None:
    """Check the schedule of a config and its options, without importing torch.

    Raises:
        UserError: An option is unknown to the schedule, missing, or has an impossible value.
    """
    name, options = config.schedule, config.schedule_options or {}
    unknown = sorted(set(options) - _OPTIONS[name])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[name])) or "none"
        raise UserError(f"--schedule-options: {name} has no option {', '.join(unknown)}; it has {known}")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        raise UserError(
            "--schedule-options: warmup_stable_decay needs num_decay_steps, for example {num_decay_steps: 500}"
        )
    if set(options) >= _MIN_RATE:
        raise UserError(f"--schedule-options: {name} accepts min_lr or min_lr_rate, not both")
    for key, value in options.items():
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise UserError(f"--schedule-options: {key} must be one of {', '.join(_CHOICES[key])}, got {value}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"--schedule-options: {key} must be a number of at least 0, got {value}")
        elif key in _POSITIVE and value == 0:
            raise UserError(f"--schedule-options: {key} must be above 0, got 0")
        elif key in _BELOW_ONE and value >= 1:
            raise UserError(f"--schedule-options: {key} must be below 1, got {value}")
        elif key in _RATES and value >= config.learning_rate:
            raise UserError(
                f"--schedule-options: {key} must be below --learning-rate {config.learning_rate:g}, got {value:g}"
            )
    if config.warmup_steps and name in NO_WARMUP:
        raise UserError(f"--warmup-steps is {config.warmup_steps}, but {NO_WARMUP[name]}")


def build_schedule(optimizer: "torch.optim.Optimizer", config: ResolvedTrainConfig, steps_per_epoch: int) -> "LambdaLR":
    """Make the learning-rate schedule of a run.

    Call its `step` after each optimizer step, and `after_validation` after each validation. All schedules but two are
    those of `transformers.get_scheduler`: one_cycle has the rates of torch's `OneCycleLR` (and leaves the betas of
    AdamW alone), and reduce_lr_on_plateau those of torch's `ReduceLROnPlateau` after a linear warm-up. Steps beyond
    the length of a schedule keep its last rate.

    Raises:
        UserError: See `check_schedule`; or warm-up and decay are longer than the run.
    """
    from torch.optim.lr_scheduler import LambdaLR

    check_schedule(config)
    num_steps = steps_per_epoch * (config.schedule_epochs or config.epochs)
    options = dict(config.schedule_options or {})
    factors: list[Callable[[int], float]]
    if config.schedule == "one_cycle":
        factors = [_one_cycle(num_steps, **options)] * len(optimizer.param_groups)
    elif config.schedule == "reduce_lr_on_plateau":
        options.setdefault("mode", "min" if config.metric_for_best_model == "loss" else "max")
        min_rate = options.pop("min_lr", 0.0)
        factors = [
            _Plateau(config.warmup_steps, floor=min(1.0, min_rate / group["lr"]), **options)
            for group in optimizer.param_groups
        ]
    else:
        factors = _factors_of_transformers(optimizer, config, options, num_steps)
    return LambdaLR(optimizer, factors)


def after_validation(schedule: "LambdaLR", metric: float | None) -> None:
    """Report the `metric_for_best_model` of a validation to the schedule; only reduce_lr_on_plateau uses it.

    None, if there was nothing to measure, changes nothing.
    """
    factors = [factor for factor in schedule.lr_lambdas if isinstance(factor, _Plateau)]
    if metric is None or not factors:
        return
    for factor in factors:
        factor.observe(metric)
    set_peaks(schedule, schedule.base_lrs)


def set_peaks(schedule: "LambdaLR", peaks: "Sequence[float | torch.Tensor]") -> None:
    """Set the peak rate of each parameter group; the shape of the schedule and its place in it stay."""
    schedule.base_lrs = list(peaks)
    schedule._last_lr = []
    for group, peak, factor in zip(schedule.optimizer.param_groups, peaks, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * factor(schedule.last_epoch)
        schedule._last_lr.append(group["lr"])


def _factors_of_transformers(
    optimizer: "torch.optim.Optimizer", config: ResolvedTrainConfig, options: dict[str, Any], num_steps: int
) -> list[Callable[[int], float]]:
    """Return, per group, the factor of transformers' schedule as a function of the number of steps."""
    import torch
    from transformers import get_scheduler

    if config.schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not set(options) & _MIN_RATE:
        options["min_lr_rate"] = 0.05
    if config.schedule == "warmup_stable_decay":
        num_known = config.warmup_steps + options["num_decay_steps"]
        if "num_stable_steps" not in options and num_known > num_steps:
            raise UserError(
                f"--schedule-options: warm-up and decay take {num_known} steps, but the run has only {num_steps}; "
                "lower num_decay_steps or --warmup-steps"
            )
    # A dummy optimizer, because the constructor of a schedule sets the rates of its optimizer.
    groups = [{"params": [torch.zeros(1)], "lr": group["lr"]} for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of stable steps, which is given on purpose
        schedule: Any = get_scheduler(
            config.schedule,
            torch.optim.SGD(groups, lr=config.learning_rate),
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=options,
        )
    if config.schedule in ("inverse_sqrt", "constant_with_warmup"):  # They have no last step.
        return list(schedule.lr_lambdas)
    # This schedule counts its steps from 1.
    last = num_steps - 1 if config.schedule == "cosine_warmup_with_min_lr" else num_steps
    return [_held_from(factor, last) for factor in schedule.lr_lambdas]


def _held_from(factor: Callable[[int], float], last: int) -> Callable[[int], float]:
    """Hold the value of the last step from then on; a cosine would rise again."""
    return lambda step: factor(min(step, last))


def _one_cycle(
    num_steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: str = "cos",
) -> Callable[[int], float]:
    """Rise from 1/div_factor to 1 over `pct_start` of the steps, then fall to 1/(div_factor · final_div_factor)."""
    lowest_first, lowest_last = 1 / div_factor, 1 / (div_factor * final_div_factor)
    top, last = pct_start * num_steps - 1, num_steps - 1

    def between(start: float, end: float, part: float) -> float:
        shape = (1 - math.cos(math.pi * part)) / 2 if anneal_strategy == "cos" else part
        return start + (end - start) * shape

    def factor(step: int) -> float:
        if step <= top:
            return between(lowest_first, 1.0, step / top if top else 1.0)
        return between(1.0, lowest_last, (min(step, last) - top) / (last - top))

    return factor


class _Plateau:
    """A factor that falls when a metric stops improving. Its attributes are saved in checkpoints."""

    def __init__(
        self,
        warmup_steps: int,
        *,
        floor: float,
        mode: str,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
    ) -> None:
        self.warmup_steps, self.floor, self.sign = warmup_steps, floor, 1.0 if mode == "max" else -1.0
        self.factor, self.patience, self.cooldown = factor, patience, cooldown
        self.threshold, self.is_relative = threshold, threshold_mode == "rel"
        self.scale, self.best = 1.0, -math.inf
        self.num_bad = self.num_cooling = 0

    def __call__(self, step: int) -> float:
        return self.scale * min(1.0, step / max(1, self.warmup_steps)) if step < self.warmup_steps else self.scale

    def observe(self, metric: float) -> None:
        """Record the metric of a validation and lower the factor if it has stopped improving."""
        value = self.sign * metric
        margin = self.threshold * (abs(self.best) if self.is_relative and math.isfinite(self.best) else 1.0)
        if value > self.best + margin:
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1
        if self.num_cooling > 0:
            self.num_cooling, self.num_bad = self.num_cooling - 1, 0
        if self.num_bad > self.patience:
            self.scale = max(self.scale * self.factor, self.floor)
            self.num_cooling, self.num_bad = self.cooldown, 0
