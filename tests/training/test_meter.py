"""The sums over an epoch: saved and restored, and merged over workers."""

import json

import pytest
import torch

from raydet.training.meter import EpochMeter, epoch_record, merge_states
from raydet.training.recovery.skipping import SkippedStep

CPU = torch.device("cpu")


def _meter(*losses: float, data_s: float = 0.0) -> EpochMeter:
    meter = EpochMeter()
    for value in losses:
        meter.add_losses({"loss_bbox": torch.tensor(value), "loss_giou": torch.tensor(2 * value)})
        meter.num_steps += 1
        meter.num_images += 4
        meter.seconds += 0.5
        meter.data_s += data_s
    return meter


def test_a_meter_survives_json_to_the_last_bit() -> None:
    meter = _meter(0.1, 0.7, 1e-9)
    meter.unreadable = {7, 3}
    again = EpochMeter.from_state(json.loads(json.dumps(meter.to_state())), CPU)
    again.add_losses({"loss_bbox": torch.tensor(0.3)})
    meter.add_losses({"loss_bbox": torch.tensor(0.3)})
    assert again.to_state() == meter.to_state()
    assert again.unreadable == {3, 7}


def test_skipped_steps_count_but_have_no_part_in_the_means() -> None:
    meter = _meter(1.0, 3.0)
    for number in range(12):
        meter.add_losses({"loss_bbox": torch.tensor(torch.nan)}, unless_skipped=torch.tensor(False))
        meter.num_steps += 1
        meter.add_skipped(SkippedStep(epoch=1, step=3 + number, images=[7], terms={"loss_bbox": None}))
    meter = EpochMeter.from_state(json.loads(json.dumps(meter.to_state())), CPU)
    record = epoch_record(merge_states([meter.to_state()]), epoch=1, learning_rate=1e-3)
    assert record.losses == {"loss_bbox": 2.0, "loss_giou": 4.0}
    assert record.num_skipped_steps == 12 and [step.step for step in record.skipped] == list(range(5, 15))


def test_workers_losses_add_up_also_when_one_lacks_a_term() -> None:
    first, second = _meter(1.0, 2.0, data_s=0.1), _meter(3.0, 4.0)
    second.add_losses({"loss_vfl_dn_0": torch.tensor(1.0)})
    first.unreadable, second.unreadable = {1}, {1, 2}
    record = epoch_record(merge_states([first.to_state(), second.to_state()]), epoch=1, learning_rate=1e-3)
    assert record.losses == pytest.approx({"loss_bbox": 5.0, "loss_giou": 10.0, "loss_vfl_dn_0": 0.5})
    assert record.loss == pytest.approx(15.5)
    assert record.images_per_s == pytest.approx(16 / 1.0)
    assert record.num_unreadable == 2
    assert record.step_s == pytest.approx({"data": 0.1, "compute": 0.4, "communication": 0.0})
