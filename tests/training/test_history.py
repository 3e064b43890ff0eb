"""Epoch records, the best epoch, and early stopping."""

import json
import math
from typing import Any

import pytest

from raydet.training.history import (
    EpochRecord,
    History,
    ValidationRecord,
    best_epoch,
    is_best_so_far,
    is_out_of_patience,
)


def _history(*values: float | None) -> list[EpochRecord]:
    return [
        EpochRecord(epoch=number + 1, loss=9.0, validation=ValidationRecord(numbers={"AP": value}, loss=9.0 - number))
        for number, value in enumerate(values)
    ]


def test_metrics_by_name() -> None:
    by_class = {"cat": 0.5, "dog": None}
    validation = ValidationRecord(numbers={"AP": 0.25, "AP75": None}, ap_by_class=by_class, loss=1.25)
    record = EpochRecord(epoch=1, loss=2.5, validation=validation)
    assert record.value("AP") == record.score("AP") == 0.25 and record.value("AP75") is None
    assert record.value("AP:cat") == 0.5 and record.value("AP:dog") is None
    assert record.value("loss") == 1.25 and record.score("loss") == -1.25
    unvalidated = EpochRecord(epoch=1, loss=1.0)
    assert unvalidated.value("AP:cat") is unvalidated.value("loss") is unvalidated.score("loss") is None


def test_a_record_survives_json_and_only_what_was_measured_has_a_key() -> None:
    plain = EpochRecord(
        epoch=2, loss=1.5, losses={"loss_vfl": 1.5}, step_s={"data": 0.1}, ended="now", peak_memory_mb=9
    )
    validation = ValidationRecord(numbers={"AP": 0.25, "APs": None}, ap_by_class={"cat": None}, loss=0.5, seconds=3.0)
    validated = EpochRecord(**{**vars(plain), "validation": validation})
    for record in (plain, validated):
        assert EpochRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert "AP" not in plain.to_json() and "peak_device_memory_mb" not in plain.to_json()
    content = validated.to_json()
    assert content["AP"] == 0.25 and content["APs"] is None and content["AP_by_class"] == {"cat": None}
    assert content["validation_loss"] == 0.5 and content["loss"] == 1.5
    assert content["validation_unreadable"] == 0 and content["validation_s"] == 3.0


@pytest.mark.parametrize("content", [3, {}, {"epoch": "x", "loss": 1.0}, {"epoch": 1, "loss": 1.0, "AP": "high"}])
def test_something_else_is_no_record(content: Any) -> None:
    with pytest.raises(ValueError, match=r"epoch|AP"):
        EpochRecord.from_json(content)


def test_the_best_is_the_newest_of_the_highest() -> None:
    history = _history(0.1, 0.5, None, 0.5, 0.4)
    best = best_epoch(history, "AP")
    assert best is not None and best.epoch == 4
    assert [is_best_so_far(history[:n], "AP") for n in range(1, 6)] == [True, True, False, True, False]
    lowest_loss = best_epoch(history, "loss")
    assert lowest_loss is not None and lowest_loss.epoch == 5
    assert best_epoch([], "AP") is None


def test_without_any_number_the_newest_is_as_good_as_any() -> None:
    history = _history(None, None)
    assert is_best_so_far(history, "AP")


def test_patience_counts_measured_epochs_without_a_better_one() -> None:
    history = _history(0.1, 0.5, None, 0.5, None, 0.4)
    assert not is_out_of_patience(history, "AP", None)
    assert is_out_of_patience(history, "AP", 2)
    assert not is_out_of_patience(history, "AP", 3)
    assert not is_out_of_patience(history[:4], "AP", 2)
    assert not is_out_of_patience([], "AP", 1)


def test_a_history_is_a_table_and_a_figure() -> None:
    validation = ValidationRecord(numbers={"AP": 0.25, "APs": None}, ap_by_class={"<b>": 0.5}, loss=0.75)
    first = EpochRecord(epoch=1, loss=math.nan, losses={"loss_vfl": 1.5}, images_per_s=20.0)
    history = History([first, EpochRecord(epoch=2, loss=1.25, validation=validation)])
    rows = history.to_arrow().to_pylist()
    assert [row["epoch"] for row in rows] == [1, 2] and [row["loss"] for row in rows] == [None, 1.25]
    assert [row["AP"] for row in rows] == [None, 0.25] and [row["APs"] for row in rows] == [None, None]
    assert [row["AP:<b>"] for row in rows] == [None, 0.5] and rows[0]["loss:loss_vfl"] == 1.5
    assert history.to_pandas()["AP"].tolist()[1] == 0.25
    curves = {trace.name: (trace.x, trace.y) for trace in history.plot().data}
    assert curves == {"loss": ((2,), (1.25,)), "validation loss": ((2,), (0.75,)), "AP": ((2,), (0.25,))}
    assert "<td>0.25</td>" in history._repr_html_() and "2 epochs" in history._repr_html_()
    assert History().to_arrow().num_rows == 0 and not History().plot().data and "0 epochs" in History()._repr_html_()
