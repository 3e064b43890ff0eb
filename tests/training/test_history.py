"""Which epoch is the best, and when a run has got no better for too long."""

from typing import Any

from raydet.training.history import best_entry, is_best_so_far, is_out_of_patience, metric_value


def _history(*values: float | None, name: str = "AP") -> list[dict[str, Any]]:
    return [{"epoch": number + 1, "loss": 9.0 - number, name: value} for number, value in enumerate(values)]


def test_metrics_by_name() -> None:
    entry = {"loss": 2.5, "AP": 0.25, "AP75": None, "AP_by_class": {"cat": 0.5, "dog": None}}
    assert metric_value(entry, "AP") == 0.25 and metric_value(entry, "AP75") is None
    assert metric_value(entry, "AP:cat") == 0.5 and metric_value(entry, "AP:dog") is None
    assert metric_value(entry, "loss") == -2.5
    assert metric_value({"loss": 1.0}, "AP:cat") is None


def test_the_best_is_the_newest_of_the_highest() -> None:
    history = _history(0.1, 0.5, None, 0.5, 0.4)
    best = best_entry(history, "AP")
    assert best is not None and best["epoch"] == 4
    assert [is_best_so_far(history[:n], "AP") for n in range(1, 6)] == [True, True, False, True, False]
    lowest_loss = best_entry(history, "loss")
    assert lowest_loss is not None and lowest_loss["epoch"] == 5
    assert best_entry([], "AP") is None


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
