"""Skipped steps: what is reported of them, and the line that ends a run."""

import json
import math
import re

import pytest

from raydet.config import ResolvedTrainConfig
from raydet.training.history import EpochRecord
from raydet.training.recovery.overrides import Override, given_settings
from raydet.training.recovery.skipping import SkippedStep, SkipWatch, end_of_run, skipped_step

RANKS = [({"loss_a": 1.5, "loss_b": 0.5}, [3, 4]), ({"loss_a": 1.0, "loss_b": 0.25}, [5])]


def test_a_gradient_that_is_not_finite_is_reported_with_all_images() -> None:
    step = skipped_step(2, 7, RANKS, loss_scale=None)
    assert step.terms == {"loss_a": 2.5, "loss_b": 0.75} and step.images == [3, 4, 5] and step.counts
    assert step.line() == "skipped step 7 of epoch 2: the gradient is not finite, the loss is 3.25; images 3, 4, 5"


def test_a_loss_that_is_not_finite_is_reported_with_its_terms_and_the_images_of_its_workers() -> None:
    step = skipped_step(1, 1, [RANKS[0], ({"loss_a": math.nan, "loss_b": math.inf}, [5])], loss_scale=None)
    assert step.images == [5] and step.bad_terms == ["loss_a", "loss_b"] and step.counts
    assert step.line() == "skipped step 1 of epoch 1: the loss is not finite (loss_a, loss_b); images 5"
    many = skipped_step(1, 1, [({"loss": math.nan}, list(range(500)))], loss_scale=None)
    assert "10, 11 and 488 more" in many.line()


@pytest.mark.parametrize(("scale", "counts"), [(2.0**15, False), (1.0, False), (0.5, True)])
def test_in_fp16_a_step_counts_once_the_scale_cannot_explain_it(scale: float, counts: bool) -> None:
    assert skipped_step(1, 1, RANKS, loss_scale=scale).counts is counts
    assert skipped_step(1, 1, [({"loss": math.nan}, [1])], loss_scale=scale).counts


def test_five_in_a_row_end_a_run() -> None:
    watch, bad = SkipWatch(), skipped_step(1, 1, RANKS, loss_scale=None)
    for step in (bad, bad, bad, bad, None, bad, bad, skipped_step(1, 1, RANKS, loss_scale=2.0), bad, bad):
        watch.add(step)
        assert not watch.is_stuck
    watch.add(bad)
    assert watch.is_stuck and len(watch.row) == 5


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"precision": "fp16"}, {"precision": "bf16"}),
        ({"learning_rate": 1e3}, {"learning_rate": 1e-4}),
        ({"learning_rate": 1e-4, "precision": "bf16"}, {"learning_rate": 1e-5}),
    ],
)
def test_the_line_that_ends_a_run_has_a_remedy(settings: dict[str, object], remedy: dict[str, object]) -> None:
    config = ResolvedTrainConfig(train_data="t", val_data="v", out="o", **settings)  # type: ignore[arg-type]
    line = end_of_run([skipped_step(1, 5, RANKS, loss_scale=None)], config)
    (override,) = re.findall(r"--override (\S+)", line)
    assert given_settings(dict([override.split("=")])) == remedy and "\n" not in line


def test_the_history_keeps_skipped_steps_and_overrides() -> None:
    record = EpochRecord(
        epoch=1,
        loss=1.0,
        num_skipped_steps=12,
        skipped=(SkippedStep(epoch=1, step=7, images=[3], terms={"a": None, "b": 1.5}, loss_scale=0.5),),
        overrides=(Override(0, 2, {"learning_rate": 1e-4}),),
    )
    again = EpochRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    for damaged in ({"skipped": [{"step": 1}]}, {"skipped": [7]}, {"overrides": [{"step": 1}]}):
        with pytest.raises(ValueError, match=r"skipped step|overrides"):
            EpochRecord.from_json({"epoch": 1, "loss": 1.0, **damaged})
