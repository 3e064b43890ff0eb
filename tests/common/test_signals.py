"""SIGTERM ends what is at work, in one line."""

import contextlib
import os
import signal
import threading

import pytest

from raydet.common.errors import RunStopped
from raydet.common.signals import ending_on_sigterm


def _work(steps: list[str]) -> None:
    with ending_on_sigterm():
        try:
            with contextlib.suppress(Exception):  # as code does that makes up for failures
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
        finally:
            steps.append("cleaned up")
        steps.append("went on")


def test_what_is_inside_is_unwound_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    steps: list[str] = []
    with ending_on_sigterm():
        within = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RunStopped, match="run stopped") as stopped:  # of the innermost alone
            _work(steps)
        assert signal.getsignal(signal.SIGTERM) == within
    assert stopped.value.exit_code == 143
    assert steps == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_stays_what_it_is() -> None:
    with pytest.raises(KeyboardInterrupt), ending_on_sigterm():
        raise KeyboardInterrupt


def test_another_thread_changes_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with ending_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
