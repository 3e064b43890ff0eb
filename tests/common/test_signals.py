"""Stop requests by signal."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from raydet.common.errors import RunStopped
from raydet.common.signals import INTERRUPTED, ending_on_second_ctrl_c, ending_on_sigterm, noting_stop_requests


def _work(steps: list[str]) -> None:
    with ending_on_sigterm():
        try:
            with contextlib.suppress(Exception):  # like code that tolerates failures
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
        finally:
            steps.append("cleaned up")
        steps.append("continued")


def test_what_is_inside_is_unwound_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    steps: list[str] = []
    with ending_on_sigterm():
        within = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RunStopped, match="stopped") as stopped:  # raised by the inner block only
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


def test_an_interrupt_that_python_drops_comes_again() -> None:
    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def work() -> None:
        with ending_on_sigterm():
            Dropping()
            time.sleep(5)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_request_to_stop_is_noted_and_the_second_acts_as_before(number: int, exit_code: int) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with noting_stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.to_error("stopped").exit_code == exit_code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_noted_request_leaves_the_handlers_as_they_were() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with noting_stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
    assert {each: signal.getsignal(each) for each in before} == before


_CLEANING_UP_FOR_EVER = """
import os, signal, sys
from raydet.common.signals import ending_on_second_ctrl_c, ending_on_sigterm, noting_stop_requests
with ending_on_second_ctrl_c(), ending_on_sigterm(), {more}:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        {then}
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            signal.pause()
"""


@pytest.mark.parametrize(("more", "then"), [("open(os.devnull)", "signal.pause()"), ("noting_stop_requests()", "pass")])
def test_the_second_ctrl_c_ends_a_command_at_once_with_one_line(more: str, then: str) -> None:
    script = _CLEANING_UP_FOR_EVER.format(more=more, then=then)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.strip() == INTERRUPTED


def test_the_handler_of_ctrl_c_is_put_back_and_an_ignored_one_stays() -> None:
    with ending_on_second_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending_on_second_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
