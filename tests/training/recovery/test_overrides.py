"""Settings that change in mid-run: checked, in force from their step on, and kept."""

import json
from typing import Any

import pytest

from raydet.common.errors import UserError
from raydet.config import ResolvedTrainConfig, TrainConfig, identity
from raydet.config.options import load
from raydet.tables.output_folder import RunRecord
from raydet.training.recovery.overrides import (
    Override,
    extended,
    given_settings,
    latest_settings,
    overrides_of,
    overrides_to_json,
    settings_at,
    with_latest,
)


def _config(**changes: Any) -> ResolvedTrainConfig:
    return ResolvedTrainConfig(train_data="t", val_data="v", out="o", learning_rate=1e-3, **changes)


@pytest.mark.parametrize(
    "words",
    [
        ["--override", "learning_rate=1e-4", "precision=bf16"],
        ["--override", "learning-rate=1e-4", "--epochs", "50", "--override=precision=bf16"],
        ["--override", "{learning_rate: 1e-4, precision: bf16}"],
    ],
)
def test_an_override_is_written_as_pairs_or_as_a_mapping(words: list[str]) -> None:
    config = load(TrainConfig, ["--train-data", "t", "--val-data", "v", "--out", "o", *words])
    assert given_settings(config.override) == {"learning_rate": 1e-4, "precision": "bf16"}
    assert identity(config) == identity(TrainConfig(train_data="t", val_data="v", out="o"))


def test_a_pipeline_is_an_override_too() -> None:
    pipeline = [{"HorizontalFlip": {"p": 0.5}}]
    assert given_settings({"augmentation": "[{HorizontalFlip: {p: 0.5}}]"}) == {"augmentation": pipeline}
    with pytest.raises(UserError, match="Nope"):
        given_settings({"augmentation": [{"Nope": {}}]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"batch_size": 4}, r"--override changes learning_rate, .* or augmentation, not batch_size"),
        ({"learning_rate": "fast"}, r"--override: --learning-rate must be a number; got fast"),
        ({"learning_rate": 0}, r"--override: --learning-rate must be above 0"),
        ({"max_grad_norm": float("inf")}, r"--override: --max-grad-norm must be a"),
        ({"precision": "fp8"}, r"--override: --precision must be one of fp32, bf16, fp16; got fp8"),
        ({"augmentation": "stronk"}, r"--override: --augmentation must be one of none"),
        ({"backbone_learning_rate": None}, r"--override: backbone_learning_rate must have a value"),
    ],
)
def test_a_wrong_override_is_one_line(override: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        given_settings(override)
    assert "\n" not in str(error.value)


def test_each_step_has_the_settings_in_force() -> None:
    config = _config()
    first = extended(config, (), {"learning_rate": 1e-4}, (1, 2))
    both = extended(config, first, {"precision": "bf16", "learning_rate": 1e-5}, (3, 0))
    rates = [settings_at(config, both, *place).learning_rate for place in ((1, 1), (1, 2), (2, 9), (3, 0))]
    assert rates == [1e-3, 1e-4, 1e-4, 1e-5]
    assert settings_at(config, both, 2, 9).precision == "fp32"
    assert latest_settings(config, both) == settings_at(config, both, 9, 0)
    # The command may repeat the override or leave it out.
    assert extended(config, both, {}, (4, 0)) == extended(config, both, {"precision": "bf16"}, (4, 0)) == both
    shown = with_latest(config, both)
    assert shown.override == {"learning_rate": 1e-5, "precision": "bf16"} and identity(shown) == identity(config)
    assert extended(shown, both, given_settings(shown.override), (4, 0)) == both


def test_an_override_that_never_took_a_step_is_replaced() -> None:
    config = _config()
    overrides = extended(config, (), {"learning_rate": 1e-4, "precision": "bf16"}, (2, 0))
    # The states since have been discarded: the run repeats the steps from (1, 0) with all that was to hold.
    assert extended(config, overrides, {"learning_rate": 1e-5}, (1, 0)) == (
        Override(1, 0, {"learning_rate": 1e-5, "precision": "bf16"}),
    )


def test_the_rate_of_the_backbone_follows_unless_it_is_given() -> None:
    assert extended(_config(), (), {"learning_rate": 1e-4}, (0, 0))[0].settings == {"learning_rate": 1e-4}
    config = _config(backbone_learning_rate=5e-4)
    (override,) = extended(config, (), {"learning_rate": 1e-4}, (0, 0))
    assert override.settings == pytest.approx({"learning_rate": 1e-4, "backbone_learning_rate": 5e-5})
    (override,) = extended(config, (), {"learning_rate": 1e-4, "backbone_learning_rate": 1e-6}, (0, 0))
    assert override.settings == {"learning_rate": 1e-4, "backbone_learning_rate": 1e-6}


def test_the_record_of_the_same_run_holds_them() -> None:
    config = _config()
    overrides = extended(config, (), {"learning_rate": 1e-4}, (1, 2))
    plan = json.loads(json.dumps({"overrides": overrides_to_json(overrides)}))
    record = RunRecord(command="train", identity=identity(config), plan=plan)
    assert overrides_of(record, config) == overrides
    assert overrides_of(record, _config(batch_size=3)) == overrides_of(None, config) == ()
    for damaged in ([{"epoch": 1}], [{"epoch": 1, "step": 0, "settings": {"seed": 1}}], 7):
        with pytest.raises(UserError, match="damaged"):
            overrides_of(RunRecord(command="train", identity=identity(config), plan={"overrides": damaged}), config)
