"""Runs with steps that go wrong: they go on, or end with one line whose remedy works in the same folder."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydet import TrainConfig, UserError, train
from raydet.common.errors import RunError
from raydet.config.options import load
from raydet.models.checkpoints import STATES_FOLDER
from raydet.models.loading import load_detector
from raydet.training.train import TrainResult
from tests.drivers import command_of, started, wait_for_progress
from tests.outcomes import RecordingConsole, assert_same_rows, outcome_of_training
from tests.poisoned import OverflowingTrainer, PoisonedTrainer
from tests.small_sets import tiny_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("ray_cluster")]


def _config(shapes: Path, out: Path, **changes: Any) -> TrainConfig:
    """Return the config of a run of 6 steps an epoch, at a constant rate."""
    options: dict[str, Any] = {
        "epochs": 3,
        "validate_batch_size": 4,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "ema_decay": 0.9,
        "save_every_steps": 2,
    }
    return TrainConfig(out=str(out), **tiny_training(shapes, **{**options, **changes}))


def _with_remedy(config: TrainConfig, error: pytest.ExceptionInfo[RunError]) -> TrainConfig:
    """Return the config of the same command with the remedy that a message gives."""
    (words,) = re.findall(r"run the same command with (--override \S+)", str(error.value))
    assert "\n" not in str(error.value)
    given = load(TrainConfig, ["--train-data", "t", "--val-data", "v", "--out", "o", *words.split()])
    return dataclasses.replace(config, override=given.override)


def _assert_sound(result: TrainResult, epochs: int = 3) -> None:
    assert [record.epoch for record in result.history] == list(range(1, epochs + 1))
    assert math.isfinite(result.history[-1].loss) and result.history[-1].value("AP") is not None
    state = load_detector(result.checkpoint).model.state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_poisoned_image_costs_one_step_an_epoch(shapes: Path, tmp_path: Path, num_workers: int) -> None:
    console = RecordingConsole()
    config = _config(shapes, tmp_path / "run", num_workers=num_workers)
    make_trainer = functools.partial(PoisonedTrainer, images=[5])
    result = train(config, console=console, make_trainer=make_trainer)
    _assert_sound(result)
    for record in result.history:
        assert math.isfinite(record.loss) and record.num_skipped_steps == 1
        (skipped,) = record.skipped
        assert 5 in skipped.images and len(skipped.images) == 4 // num_workers and "loss_giou" in skipped.bad_terms
        assert any(skipped.line() in line for line in console.lines)


def test_a_loss_scale_that_is_too_high_falls_until_steps_count(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "run", precision="fp16", epochs=8)
    result = train(config, make_trainer=functools.partial(OverflowingTrainer, always=False))
    _assert_sound(result, epochs=8)
    assert sum(record.num_skipped_steps for record in result.history) > 5
    assert result.history[-1].num_skipped_steps == 0


def test_after_five_overflows_in_fp16_another_precision_goes_on_from_there(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "run", precision="fp16", epochs=5)
    make_trainer = functools.partial(OverflowingTrainer, always=True)
    with pytest.raises(RunError, match=r"\d steps in a row were skipped.*gradient is not finite") as error:
        train(config, make_trainer=make_trainer)
    states = [path.name for path in Path(config.out, STATES_FOLDER).iterdir()]
    better = _with_remedy(config, error)
    assert better.override == {"precision": "bf16"} and states
    result = train(better, make_trainer=make_trainer)
    _assert_sound(result, epochs=5)
    overrides = [one for record in result.history for one in record.overrides]
    assert [one.settings for one in overrides] == [{"precision": "bf16"}]
    assert sum(record.num_skipped_steps for record in result.history) >= 16
    assert train(config).already_done


@pytest.mark.parametrize(("rate", "num_workers"), [(1e3, 1), (1e25, 1), (1e25, 2)])
def test_a_rate_that_ruins_the_weights_can_be_replaced(
    shapes: Path, tmp_path: Path, rate: float, num_workers: int
) -> None:
    changes = {"learning_rate": rate, "backbone_learning_rate": rate, "max_grad_norm": 1e9}
    config = _config(shapes, tmp_path / "run", num_workers=num_workers, **changes)
    try:
        result = train(config)
    except RunError as raised:
        error = raised
        assert re.search(
            r"\d steps in a row were skipped, up to step \d of epoch \d: the (loss|gradient) is not", str(error)
        )
    else:
        assert rate == 1e3
        _assert_sound(result)
        return
    (words,) = re.findall(r"run the same command with --override (\S+)", str(error))
    name, value = words.split("=")
    assert (name, float(value)) == ("learning_rate", 1e-4)
    better = dataclasses.replace(config, override={name: value})
    result = train(better)
    _assert_sound(result)
    assert all(record.num_skipped_steps == 0 for record in result.history)
    settings = result.history[0].overrides[0].settings
    assert settings == pytest.approx({"learning_rate": 1e-4, "backbone_learning_rate": 1e-4})


def test_a_good_state_survives_a_later_rate_that_ruins_the_weights(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "run", epochs=1)
    first = train(config)
    worse = dataclasses.replace(config, epochs=3, override={"learning_rate": 1e25, "max_grad_norm": 1e9})
    with pytest.raises(RunError, match="skipped") as error:
        train(worse)
    better = _with_remedy(worse, error)
    result = train(dataclasses.replace(better, override={**(better.override or {}), "max_grad_norm": 0.1}))
    _assert_sound(result)
    assert result.history[:1] == first.history
    assert [one.start for record in result.history for one in record.overrides] == [(1, 0)]


def test_an_override_holds_from_its_step_on_however_often_the_run_resumes(shapes: Path, tmp_path: Path) -> None:
    """Compare with a run that nothing interrupts, to the last bit, and resume from before the override too."""
    changed = {"learning_rate": 2e-4, "augmentation": "strong", "max_grad_norm": 1.0}

    def begun(name: str) -> TrainConfig:
        config = _config(shapes, tmp_path / name, keep_states=20)
        train(dataclasses.replace(config, epochs=1))
        # As if the run had stopped in mid-epoch.
        Path(config.out, STATES_FOLDER, "00001-0000000.pt").unlink()
        return config

    undisturbed = begun("undisturbed")
    console = RecordingConsole()
    result = train(dataclasses.replace(undisturbed, override=changed), console=console)
    assert any(line.startswith("override from step 5 of epoch 1: learning_rate 0.0002") for line in console.lines)
    assert [record.overrides[0].settings for record in result.history[:1]] == [changed]
    expected = outcome_of_training(result.out)

    config = begun("killed")
    command = command_of("train", dataclasses.replace(config, override=changed))
    with started(command, tmp_path / "output") as driver:
        state = Path(config.out, STATES_FOLDER, "00001-0000002.pt")
        wait_for_progress(state.exists, driver, tmp_path / "output")
    shown = yaml.safe_load(Path(config.out, "config.yaml").read_text())
    assert shown["learning_rate"] == 1e-3 and shown["override"] == changed
    assert_same_rows(outcome_of_training(train(config).out), expected)

    config = begun("older")
    train(dataclasses.replace(config, epochs=2, override=changed))
    for path in Path(config.out, STATES_FOLDER).iterdir():
        if path.name > "00000-0000002.pt":
            path.unlink()
    assert_same_rows(outcome_of_training(train(config).out), expected)
    with pytest.raises(UserError, match=r"--learning-rate: 0\.001 → 0\.0002.*--override"):
        train(dataclasses.replace(config, epochs=4, learning_rate=2e-4))
    record = json.loads(Path(config.out, ".run.json").read_text())
    assert record["plan"]["overrides"] == [{"epoch": 0, "step": 4, "settings": changed}]
