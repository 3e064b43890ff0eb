"""The output of a command in each style."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from raydet.common.console import WORTH_A_LINE_S, Console
from raydet.common.display.progress import Progress
from tests.common.display.test_progress import Clock
from tests.terminals import shown_after


@dataclass(frozen=True)
class _Result:
    num_images: int = 3

    def lines(self) -> list[str]:
        return [f"{self.num_images} images"]


def _speak(console: Console, clock: Clock) -> None:
    """Print one of everything."""
    console.title("a title")
    console.line("a line")
    with console.progress("scoring", total=3) as progress:
        progress.advance(3)
        clock.now += WORTH_A_LINE_S
    console.record("epoch", {"epoch": 1, "loss": float("nan")}, ["1/3  –"], heading="epoch  loss")
    console.result(_Result(), exit_code=1)


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    _speak(Console(clock=clock), clock)
    lines = ["a title", "a line", "scoring: 3 images in 0:00:03, 1.0 images/s", "epoch  loss", "1/3  –", "3 images"]
    assert capsys.readouterr().out.splitlines() == lines


def test_plain_lines_of_progress_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("scoring", total=100_000, clock=clock)
    with Console("plain", clock=clock)._display() as show:
        for _ in range(8 * 3600):
            clock.now += 1
            progress.advance()
            show(progress.snapshot())
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert lines[0].startswith("scoring: 10/100,000 images (0%), 1.0 images/s, 1 d 3:46:3")
    assert 480 <= len(lines) <= 600  # every ten seconds first, and every minute in the end


def test_json_has_an_object_per_line_and_the_result_last(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console("json", command="predict", clock=clock)
    with console.own_stdout():
        print("a library")
        _speak(console, clock)
    captured = capsys.readouterr()
    objects = [json.loads(line) for line in captured.out.splitlines()]
    assert "a library" in captured.err
    assert {(item["schema_version"], item["command"]) for item in objects} == {(1, "predict")}
    assert [item["type"] for item in objects] == ["message", "message", "progress", "epoch", "result"]
    assert objects[0]["text"] == "a title"
    assert (objects[2]["task"], objects[2]["completed"], objects[2]["total"]) == ("scoring", 3, 3)
    assert objects[3]["loss"] is None
    assert (objects[4]["num_images"], objects[4]["exit_code"]) == (3, 1)


@pytest.mark.parametrize(("style", "num_lines"), [("plain", 1), ("json", 1)])
def test_quiet_prints_the_result_alone(style: Any, num_lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    _speak(Console(style, is_quiet=True, clock=clock), clock)
    assert len(capsys.readouterr().out.splitlines()) == num_lines


def test_failures(capsys: pytest.CaptureFixture[str]) -> None:
    Console().failure(["raydet: error: no such file: a"], 2)
    assert capsys.readouterr() == ("", "raydet: error: no such file: a\n")
    Console("json", command="train").failure(["a traceback", "raydet: error: no such file: a"], 2)
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert captured.err == ""
    assert (content["type"], content["message"], content["exit_code"]) == ("error", "no such file: a", 2)


def test_a_display_within_another_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("json")
    with console.progress("outer") as outer, console.progress("inner") as inner:
        inner.advance()
        outer.advance()
    assert [json.loads(line)["task"] for line in capsys.readouterr().out.splitlines()] == ["outer"]


@contextlib.contextmanager
def _on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """Context manager: stdout and stderr are a terminal of 80 columns; yield what is written to it, after the block."""
    written, (master, slave) = io.BytesIO(), pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        yield written
        screen.flush()
        os.set_blocking(master, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                written.write(os.read(master, 65536))
    os.close(master)
    monkeypatch.undo()


def _drawn(written: io.BytesIO) -> str:
    return written.getvalue().decode()


def test_on_a_terminal_other_output_appears_above_the_bar_which_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, clock = logging.getLogger("tests.console"), Clock()
    with _on_terminal(monkeypatch) as written:
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        console = Console(clock=clock)
        assert console.style == "terminal"
        with console.progress("epoch 3/10", total=4800) as progress:
            progress.advance(1920)
            progress.note(loss=3.2)
            progress.wait_for("waiting for images")
            clock.now += 10
            console.line("a line")
            print("a library")
            logger.warning("a log line")
            print("a warning", file=sys.stderr)
        assert handler.stream is sys.stderr
        logger.removeHandler(handler)
        console.line("the end")
    lines = shown_after(_drawn(written))
    last = "epoch 3/10: 1,920 images in 0:00:10, 192.0 images/s"
    assert lines == ["a line", "a library", "a log line", "a warning", last, "the end", ""]
    assert "\x1b[?25l" not in _drawn(written)  # the cursor is never hidden, so that nothing has to restore it


def test_the_bar_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    progress = Progress("epoch 3/10", total=118_287, clock=clock)
    progress.advance(10)
    progress.snapshot()
    clock.now += 10
    progress.advance(300)
    progress.note(loss=3.2, device_memory_mb=11469.0, note="x" * 100)
    progress.wait_for("waiting for images")
    with _on_terminal(monkeypatch) as written, Console()._display() as show:
        show(progress.snapshot())
    drawn = _drawn(written)
    bar, details, *rest = shown_after(drawn[: drawn.rindex("…") + 1])  # before it is erased
    assert re.fullmatch(r"epoch 3/10 ━+ 310/118,287 images 30.0 images/s 1:05:33 left", bar), bar
    assert details.startswith("  waiting for images · loss 3.200 · GPU memory 11.2 GB · note xx")
    assert details.endswith("…") and max(len(bar), len(details)) <= 80 and not any(rest)


def test_an_interrupt_leaves_a_usable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with _on_terminal(monkeypatch) as written:
        before = (sys.stdout, sys.stderr)
        console = Console()
        with pytest.raises(KeyboardInterrupt), console.progress("scoring", total=3):
            raise KeyboardInterrupt
        assert (sys.stdout, sys.stderr) == before
        console.failure(["interrupted"], 130)
    assert [line for line in shown_after(_drawn(written)) if line] == ["interrupted"]
