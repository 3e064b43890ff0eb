"""Overrides: settings of a run that change from a step on, and are part of the run's identity from then on.

The run's record, OUT/.run.json, holds them in the order of their steps, so that every restart applies each from the
same step on, whatever state it resumes from. This module imports neither torch nor Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from raydet.common.errors import UserError
from raydet.config import OVERRIDABLE, ResolvedTrainConfig, TrainConfig, identity
from raydet.config.options import build
from raydet.tables.output_folder import RunRecord, token_of_run

_Config = TypeVar("_Config", bound=ResolvedTrainConfig)
_RATES = ("learning_rate", "backbone_learning_rate")


@dataclass(frozen=True)
class Override:
    """Settings from a step on.

    Attributes:
        epoch: Epoch of the first step, from 0.
        step: The first step within the epoch, from 0; may be one past the last step of the epoch.
        settings: Values of `TrainConfig` by name.
    """

    epoch: int
    step: int
    settings: dict[str, Any]

    @property
    def start(self) -> tuple[int, int]:
        """Epoch and step, which order overrides."""
        return self.epoch, self.step

    def line(self) -> str:
        """Describe the override for the user."""
        values = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"override from step {self.step + 1} of epoch {self.epoch + 1}: {values}"


def given_settings(override: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the settings of `--override`, and convert text to their types.

    Raises:
        UserError: A setting is unknown, cannot be overridden, or has a wrong value.
    """
    settings = _typed(override) if override else {}
    if isinstance(settings.get("augmentation"), list):
        from raydet.augmentation.transforms import check_augmentation  # imports albumentations

        check_augmentation(settings["augmentation"])
    return settings


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in OVERRIDABLE:
            raise UserError(f"--override changes {', '.join(OVERRIDABLE[:-1])} or {OVERRIDABLE[-1]}, not {name}")
    try:
        tables = {"train_data": "t", "val_data": "v", "out": "o"}
        config = build(TrainConfig, {**tables, **given}, program="raydet train")
    except UserError as error:
        raise UserError(f"--override: {error}") from None
    settings = {name: getattr(config, name) for name in given}
    for name, value in settings.items():
        if value is None:
            raise UserError(f"--override: {name} must have a value")
    return settings


def settings_at(config: _Config, overrides: Sequence[Override], epoch: int, step: int) -> _Config:
    """Return the config that holds for a step.

    Args:
        config: Configuration with which the run began.
        overrides: All overrides of the run, in the order of their steps.
        epoch: Epoch, from 0.
        step: Step within the epoch, from 0.
    """
    return replace(config, **_merged([one for one in overrides if one.start <= (epoch, step)]))


def latest_settings(config: _Config, overrides: Sequence[Override]) -> _Config:
    """Return the config that holds from the latest override on."""
    return replace(config, **_merged(overrides))


def with_latest(config: _Config, overrides: Sequence[Override]) -> _Config:
    """Return the config of the run's beginning whose `override` gives the latest settings, for `config.yaml`."""
    return replace(config, override=_merged(overrides) or None)


def extended(
    config: ResolvedTrainConfig, overrides: Sequence[Override], given: Mapping[str, Any], start: tuple[int, int]
) -> tuple[Override, ...]:
    """Add settings that hold from a step on; settings that hold already add nothing.

    A learning rate takes the backbone's along, by the same factor, unless that is given too.

    Args:
        config: Configuration with which the run began.
        overrides: Overrides so far. Those that would begin later than the new one begin with it, because the steps in
            between are repeated.
        given: Result of `given_settings`.
        start: Epoch and step, both from 0, of the state from which the run resumes.
    """
    now = latest_settings(config, overrides)
    changes = {name: value for name, value in given.items() if getattr(now, name) != value}
    if not changes:
        return tuple(overrides)
    rate, backbone_rate = (getattr(now, name) for name in _RATES)
    if _RATES[0] in changes and _RATES[1] not in given and backbone_rate is not None:
        changes[_RATES[1]] = backbone_rate * changes[_RATES[0]] / rate
    earlier = [one for one in overrides if one.start < start]
    return *earlier, Override(*start, {**_merged(overrides[len(earlier) :]), **changes})


def changed_rate(rate: float, group_name: str, config: ResolvedTrainConfig, settings: ResolvedTrainConfig) -> float:
    """Return the learning rate of a parameter group under other settings.

    Args:
        rate: Its rate under `config`; it may be a multiple of the head's or the backbone's.
        group_name: Its name, which begins with `backbone` for groups of the backbone.
        config: Configuration with which the run began.
        settings: Configuration that holds now.
    """
    before, now = (_rate_of(group_name, one) for one in (config, settings))
    return rate / before * now


def _rate_of(group_name: str, config: ResolvedTrainConfig) -> float:
    return config.backbone_rate if group_name.startswith("backbone") else config.learning_rate


def overrides_of(record: RunRecord | None, config: TrainConfig) -> tuple[Override, ...]:
    """Return the overrides of the run in a folder; none if the record is that of a run with another identity.

    Raises:
        UserError: The record is damaged.
    """
    if record is None or token_of_run(record.identity) != token_of_run(identity(config)):
        return ()
    try:
        return overrides_from_json(record.plan.get("overrides", []))
    except ValueError as error:
        raise UserError(f"the run record of --out {config.out} is damaged: {error}; choose another --out") from None


def overrides_from_json(contents: Any) -> tuple[Override, ...]:
    """Read the result of `overrides_to_json`.

    Raises:
        ValueError: The content is not a list of overrides.
    """
    try:
        return tuple(Override(int(one["epoch"]), int(one["step"]), _typed(one["settings"])) for one in contents)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise ValueError(f"it does not hold the overrides of a run: {error}") from None


def overrides_to_json(overrides: Sequence[Override]) -> list[dict[str, Any]]:
    """Return overrides as JSON values."""
    return [asdict(one) for one in overrides]


def _merged(overrides: Sequence[Override]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for one in overrides:
        merged |= one.settings
    return merged
