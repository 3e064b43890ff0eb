"""The words of a snapshot."""

import pytest

from raydet.common.display.progress import Snapshot
from raydet.common.display.rendering import clock_text, end_line, plain_line, rate_text


def _snapshot(**changes: object) -> Snapshot:
    values = {"task": "scoring", "completed": 0, "total": None, "unit": "images", "elapsed_s": 5.0}
    return Snapshot(**{**values, "rate_per_s": None, "eta_s": None, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (72, "0:01:12"), (3723, "1:02:03"), (90061, "1 d 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_a_plain_line_says_what_is_known() -> None:
    assert plain_line(_snapshot(total=3)) == "scoring: 0/3 images"
    assert plain_line(_snapshot(waiting_for="loading the model")) == "scoring: 0:00:05, loading the model"
    assert plain_line(_snapshot(completed=1200)) == "scoring: 1,200 images, 0:00:05"
    line = plain_line(
        _snapshot(
            task="epoch 3/10",
            completed=1920,
            total=4800,
            rate_per_s=31.42,
            eta_s=91.6,
            run_eta_s=2000.0,
            waiting_for="waiting for images 34% of the time",
            values={"loss": 3.2141, "best_AP": 0.2312, "device_memory_mb": 11469.0, "best_trial": "trial-0003"},
        )
    )
    assert line == (
        "epoch 3/10: 1,920/4,800 images (40%), 31.4 images/s, 0:01:32 left, run 0:33:20 left, "
        "waiting for images 34% of the time, loss 3.214, best AP 0.231, GPU memory 11.2 GB, best trial trial-0003"
    )


def test_rates_of_fast_and_slow_units() -> None:
    assert rate_text(_snapshot(rate_per_s=1234.5)) == "1,234 images/s"
    assert rate_text(_snapshot(rate_per_s=0.01, unit="trials")) == "100 s each"
    assert rate_text(_snapshot(rate_per_s=0.0)) == ""


def test_the_line_of_a_task_that_ended() -> None:
    assert end_line(_snapshot(completed=1000, elapsed_s=10.0)) == "scoring: 1,000 images in 0:00:10, 100.0 images/s"
    assert end_line(_snapshot(elapsed_s=10.0)) == "scoring: 0:00:10"
