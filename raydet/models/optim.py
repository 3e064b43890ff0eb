"""Parameter groups, learning-rate schedules and the moving average of the weights.

torch is imported where it is needed, so that the driver can check a schedule without it.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from raydet.common.errors import UserError
from raydet.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler

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
"""What `schedule_options` may hold for each schedule; the names are those of transformers and torch."""
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
_NO_WARMUP = {
    "constant": "constant has no warm-up; take constant_with_warmup",
    "one_cycle": "one_cycle has its own warm-up, pct_start in --schedule-options; leave out --warmup-steps",
}


def check_schedule(config: TrainConfig) -> None:
    """Makes sure that the schedule can be built from its options, without importing torch.

    Raises:
        UserError: An option is unknown to the schedule, missing, or of a value that cannot be.
    """
    name, options = config.schedule, config.schedule_options or {}
    unknown = sorted(set(options) - _OPTIONS[name])
    if unknown:
        known = ", ".join(sorted(_OPTIONS[name])) or "none at all"
        raise UserError(f"--schedule-options: {name} does not know {', '.join(unknown)}; it takes {known}")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        raise UserError("--schedule-options: warmup_stable_decay needs num_decay_steps, such as {num_decay_steps: 500}")
    if set(options) >= _MIN_RATE:
        raise UserError(f"--schedule-options: {name} takes min_lr or min_lr_rate, not both")
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
    if config.warmup_steps and name in _NO_WARMUP:
        raise UserError(f"--warmup-steps is {config.warmup_steps}, but {_NO_WARMUP[name]}")


def parameter_groups(model: "nn.Module", config: TrainConfig, backbone_names: Iterable[str]) -> list[dict[str, object]]:
    """Splits the trainable parameters by learning rate (backbone or not) and by weight decay.

    Biases and the weights of norms, which have one dimension, are not decayed.

    Args:
        model: The detector's model.
        config: Rates and decay.
        backbone_names: Names of the backbone's parameters.
    """
    backbone = set(backbone_names)
    backbone_rate = config.backbone_learning_rate
    rates = {True: config.learning_rate / 10 if backbone_rate is None else backbone_rate, False: config.learning_rate}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in backbone, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "name": f"{'backbone' if in_backbone else 'head'}{'' if decayed else '_no_decay'}",
            "params": parameters,
            "lr": rates[in_backbone],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in sorted(groups.items())
    ]


def build_optimizer(model: "nn.Module", config: TrainConfig, backbone_names: Iterable[str]) -> "torch.optim.AdamW":
    """AdamW over `parameter_groups`."""
    from torch.optim import AdamW

    return AdamW(parameter_groups(model, config, backbone_names), lr=config.learning_rate, fused=True)


def build_schedule(optimizer: "torch.optim.Optimizer", config: TrainConfig, steps_per_epoch: int) -> "LRScheduler":
    """The schedule of the run, to be stepped after each optimizer step and told of each validation.

    Each is `transformers.get_scheduler`'s of that name but two: one_cycle has the rates of torch's `OneCycleLR`
    (AdamW's betas stay as they are), and reduce_lr_on_plateau those of torch's `ReduceLROnPlateau` with a linear
    warm-up before. Steps beyond the number that a schedule is laid out for keep its last rate.

    Args:
        optimizer: Its groups hold their peak rates.
        config: Names the schedule; checked by `check_schedule`.
        steps_per_epoch: Optimizer steps of an epoch.
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


def after_validation(schedule: "LRScheduler", metric: float | None) -> None:
    """Tells the schedule what a validation came to; only reduce_lr_on_plateau listens.

    Args:
        schedule: Of `build_schedule`.
        metric: The value of `metric_for_best_model`; null, where there was nothing to measure, changes nothing.
    """
    factors = getattr(schedule, "lr_lambdas", [])
    if metric is None or not factors or not isinstance(factors[0], _Plateau):
        return
    rates = []
    for group, base_rate, factor in zip(schedule.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
        factor.observe(metric)
        group["lr"] = base_rate * factor(schedule.last_epoch)
        rates.append(group["lr"])
    schedule._last_lr = rates


def _factors_of_transformers(
    optimizer: "torch.optim.Optimizer", config: TrainConfig, options: dict[str, Any], num_steps: int
) -> list[Callable[[int], float]]:
    """What transformers' schedule multiplies each group's rate with, by the number of steps taken."""
    import torch
    from transformers import get_scheduler

    if config.schedule in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not set(options) & _MIN_RATE:
        options["min_lr_rate"] = 0.05
    if config.schedule == "warmup_stable_decay":
        num_known = config.warmup_steps + options["num_decay_steps"]
        if "num_stable_steps" not in options and num_known > num_steps:
            raise UserError(
                f"--schedule-options: warm-up and decay are {num_known} steps, the run has only {num_steps}; lower "
                "num_decay_steps or --warmup-steps"
            )
    # A stand-in, since a schedule sets the rates of its optimizer as soon as it is made.
    groups = [{"params": [torch.zeros(1)], "lr": group["lr"]} for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a number of stable steps that is given on purpose
        schedule: Any = get_scheduler(
            config.schedule,
            torch.optim.SGD(groups, lr=config.learning_rate),
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=options,
        )
    if config.schedule in ("inverse_sqrt", "constant_with_warmup"):  # they have no end
        return list(schedule.lr_lambdas)
    # This one's steps are counted from 1.
    last = num_steps - 1 if config.schedule == "cosine_warmup_with_min_lr" else num_steps
    return [_held_from(factor, last) for factor in schedule.lr_lambdas]


def _held_from(factor: Callable[[int], float], last: int) -> Callable[[int], float]:
    """Keeps the value of the last step from there on: a cosine would rise again."""
    return lambda step: factor(min(step, last))


def _one_cycle(
    num_steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: str = "cos",
) -> Callable[[int], float]:
    """From 1/div_factor up to 1 within a part of the steps, then down to 1/(div_factor · final_div_factor)."""
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
    """A factor that falls when a metric has stopped getting better; its attributes go into checkpoints."""

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
        """Takes in the metric of a validation."""
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


class MovingAverage:
    """Exponential moving average of a model's weights and buffers.

    The decay rises from 0 to its full value, as decay · (1 − exp(−updates / rise_steps)), so that the average does
    not remember the random start. Whole numbers, such as the counts of batch norms, are copied.
    """

    def __init__(self, model: "nn.Module", decay: float, *, rise_steps: float = 300.0) -> None:
        self.decay, self.rise_steps, self.num_updates = decay, rise_steps, 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: "nn.Module") -> None:
        """Takes in the weights after an optimizer step."""
        import torch

        self.num_updates += 1
        decay = self.decay * (1.0 - math.exp(-self.num_updates / self.rise_steps))
        averaged: tuple[list[Tensor], list[Tensor]] = [], []
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        for name, value in model.state_dict().items():
            shadows, values = averaged if value.is_floating_point() else copied
            shadows.append(self.shadow[name])
            values.append(value)
        with torch.no_grad():
            torch._foreach_lerp_(*averaged, 1.0 - decay)
            if copied[0]:
                torch._foreach_copy_(*copied)

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"shadow": self.shadow, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on from a saved state."""
        shadow, num_updates = state["shadow"], state["num_updates"]
        assert isinstance(shadow, dict) and isinstance(num_updates, int)
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.num_updates = num_updates
